"""Weights on disk: read without running anything, under our names or the published ones."""
