"""What ``transcnn train`` is made of: building, checkpoints, callbacks, faults, many processes."""
