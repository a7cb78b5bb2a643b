"""What teaches: frozen velocity fields over one shared state space."""
