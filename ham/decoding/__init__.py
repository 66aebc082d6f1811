"""Decoding with fused kernels: a whole step in one CUDA graph, caches that grow beside it.

`stepper.make_stepper` chooses; `graph.GraphDecoder` is the fused one.
"""
