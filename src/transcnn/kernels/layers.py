"""Layers of PyTorch that train with kernels of our own on a GPU; anywhere else they are what they were."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .gpu.runs import fits

__all__ = ["KernelBatchNorm2d", "KernelPointwise", "is_pointwise", "worthwhile"]

LEAST = 2**23  # numbers in a map; with fewer, starting these kernels takes longer than they save


class KernelBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose statistics and gradients take one pass over the map each, (B, C, H, W) -> (B, C, H, W)."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        usual = self.training and self.affine and self.momentum is not None and torch.is_grad_enabled()
        if not (usual and input.ndim == 4 and input.shape[1] == self.num_features and worthwhile(input)):
            return super().forward(input)
        from .gpu.training import batch_norm

        return batch_norm(input, self)


class KernelPointwise(nn.Conv2d):
    """A 1x1 convolution whose bias is added inside the product, (B, C, H, W) -> (B, C', H, W)."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        x, weight, bias = input, self.weight, self.bias
        usual = torch.is_grad_enabled() and input.ndim == 4 and input.shape[1] == self.in_channels
        if not usual or bias is None or not _pointwise(self):
            return super().forward(input)
        if torch.is_autocast_enabled(input.device.type):
            dtype = torch.get_autocast_dtype(input.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
        if not (x.dtype == weight.dtype and worthwhile(x)):
            return super().forward(input)
        from .gpu.training import pointwise

        return pointwise(x, weight, bias)


def is_pointwise(module: nn.Module) -> bool:
    """Whether :class:`KernelPointwise` can take the place of this module."""
    return type(module) is nn.Conv2d and _pointwise(module) and module.bias is not None


def _pointwise(conv: nn.Conv2d) -> bool:
    return (conv.kernel_size, conv.stride, conv.groups, conv.padding) == ((1, 1), (1, 1), 1, (0, 0))


def worthwhile(x: Tensor) -> bool:
    """Whether this map (B, C, H, W) is one that the kernels for GPUs train with: channels-last, and not too small."""
    return fits(x) and x.numel() >= LEAST and x.is_contiguous(memory_format=torch.channels_last)
