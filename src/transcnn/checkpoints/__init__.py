"""Weights: the published layouts, what our files say of themselves, loading, the hub."""
