"""The convolutions of the networks: depthwise, whose weight gradient is fast on a CPU, and strided 3x3.

Of a depthwise convolution the forward pass and the input gradient are PyTorch's. Its weight gradient on a CPU,
though, takes thirty times as long for 5x5 as for 3x3 kernels. That of a k×k kernel is a mosaic of 3×3 gradients, each
of the map shifted by two: ((k - 1) / 2)² of them cover all k² weights, and neighbours overlap in a row or a column.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DepthwiseConv2d", "StridedConv2d", "is_depthwise", "strided_conv2d"]


class DepthwiseConv2d(nn.Conv2d):
    """A k×k convolution of each channel by itself, same size out as in, (B, C, H, W) -> (B, C, H, W).

    Args:
        channels: C.
        kernel_size: k, odd.
        device, dtype: As everywhere in PyTorch.
    """

    def __init__(self, channels: int, kernel_size: int, **dd: Any) -> None:
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=False, **dd)

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if not is_depthwise(self):
            return super().forward(input)
        return _depthwise(input, self.weight, self.bias, self.in_channels, self.kernel_size[0])


def is_depthwise(conv: nn.Conv2d) -> bool:
    """Whether this convolution still is what :class:`DepthwiseConv2d` was made as, but for a bias."""
    size = conv.kernel_size[0]
    shape = (conv.kernel_size, conv.padding, conv.stride, conv.dilation)
    same = shape == ((size, size), (size // 2, size // 2), (1, 1), (1, 1)) and size % 2 == 1
    return same and conv.groups == conv.in_channels == conv.out_channels and conv.padding_mode == "zeros"


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, channels: int, size: int) -> Tensor:
    if size > 3 and weight.requires_grad and x.device.type == "cpu" and _eager():
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            x, weight = x.to(dtype), weight.to(dtype)
        y: Tensor = _Depthwise.apply(x, weight)  # pyright: ignore
        return y if bias is None else y + bias.to(y.dtype)[:, None, None]
    return F.conv2d(x, weight, bias, padding=size // 2, groups=channels)


torch.fx.wrap("_depthwise")  # its branches can't be traced


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


class StridedConv2d(nn.Conv2d):
    """A 3x3 convolution that is correct in bfloat16 on narrow maps, too, (B, C, H, W) -> (B, C', ⌈H/s⌉, ⌈W/s⌉)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 2, **dd: Any) -> None:
        super().__init__(in_channels, out_channels, 3, stride=stride, padding=1, **dd)

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ⌈H/s⌉, ⌈W/s⌉)."""
        shape = (self.kernel_size, self.padding, self.dilation, self.groups, self.padding_mode)
        if shape != ((3, 3), (1, 1), (1, 1), 1, "zeros"):
            return super().forward(input)
        return strided_conv2d(input, self.weight, self.bias, self.stride)


def strided_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...]) -> Tensor:
    """A 3x3 convolution with padding 1.

    Where a stride of 2 leaves one column, PyTorch's bfloat16 kernels for CPUs are wrong: from five rows on the output
    is uninitialised memory, often NaN, and so are columns of the weight gradient. Further columns of zeros give a
    second column, which is cut off.
    """
    if stride[1] == 2 and not torch.compiler.is_exporting() and x.shape[-1] <= 2:  # files take any size
        return F.conv2d(F.pad(x, (0, 3 - x.shape[-1])), weight, bias, stride, 1)[..., :1]
    return F.conv2d(x, weight, bias, stride, 1)


torch.fx.wrap("strided_conv2d")  # its branch on the size can't be traced
