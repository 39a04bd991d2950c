# pyright: reportCallIssue=false, reportArgumentType=false
# (Triton compiles the kernels: what it makes of their arguments has no Python types.)
"""Average pooling with borders (the merging of tokens) and its backward pass: PyTorch's take 3 and 9 times as long."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .norms import CHANNELS, ROWS

__all__ = ["average_pool", "average_pool_backward"]


@triton.jit
def _average_pool(x, out, tokens, height, width, columns, ratio, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    tall, wide = tl.cdiv(height, ratio), tl.cdiv(width, ratio)
    image, top, left = t // (tall * wide), t // wide % tall * ratio, t % wide * ratio
    mask = (t < tokens)[:, None] & (c < columns)[None, :]
    total = tl.zeros((TOKENS, CHANNELS), tl.float32)
    for row in range(ratio):
        for column in range(ratio):
            inside = (top + row < height) & (left + column < width)
            p = (image * height + top + row).to(tl.int64) * width + left + column
            at = p[:, None] * columns + c[None, :]
            total += tl.load(x + at, mask=inside[:, None] & mask, other=0.0).to(tl.float32)
    count = tl.minimum(ratio, height - top) * tl.minimum(ratio, width - left)  # positions of each token
    total /= count[:, None].to(tl.float32)
    tl.store(out + t.to(tl.int64)[:, None] * columns + c[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _average_pool_backward(grad, out, rows, height, width, columns, ratio, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    p = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = (p < rows)[:, None] & (c < columns)[None, :]
    image, y, x = p // (height * width), p // width % height // ratio, p % width // ratio
    token = (image * tl.cdiv(height, ratio) + y) * tl.cdiv(width, ratio) + x
    count = tl.minimum(ratio, height - y * ratio) * tl.minimum(ratio, width - x * ratio)  # positions of that token
    g = tl.load(grad + token[:, None] * columns + c[None, :], mask=mask, other=0.0).to(tl.float32)
    g /= count[:, None].to(tl.float32)
    tl.store(out + p[:, None] * columns + c[None, :], g.to(out.dtype.element_ty), mask=mask)


def average_pool(x: Tensor, ratio: int) -> Tensor:
    """The mean of each ratio×ratio patch, of its positions inside the map, (B, H, W, C) -> (B, ⌈H/r⌉, ⌈W/r⌉, C)."""
    batch, height, width, columns = x.shape
    out = x.new_empty(batch, triton.cdiv(height, ratio), triton.cdiv(width, ratio), columns)
    tokens = out.shape[:3].numel()
    _average_pool[(triton.cdiv(tokens, 16), triton.cdiv(columns, CHANNELS))](
        x, out, tokens, height, width, columns, ratio, TOKENS=16, CHANNELS=CHANNELS
    )
    return out


def average_pool_backward(grad: Tensor, ratio: int, height: int, width: int) -> Tensor:
    """The backward pass of :func:`average_pool`, (B, ⌈H/r⌉, ⌈W/r⌉, C) -> (B, H, W, C)."""
    out = grad.new_empty(len(grad), height, width, grad.shape[3])
    rows, columns = out.shape[:3].numel(), out.shape[3]
    _average_pool_backward[(triton.cdiv(rows, ROWS), triton.cdiv(columns, CHANNELS))](
        grad, out, rows, height, width, columns, ratio, ROWS=ROWS, CHANNELS=CHANNELS
    )
    return out
