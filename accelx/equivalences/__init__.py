"""One run in many layouts of ranks, beside the run of one process by torch alone."""
