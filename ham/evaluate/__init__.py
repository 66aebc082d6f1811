"""Bits per byte, lm-eval, needles, recall and the HAM dial."""
