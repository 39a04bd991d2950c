"""Depthwise convolutions whose weight gradient is fast on a CPU.

Of a depthwise convolution the forward pass and the input gradient are PyTorch's. Its weight gradient on a CPU,
though, takes thirty times as long for 5x5 as for 3x3 kernels. That of a k×k kernel is a mosaic of 3×3 gradients, each
of the map shifted by two: ((k - 1) / 2)² of them cover all k² weights, and neighbours overlap in a row or a column.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..limits import refuse_fx

__all__ = ["KernelDepthwise", "is_depthwise", "is_large_depthwise"]

LARGEST = 9  # beyond, the many 3x3 gradients may take longer than PyTorch's own


class KernelDepthwise(nn.Conv2d):
    """A k×k convolution of each channel by itself, same size out as in, (B, C, H, W) -> (B, C, H, W)."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        refuse_fx(input)
        x, weight, bias = input, self.weight, self.bias
        if not (weight.requires_grad and x.ndim == 4 and x.device.type == "cpu" and _eager() and is_depthwise(self)):
            return super().forward(input)
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            x, weight = x.to(dtype), weight.to(dtype)
        y: Tensor = _Depthwise.apply(x, weight)  # pyright: ignore
        return y if bias is None else y + bias.to(y.dtype)[:, None, None]


def is_depthwise(conv: nn.Conv2d) -> bool:
    """Whether this is a depthwise convolution with an odd kernel that leaves a map's size as it is."""
    size = conv.kernel_size[0]
    shape = (conv.kernel_size, conv.padding, conv.stride, conv.dilation)
    same = shape == ((size, size), (size // 2, size // 2), (1, 1), (1, 1)) and size % 2 == 1
    return same and conv.groups == conv.in_channels == conv.out_channels and conv.padding_mode == "zeros"


def is_large_depthwise(module: nn.Module) -> bool:
    """Whether :class:`KernelDepthwise` takes the place of this module: one where PyTorch's gradient is slower."""
    return type(module) is nn.Conv2d and 3 < module.kernel_size[0] <= LARGEST and is_depthwise(module)


def _eager() -> bool:
    """Whether autograd records as the code runs, and nothing traces, compiles or exports it."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling() and not torch.jit.is_tracing()


class _Depthwise(torch.autograd.Function):
    generate_vmap_rule = True  # for torch.func

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=weight.shape[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # pyright: ignore
        x, weight = ctx.saved_tensors
        of_x = _gradient(grad, x, weight, weight.shape[-1] // 2, of_weight=False) if ctx.needs_input_grad[0] else None
        return of_x, _gradient_of_weight(grad, x, weight) if ctx.needs_input_grad[1] else None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dweight: Tensor | None) -> Tensor:  # pyright: ignore
        x, weight = ctx.saved_tensors
        pairs = [pair for pair in ((dx, weight), (x, dweight)) if pair[0] is not None and pair[1] is not None]
        return torch.stack([_Depthwise.forward(a, b) for a, b in pairs]).sum(0)  # pyright: ignore


def _gradient_of_weight(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    size, (height, width) = weight.shape[-1], grad.shape[-2:]
    x = F.pad(x, (size // 2,) * 4)
    rows = []
    for top in range(0, size - 1, 2):
        row = []
        for left in range(0, size - 1, 2):
            shifted = x[..., top : top + height + 2, left : left + width + 2]
            found = _gradient(grad, shifted, weight[..., :3, :3], 0, of_weight=True)
            row.append(found[..., 1 if left else 0 :])  # without the column that overlaps the one before
        rows.append(torch.cat(row, -1)[..., 1 if top else 0 :, :])
    return torch.cat(rows, -2)


def _gradient(grad: Tensor, x: Tensor, weight: Tensor, padding: int, *, of_weight: bool) -> Tensor:
    """One of a depthwise convolution's two gradients, by PyTorch's kernel."""
    found = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], [padding] * 2, [1, 1], False, [0, 0], weight.shape[0],
        [not of_weight, of_weight, False],
    )  # fmt: skip
    return found[of_weight]
