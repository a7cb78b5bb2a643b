"""Training inputs: manifests, generated examples, and one seeded bucket per route."""
