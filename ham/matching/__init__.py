"""Rivals at the parameters, the decoding memory or the training FLOPs of one arm.

`selection` chooses arms and lengths; `bench` builds arms without memory and asks their mixers what
they cost; `search` finds the value of a knob; `budgets` matches one rival to one budget; `written`
makes a configuration of the result.
"""

BUDGETS = ("parameters", "bytes", "flops")
