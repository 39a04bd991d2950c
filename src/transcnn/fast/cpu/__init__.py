"""C++ kernels for CPUs: how they are compiled (:mod:`.build`) and called; sources in ``src``."""
