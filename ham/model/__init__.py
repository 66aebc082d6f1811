"""The decoder that all architectures share, the mixer interface, saving, loading, generation."""
