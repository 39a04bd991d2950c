"""An inverted residual in training, with the five layers between its 1x1 convolutions fused into one operation.

Those are BatchNorm, SiLU, a depthwise convolution, BatchNorm and SiLU. One by one they read and write the hidden map,
several times as wide as the block's input, a dozen times each way, and save five copies of it for the backward pass.
Here two are saved, and everything else is recomputed where it is needed, on a CPU by ``cpu/src/bn_silu_dwconv.cpp``,
on a GPU by ``triton/autograd.py``. With z = γ·(x - μ)/σ + β, n positions, S = Σ dz and Q = Σ dz·(x - μ),

    dβ = S,   dγ = Q/σ,   dx = γ/σ·(dz - S/n - (x - μ)·Q/(n·σ²))

HAT-Net has no norms there; ``None`` stands for each of them then.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...blocks import InvertedResidual
from ..cpu import training as cpu
from ..cpu.call import KERNEL_SIZES
from ..dispatch import fits_cpu, globally_hooked, hooked, own_nchw
from ..limits import first_order, refuse_fx
from .depthwise import KernelDepthwise, is_depthwise
from .layers import uses_triton
from .norms import KernelBatchNorm2d, run_fused, track

__all__ = ["KernelInvertedResidual"]


class KernelInvertedResidual(InvertedResidual):
    """:class:`transcnn.blocks.InvertedResidual` that trains with kernels of this package where they fit."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        refuse_fx(x)
        if mask is not None or x.ndim != 4:
            return super().forward(x, mask)
        if not (self.training and torch.is_grad_enabled() and self._matches_pattern()):
            seen = globally_hooked() or any(map(hooked, self.children()))
            return super().forward(x) if seen else run_fused(self._each(), x)
        before, (norm1, act1, conv, norm2, act2) = self._layers()
        e = before(x)
        if uses_triton(e):
            from ..triton.autograd import bn_silu_dwconv

            s = bn_silu_dwconv(e, norm1, conv, norm2)
        elif _fits_training(e):
            s = _bn_silu_dwconv(e, norm1, conv, norm2)
        else:
            s = act1(e if norm1 is None else norm1(e))
            s = act2(conv(s) if norm2 is None else norm2(conv(s)))
        return self.conv3(s)

    def _each(self) -> Iterator[nn.Module]:
        return chain(self.conv1, self.conv2, self.conv3)

    def _layers(self) -> tuple[nn.Sequential, tuple[Any, ...]]:
        """What comes before the five fused layers, and those."""
        if len(self.conv2) == 3:  # TransCNN
            return self.conv1[:1], (*self.conv1[1:], *self.conv2)
        return self.conv1[:2], (None, self.conv1[2], self.conv2[0], None, self.conv2[1])

    def _matches_pattern(self) -> bool:
        """Whether the layers are those that the kernels compute."""
        _, (norm1, act1, conv, norm2, act2) = self._layers()
        matches = all(
            norm is None or (type(norm) in (nn.BatchNorm2d, KernelBatchNorm2d) and norm.training and norm.affine)
            for norm in (norm1, norm2)
        )
        matches = matches and all(type(act) is nn.SiLU for act in (act1, act2))
        matches = matches and type(conv) in (nn.Conv2d, KernelDepthwise) and is_depthwise(conv) and conv.bias is None
        return (
            matches
            and conv.kernel_size[0] in KERNEL_SIZES
            and not (globally_hooked() or any(map(hooked, self.modules())))
        )


def _fits_training(e: Tensor) -> bool:
    batch, channels, height, width = e.shape
    return (
        fits_cpu(e, channels, gemm=False)
        and batch * height * width > 1
        and e.is_contiguous(memory_format=torch.channels_last)
    )


def _bn_silu_dwconv(e: Tensor, norm1: nn.BatchNorm2d | None, conv: nn.Conv2d, norm2: nn.BatchNorm2d | None) -> Tensor:
    weights1, weights2 = ((None, None) if norm is None else (norm.weight, norm.bias) for norm in (norm1, norm2))
    return _BNSiLUDWConv.apply(e, *weights1, conv.weight, *weights2, norm1, norm2)  # pyright: ignore


