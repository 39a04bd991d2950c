# pyright: reportCallIssue=false, reportArgumentType=false
# (Triton compiles the kernels: what it makes of their arguments has no Python types.)
"""Attention inside grids as one kernel: reads Q, K and V from the 1x1 convolution's output, writes the map.

No grid is cut, padded, permuted or joined in memory: a program takes one grid and one head, reads its N = g·g positions
from the channels-last map (B, H, W, 3C), attends, and writes to (B, H, W, C). A grid at the border is masked, and the
residual is added in the epilogue. The backward pass recomputes the scores. In fp32 products have the precision of fp32
(three products in TF32), or of TF32 where PyTorch is set to use it.

Letters as in :mod:`transcnn.attention`; channels of ``qkv`` are ordered (q, k, v) × heads × head_dim. Under
``TRITON_INTERPRET=1`` the kernels run on the CPU, which is how they are tested.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..limits import first_order

__all__ = ["attend", "grid_attention", "supports"]


@triton.jit
def _positions(grid, width, height, rows, columns, SIZE: tl.constexpr, TOKENS: tl.constexpr):
    """Indices of a grid's tokens in the map flattened to B·H·W positions, and which of them are inside the map."""
    n = tl.arange(0, TOKENS)
    column = grid % columns
    row = (grid // columns) % rows
    image = grid // (columns * rows)
    y = row * SIZE + n // SIZE
    x = column * SIZE + n % SIZE
    valid = (n < SIZE * SIZE) & (y < height) & (x < width)
    return (image * height + y).to(tl.int64) * width + x, valid


@triton.jit
def _indices(
    width, height, rows, columns, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr, TOKENS: tl.constexpr
):  # fmt: skip
    """Positions and channels of this program's grid and head, the mask of both, and that of the positions."""
    position, valid = _positions(tl.program_id(0), width, height, rows, columns, SIZE, TOKENS)
    d = tl.arange(0, DIM)
    return position, tl.program_id(1) * HEAD_DIM + d, valid[:, None] & (d < HEAD_DIM)[None, :], valid


@triton.jit
def _load_qkv(q, inside, CHANNELS: tl.constexpr):
    """Q, K and V, at a distance of ``CHANNELS``."""
    return (
        tl.load(q, mask=inside, other=0.0),
        tl.load(q + CHANNELS, mask=inside, other=0.0),
        tl.load(q + 2 * CHANNELS, mask=inside, other=0.0),
    )


@triton.jit
def _scores(q, k, valid, scale, PRECISION: tl.constexpr):
    """softmax(Q·Kᵀ/√d) over the keys inside the map, (N, N) in fp32; rows of positions outside aren't stored."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    s = tl.where(valid[None, :], s, float("-inf"))
    p = tl.exp(s - tl.max(s, axis=1)[:, None])
    return p / tl.sum(p, axis=1)[:, None]


@triton.jit
def _forward(
    qkv, residual, factor, out, height, width, rows, columns, scale, RESIDUAL: tl.constexpr, FACTOR: tl.constexpr,
    CHANNELS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr, TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    position, channel, inside, valid = _indices(width, height, rows, columns, HEAD_DIM, DIM, SIZE, TOKENS)
    read = position[:, None] * (3 * CHANNELS) + channel[None, :]
    q, k, v = _load_qkv(qkv + read, inside, CHANNELS)
    p = _scores(q, k, valid, scale, PRECISION)
    o = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    offset = position[:, None] * CHANNELS + channel[None, :]
    if RESIDUAL:
        x = tl.load(residual + offset, mask=inside, other=0.0).to(tl.float32)
        if FACTOR:
            known = channel < (tl.program_id(1) + 1) * HEAD_DIM
            x *= tl.load(factor + channel, mask=known, other=0.0).to(tl.float32)[None, :]
        o += x
    tl.store(out + offset, o.to(q.dtype), mask=inside)


@triton.jit
def _backward(
    qkv, grad, grad_qkv, height, width, rows, columns, scale,
    CHANNELS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr, TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    position, channel, inside, valid = _indices(width, height, rows, columns, HEAD_DIM, DIM, SIZE, TOKENS)
    read = position[:, None] * (3 * CHANNELS) + channel[None, :]
    q, k, v = _load_qkv(qkv + read, inside, CHANNELS)
    g = tl.load(grad + position[:, None] * CHANNELS + channel[None, :], mask=inside, other=0.0)
    p = _scores(q, k, valid, scale, PRECISION)
    # O = P·V: dV = Pᵀ·dO, dP = dO·Vᵀ; the softmax's rows: dS = P·(dP - Σ P·dP); S = Q·Kᵀ/√d.
    dv = tl.dot(tl.trans(p.to(g.dtype)), g, input_precision=PRECISION)
    dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
    ds = p * (dp - tl.sum(p * dp, axis=1)[:, None]) * scale
    ds = tl.where(valid[:, None], ds, 0.0).to(q.dtype)
    dq = tl.dot(ds, k, input_precision=PRECISION)
    dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION)
    tl.store(grad_qkv + read, dq.to(q.dtype), mask=inside)
    tl.store(grad_qkv + read + CHANNELS, dk.to(q.dtype), mask=inside)
    tl.store(grad_qkv + read + 2 * CHANNELS, dv.to(q.dtype), mask=inside)


class _GridAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, residual: Tensor | None, head_dim: int, size: int) -> Tensor:
        ctx.save_for_backward(qkv)
        ctx.sizes = (head_dim, size)
        return attend(qkv, head_dim, size, residual=residual)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        (qkv,) = ctx.saved_tensors
        head_dim, size = ctx.sizes
        grad_qkv = torch.empty_like(qkv)
        grad = grads[0].to(qkv.dtype).contiguous()
        _launch(_backward, qkv, grad, grad_qkv, head_dim=head_dim, size=size, scale=head_dim**-0.5)
        return grad_qkv, grads[0] if ctx.needs_input_grad[1] else None, None, None


def _launch(kernel: Any, qkv: Tensor, *others: Tensor, head_dim: int, size: int, scale: float, **flags: bool) -> None:
    batch, height, width, channels = qkv.shape
    rows, columns = triton.cdiv(height, size), triton.cdiv(width, size)
    tokens = max(16, triton.next_power_of_2(size * size))
    tf32 = qkv.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    kernel[(batch * rows * columns, channels // 3 // head_dim)](
        qkv, *others, height, width, rows, columns, scale,
        CHANNELS=channels // 3, HEAD_DIM=head_dim, DIM=max(16, triton.next_power_of_2(head_dim)),
        SIZE=size, TOKENS=tokens, PRECISION="tf32" if tf32 else "tf32x3", num_warps=4, **flags,
    )  # fmt: skip


def attend(
    qkv: Tensor,
    head_dim: int,
    size: int,
    scale: float | None = None,
    residual: Tensor | None = None,
    factor: Tensor | None = None,
) -> Tensor:
    """Attention inside each size×size grid of a channels-last map, (B, H, W, 3C) -> (B, H, W, C), for inference.

    ``scale`` multiplies the scores Q·Kᵀ; None is 1/√d. ``residual`` (B, H, W, C), times ``factor`` (C) where
    given, is added.
    """
    qkv = qkv.contiguous()
    out = qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)
    residual = residual if residual is None else residual.contiguous()
    filled = (qkv if residual is None else residual, qkv if factor is None else factor)
    scale = head_dim**-0.5 if scale is None else scale
    _launch(
        _forward, qkv, *filled, out, head_dim=head_dim, size=size, scale=scale,
        RESIDUAL=residual is not None, FACTOR=factor is not None,
    )  # fmt: skip
    return out


def grid_attention(qkv: Tensor, head_dim: int, size: int, residual: Tensor | None = None) -> Tensor:
    """The same with scale 1/√d, plus ``residual`` where given, differentiable."""
    return _GridAttention.apply(qkv.contiguous(), residual, head_dim, size)  # pyright: ignore


def supports(dtype: torch.dtype, head_dim: int, size: int) -> bool:
    """Whether a grid and a head fit into a GPU's registers and shared memory."""
    return dtype in (torch.float16, torch.bfloat16, torch.float32) and 4 <= size <= 8 and 16 <= head_dim <= 128
