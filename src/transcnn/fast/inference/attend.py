"""softmax(Q·Kᵀ)·V by whatever is fastest on the tensors' device, in memory that doesn't grow with N·M.

The factor 1/√d is missing on purpose: it is folded into the weights of Q.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attend"]

MAX_SCORES = 2**22  # elements of one chunk's matrix of scores; 8 MB in bf16, which stays in a CPU's cache


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, fused: bool = True) -> Tensor:
    """Attention for inference with scaled Q, (B, h, N, d) and twice (B, h, M, d) -> (B, h, N, d).

    ``mask`` (B, 1, 1, M) is true where a key is inside the map. In bf16 on a CPU, two matrix products on chunks of the
    queries are faster than PyTorch's fused kernel; everywhere else that kernel runs, which keeps no scores either.
    """
    if not fused or (q.device.type == "cpu" and q.dtype == torch.bfloat16):
        return _chunked(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)


def _chunked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    batch, heads, queries, head_dim = q.shape

    def chunk(rows: slice, tokens: slice) -> Tensor:
        scores = q[rows, :, tokens] @ k[rows].mT  # (b, h, n, M)
        if mask is not None:
            scores.masked_fill_(~mask[rows], -torch.inf)
        return scores.softmax(dim=-1) @ v[rows]

    scores_per_row = heads * queries * k.shape[-2]  # of one image or grid
    if batch * scores_per_row <= MAX_SCORES:
        return chunk(slice(None), slice(None))
    out = q.new_empty(batch, queries, heads, head_dim).transpose(1, 2)
    if scores_per_row <= MAX_SCORES:
        step = MAX_SCORES // scores_per_row
        for i in range(0, batch, step):
            out[i : i + step] = chunk(slice(i, i + step), slice(None))
        return out
    step = max(1, MAX_SCORES // (heads * k.shape[-2]))
    for i in range(batch):
        for j in range(0, queries, step):
            out[i : i + 1, :, j : j + step] = chunk(slice(i, i + 1), slice(j, j + step))
    return out
