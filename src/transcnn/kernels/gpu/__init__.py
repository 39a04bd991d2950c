"""Kernels in Triton for GPUs, which only :mod:`.runs` and :mod:`.graphs` can do without."""
