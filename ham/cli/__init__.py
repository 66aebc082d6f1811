"""The `ham` command: one module per sub-command."""
