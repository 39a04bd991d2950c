"""Vectors of images: kept in files, and compared."""
