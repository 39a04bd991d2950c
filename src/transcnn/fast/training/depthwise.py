"""Depthwise convolutions whose gradients are fast on a CPU, of sequences, images and volumes.

Of a depthwise convolution the forward pass is PyTorch's. PyTorch's gradients take far longer: up to 30 times the
forward pass for the input's, and for the weight's 30 times as long for 5x5 as for 3x3 kernels. But

- the input's gradient is the same convolution of the output's gradient, with the kernel turned round;
- the weight's gradient is a mosaic of gradients of kernels three wide, each of the map shifted, and that of a kernel
  with depth is one 2-D gradient for each of its planes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...attention import CONVS
from ..dispatch import HALF_DTYPES, autocast_dtype, onednn_has_bf16
from ..limits import refuse_fx

__all__ = [
    "DepthwiseNd",
    "KernelDepthwise",
    "KernelDepthwise1d",
    "KernelDepthwise3d",
    "gains_depthwise",
    "is_depthwise",
]

LARGEST = 9  # beyond, the many gradients of a mosaic may take longer than PyTorch's own


class DepthwiseNd(nn.modules.conv._ConvNd):
    """Convolves each channel by itself, same size out as in, (B, C, *S) -> (B, C, *S)."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, *S) -> (B, C, *S)."""
        refuse_fx(input)
        x, weight, bias = input, self.weight, self.bias
        fits = weight.requires_grad and x.ndim == weight.ndim and x.device.type == "cpu" and _eager()
        if not (fits and is_depthwise(self)):
            return super().forward(input)
        dtype = autocast_dtype(x, weight)
        if dtype is not None:
            x, weight = x.to(dtype), weight.to(dtype)
        y: Tensor = _Convolve.apply(x, weight)  # pyright: ignore
        return y if bias is None else y + bias.to(y.dtype).view(-1, *(1,) * (y.ndim - 2))


class KernelDepthwise1d(DepthwiseNd, nn.Conv1d):
    """Convolves each channel by itself, (B, C, L) -> (B, C, L)."""


class KernelDepthwise(DepthwiseNd, nn.Conv2d):
    """Convolves each channel by itself, (B, C, H, W) -> (B, C, H, W)."""


class KernelDepthwise3d(DepthwiseNd, nn.Conv3d):
    """Convolves each channel by itself, (B, C, D, H, W) -> (B, C, D, H, W)."""


def is_depthwise(conv: nn.modules.conv._ConvNd) -> bool:
    """Whether this is a depthwise convolution with an odd kernel that leaves a map's size as it is."""
    size, ndim = conv.kernel_size[0], len(conv.kernel_size)
    shape = (conv.kernel_size, conv.padding, conv.stride, conv.dilation)
    same = shape == ((size,) * ndim, (size // 2,) * ndim, (1,) * ndim, (1,) * ndim) and size % 2 == 1
    return same and conv.groups == conv.in_channels == conv.out_channels and conv.padding_mode == "zeros"


def gains_depthwise(module: nn.Module) -> bool:
    """Whether one of these classes takes the place of this module: one where PyTorch's gradients are slower."""
    if type(module) not in CONVS.values() or not is_depthwise(module):  # pyright: ignore
        return False
    return (1 if type(module) is nn.Conv3d else 3) < module.kernel_size[0] <= LARGEST  # pyright: ignore


def _eager() -> bool:
    """Whether autograd records as the code runs, and nothing traces, compiles or exports it."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling() and not torch.jit.is_tracing()


class _Convolve(torch.autograd.Function):
    generate_vmap_rule = True  # for torch.func

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        # Not F.conv2d, which autocast would have round a gradient where it is on in the backward pass alone.
        ones, zeros, halo = ([n] * (x.ndim - 2) for n in (1, 0, weight.shape[-1] // 2))
        return torch.convolution(x, weight, None, ones, halo, ones, False, zeros, weight.shape[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # pyright: ignore
        x, weight = ctx.saved_tensors
        turned = weight.flip(*range(2, weight.ndim))
        of_x = _Convolve.forward(grad, turned) if ctx.needs_input_grad[0] else None
        return of_x, _gradient_of_weight(grad, x, weight) if ctx.needs_input_grad[1] else None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dweight: Tensor | None) -> Tensor:  # pyright: ignore
        x, weight = ctx.saved_tensors
        pairs = [pair for pair in ((dx, weight), (x, dweight)) if pair[0] is not None and pair[1] is not None]
        return torch.stack([_Convolve.forward(a, b) for a, b in pairs]).sum(0)  # pyright: ignore


def _gradient_of_weight(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    size, around = weight.shape[-1], weight.shape[-1] // 2
    padded = F.pad(x, (around,) * 2 * (x.ndim - 2))
    if x.ndim < 5:
        return _mosaic(grad, padded, weight)
    # Without oneDNN each map's gradient is rounded before it is added to the others', and planes make many maps.
    if x.dtype in HALF_DTYPES and not (x.dtype == torch.bfloat16 and onednn_has_bf16()):
        return _gradient_of_weight(grad.float(), x.float(), weight.float()).to(weight.dtype)
    # Items' planes in one row of maps: each is as many planes of zeros longer than the gradient as padding has.
    grad = F.pad(grad, (0, 0, 0, 0, 0, size - 1))
    grad, x = (_planes(y) for y in (grad, padded))  # (B·(D + size - 1), C, H, W)
    count = len(x) - (size - 1)
    planes = [_mosaic(grad[:count], x[top : top + count], weight[:, :, top]) for top in range(size)]
    return torch.stack(planes, 2)


def _planes(x: Tensor) -> Tensor:
    """(B, C, D, H, W) -> (B·D, C, H, W), channels-last, for which PyTorch's gradient is fastest."""
    x = x.permute(0, 2, 3, 4, 1).contiguous()
    return x.view(-1, *x.shape[2:]).movedim(-1, 1)


def _mosaic(grad: Tensor, x: Tensor, weight: Tensor, axis: int = 2) -> Tensor:
    """The gradient, from ``axis`` on of kernels three wide, of one dimension or two; ``x`` is padded."""
    if axis == x.ndim:
        return _gradient_of_three(grad, x, weight)
    size, end, pieces = weight.shape[axis], 0, []
    for start in (*range(0, size - 3, 3), size - 3):
        shifted, part = x.narrow(axis, start, grad.shape[axis] + 2), weight.narrow(axis, start, 3)
        piece = _mosaic(grad, shifted, part, axis + 1)
        pieces.append(piece.narrow(axis, end - start, start + 3 - end))  # without what overlaps the one before
        end = start + 3
    return torch.cat(pieces, axis)


def _gradient_of_three(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """That of PyTorch, of a kernel three wide without padding."""
    ones, zeros = [1] * (x.ndim - 2), [0] * (x.ndim - 2)
    found = torch.ops.aten.convolution_backward(
        grad, x, weight, None, ones, zeros, ones, False, zeros, weight.shape[0], [False, True, False]
    )
    return found[1]
