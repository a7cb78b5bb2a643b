"""The loop around an update: optimiser, EMA, checkpoints, tracking."""
