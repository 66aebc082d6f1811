"""Two runs compared: what made them, then their rows (`ham diff`)."""
