"""Decoding of one token per sequence in few launches: HAM layer, gated delta rule, small pieces.

Nothing here allocates or waits for the device, so all of it can be captured in a CUDA graph.
`layout` has the arithmetic of cache pages and needs no Triton; `launch` has the public functions,
`reference` what they are held to in plain torch, `cost` FLOPs and bytes. README.md explains.
"""
