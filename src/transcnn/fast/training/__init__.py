"""Layers that train with kernels of this package, with the parameters of those that they replace."""
