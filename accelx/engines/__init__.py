"""How models of each kind go backward and update: one Engine a file."""
