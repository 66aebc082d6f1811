"""Hybrid Associative Memory: layers, benchmark and reproducibility harness.

Importing this package is cheap: it loads neither torch nor Triton, and none of transformers,
lm-eval, datasets or matplotlib. Sub-packages load what they need when they are imported.

It makes the auto classes of transformers know this project's models, now or whenever they are
imported (`ham.hf.hook`).
"""

from ham.hf.hook import install as _install

__version__ = "0.1.0"

_install()
