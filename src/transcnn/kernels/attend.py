"""softmax(Q·Kᵀ)·V by whatever is fastest where the tensors are, in memory that doesn't grow with N·M.

The factor 1/√d is missing on purpose: it is folded into the weights that make Q.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attend"]

SCORES = 2**22  # numbers in one chunk's matrix of scores; 8 MB in bf16, which stays in a processor's cache


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention for inference with Q scaled already, (B, h, N, d) and twice (B, h, M, d) -> (B, h, N, d).

    ``mask`` (B, 1, 1, M) is true where a key is real. In bf16 on a processor, two matrix products on chunks of the
    queries are faster than PyTorch's fused kernel; everywhere else that kernel runs, which keeps no scores either.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return _chunked(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)


def _chunked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    batch, heads, queries, head_dim = q.shape

    def part(rows: slice, tokens: slice) -> Tensor:
        scores = q[rows, :, tokens] @ k[rows].mT  # (b, h, n, M)
        if mask is not None:
            scores.masked_fill_(~mask[rows], -torch.inf)
        return scores.softmax(dim=-1) @ v[rows]

    each = heads * queries * k.shape[-2]  # scores of one image or grid
    if batch * each <= SCORES:
        return part(slice(None), slice(None))
    out = q.new_empty(batch, queries, heads, head_dim).transpose(1, 2)
    if each <= SCORES:
        step = SCORES // each
        for i in range(0, batch, step):
            out[i : i + step] = part(slice(i, i + step), slice(None))
        return out
    step = max(1, SCORES // (heads * k.shape[-2]))
    for i in range(batch):
        for j in range(0, queries, step):
            out[i : i + 1, :, j : j + step] = part(slice(i, i + 1), slice(j, j + step))
    return out
