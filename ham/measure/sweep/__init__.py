"""Decoding, prefill and training of whole models and single mixers over context, batch and share.

One cell is one number with its memory: `grid.py` lists the cells in order of importance, `run.py`
measures what is missing and stores a row for each; `ham sweep run` is the command.

Routing is forced: a hash of layer, sequence and position decides which tokens are kept, so that the
share is known for untrained weights and no cell depends on what a router has learned. Every row
says `routing: forced` or `routing: forced, clustered`.

Positions are frozen: a replay decodes the same position again, which costs what the next one costs
and keeps every shape as it was captured.
"""
