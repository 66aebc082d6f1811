"""The static gate: compiles every kernel as it is launched and compares what comes out.

`ham kernels gate` needs Triton but no GPU. `README.md` beside this file tells what is compared.
"""
