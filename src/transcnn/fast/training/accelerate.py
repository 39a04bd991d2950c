"""Replaces layers of a network by those that train faster."""

from __future__ import annotations

from torch import nn

from ...attention import HMHSA, LocalStep
from ...blocks import InvertedResidual
from .attention import KernelHMHSA
from .layers import KernelBatchNorm2d, KernelPointwise, is_pointwise
from .local import KernelLocalStep
from .residual import KernelInvertedResidual

__all__ = ["accelerate_training"]


def accelerate_training(model: nn.Module) -> nn.Module:
    """Let ``model`` train with kernels of this package where those are faster, in place; returns the model.

    On a CPU those are local and global attention and, fused, BatchNorm, SiLU and depthwise convolution of every
    inverted residual; on a GPU the attention inside grids and, for large maps, the same fused layers, BatchNorm, 1x1
    convolutions with a bias and the merging of tokens. Maps must be channels-last
    (``model.to(memory_format=torch.channels_last)``, and the images as well). Parameters, state dict and, up to
    rounding, outputs and gradients stay the same.
    """
    for module in model.modules():
        if type(module) is LocalStep:
            module.__class__ = KernelLocalStep
        elif type(module) is HMHSA:
            module.__class__ = KernelHMHSA
        elif type(module) is InvertedResidual:
            module.__class__ = KernelInvertedResidual
        elif type(module) is nn.BatchNorm2d:
            module.__class__ = KernelBatchNorm2d
        elif is_pointwise(module):
            module.__class__ = KernelPointwise
    return model
