"""PyTorch's layers that train by Triton kernels on a GPU, or by other operations on a CPU, where those are faster."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dispatch import fits_triton
from ..limits import refuse_fx

__all__ = [
    "KernelPointwise",
    "KernelPointwise3d",
    "is_pointwise",
    "is_pointwise3d",
    "uses_triton",
]

MIN_NUMEL = 2**23  # of a map; below, launching these kernels takes longer than they save


class KernelPointwise(nn.Conv2d):
    """A 1x1 convolution with the bias in the product's epilogue, (B, C, H, W) -> (B, C', H, W)."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        refuse_fx(input)
        x, weight, bias = input, self.weight, self.bias
        supported = torch.is_grad_enabled() and input.ndim == 4 and input.shape[1] == self.in_channels
        if not supported or bias is None or not _pointwise(self):
            return super().forward(input)
        if torch.is_autocast_enabled(input.device.type):
            dtype = torch.get_autocast_dtype(input.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
        if not (x.dtype == weight.dtype and uses_triton(x)):
            return super().forward(input)
        from ..triton.autograd import pointwise

        return pointwise(x, weight, bias)


class KernelPointwise3d(nn.Conv3d):
    """A 1x1x1 convolution that is one product, (B, C, D, H, W) -> (B, C', D, H, W).

    On a CPU and in fp32 PyTorch's takes twice as long in channels-last memory and leaves it: the layers after it slow
    down, too.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, D, H, W) -> (B, C', D, H, W)."""
        refuse_fx(input)
        fits = input.ndim == 5 and input.device.type == "cpu" and not torch.compiler.is_compiling()
        fits = fits and input.is_contiguous(memory_format=torch.channels_last_3d)
        if not (fits and torch.is_grad_enabled() and input.shape[1] == self.in_channels and _pointwise(self)):
            return super().forward(input)
        return F.linear(input.movedim(1, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)


def is_pointwise3d(module: nn.Module) -> bool:
    """Whether :class:`KernelPointwise3d` can take the place of this module."""
    return type(module) is nn.Conv3d and _pointwise(module)


def is_pointwise(module: nn.Module) -> bool:
    """Whether :class:`KernelPointwise` can take the place of this module."""
    return type(module) is nn.Conv2d and _pointwise(module) and module.bias is not None


def _pointwise(conv: nn.modules.conv._ConvNd) -> bool:
    ones, zeros = (1,) * len(conv.kernel_size), (0,) * len(conv.kernel_size)
    return (conv.kernel_size, conv.stride, conv.groups, conv.padding) == (ones, ones, 1, zeros)


def uses_triton(x: Tensor) -> bool:
    """Whether Triton kernels train on this map (B, C, H, W): channels-last, and not too small."""
    return fits_triton(x) and x.numel() >= MIN_NUMEL and x.is_contiguous(memory_format=torch.channels_last)
