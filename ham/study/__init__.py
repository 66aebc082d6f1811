"""Studies: small experiments with their own data that decide a default of the project."""
