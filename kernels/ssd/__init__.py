"""State-space duality, the recurrence of Mamba-2 (Dao and Gu 2024, arXiv 2405.21060)."""
