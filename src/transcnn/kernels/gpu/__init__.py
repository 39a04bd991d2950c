"""Kernels in Triton for GPUs; modules of this room but :mod:`.runs` can be imported only where Triton is installed."""
