"""Runs: recipes, the folder of a run, and many runs side by side. Nothing is imported before it is used."""
