"""What a machine, its network and a store can do for a run, found out and told."""
