"""What :mod:`transcnn.fast` is made of: layers that run on channels-last tokens, and a kernel for GPUs."""
