"""The attention of both steps of H-MHSA in training, by C++ kernels: neither keeps its scores.

The forward pass saves Q, K and V; the backward pass recomputes scores and softmax, a head and 64 queries at a time,
in a core's cache (``cpu/src/attention_training.cpp``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...attention import HMHSA, HMHSA1d, HMHSA3d
from ...grids import Size, channels_first, channels_last
from ..cpu import training as cpu
from ..cpu.call import MAX_HEAD_DIM
from ..dispatch import fits_cpu
from ..limits import first_order, refuse_fx
from .layers import uses_triton

__all__ = ["KernelHMHSA", "KernelHMHSA1d", "KernelHMHSA3d", "fits_training", "grid_attention"]


def fits_training(x: Tensor, head_dim: int) -> bool:
    """Whether the C++ kernels train on tokens like these, (..., C)."""
    return torch.is_grad_enabled() and x.is_contiguous() and head_dim <= MAX_HEAD_DIM and fits_cpu(x, head_dim)


class KernelHMHSA(HMHSA):
    """:class:`transcnn.HMHSA` that trains with kernels of this package where they fit."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C, *S) -> (B, C, *S); with ``mask`` PyTorch's operations run."""
        refuse_fx(x)
        return super().forward(x, mask)

    def merge(self, a: Tensor, ratio: Size) -> Tensor:
        """(B, C, H, W) -> (B, C, ⌈H/ratio⌉, ⌈W/ratio⌉)."""
        if not (a.ndim == 4 and isinstance(ratio, int) and torch.is_grad_enabled() and uses_triton(a)):
            return super().merge(a, ratio)
        from ..triton.autograd import merge

        return merge(a, ratio)

    def global_step(self, q: Tensor, kv: Tensor, real: Tensor | None = None) -> Tensor:
        """(B, C, *S) and (B, 2C, *S') -> (B, C, *S)."""
        queries, tokens = channels_last(q), channels_last(kv)
        if self.ndim == 1:  # PyTorch has no channels-last for sequences
            queries, tokens = queries.contiguous(), tokens.contiguous()
        fits = real is None and q.dtype == kv.dtype
        if not (fits and fits_training(queries, self.head_dim) and fits_training(tokens, self.head_dim)):
            return super().global_step(q, kv, real)
        out = _GlobalAttention.apply(queries.flatten(1, -2), tokens.flatten(1, -2), self.head_dim)
        return channels_first(out.view(queries.shape))  # pyright: ignore


class KernelHMHSA1d(KernelHMHSA, HMHSA1d):
    """The same of :class:`transcnn.HMHSA1d`."""


class KernelHMHSA3d(KernelHMHSA, HMHSA3d):
    """The same of :class:`transcnn.HMHSA3d`."""


def grid_attention(qkv: Tensor, head_dim: int, size: int) -> Tensor:
    """Multi-head attention inside each size×size grid, (B, H, W, 3C) -> (B, H, W, C)."""
    return _LocalAttention.apply(qkv, head_dim, size)  # pyright: ignore


class _LocalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, head_dim: int, size: int) -> Tensor:
        ctx.save_for_backward(qkv)
        ctx.options = (head_dim, size)
        return cpu.grid_forward(qkv, head_dim, size)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        (qkv,) = ctx.saved_tensors
        return cpu.grid_backward(qkv, grads[0].to(qkv.dtype).contiguous(), *ctx.options), None, None


class _GlobalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, head_dim: int) -> Tensor:  # (B, N, C), (B, M, 2C) -> (B, N, C)
        ctx.save_for_backward(q, kv)
        ctx.head_dim = head_dim
        return cpu.global_forward(q, kv, head_dim)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        q, kv = ctx.saved_tensors
        return *cpu.global_backward(q, kv, grads[0].to(q.dtype).contiguous(), ctx.head_dim), None
