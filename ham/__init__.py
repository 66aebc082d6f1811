"""Hybrid Associative Memory: layers, benchmark and reproducibility harness.

Importing this package is cheap: it loads neither torch nor Triton, and none of transformers,
lm-eval, datasets or matplotlib. Sub-packages load what they need when they are imported.
"""

__version__ = "0.1.0"
