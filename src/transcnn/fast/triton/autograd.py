"""The Triton kernels as autograd functions on channels-last maps (B, C, H, W)."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dispatch import own_nchw, to_nchw, to_nhwc
from ..limits import first_order
from . import norms
from .pool import average_pool, average_pool_backward

__all__ = ["batch_norm", "bn_silu_dwconv", "merge", "pointwise"]


def bn_silu_dwconv(e: Tensor, norm1: nn.BatchNorm2d | None, conv: nn.Conv2d, norm2: nn.BatchNorm2d | None) -> Tensor:
    """BatchNorm, SiLU, depthwise convolution, BatchNorm and SiLU of an inverted residual; HAT-Net has no norms there.

    Two maps are saved for the backward pass, the input and the convolution's output; the rest is recomputed.
    """
    weights1, weights2 = ((None, None) if norm is None else (norm.weight, norm.bias) for norm in (norm1, norm2))
    return _BNSiLUDWConv.apply(e, *weights1, conv.weight, *weights2, norm1, norm2)  # pyright: ignore


def batch_norm(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """``norm`` of a map in training."""
    return _BatchNorm.apply(x, norm.weight, norm.bias, norm)  # pyright: ignore


def pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 1x1 convolution, (B, C, H, W), (C', C, 1, 1) and (C') -> (B, C', H, W)."""
    return _Pointwise.apply(x, weight, bias)  # pyright: ignore


def merge(x: Tensor, ratio: int) -> Tensor:
    """:func:`transcnn.attention.merge`, (B, C, H, W) -> (B, C, ⌈H/r⌉, ⌈W/r⌉)."""
    return _Merge.apply(x, ratio)  # pyright: ignore


class _BNSiLUDWConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, e: Tensor, *arguments: Any) -> Tensor:  # γ₁, β₁, weight, γ₂, β₂, both norms
        weight1, bias1, weight, weight2, bias2, norm1, norm2 = arguments
        x = to_nhwc(e)
        statistics1 = _identity(x) if norm1 is None else norms.batch_statistics(x, norm1)
        m = _convolve(norms.affine_silu(x, *statistics1[2:], silu=True), weight.to(x.dtype))
        statistics2 = _identity(x) if norm2 is None else norms.batch_statistics(m, norm2)
        ctx.save_for_backward(x, m, statistics1, statistics2, weight1, bias1, weight, weight2, bias2)
        return own_nchw(norms.affine_silu(m, *statistics2[2:], silu=True))

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, m, statistics1, statistics2, weight1, bias1, weight, weight2, bias2 = ctx.saved_tensors
        positions = x.numel() // x.shape[3]
        ds = to_nhwc(grads[0].to(x.dtype))
        factors = of_weight1 = of_bias1 = of_weight2 = of_bias2 = None
        if weight2 is not None:
            partial = norms.backward_sums(m, ds, statistics2, silu=True)
            factors, of_weight2, of_bias2 = norms.bn_factors(statistics2, positions, partial, weight2, bias2)
        dm = norms.norm_backward(m, ds, statistics2, factors, silu=True)
        z = norms.affine_silu(x, *statistics1[2:], silu=True)
        of_weight = _weight_gradient(dm, z, weight)
        dz = _convolve(dm, weight.to(x.dtype).flip(2, 3))
        dx, partial = norms.silu_backward(x, dz, statistics1)
        if weight1 is not None:
            factors, of_weight1, of_bias1 = norms.bn_factors(statistics1, positions, partial, weight1, bias1)
            dx = norms.norm_backward(x, dx, statistics1, factors, silu=False, out=dx)
        return to_nchw(dx), of_weight1, of_bias1, of_weight, of_weight2, of_bias2, None, None


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: nn.BatchNorm2d) -> Tensor:
        x = to_nhwc(x)
        statistics = norms.batch_statistics(x, norm)
        ctx.save_for_backward(x, statistics, weight, bias)
        return own_nchw(norms.affine_silu(x, *statistics[2:], silu=False))

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, statistics, weight, bias = ctx.saved_tensors
        grad = to_nhwc(grads[0].to(x.dtype))
        partial = norms.backward_sums(x, grad, statistics, silu=False)
        factors, of_weight, of_bias = norms.bn_factors(statistics, x.numel() // x.shape[3], partial, weight, bias)
        return to_nchw(norms.norm_backward(x, grad, statistics, factors, silu=False)), of_weight, of_bias, None


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = to_nhwc(x)
        ctx.save_for_backward(x, weight)
        return own_nchw(F.linear(x, weight.flatten(1), bias))

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, weight = ctx.saved_tensors
        grad = to_nhwc(grads[0].to(x.dtype))
        of_weight = (grad.flatten(0, 2).t() @ x.flatten(0, 2)).view_as(weight)
        return to_nchw(grad @ weight.flatten(1)), of_weight, norms.sum_rows(grad).to(weight.dtype)


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ratio: int) -> Tensor:
        ctx.sizes = (ratio, *x.shape[2:])
        return own_nchw(average_pool(to_nhwc(x), ratio))

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        return to_nchw(average_pool_backward(to_nhwc(grads[0]), *ctx.sizes)), None


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    """A depthwise convolution, (B, H, W, C) -> (B, H, W, C); its backward pass is one with the flipped weights."""
    return to_nhwc(F.conv2d(to_nchw(x), weight, padding=weight.shape[2] // 2, groups=len(weight)))


def _weight_gradient(grad: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """The gradient of a depthwise convolution's weights, by PyTorch's own kernel."""
    reach = weight.shape[2] // 2
    _, found, _ = torch.ops.aten.convolution_backward(
        to_nchw(grad), to_nchw(z), weight.to(z.dtype), None, [1, 1], [reach, reach], [1, 1], False, [0, 0], len(weight),
        [False, True, False],
    )  # fmt: skip
    return found.to(weight.dtype)


def _identity(x: Tensor) -> Tensor:
    """The statistics of a norm that is the identity, (4, C)."""
    return _identity_statistics(x.shape[3], x.device)


@functools.lru_cache(maxsize=64)
def _identity_statistics(channels: int, device: torch.device) -> Tensor:
    return torch.tensor([0.0, 1.0, 1.0, 0.0], device=device)[:, None].expand(4, channels).contiguous()
