"""What is read, in which order, and how it is cut into batches."""
