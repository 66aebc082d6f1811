"""Pages of routed keys and values: layout, pool, ragged cache, and growth under a CUDA graph.

A page holds the routed tokens of one sequence in one layer; it never moves, so that kernels can
find it by its byte address. `ham.kernels.decode.layout` says where keys, values and positions
stand on it.
"""
