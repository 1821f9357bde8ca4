"""Recipes for environments: one file for each algorithm, with `options` and `runner`, which they share."""
