"""A recipe for a real model tried on a tiny random one of the same pipeline class: no download, no file of its own."""
