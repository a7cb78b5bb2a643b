"""How it teaches: route, query, roll out, match."""
