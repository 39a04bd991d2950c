"""Samplers, loaders and Lightning's data module."""
