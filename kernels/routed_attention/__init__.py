"""Attention over routed tokens only."""
