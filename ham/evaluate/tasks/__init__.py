"""The lm-eval tasks of this project."""
