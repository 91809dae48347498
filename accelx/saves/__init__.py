"""How a state is saved and restored: the format, who writes and who reads what."""
