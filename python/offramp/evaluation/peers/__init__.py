"""What people use instead of the core, at its best: the rows that stand beside ours in every benchmark."""
