"""What a reader of the papers need never open: data, checkpoints, processes, fast forms."""
