"""Pages and plots, made from a run folder's files alone."""
