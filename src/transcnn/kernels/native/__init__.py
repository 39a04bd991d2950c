"""Kernels of our own for processors, in C++; :mod:`transcnn.kernels.native.build` compiles them where they are run."""
