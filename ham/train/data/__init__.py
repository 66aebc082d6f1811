"""The public-domain corpus that ships with the project."""
