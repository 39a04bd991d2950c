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

__all__ = ["KernelHMHSA", "KernelHMHSA1d", "KernelHMHSA3d", "added_by_kernel", "fits_training", "grid_attention"]


MAX_POSITIONS = 1024  # of a map where all positions attend to all and that is treated as one grid


def fits_training(x: Tensor, head_dim: int) -> bool:
    """Whether the C++ kernels train on tokens like these, (..., C)."""
    return torch.is_grad_enabled() and head_dim <= MAX_HEAD_DIM and fits_cpu(x, head_dim) and x.is_contiguous()


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

    def only_step(self, qkv: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, 3C, *S) -> (B, C, *S); the map is one grid."""
        tokens = channels_last(qkv)
        fits = qkv.ndim == 4 and mask is None and fits_training(tokens, self.head_dim)
        if not (fits and qkv.shape[2:].numel() <= MAX_POSITIONS):
            return super().only_step(qkv, mask)
        return channels_first(grid_attention(tokens, self.head_dim, max(qkv.shape[2:])))

    def global_step(self, q: Tensor, kv: Tensor, a1: Tensor, real: Tensor | None = None) -> Tensor:
        """(B, C, *S), (B, 2C, *S') and (B, C, *S) -> (B, C, *S)."""
        queries, tokens, residual = channels_last(q), channels_last(kv), channels_last(a1)
        if self.ndim == 1:  # PyTorch has no channels-last for sequences
            queries, tokens = queries.contiguous(), tokens.contiguous()
        fits = real is None and q.dtype == kv.dtype
        if not (fits and fits_training(queries, self.head_dim) and fits_training(tokens, self.head_dim)):
            return super().global_step(q, kv, a1, real)
        added = added_by_kernel(residual, queries)
        rows = queries.flatten(1, -2), tokens.flatten(1, -2), residual.flatten(1, -2) if added else None
        out = channels_first(_GlobalAttention.apply(*rows, self.head_dim).view(queries.shape))  # pyright: ignore
        return out if added else out + a1


class KernelHMHSA1d(KernelHMHSA, HMHSA1d):
    """The same of :class:`transcnn.HMHSA1d`."""


class KernelHMHSA3d(KernelHMHSA, HMHSA3d):
    """The same of :class:`transcnn.HMHSA3d`."""


def grid_attention(qkv: Tensor, head_dim: int, size: int, residual: Tensor | None = None) -> Tensor:
    """Multi-head attention inside each size×size grid, plus ``residual``, (B, H, W, 3C) -> (B, H, W, C)."""
    return _LocalAttention.apply(qkv, residual, head_dim, size)  # pyright: ignore


def added_by_kernel(residual: Tensor, tokens: Tensor) -> bool:
    """Whether kernels that take these tokens add this to the result, (..., C) both."""
    return residual.dtype == tokens.dtype and residual.is_contiguous() and fits_cpu(residual)


class _LocalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, residual: Tensor | None, head_dim: int, size: int) -> Tensor:
        ctx.save_for_backward(qkv)
        ctx.options = (head_dim, size)
        return cpu.grid_forward(qkv, head_dim, size, residual)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        (qkv,) = ctx.saved_tensors
        of_residual = grads[0] if ctx.needs_input_grad[1] else None
        return cpu.grid_backward(qkv, grads[0].to(qkv.dtype).contiguous(), *ctx.options), of_residual, None, None


class _GlobalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, residual: Tensor | None, head_dim: int) -> Tensor:
        ctx.save_for_backward(q, kv)  # (B, N, C), (B, M, 2C)
        ctx.head_dim = head_dim
        return cpu.global_forward(q, kv, head_dim, residual)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        q, kv = ctx.saved_tensors
        of_residual = grads[0] if ctx.needs_input_grad[2] else None
        return *cpu.global_backward(q, kv, grads[0].to(q.dtype).contiguous(), ctx.head_dim), of_residual, None
