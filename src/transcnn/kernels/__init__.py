"""What :mod:`transcnn.fast` is made of: layers on channels-last tokens, kernels for processors and for GPUs."""
