"""The attention of both steps of H-MHSA in training, by C++ kernels: neither keeps its scores.

The forward pass saves Q, K and V; the backward pass recomputes scores and softmax, a head and 64 queries at a time,
in a core's cache (``cpu/src/attention_training.cpp``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...attention import HMHSA
from ..cpu import training as cpu
from ..cpu.call import MAX_HEAD_DIM
from ..dispatch import fits_cpu
from ..limits import first_order, refuse_fx
from .layers import uses_triton

__all__ = ["KernelHMHSA", "fits_training", "grid_attention"]


def fits_training(x: Tensor, head_dim: int) -> bool:
    """Whether the C++ kernels train on tokens like these, (..., C)."""
    return torch.is_grad_enabled() and x.is_contiguous() and head_dim <= MAX_HEAD_DIM and fits_cpu(x, head_dim)


class KernelHMHSA(HMHSA):
    """:class:`transcnn.HMHSA` that trains with kernels of this package where they fit."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        refuse_fx(x)
        return super().forward(x)

    def merge(self, a: Tensor, ratio: int) -> Tensor:
        """(B, C, H, W) -> (B, C, ⌈H/ratio⌉, ⌈W/ratio⌉)."""
        if not (torch.is_grad_enabled() and uses_triton(a)):
            return super().merge(a, ratio)
        from ..triton.autograd import merge

        return merge(a, ratio)

    def global_step(self, q: Tensor, kv: Tensor) -> Tensor:
        """(B, C, H, W) and (B, 2C, H', W') -> (B, C, H, W)."""
        queries, tokens = q.permute(0, 2, 3, 1), kv.permute(0, 2, 3, 1)
        if q.dtype != kv.dtype or not (fits_training(queries, self.head_dim) and fits_training(tokens, self.head_dim)):
            return super().global_step(q, kv)
        out = _GlobalAttention.apply(queries.flatten(1, 2), tokens.flatten(1, 2), self.head_dim)
        return out.view(queries.shape).permute(0, 3, 1, 2)  # pyright: ignore


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
