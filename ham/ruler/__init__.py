"""RULER's retrieval tasks, built from token numbers; see README.md for what is as published."""
