"""Hierarchical multi-head self-attention (H-MHSA), straight from the paper's formulas.

Paper: Y. Liu et al., "Transformer in Convolutional Neural Networks", arXiv 2106.03180, section 3.2. This file
needs torch alone and favours being read over being fast; :mod:`transcnn.fast` computes the same function faster.

Attention over all N = H·W positions of a feature map costs O(N²). H-MHSA computes it step by step: inside small
grids, then, each small patch of positions merged into one token, inside grids of tokens, and so on; at the end
every position attends to the few tokens that are left.

Letters
    B  images in the batch              C  channels, C = h·d
    H, W  height and width of a map     h  heads            d  channels of one head (``head_dim``)
    g  side of a grid in positions      r  pooling ratio, the side of a merged patch
    G  grids in one map                 N  positions in one grid, g·g
    L  levels                           M  tokens left at the last level
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["HMHSA", "LocalStep", "default_head_dim"]


class HMHSA(nn.Module):
    """Hierarchical multi-head self-attention over a feature map, (B, C, H, W) -> (B, C, H, W).

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
        grid_sizes: Side of the grids of each local step, in positions of the map that the step works on.
        pool_ratios: Side of the patches merged after each local step; as many as ``grid_sizes``.
        norm_layer: Makes a normalisation layer from a number of channels (BatchNorm in TransCNN, GroupNorm with
            one group in HAT-Net).
        bias: Whether the projections have a bias.
        device, dtype: Where and as what the parameters are made.

    Raises:
        ValueError: ``head_dim`` does not divide ``dim``, a grid size or ratio is below 1, their numbers differ, or,
            from ``forward``, the input is no (B, ``dim``, H, W) tensor.
    """

    fused_attn = True  # whether F.scaled_dot_product_attention computes the attention

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int | None = None,
        grid_sizes: Sequence[int] = (8,),
        pool_ratios: Sequence[int] = (8,),
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        head_dim = default_head_dim(dim) if head_dim is None else head_dim
        grid_sizes, pool_ratios = tuple(grid_sizes), tuple(pool_ratios)
        _check_arguments(dim, head_dim, grid_sizes, pool_ratios)
        self.dim = dim
        self.head_dim = head_dim
        self.num_heads = dim // head_dim
        self.grid_sizes = grid_sizes
        self.pool_ratios = pool_ratios

        def project(outputs: int) -> nn.Conv2d:
            return nn.Conv2d(dim, outputs, 1, bias=bias, device=device, dtype=dtype)

        def norm() -> nn.Module:
            return norm_layer(dim).to(device=device, dtype=dtype)

        self.local = nn.ModuleList(LocalStep(norm(), project(3 * dim), norm(), head_dim, g) for g in grid_sizes)
        if self.local:
            self.ds_norm = norm()  # "down-sampled norm": the released code's name for the norm of T_L
            self.q = project(dim)
            self.kv = project(2 * dim)
        else:
            self.norm = norm()
            self.qkv = project(3 * dim)
        self.proj = project(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        _check_input(x, self.dim)
        if not self.local:
            q, k, v = self.qkv(self.norm(x)).chunk(3, dim=1)
            return self.proj(global_attention(q, k, v, self.head_dim, self.fused_attn))

        tokens, ratio = x, 1  # each token stands for ratio×ratio positions
        steps: list[tuple[Tensor, int]] = []  # A₁ … A_{L-1}, each with its ratio
        for step, pool_ratio in zip(self.local, self.pool_ratios, strict=True):
            a = step(tokens)  # (B, C, ⌈H/ratio⌉, ⌈W/ratio⌉)
            steps.append((a, ratio))
            tokens = self.merge(a, pool_ratio)
            ratio *= pool_ratio

        a1 = steps[0][0]
        kv = self.kv(self.ds_norm(tokens))  # (B, 2C, ⌈H/ratio⌉, ⌈W/ratio⌉), M tokens
        y = self.global_step(self.q(a1), kv) + a1
        for a, level_ratio in steps[1:]:
            y = y + spread(a, level_ratio, a1)
        return self.proj(y)

    def merge(self, a: Tensor, ratio: int) -> Tensor:
        """Tokens of the next level, (B, C, H, W) -> (B, C, ⌈H/ratio⌉, ⌈W/ratio⌉)."""
        return merge(a, ratio)

    def global_step(self, q: Tensor, kv: Tensor) -> Tensor:
        """Attention of all positions to the merged tokens, (B, C, H, W) and (B, 2C, H', W') -> (B, C, H, W)."""
        k, v = kv.chunk(2, dim=1)
        return global_attention(q, k, v, self.head_dim, self.fused_attn)

    def set_fused_attn(self, enable: bool) -> None:
        """Compute the attention by ``F.scaled_dot_product_attention`` or, with ``enable=False``, step by step.

        Networks and :func:`transcnn.plug` take over what ``timm.layers.set_fused_attn`` says when they are made.
        """
        self.fused_attn = enable
        for step in self.local:
            step.fused_attn = enable  # pyright: ignore

    def extra_repr(self) -> str:
        return f"{self.dim}, head_dim={self.head_dim}, grid_sizes={self.grid_sizes}, pool_ratios={self.pool_ratios}"


class LocalStep(nn.Module):
    """Attention inside each grid, its input added, normalised: A = GridNorm(X + Attn), (B, C, H, W) -> (B, C, H, W).

    The layers are made by :class:`HMHSA`; the output channels of ``qkv`` are ordered (q, k, v) × heads × head_dim.
    """

    fused_attn = True

    def __init__(self, norm: nn.Module, qkv: nn.Conv2d, grid_norm: nn.Module, head_dim: int, grid_size: int) -> None:
        super().__init__()
        self.norm = norm
        self.qkv = qkv
        self.grid_norm = grid_norm
        self.head_dim = head_dim
        self.grid_size = grid_size

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        qkv = self.qkv(self.norm(x))
        return self.grid_norm(x + grid_attention(qkv, self.head_dim, self.grid_size, self.fused_attn))


def grid_attention(qkv: Tensor, head_dim: int, grid_size: int, fused: bool = True) -> Tensor:
    """Multi-head attention inside each grid_size×grid_size grid, (B, 3C, H, W) -> (B, C, H, W)."""
    batch, channels, height, width = qkv.shape
    tokens, mask = cut_into_grids(qkv, grid_size)  # (B·G, N, 3C), (B·G, 1, 1, N)
    tokens = tokens.unflatten(2, (3, channels // 3 // head_dim, head_dim))  # (B·G, N, 3, h, d)
    q, k, v = tokens.permute(2, 0, 3, 1, 4)  # (B·G, h, N, d) each
    out = attend(q, k, v, mask, fused)
    return join_grids(out.transpose(1, 2).flatten(2), grid_size, batch, height, width)


def global_attention(q: Tensor, k: Tensor, v: Tensor, head_dim: int, fused: bool = True) -> Tensor:
    """Every position of ``q`` attends to every token of ``k`` and ``v``.

    (B, C, H, W) and twice (B, C, H', W') -> (B, C, H, W).
    """

    def split(x: Tensor) -> Tensor:
        return x.flatten(2).unflatten(1, (-1, head_dim)).transpose(2, 3)  # (B, h, H·W, d)

    out = attend(split(q), split(k), split(v), fused=fused)  # (B, h, H·W, d)
    return out.transpose(2, 3).reshape(q.shape)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, fused: bool = True) -> Tensor:
    """softmax(Q·Kᵀ/√d)·V where ``mask`` is true, (..., N, d) and twice (..., M, d) -> (..., N, d)."""
    if not fused or (q.dtype == torch.bfloat16 and q.device.type == "cpu" and k.shape[-2] <= 256):
        # A CPU's fused kernel takes up to six times as long, most of it in the backward pass (docs/speed.md).
        scores = q @ k.mT * q.shape[-1] ** -0.5  # (..., N, M)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def cut_into_grids(x: Tensor, size: int) -> tuple[Tensor, Tensor | None]:
    """Cut a map into size×size grids from the top left corner, (B, C, H, W) -> (B·G, N, C).

    Where sizes don't divide, border grids are filled up with zeros; the second result then marks the real
    positions from those, (B·G, 1, 1, N) and ready to be an attention mask. It is None where all are real.
    """
    batch, _, height, width = x.shape
    rows, columns = _grids(height, size), _grids(width, size)
    below, beside = rows * size - height, columns * size - width
    # A graph that is exported for any size can't ask whether sizes divide: it always fills up and masks.
    ragged = _is_symbolic(height, width) or below or beside
    x = x.permute(0, 2, 3, 1)  # (B, H, W, C)
    mask = None
    if ragged:
        x = F.pad(x, (0, 0, 0, beside, 0, below))
        mask = real_positions(height, width, rows, columns, size, x.device)  # (G, N)
        mask = mask.repeat(batch, 1)[:, None, None]  # (B·G, 1, 1, N)
    x = x.reshape(batch, rows, size, columns, size, x.shape[3]).transpose(2, 3)  # (B, rows, columns, g, g, C)
    return x.reshape(batch * rows * columns, size * size, x.shape[5]), mask


def join_grids(x: Tensor, size: int, batch: int, height: int, width: int) -> Tensor:
    """Put grids back to where :func:`cut_into_grids` took them from, (B·G, N, C) -> (B, C, H, W)."""
    rows, columns = _grids(height, size), _grids(width, size)
    x = x.reshape(batch, rows, columns, size, size, x.shape[2]).transpose(2, 3)  # (B, rows, g, columns, g, C)
    x = x.reshape(batch, rows * size, columns * size, x.shape[5])
    return x[:, :height, :width].permute(0, 3, 1, 2)


def merge(x: Tensor, ratio: int) -> Tensor:
    """Average each ratio×ratio patch, of its real positions only, (B, C, H, W) -> (B, C, ⌈H/r⌉, ⌈W/r⌉)."""
    if ratio == 1:
        return x
    if torch.compiler.is_exporting():
        return _merge_padded(x, ratio)
    return F.avg_pool2d(x, ratio, ratio, ceil_mode=True, count_include_pad=False)


def _merge_padded(x: Tensor, ratio: int) -> Tensor:
    """The same for exported graphs, by whole patches: OpenVINO refuses to pool a map that is smaller than a patch."""
    missing, real = [], []
    for length in x.shape[2:]:
        patches = _grids(length, ratio)
        missing.append(patches * ratio - length)
        real.append((length - ratio * torch.arange(patches, device=x.device)).clamp(max=ratio).to(x.dtype))
    means = F.avg_pool2d(F.pad(x, (0, missing[1], 0, missing[0])), ratio, ratio)
    return means * (ratio / real[0])[:, None] * (ratio / real[1])


def spread(x: Tensor, ratio: int, like: Tensor) -> Tensor:
    """Give each merged token's value to all its positions, (B, C, ⌈H/r⌉, ⌈W/r⌉) -> (B, C, H, W) of ``like``."""
    height, width = like.shape[2:]
    x = x.repeat_interleave(ratio, dim=2).repeat_interleave(ratio, dim=3)
    return x[:, :, :height, :width]


