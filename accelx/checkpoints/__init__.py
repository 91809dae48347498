"""What `python -m accelx.checkpoint` lists, shows, compares, checks and removes."""
