"""Decoding one token of a HAM layer: page layout and kernels."""
