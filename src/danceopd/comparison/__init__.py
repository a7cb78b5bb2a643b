"""A fair comparison: suites of recipes, cached runs, one evaluation for all, paired statistics."""
