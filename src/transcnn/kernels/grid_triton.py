# pyright: reportCallIssue=false, reportArgumentType=false
# (Triton compiles the kernels: what it makes of their arguments has no Python types.)
"""Grid attention as one GPU kernel: reads q, k and v where the 1x1 convolution left them, writes the map.

Nothing is cut, padded, permuted or joined in memory: a program of the kernel takes one grid and one head, finds its
N = g·g positions in the channels-last map (B, H, W, 3C), attends, and writes to (B, H, W, C). A grid at the border
masks what lies outside. The backward pass computes the scores again instead of keeping them.

Letters as in :mod:`transcnn.attention`; channels of ``qkv`` are ordered (q, k, v) × heads × head_dim. Under
``TRITON_INTERPRET=1`` the kernels run on the processor, which is how they are tested; no GPU has timed them yet.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["grid_attention", "supports"]


@triton.jit
def _positions(grid, width, height, rows, columns, SIZE: tl.constexpr, TOKENS: tl.constexpr):
    """Where the tokens of a grid lie in the map seen as one row of B·H·W positions, and which of them are real."""
    n = tl.arange(0, TOKENS)
    column = grid % columns
    row = (grid // columns) % rows
    image = grid // (columns * rows)
    y = row * SIZE + n // SIZE
    x = column * SIZE + n % SIZE
    real = (n < SIZE * SIZE) & (y < height) & (x < width)
    return (image * height + y).to(tl.int64) * width + x, real


@triton.jit
def _scores(q, k, real, scale):
    """softmax(Q·Kᵀ/√d) over the real keys, (N, N) in fp32; rows of positions that aren't real are harmless."""
    s = tl.dot(q, tl.trans(k)) * scale
    s = tl.where(real[None, :], s, float("-inf"))
    p = tl.exp(s - tl.max(s, axis=1)[:, None])
    return p / tl.sum(p, axis=1)[:, None]


@triton.jit
def _forward(
    qkv, out, height, width, rows, columns, scale,
    CHANNELS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    position, real = _positions(tl.program_id(0), width, height, rows, columns, SIZE, TOKENS)
    d = tl.arange(0, DIM)
    inside = real[:, None] & (d < HEAD_DIM)[None, :]
    channel = tl.program_id(1) * HEAD_DIM + d
    read = position[:, None] * (3 * CHANNELS) + channel[None, :]
    q = tl.load(qkv + read, mask=inside, other=0.0)
    k = tl.load(qkv + read + CHANNELS, mask=inside, other=0.0)
    v = tl.load(qkv + read + 2 * CHANNELS, mask=inside, other=0.0)
    p = _scores(q, k, real, scale)
    o = tl.dot(p.to(v.dtype), v)
    tl.store(out + position[:, None] * CHANNELS + channel[None, :], o.to(q.dtype), mask=inside)


@triton.jit
def _backward(
    qkv, grad, grad_qkv, height, width, rows, columns, scale,
    CHANNELS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    position, real = _positions(tl.program_id(0), width, height, rows, columns, SIZE, TOKENS)
    d = tl.arange(0, DIM)
    inside = real[:, None] & (d < HEAD_DIM)[None, :]
    channel = tl.program_id(1) * HEAD_DIM + d
    read = position[:, None] * (3 * CHANNELS) + channel[None, :]
    q = tl.load(qkv + read, mask=inside, other=0.0)
    k = tl.load(qkv + read + CHANNELS, mask=inside, other=0.0)
    v = tl.load(qkv + read + 2 * CHANNELS, mask=inside, other=0.0)
    g = tl.load(grad + position[:, None] * CHANNELS + channel[None, :], mask=inside, other=0.0)
    p = _scores(q, k, real, scale)
    # O = P·V: dV = Pᵀ·dO, dP = dO·Vᵀ; the softmax's rows: dS = P·(dP - Σ P·dP); S = Q·Kᵀ/√d.
    dv = tl.dot(tl.trans(p.to(g.dtype)), g)
    dp = tl.dot(g, tl.trans(v))
    ds = p * (dp - tl.sum(p * dp, axis=1)[:, None]) * scale
    ds = tl.where(real[:, None], ds, 0.0).to(q.dtype)
    dq = tl.dot(ds, k)
    dk = tl.dot(tl.trans(ds), q)
    tl.store(grad_qkv + read, dq.to(q.dtype), mask=inside)
    tl.store(grad_qkv + read + CHANNELS, dk.to(q.dtype), mask=inside)
    tl.store(grad_qkv + read + 2 * CHANNELS, dv.to(q.dtype), mask=inside)


class _GridAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, head_dim: int, size: int, scale: float) -> Tensor:
        ctx.save_for_backward(qkv)
        ctx.head_dim, ctx.size, ctx.scale = head_dim, size, scale
        out = qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)
        _launch(_forward, qkv, out, head_dim=head_dim, size=size, scale=scale)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (qkv,) = ctx.saved_tensors
        grad_qkv = torch.empty_like(qkv)
        grad = grads[0].contiguous()
        _launch(_backward, qkv, grad, grad_qkv, head_dim=ctx.head_dim, size=ctx.size, scale=ctx.scale)
        return grad_qkv, None, None, None


def _launch(kernel: Any, qkv: Tensor, *others: Tensor, head_dim: int, size: int, scale: float) -> None:
    batch, height, width, channels = qkv.shape
    rows, columns = triton.cdiv(height, size), triton.cdiv(width, size)
    tokens = max(16, triton.next_power_of_2(size * size))
    kernel[(batch * rows * columns, channels // 3 // head_dim)](
        qkv, *others, height, width, rows, columns, scale,
        CHANNELS=channels // 3, HEAD_DIM=head_dim, DIM=max(16, triton.next_power_of_2(head_dim)),
        SIZE=size, TOKENS=tokens, num_warps=4,
    )  # fmt: skip


def grid_attention(qkv: Tensor, head_dim: int, size: int, scale: float | None = None) -> Tensor:
    """Attention inside each size×size grid of a channels-last map, (B, H, W, 3C) -> (B, H, W, C), differentiable.

    ``scale`` multiplies the scores Q·Kᵀ; None is the usual 1/√d.
    """
    scale = head_dim**-0.5 if scale is None else scale
    return _GridAttention.apply(qkv.contiguous(), head_dim, size, scale)  # pyright: ignore


def supports(dtype: torch.dtype, head_dim: int, size: int) -> bool:
    """Whether the kernel is made for this: a grid and a head must fit into a GPU's registers and shared memory."""
    return dtype in (torch.float16, torch.bfloat16, torch.float32) and 4 <= size <= 8 and 16 <= head_dim <= 128