def default_head_dim(dim: int) -> int:
    """The largest of 64, 48, 32, 16, 8, 4, 2, 1 that divides ``dim``."""
    return next(d for d in (64, 48, 32, 16, 8, 4, 2, 1) if dim % d == 0)


def _grids(length: int, size: int) -> int:
    """How many grids cover a side, ⌈length/size⌉; without negative numbers, whose division ONNX rounds otherwise."""
    return (length + size - 1) // size


def real_positions(height: int, width: int, rows: int, columns: int, size: int, device: torch.device) -> Tensor:
    """Which positions of each grid lie inside the map, (G, N)."""
    y = torch.arange(rows * size, device=device) < height
    x = torch.arange(columns * size, device=device) < width
    real = y.view(rows, 1, size, 1) & x.view(1, columns, 1, size)  # (rows, columns, g, g)
    return real.reshape(rows * columns, size * size)


def _is_symbolic(*sizes: int) -> bool:
    return torch.compiler.is_exporting() and any(isinstance(size, torch.SymInt) for size in sizes)


def _check_arguments(dim: int, head_dim: int, grid_sizes: tuple[int, ...], pool_ratios: tuple[int, ...]) -> None:
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
        if any(not isinstance(value, int) or value < 1 for value in values):
            raise ValueError(f"{name} must be whole numbers of 1 or more, got {values}")


def _check_input(x: Tensor, dim: int) -> None:
    if x.ndim != 4:
        raise ValueError(f"expected a (B, {dim}, H, W) tensor, got {x.ndim} dimensions: {tuple(x.shape)}")
    if x.shape[1] != dim:
        raise ValueError(f"expected {dim} channels, got {x.shape[1]} in {tuple(x.shape)}")
    if x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"expected H and W of 1 or more, got {tuple(x.shape)}")


# Functions that look at sizes stay whole when torch.fx traces a model (timm's feature extraction does).
torch.fx.wrap("_check_input")
torch.fx.wrap("grid_attention")
torch.fx.wrap("global_attention")
torch.fx.wrap("spread")