class _Statistics(NamedTuple):
    """Of a BatchNorm, (C) each, in fp32."""

    mean: Tensor
    inverse: Tensor  # 1/σ
    scale: Tensor  # a BatchNorm is x * scale + shift
    shift: Tensor


class _BNSiLUDWConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, e: Tensor, *arguments: Any) -> Tensor:  # γ₁, β₁, weight, γ₂, β₂, both norms
        weight1, bias1, weight, weight2, bias2, norm1, norm2 = arguments
        x = e.permute(0, 2, 3, 1)
        kernel = weight.detach().float().flatten(1).t().contiguous()  # (k², C)

        sums = None if norm1 is None else cpu.channel_sums(x)
        first = _statistics(norm1, weight1, bias1, sums, x)
        m, found = cpu.bn_silu_dwconv_forward(x, (first.scale, first.shift), kernel, activate=norm2 is None)
        second = _statistics(norm2, weight2, bias2, found, x)
        s = found if norm2 is None else cpu.bn_silu(m, (second.scale, second.shift))
        ctx.save_for_backward(x, m, kernel, *first, *second)
        ctx.dtypes = [None if argument is None else argument.dtype for argument in arguments[:5]]
        return own_nchw(s)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, m, kernel, *rest = ctx.saved_tensors
        first, second = _Statistics(*rest[:4]), _Statistics(*rest[4:])
        channels, positions, size = x.shape[3], x.shape[:3].numel(), round(len(kernel) ** 0.5)
        ds = grads[0].permute(0, 2, 3, 1).to(x.dtype).contiguous()

        factors, weight2, bias2 = (second.scale, second.shift, second.shift), None, None  # 1, 0, 0 without a norm
        if ctx.dtypes[3] is not None:
            sums = cpu.bn_silu_backward_sums(m, ds, (second.scale, second.shift, second.mean))
            factors, weight2, bias2 = _norm_backward(second, sums, positions)
        norm1, norm2 = (first.scale, first.shift, first.mean), (second.scale, second.shift, *factors)
        dx, dkernel, sums = cpu.bn_silu_dwconv_backward(m, ds, norm2, x, norm1, kernel.flip(0).contiguous())
        weight1, bias1 = None, None
        if ctx.dtypes[0] is not None:
            factors, weight1, bias1 = _norm_backward(first, sums, positions)
            cpu.bn_backward(dx, x, factors)
        weight = dkernel.sum(0).t().reshape(channels, 1, size, size)
        found = (weight1, bias1, weight, weight2, bias2)
        found = [None if grad is None else grad.to(dtype) for grad, dtype in zip(found, ctx.dtypes, strict=True)]
        return dx.permute(0, 3, 1, 2), *found, None, None


def _statistics(
    norm: nn.BatchNorm2d | None, weight: Tensor, bias: Tensor, sums: Tensor | None, x: Tensor
) -> _Statistics:
    """BatchNorm's statistics from sums of x and of its square; updates its running statistics."""
    if norm is None or sums is None:
        zero = x.new_zeros(x.shape[3], dtype=torch.float32)
        return _Statistics(zero, zero + 1, zero + 1, zero)
    positions = x.shape[:3].numel()
    mean, square = sums.sum(0) / positions
    variance = (square - mean**2).clamp_min(0)
    track(norm, mean, variance, positions)
    inverse = (variance + norm.eps).rsqrt()
    scale = weight.detach().double() * inverse
    return _Statistics(*(t.float() for t in (mean, inverse, scale, bias.detach().double() - mean * scale)))


def _norm_backward(norm: _Statistics, sums: Tensor, positions: int) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """The factors of dx = a·dz + b·x + c, and the gradients of γ and β."""
    of_sum, of_products = sums.sum(0)
    mean, inverse, scale, _ = (t.double() for t in norm)
    by_x = -scale * inverse**2 * of_products / positions
    rest = -scale * of_sum / positions - by_x * mean
    return (norm.scale, by_x.float(), rest.float()), of_products * inverse, of_sum
