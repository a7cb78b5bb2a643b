"""How well a model does what it is asked: scores with intervals, from fresh scenes and the same noise for all."""
