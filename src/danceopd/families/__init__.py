"""Who is taught: one file per model family, all behind one Protocol."""
