"""The same function, faster: copies for inference, layers for training, CUDA graphs.

:mod:`.dispatch` decides which implementation runs: PyTorch's operations, C++ kernels on CPUs (:mod:`.cpu`), Triton
kernels on GPUs (:mod:`.triton`).
"""

from .cuda_graphs import record_training
from .inference.folding import fold_batchnorms
from .inference.optimize import optimize
from .training.accelerate import accelerate_training, plain

__all__ = ["accelerate_training", "fold_batchnorms", "optimize", "plain", "record_training"]
