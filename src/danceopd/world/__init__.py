"""The embedded Shapes world: scenes, renderer, tasks, verifiers, the small network and its sources."""
