"""The kernels for GPUs as operations that autograd knows; all take and give channels-last maps (B, C, H, W)."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..tokens import to_map, to_tokens
from . import norms
from .pool import average, share

__all__ = ["batch_norm", "merge", "middle", "pointwise"]


def middle(e: Tensor, norm1: nn.BatchNorm2d | None, conv: nn.Conv2d, norm2: nn.BatchNorm2d | None) -> Tensor:
    """Norm, SiLU, depthwise convolution, norm and SiLU of an inverted residual as one; HAT-Net has no norms there.

    Two maps are kept for the backward pass, the input and what the convolution gave; the rest is made again.
    """
    weights1, weights2 = ((None, None) if norm is None else (norm.weight, norm.bias) for norm in (norm1, norm2))
    return _Middle.apply(e, *weights1, conv.weight, *weights2, norm1, norm2)  # pyright: ignore


def batch_norm(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """What ``norm`` makes of a map in training."""
    return _BatchNorm.apply(x, norm.weight, norm.bias, norm)  # pyright: ignore


def pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 1x1 convolution, (B, C, H, W), (C', C, 1, 1) and (C') -> (B, C', H, W)."""
    return _Pointwise.apply(x, weight, bias)  # pyright: ignore


def merge(x: Tensor, ratio: int) -> Tensor:
    """:func:`transcnn.attention.merge`, (B, C, H, W) -> (B, C, ⌈H/r⌉, ⌈W/r⌉)."""
    return _Merge.apply(x, ratio)  # pyright: ignore


class _Middle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, e: Tensor, *arguments: Any) -> Tensor:  # γ₁, β₁, weight, γ₂, β₂, the norms themselves
        weight1, bias1, weight, weight2, bias2, norm1, norm2 = arguments
        x = to_tokens(e)
        numbers1 = _nothing(x) if norm1 is None else norms.moments(x, norm1)
        m = _convolve(norms.activate(x, *numbers1[2:], silu=True), weight.to(x.dtype))
        numbers2 = _nothing(x) if norm2 is None else norms.moments(m, norm2)
        ctx.save_for_backward(x, m, numbers1, numbers2, weight1, bias1, weight, weight2, bias2)
        return to_map(norms.activate(m, *numbers2[2:], silu=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, m, numbers1, numbers2, weight1, bias1, weight, weight2, bias2 = ctx.saved_tensors
        positions = x.numel() // x.shape[3]
        ds = to_tokens(grads[0].to(x.dtype))
        abc = of_weight1 = of_bias1 = of_weight2 = of_bias2 = None
        if weight2 is not None:
            partial = norms.slopes(m, ds, numbers2, silu=True)
            abc, of_weight2, of_bias2 = norms.factors(numbers2, positions, partial, weight2, bias2)
        dm = norms.through(m, ds, numbers2, abc, silu=True)
        z = norms.activate(x, *numbers1[2:], silu=True)
        of_weight = _of_taps(dm, z, weight)
        dz = _convolve(dm, weight.to(x.dtype).flip(2, 3))
        dx, partial = norms.gate(x, dz, numbers1)
        if weight1 is not None:
            abc, of_weight1, of_bias1 = norms.factors(numbers1, positions, partial, weight1, bias1)
            dx = norms.through(x, dx, numbers1, abc, silu=False, out=dx)
        return to_map(dx), of_weight1, of_bias1, of_weight, of_weight2, of_bias2, None, None


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: nn.BatchNorm2d) -> Tensor:
        x = to_tokens(x)
        numbers = norms.moments(x, norm)
        ctx.save_for_backward(x, numbers, weight, bias)
        return to_map(norms.activate(x, *numbers[2:], silu=False))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, numbers, weight, bias = ctx.saved_tensors
        grad = to_tokens(grads[0].to(x.dtype))
        partial = norms.slopes(x, grad, numbers, silu=False)
        abc, of_weight, of_bias = norms.factors(numbers, x.numel() // x.shape[3], partial, weight, bias)
        return to_map(norms.through(x, grad, numbers, abc, silu=False)), of_weight, of_bias, None


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = to_tokens(x)
        ctx.save_for_backward(x, weight)
        return to_map(F.linear(x, weight.flatten(1), bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, weight = ctx.saved_tensors
        grad = to_tokens(grads[0].to(x.dtype))
        of_weight = (grad.flatten(0, 2).t() @ x.flatten(0, 2)).view_as(weight)
        return to_map(grad @ weight.flatten(1)), of_weight, norms.sum_rows(grad).to(weight.dtype)


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ratio: int) -> Tensor:
        ctx.sizes = (ratio, *x.shape[2:])
        return to_map(average(to_tokens(x), ratio))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        return to_map(share(to_tokens(grads[0]), *ctx.sizes)), None


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    """A depthwise convolution, (B, H, W, C) -> (B, H, W, C); its own backward pass is one with the turned weights."""
    return to_tokens(F.conv2d(to_map(x), weight, padding=weight.shape[2] // 2, groups=len(weight)))


def _of_taps(grad: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """The gradient of a depthwise convolution's weights, by PyTorch's own kernel."""
    reach = weight.shape[2] // 2
    _, found, _ = torch.ops.aten.convolution_backward(
        to_map(grad), to_map(z), weight.to(z.dtype), None, [1, 1], [reach, reach], [1, 1], False, [0, 0], len(weight),
        [False, True, False],
    )  # fmt: skip
    return found.to(weight.dtype)


def _nothing(x: Tensor) -> Tensor:
    """The numbers of a norm that changes nothing, (4, C)."""
    return _unchanged(x.shape[3], x.device)


@functools.lru_cache(maxsize=64)
def _unchanged(channels: int, device: torch.device) -> Tensor:
    return torch.tensor([0.0, 1.0, 1.0, 0.0], device=device)[:, None].expand(4, channels).contiguous()
