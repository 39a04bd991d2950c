"""PyTorch's convolutions that train by Triton kernels on a GPU, by C++ kernels or other operations on a CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cpu.training import pointwise_gradient
from ..dispatch import autocast_dtype, eager_cpu, fits_cpu, fits_triton
from ..limits import first_order, refuse_fx

__all__ = [
    "KernelPointwise",
    "KernelPointwise3d",
    "KernelStridedPointwise",
    "is_pointwise",
    "is_pointwise3d",
    "is_strided_pointwise",
    "uses_triton",
]

FEW_CHANNELS = 16  # oneDNN computes as many at a time
MIN_NUMBERS = 2**21  # of both maps of a 1x1 convolution in bf16 on a CPU; below, PyTorch's gradient takes less time
MIN_NUMEL = 2**23  # of a map; below, launching these kernels takes longer than they save


class KernelPointwise(nn.Conv2d):
    """A 1x1 convolution, (B, C, H, W) -> (B, C', H, W).

    On a GPU the bias is added in the product's epilogue. On a CPU the weight's gradient is a kernel's, with which a
    network's step takes 3 to 10 % less time in fp32, and 3 % less in bf16, but there only for large maps.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        refuse_fx(input)
        x, weight, bias = input, self.weight, self.bias
        supported = torch.is_grad_enabled() and input.ndim == 4 and input.shape[1] == self.in_channels
        if not supported or not _pointwise(self):
            return super().forward(input)
        lower = autocast_dtype(x, weight)
        dtype = weight.dtype if lower is None else lower
        if (lower is None and x.dtype != dtype) or (bias is not None and bias.dtype != weight.dtype):
            return super().forward(input)
        if bias is not None and uses_triton(x):
            from ..triton.autograd import pointwise

            return pointwise(x.to(dtype), weight.to(dtype), bias.to(dtype))
        if weight.requires_grad and self._gains(x, dtype):
            x = x.to(dtype)
            fits = fits_cpu(x, self.in_channels, self.out_channels, gemm=False)
            if fits and x.is_contiguous(memory_format=torch.channels_last):
                return _Pointwise.apply(x, weight, bias)  # pyright: ignore
        return super().forward(x)

    def _gains(self, x: Tensor, dtype: torch.dtype) -> bool:
        """Whether the kernel takes less time than PyTorch on a CPU; of what is exported, no size is looked at."""
        numbers = x.numel() // self.in_channels * (self.in_channels + self.out_channels)
        return eager_cpu(x) and (dtype == torch.float32 or numbers >= MIN_NUMBERS)


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        lower = weight.detach().to(x.dtype)
        ctx.save_for_backward(x, lower)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return F.conv2d(x, lower, None if bias is None else bias.detach().to(x.dtype))

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        (x, weight), (dtype, of_bias) = ctx.saved_tensors, ctx.dtypes
        grad = grads[0].to(x.dtype).contiguous(memory_format=torch.channels_last)
        dx = None
        if ctx.needs_input_grad[0]:
            options = None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, False, False]
            dx = torch.ops.aten.convolution_backward(grad, x, weight, *options)[0]
        rows = (t.permute(0, 2, 3, 1).flatten(0, 2) for t in (x, grad))
        dweight, dbias = pointwise_gradient(*rows, bias=of_bias is not None)
        dweight = dweight.to(dtype).view(weight.shape)
        if weight.is_contiguous(memory_format=torch.channels_last):  # the same memory, for the sides are 1
            dweight = dweight.as_strided(weight.shape, weight.stride())  # DDP copies gradients with other strides
        return dx, dweight, None if dbias is None else dbias.to(of_bias)


class KernelStridedPointwise(nn.Conv2d):
    """A 1x1 convolution of few channels with a stride, as of images in RepVGG, (B, C, H, W) -> (B, C', H', W').

    On a CPU it convolves the positions that it keeps, taken beforehand. PyTorch's own gradient of its weight, in
    channels-last memory, writes past the end of an array (oneDNN issue 6035): the process crashes, at best.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        refuse_fx(input)
        if input.device.type != "cpu":
            return super().forward(input)
        down, right = self.stride
        return F.conv2d(input[..., ::down, ::right], self.weight, self.bias)


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
    return type(module) is nn.Conv2d and _pointwise(module)


def is_strided_pointwise(module: nn.Module) -> bool:
    """Whether :class:`KernelStridedPointwise` takes the place of this module."""
    if type(module) is not nn.Conv2d or module.in_channels >= FEW_CHANNELS:
        return False
    unpadded = module.padding in ((0, 0), "valid")
    return module.kernel_size == (1, 1) and module.stride != (1, 1) and module.groups == 1 and unpadded


def _pointwise(conv: nn.modules.conv._ConvNd) -> bool:
    ones, zeros = (1,) * len(conv.kernel_size), (0,) * len(conv.kernel_size)
    return (conv.kernel_size, conv.stride, conv.groups, conv.padding) == (ones, ones, 1, zeros)


def uses_triton(x: Tensor) -> bool:
    """Whether Triton kernels train on this map (B, C, H, W): channels-last, and not too small."""
    return fits_triton(x) and x.numel() >= MIN_NUMEL and x.is_contiguous(memory_format=torch.channels_last)
