"""Triton kernels for GPUs. Nothing imports them where Triton isn't installed (:mod:`..dispatch`)."""
