"""Datasets of the tasks: the splits of what a user named, and their samples."""
