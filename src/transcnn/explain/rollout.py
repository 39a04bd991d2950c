"""Attention across all blocks and stages: what of the image ends up where.

Attention rollout (S. Abnar and W. Zuidema, "Quantifying Attention Flow in Transformers", arXiv 2005.00928) multiplies
the attention of all layers, each as ½(I + A) because of the residual. H-MHSA has no one matrix A, but all that it does
to positions is a sum or a product of such matrices whose rows sum to one. Counting every term of every sum equally, as
rollout counts a residual, with S_l the attention inside the grids of level l, P_l the averaging of patches, U_l its
way back, G the global attention (all are means over heads) and L levels:

    A₁ = ½(I + S₁)·X            X + Attn in a local step: two terms
    A_l = ½(I + S_l)·P_{l-1}·A_{l-1}
    Y = 1/L·(G·P_{L-1}·A_{L-1} + A₁ + Σ U_l·A_l, 1 < l < L)      L terms; plain attention is Y = S·X
    block = ½(X + Y)

Downsampling and pooling spread a position's share evenly over what it was made of. Convolutions count as staying in
place, and heads, channels and values are not looked at: rollout says where attention *could* carry things, for no class
in particular. A plugged branch x + s·Y counts by its size instead of by half, |s·Y| : |x| averaged over the map:
training starts it at nothing. Matrices are never formed; their transposes are applied, in memory linear in H·W.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checkpoints.loading import Loaded
from ..grids import Size, cut_into_grids, join_grids, product
from ..plugging.plug import ConvReplacement, HMHSABranch
from .geometry import carry, cell_of
from .maps import check_query
from .record import ImageLike, Record, as_input, check_stage, heads_of, local_weights, record, token_weights

__all__ = ["attention_rollout"]


@torch.no_grad()
def attention_rollout(
    model: nn.Module | Loaded, image: ImageLike, query: tuple[int, ...] | None = None, stage: int | None = None
) -> Tensor:
    """How much of what reaches the end of a stage comes from each pixel, (H, W), of sum 1.

    Of a sequence (L), of a volume (D, H, W).

    The definition is at the top of this module. It takes the H-MHSA modules to form one chain, in the order they run.

    Args:
        model, image: As for :func:`~transcnn.explain.attention_maps`.
        query: Row and column of the pixel whose position at the end is asked for; None is all positions alike, as
            average pooling sees them.
        stage: The stage at whose end to begin; None is the last.

    Raises:
        UserError: As for :func:`~transcnn.explain.attention_maps`.
    """
    module, x = as_input(model, image)
    size = tuple(x.shape[2:])
    _, records = record(module, x)
    last = check_stage(records, -1 if stage is None else stage)[-1]
    share = last.x.new_zeros(last.size, dtype=torch.promote_types(last.x.dtype, torch.float32))
    if query is None:
        share += 1 / share.numel()
    else:
        check_query(query, size)
        share[tuple(int(cell_of(n, had)[q]) for n, had, q in zip(size, last.size, query, strict=True))] = 1
    for r in reversed(records[: records.index(last) + 1]):
        share = _back_block(r, carry(share, r.size))
    return carry(share, size).cpu()


def _back_block(r: Record, share: Tensor) -> Tensor:
    """From a block's output to its input, (*S) -> (*S)."""
    part = 0.5
    if isinstance(r.owner, ConvReplacement):
        part = 1.0
    elif isinstance(r.owner, HMHSABranch):
        branch = (r.owner.scale.view(-1, *(1,) * len(r.size)) * r.y).norm(dim=1).mean()
        part = float(branch / (branch + r.x.norm(dim=1).mean()).clamp(min=1e-12))
    return (1 - part) * share + part * _back(r, share)


def _back(r: Record, share: Tensor) -> Tensor:
    """From the output of H-MHSA to its input, (*S) -> (*S)."""
    attn = r.attn
    weights = token_weights(heads_of(r.q, attn.head_dim), heads_of(r.k, attn.head_dim)).mean(0)  # (H·W, M)
    tokens = (share.flatten() @ weights).view(r.k.shape[2:])
    levels = len(r.qkv)
    if not levels:
        return tokens
    ratio = (1,) * attn.ndim
    direct = []  # what comes to A₁ … A_{L-1} from the sum, not by way of the next level
    for qkv, pool in zip(r.qkv, attn.pool_ratios, strict=True):
        direct.append(carry(share, qkv.shape[2:], side=ratio))
        ratio = product(ratio, pool)
    flow = tokens
    for level in reversed(range(levels)):
        qkv, pool = r.qkv[level], attn.pool_ratios[level]
        flow = carry(flow, qkv.shape[2:], side=pool) + direct[level]
        flow = 0.5 * (flow + _back_local(qkv, flow, attn.head_dim, attn.grid_sizes[level]))
    return flow / (levels + 1)


def _back_local(qkv: Tensor, share: Tensor, head_dim: int, grid_size: Size) -> Tensor:
    """From the output of attention inside grids to its input, (*S) -> (*S)."""
    weights = local_weights(qkv, head_dim, grid_size)[0].mean(1)  # (G, N, N)
    tokens, _ = cut_into_grids(share[None, None], grid_size)  # (G, N, 1), zeros where positions aren't real
    return join_grids(weights.mT @ tokens, grid_size, 1, share.shape)[0, 0]
