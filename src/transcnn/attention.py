"""Hierarchical multi-head self-attention (H-MHSA), straight from the paper's formulas.

Paper: Y. Liu et al., "Transformer in Convolutional Neural Networks", arXiv 2106.03180, section 3.2. This file
needs torch alone and favours being read over being fast; :mod:`transcnn.fast` computes the same function faster. How
a map is cut into grids and merged stands in :mod:`transcnn.grids`.

Attention over all N = H·W positions of a feature map costs O(N²). H-MHSA computes it step by step: inside small
grids, then, each small patch of positions merged into one token, inside grids of tokens, and so on; at the end
every position attends to the few tokens that are left. Sequences and volumes follow the same formulas: how many
dimensions a map has is data here, and what is said of H and W holds for L alone and for D, H and W.

Letters
    B  images in the batch              C  channels, C = h·d
    H, W  height and width of a map     h  heads            d  channels of one head (``head_dim``)
    g  side of a grid in positions      r  pooling ratio, the side of a merged patch
    G  grids in one map                 N  positions in one grid, g·g
    L  levels                           M  tokens left at the last level
    *S  the sizes of a map: L of a sequence, H, W of an image, D, H, W of a volume; *S' smaller ones
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from .grids import Size, cut_into_grids, join_grids, merge, merge_real, one_if_equal, per_axis, product, spread
from .masking import check_mask, keep_real, never_none, normalise, unless_traced, unless_whole

__all__ = ["HMHSA", "HMHSA1d", "HMHSA2d", "HMHSA3d", "LocalStep", "default_head_dim"]

SIZES = {1: "L", 2: "H, W", 3: "D, H, W"}
Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVS: dict[int, type[Conv]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class HMHSA(nn.Module):
    """Hierarchical multi-head self-attention over a feature map, (B, C, H, W) -> (B, C, H, W).

    :class:`HMHSA1d` takes sequences (B, C, L), :class:`HMHSA3d` volumes and video (B, C, D, H, W); ``HMHSA2d`` is this.

    With X the input, ``Attn(Q, K, V) = softmax(Q·Kᵀ/√d)·V`` for each head, ``Grid_g`` cutting a map into g×g
    grids from its top left corner and ``Pool_r`` average pooling with kernel = stride = r:

        local step    [Q, K, V] = W_qkv·Norm(X);  A₁ = GridNorm(X + Attn inside each g₁×g₁ grid)
        merging       T₂ = Pool_{r₁}(A₁);  a local step on T₂ with g₂ gives A₂, T₃ = Pool_{r₂}(A₂), ... up to T_L
        global step   Q = W_q·A₁ at full resolution;  [K, V] = W_kv·Norm(T_L) on the merged tokens
        sum           Y = W_proj·(Attn(Q, K, V) + A₁ + Σ Up(A_l), 1 < l < L)

    where ``Up`` gives each merged token's value to all its positions. The number of levels is
    ``L = len(grid_sizes) + 1``: one grid size is the published network, none at all is plain multi-head
    self-attention with Q, K, V from Norm(X) and no A terms, and with enough of them the cost is linear in H·W.

    Any H and W from 1 up work, and nothing that depends on them is stored: a grid at the border holds fewer
    positions, attends to real positions only, and pooling averages real positions only. There is no residual
    around the whole (a network's block adds its own), no dropout and no position embedding, as in the paper.

    Args:
        dim: Channels C of the map.
        head_dim: Channels d of one head; None takes the largest of 64, 48, 32, 16, 8, 4, 2, 1 that divides ``dim``.
        grid_sizes: Side of the grids of each local step, in positions of the map that the step works on: a number,
            or a tuple of one for each dimension, so that ``[(2, 8, 8)]`` is one step with grids of 2x8x8.
        pool_ratios: Side of the patches merged after each local step, in the same form; as many as ``grid_sizes``.
        norm_layer: Makes a normalisation layer from a number of channels (BatchNorm in TransCNN, GroupNorm with
            one group in HAT-Net). None takes the BatchNorm of the map's dimensions.
        bias: Whether the projections have a bias.
        device, dtype: Where and as what the parameters are made.

    Raises:
        ValueError: ``head_dim`` does not divide ``dim``, a grid size or ratio is below 1, their numbers differ, or,
            from ``forward``, the input is no (B, ``dim``, H, W) tensor or the mask no bool tensor (B, 1, H, W).
    """

    ndim = 2  # of the maps
    fused_attn = True  # whether F.scaled_dot_product_attention computes the attention

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int | None = None,
        grid_sizes: Sequence[Size] = (8,),
        pool_ratios: Sequence[Size] = (8,),
        norm_layer: Callable[[int], nn.Module] | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        head_dim = default_head_dim(dim) if head_dim is None else head_dim
        grid_sizes = tuple(map(one_if_equal, grid_sizes))
        pool_ratios = tuple(map(one_if_equal, pool_ratios))
        _check_arguments(dim, head_dim, grid_sizes, pool_ratios, self.ndim)
        self.dim = dim
        self.head_dim = head_dim
        self.num_heads = dim // head_dim
        self.grid_sizes = grid_sizes
        self.pool_ratios = pool_ratios
        make_norm = BATCH_NORMS[self.ndim] if norm_layer is None else norm_layer

        def project(outputs: int) -> Conv:
            return CONVS[self.ndim](dim, outputs, 1, bias=bias, device=device, dtype=dtype)

        def norm() -> nn.Module:
            return make_norm(dim).to(device=device, dtype=dtype)

        self.local = nn.ModuleList(LocalStep(norm(), project(3 * dim), norm(), head_dim, g) for g in grid_sizes)
        if self.local:
            self.ds_norm = norm()  # "down-sampled norm": the released code's name for the norm of T_L
            self.q = project(dim)
            self.kv = project(2 * dim)
        else:
            self.norm = norm()
            self.qkv = project(3 * dim)
        self.proj = project(dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W).

        ``mask`` (B, 1, H, W), bool, is true at real positions, where a batch holds items of several sizes filled up to
        one. What lies outside of it changes nothing inside: those positions are no keys, enter no average and, in
        GroupNorm and in a BatchNorm that trains, no statistics; outside of it the output is zero. Inside, it is that of
        each item alone without padding (with the batch's statistics where BatchNorm trains). InstanceNorm is treated
        as GroupNorm is, norms of each position by itself need nothing; other norms are given zeros for padding. What
        torch.fx traces takes no mask.
        """
        _check_input(x, self.dim, self.ndim, mask)
        mask = unless_whole(unless_traced(mask))
        x = keep_real(x, mask)
        if not self.local:
            return keep_real(self.proj(self.only_step(self.qkv(normalise(self.norm, x, mask)), mask)), mask)

        tokens, real, ratio = x, mask, per_axis(1, self.ndim)  # each token stands for a patch of `ratio` positions
        steps: list[tuple[Tensor, Size]] = []  # A₁ … A_{L-1}, each with its ratio
        for step, pool_ratio in zip(self.local, self.pool_ratios, strict=True):
            a = step(tokens) if real is None else step(tokens, real)  # (B, C, ⌈H/ratio⌉, ⌈W/ratio⌉)
            steps.append((a, ratio))
            if real is None:
                tokens = self.merge(a, pool_ratio)
            else:
                tokens, real = merge_real(a, pool_ratio, real)
            ratio = product(ratio, pool_ratio)

        a1 = steps[0][0]
        kv = self.kv(normalise(self.ds_norm, tokens, real))  # (B, 2C, ⌈H/ratio⌉, ⌈W/ratio⌉), M tokens
        y = self.global_step(self.q(a1), kv, a1, real)
        for a, level_ratio in steps[1:]:
            y = y + spread(a, level_ratio, a1)
        return keep_real(self.proj(y), mask)

    def merge(self, a: Tensor, ratio: Size) -> Tensor:
        """Tokens of the next level, (B, C, H, W) -> (B, C, ⌈H/ratio⌉, ⌈W/ratio⌉)."""
        return merge(a, ratio)

    def only_step(self, qkv: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention of all positions to all, where there is no local step, (B, 3C, H, W) -> (B, C, H, W)."""
        q, k, v = qkv.chunk(3, dim=1)
        return global_attention(q, k, v, self.head_dim, self.fused_attn, mask)

    def global_step(self, q: Tensor, kv: Tensor, a1: Tensor, real: Tensor | None = None) -> Tensor:
        """Attention of all positions to the merged tokens, plus A₁, (B, C, H, W), (B, 2C, H', W') -> (B, C, H, W)."""
        k, v = kv.chunk(2, dim=1)
        return global_attention(q, k, v, self.head_dim, self.fused_attn, real) + a1

    def set_fused_attn(self, enable: bool) -> None:
        """Compute the attention by ``F.scaled_dot_product_attention`` or, with ``enable=False``, step by step.

        Networks and :func:`transcnn.plug` take over what ``timm.layers.set_fused_attn`` says when they are made.
        """
        self.fused_attn = enable
        for step in self.local:
            step.fused_attn = enable  # pyright: ignore

    def extra_repr(self) -> str:
        return f"{self.dim}, head_dim={self.head_dim}, grid_sizes={self.grid_sizes}, pool_ratios={self.pool_ratios}"


class HMHSA1d(HMHSA):
    """:class:`HMHSA` over sequences (sound, sensors), (B, C, L) -> (B, C, L); arguments and formulas are its own."""

    ndim = 1


class HMHSA3d(HMHSA):
    """:class:`HMHSA` over volumes or video, (B, C, D, H, W) -> (B, C, D, H, W); arguments and formulas are its own."""

    ndim = 3


HMHSA2d = HMHSA


class LocalStep(nn.Module):
    """Attention inside each grid, its input added, normalised: A = GridNorm(X + Attn), (B, C, *S) -> (B, C, *S).

    The layers are made by :class:`HMHSA`; the output channels of ``qkv`` are ordered (q, k, v) × heads × head_dim.
    """

    fused_attn = True

    def __init__(self, norm: nn.Module, qkv: Conv, grid_norm: nn.Module, head_dim: int, grid_size: Size) -> None:
        super().__init__()
        self.norm = norm
        self.qkv = qkv
        self.grid_norm = grid_norm
        self.head_dim = head_dim
        self.grid_size = grid_size

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C, *S) -> (B, C, *S), given which positions are real, (B, 1, *S)."""
        mask = unless_traced(mask)
        # Not named here, so that grid_attention can free it: it is the largest tensor of all.
        out = grid_attention(
            self.qkv(normalise(self.norm, x, mask)), self.head_dim, self.grid_size, self.fused_attn, mask
        )
        return normalise(self.grid_norm, x + out, mask)


def grid_attention(
    qkv: Tensor, head_dim: int, grid_size: Size, fused: bool = True, mask: Tensor | None = None
) -> Tensor:
    """Multi-head attention inside each grid, (B, 3C, *S) -> (B, C, *S); ``mask`` as :class:`HMHSA` takes it."""
    batch, channels, *sides = qkv.shape
    tokens, keys = cut_into_grids(qkv, grid_size, mask)  # (B·G, N, 3C), (B·G, 1, 1, N)
    tokens = _side_by_side(tokens)
    del qkv
    tokens = tokens.unflatten(2, (3, channels // 3 // head_dim, head_dim))  # (B·G, N, 3, h, d)
    q, k, v = tokens.permute(2, 0, 3, 1, 4)  # (B·G, h, N, d) each
    out = attend(q, k, v, keys if mask is None else never_none(keys), fused)
    return join_grids(out.transpose(1, 2).flatten(2), grid_size, batch, sides)


def global_attention(
    q: Tensor, k: Tensor, v: Tensor, head_dim: int, fused: bool = True, mask: Tensor | None = None
) -> Tensor:
    """Every position of ``q`` attends to every token of ``k`` and ``v`` (where ``mask``, (B, 1, *S'), is true).

    (B, C, *S) and twice (B, C, *S') -> (B, C, *S).
    """

    def split(x: Tensor) -> Tensor:
        return x.flatten(2).unflatten(1, (-1, head_dim)).transpose(2, 3)  # (B, h, N, d)

    keys = None if mask is None else never_none(mask.flatten(2)[:, :, None])  # (B, 1, 1, M)
    out = attend(split(q), split(k), split(v), keys, fused).transpose(2, 3)  # (B, h, d, N)
    return (out if q.stride(1) == 1 else out.contiguous()).reshape(q.shape)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, fused: bool = True) -> Tensor:
    """softmax(Q·Kᵀ/√d)·V where ``mask`` is true, (..., N, d) and twice (..., M, d) -> (..., N, d)."""
    if not fused or (q.dtype == torch.bfloat16 and q.device.type == "cpu" and k.shape[-2] <= 256):
        # A CPU's fused kernel takes up to six times as long, most of it in the backward pass (docs/speed.md).
        scores = q @ k.mT * q.shape[-1] ** -0.5  # (..., N, M)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(*map(_side_by_side, (q, k, v)), attn_mask=mask)


def _side_by_side(x: Tensor) -> Tensor:
    """The channels of each position, (..., N, C), in a row: else no fused kernel runs, and all scores are kept."""
    return x if torch.compiler.is_exporting() or x.stride(-1) == 1 else x.contiguous()


def default_head_dim(dim: int) -> int:
    """The largest of 64, 48, 32, 16, 8, 4, 2, 1 that divides ``dim``."""
    return next(d for d in (64, 48, 32, 16, 8, 4, 2, 1) if dim % d == 0)


def _check_arguments(
    dim: int, head_dim: int, grid_sizes: tuple[Size, ...], pool_ratios: tuple[Size, ...], ndim: int
) -> None:
    if dim < 1:
        raise ValueError(f"dim must be 1 or more, got {dim}")
    if head_dim < 1 or dim % head_dim:
        divisors = ", ".join(str(d) for d in range(1, dim + 1) if dim % d == 0)
        raise ValueError(f"head_dim must divide dim={dim}, got {head_dim}; allowed: {divisors}")
    if len(grid_sizes) != len(pool_ratios):
        raise ValueError(
            f"grid_sizes and pool_ratios must be equally many, got {len(grid_sizes)} and {len(pool_ratios)}: "
            f"{grid_sizes} and {pool_ratios}"
        )
    for name, values in (("grid_sizes", grid_sizes), ("pool_ratios", pool_ratios)):
        axes = [value if isinstance(value, tuple) else (value,) * ndim for value in values]
        if any(len(a) != ndim or any(not isinstance(n, int) or n < 1 for n in a) for a in axes):
            raise ValueError(
                f"{name} must be whole numbers of 1 or more, got {values}; "
                f"one for each level, or a tuple of {ndim} for each level"
            )


def _check_input(x: Tensor, dim: int, ndim: int, mask: Tensor | None) -> None:
    letters = SIZES[ndim]
    if x.ndim != ndim + 2:
        raise ValueError(f"expected a (B, {dim}, {letters}) tensor, got {x.ndim} dimensions: {tuple(x.shape)}")
    if x.shape[1] != dim:
        raise ValueError(f"expected {dim} channels, got {x.shape[1]} in {tuple(x.shape)}")
    if 0 in x.shape[2:]:
        raise ValueError(f"expected {letters.replace(', ', ' and ')} of 1 or more, got {tuple(x.shape)}")
    check_mask(mask, x)


# Functions that look at sizes stay whole when torch.fx traces a model (timm's feature extraction does).
torch.fx.wrap("_check_input")
torch.fx.wrap("grid_attention")
torch.fx.wrap("global_attention")
torch.fx.wrap("merge")
torch.fx.wrap("spread")
