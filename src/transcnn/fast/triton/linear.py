# pyright: reportCallIssue=false, reportArgumentType=false
# (Triton compiles the kernels: what it makes of their arguments has no Python types.)
"""A matrix product with bias, residual and SiLU in its epilogue.

With PyTorch's operations each of these reads and writes the whole output once more, which takes as long as the product
itself where maps are large and channels few.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["linear", "plain_linear"]


@triton.jit
def _linear(
    x, weight, bias, residual, out, rows, columns, depth,
    SILU: tl.constexpr, RESIDUAL: tl.constexpr, EXACT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(columns, COLUMNS)
    m = (tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    n = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    y = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, depth, DEPTH):
        k = start + tl.arange(0, DEPTH)
        valid = k < depth if not EXACT else k < start + DEPTH
        a = tl.load(x + m[:, None] * depth + k[None, :], mask=(m < rows)[:, None] & valid[None, :], other=0.0)
        b = tl.load(weight + n[None, :] * depth + k[:, None], mask=(n < columns)[None, :] & valid[:, None], other=0.0)
        y = tl.dot(a, b, y)
    y += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    offset = m[:, None] * columns + n[None, :]
    mask = (m < rows)[:, None] & (n < columns)[None, :]
    if RESIDUAL:
        y += tl.load(residual + offset, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        y = y * tl.sigmoid(y)
    tl.store(out + offset, y.to(out.dtype.element_ty), mask=mask)


def linear(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, silu: bool = False) -> Tensor:
    """silu(x·Wᵀ + bias + residual), (..., K), (N, K), (N) and (..., N) -> (..., N), in bf16 or fp16, sums in fp32."""
    x = x.contiguous()
    columns, depth = weight.shape
    rows = x.numel() // depth
    out = x.new_empty(*x.shape[:-1], columns)
    block_n = 128 if columns > 64 else 64
    block_k, stages = (32, 4) if silu or depth <= 32 else (64, 3)  # as measured on an H100
    _linear[(triton.cdiv(rows, 128) * triton.cdiv(columns, block_n),)](
        x, weight, bias, out if residual is None else residual.contiguous(), out, rows, columns, depth,
        SILU=silu, RESIDUAL=residual is not None, EXACT=depth % block_k == 0, ROWS=128, COLUMNS=block_n, DEPTH=block_k,
        num_warps=4, num_stages=stages,
    )  # fmt: skip
    return out


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, silu: bool = False) -> Tensor:
    """The same with PyTorch's operations."""
    y = torch.nn.functional.linear(x, weight, bias)
    y = y if residual is None else y.add_(residual)
    return torch.nn.functional.silu(y, inplace=True) if silu else y
