"""H-MHSA for inference on (B, *S, C): by kernels where they fit, else by PyTorch's operations in tiles.

The kernels take maps (B, H, W, C) with square grids. A sequence is one of a single row. Grids of a volume are cut out,
and each is a map of its own of √N x √N or 1xN positions; where some of them hold fewer positions, PyTorch's operations
run, and so they do where grids differ by axis. The global step sees a volume as a map of D·H rows.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...attention import HMHSA, SIZES, LocalStep
from ...grids import Size, channels_first, cut_into_grids, join_grids, merge, per_axis, product, real_positions, spread
from ..cpu import inference as cpu
from ..cpu.call import MAX_HEAD_DIM
from ..cpu.passes import average_pool as average_pool_on_cpu
from ..dispatch import fits_cpu, fits_triton, to_nchw, to_nhwc, traced, uses_triton_grids
from .attend import attend
from .entry import InferenceOnly, entry, refuse_mask
from .layers import FastGroupNorm, Pointwise, affine, constant, fuse, gemm_fits
from .replays import Replays
from .tiles import Tile, in_tiles

__all__ = ["FastHMHSA", "FastLocalStep"]


class FastLocalStep(InferenceOnly):
    """:class:`transcnn.attention.LocalStep` for inference, (B, *S, C) -> (B, *S, C)."""

    def __init__(self, step: LocalStep) -> None:
        super().__init__()
        self.head_dim, self.grid_size, self.fused_attn = step.head_dim, step.grid_size, step.fused_attn
        before, grid = affine(step.norm), affine(step.grid_norm)
        one = step.qkv.weight.new_ones(step.qkv.in_channels, dtype=torch.double)
        scale, shift = (one, 0 * one) if grid is None else grid
        after = torch.cat((one * step.head_dim**-0.5, one, scale)), torch.cat((0 * one, 0 * one, shift))
        self.norm = None if before is not None else fuse([step.norm])
        self.qkv = Pointwise(step.qkv, before, after)
        self.scale = None if grid is None else constant(grid[0], step.qkv.weight)
        self.grid_norm = None if grid is not None else fuse([step.grid_norm])
        self._scale = cpu.Packed(Tensor.float)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *S, C) -> (B, *S, C)."""
        normed = x if self.norm is None else self.norm(x)
        ndim = x.ndim - 2
        if ndim == 2:
            a = self._attend(x, normed, self.grid_size)
        elif ndim == 1:  # a map of one row; its grids are of one row, too
            size = per_axis(self.grid_size, 1)[0]
            a = self._attend(x[:, None], normed[:, None], (1, size))[:, 0]
        else:
            a = self._attend_in_volume(x, normed)
        if self.grid_norm is None:
            return a
        norm = self.grid_norm[0] if len(self.grid_norm) == 1 else self.grid_norm
        return norm(a, overwrite=True) if isinstance(norm, FastGroupNorm) else norm(a)

    def _attend_in_volume(self, x: Tensor, normed: Tensor) -> Tensor:
        """The same for (B, D, H, W, C): grids, cut out, are maps of one grid each."""
        (rows, keys), (normed_rows, _) = (cut_into_grids(channels_first(t), self.grid_size) for t in (x, normed))
        if keys is None:
            n = rows.shape[1]
            side = math.isqrt(n)
            shape = (side, side) if side * side == n else (1, n)
            size = side if side * side == n else shape
            out = self._attend(rows.unflatten(1, shape), normed_rows.unflatten(1, shape), size).flatten(1, 2)
        else:
            out = self._add(self._attend_rows(normed_rows, keys), rows)
        return to_nhwc(join_grids(out, self.grid_size, len(x), x.shape[1:-1]))

    def _attend(self, x: Tensor, normed: Tensor, size: Size) -> Tensor:
        """The sum of x, scaled where GridNorm is folded, and the attention inside each grid, (B, H, W, C)."""
        # The kernels' grids are square; where the map is one row, so are those of one row.
        square = size if isinstance(size, int) else size[1] if size[0] == x.shape[1] == 1 else None
        if square and x.dtype == self.qkv.weight.dtype and uses_triton_grids(x, self.head_dim, square):
            from ..triton import local_attention

            qkv = self.qkv(normed)
            return local_attention.attend(qkv, self.head_dim, square, 1.0, residual=x, factor=self.scale)
        if square and self.head_dim <= MAX_HEAD_DIM and gemm_fits(self.qkv, x, self.head_dim):
            scale = None if self.scale is None else self._scale(self.scale)
            return cpu.local_attention(x, normed, self.qkv.packed(), scale, self.head_dim, square)
        sizes = per_axis(size, 2)

        def compute(tile: Tile) -> Tensor:
            return self._cut_and_attend(x[tile], normed[tile], sizes)

        return in_tiles(compute, x, 3 * x.shape[3], sizes[0])

    def _add(self, out: Tensor, x: Tensor) -> Tensor:
        return out + x if self.scale is None else torch.addcmul(out, x, self.scale)

    def _attend_rows(self, normed: Tensor, mask: Tensor | None) -> Tensor:
        """Attention among the tokens of each grid, (B·G, N, C) -> (B·G, N, C)."""
        qkv = self.qkv(normed).unflatten(2, (3, normed.shape[2] // self.head_dim, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B·G, h, N, d) each
        return attend(q, k, v, mask, self.fused_attn).transpose(1, 2).flatten(2)

    def _cut_and_attend(self, x: Tensor, normed: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """:meth:`_attend` by PyTorch's operations."""
        batch, height, width, channels = x.shape
        g, h = sizes
        rows, columns = (height + g - 1) // g, (width + h - 1) // h
        padding = (0, 0, 0, columns * h - width, 0, rows * g - height)
        ragged = any(padding)
        if ragged:
            normed, x = F.pad(normed, padding), F.pad(x, padding)

        def grids(tokens: Tensor) -> Tensor:  # a view, (B, rows, columns, g, h, C)
            return tokens.view(batch, rows, g, columns, h, channels).transpose(2, 3)

        mask = None
        if ragged:
            mask = real_positions((height, width), (rows, columns), sizes, x.device)  # (G, N)
            mask = mask.repeat(batch, 1)[:, None, None]  # (B·G, 1, 1, N)
        out = self._attend_rows(grids(normed).reshape(-1, g * h, channels), mask)
        out = out.reshape(batch, rows, columns, g, h, channels)
        if torch.compiler.is_compiling() or traced():  # which know no operations that write into views
            a = self._add(out, grids(x)).transpose(2, 3).reshape(x.shape)
            return a[:, :height, :width].contiguous()
        a = torch.empty_like(x)  # sum and join in one pass: results are written to their positions in the map
        if self.scale is None:
            torch.add(out, grids(x), out=grids(a))
        else:
            torch.addcmul(out, grids(x), self.scale, out=grids(a))
        return a[:, :height, :width].contiguous()


class FastHMHSA(InferenceOnly):
    """:class:`transcnn.HMHSA` for inference, (B, C, *S) -> (B, C, *S), without masks."""

    def __init__(self, attn: HMHSA) -> None:
        super().__init__()
        self.ndim = attn.ndim
        self.dim, self.head_dim, self.num_heads = attn.dim, attn.head_dim, attn.num_heads
        self.grid_sizes, self.pool_ratios, self.fused_attn = attn.grid_sizes, attn.pool_ratios, attn.fused_attn
        self.local = nn.ModuleList(FastLocalStep(step) for step in attn.local)  # pyright: ignore
        self.norm_kv = None
        one = attn.proj.weight.new_ones(attn.dim, dtype=torch.double)
        if self.local:
            before = affine(attn.ds_norm)
            self.norm_kv = None if before is not None else fuse([attn.ds_norm])
            self.q = Pointwise(attn.q, after=(one * attn.head_dim**-0.5, 0 * one))
            self.kv = Pointwise(attn.kv, before)
        else:
            before = affine(attn.norm)
            self.norm_kv = None if before is not None else fuse([attn.norm])
            after = torch.cat((one * attn.head_dim**-0.5, one, one)), torch.cat((0 * one, 0 * one, 0 * one))
            self.qkv = Pointwise(attn.qkv, before, after)
        self.proj = Pointwise(attn.proj)
        self._replays = Replays()

    def weight_like(self) -> Tensor:
        """The last projection's, which every one has."""
        return self.proj.weight

    @entry
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C, *S) -> (B, C, *S)."""
        refuse_mask(mask)
        if x.ndim != self.ndim + 2 or x.shape[1] != self.dim:
            raise ValueError(f"expected a (B, {self.dim}, {SIZES[self.ndim]}) tensor, got {tuple(x.shape)}")
        return to_nchw(self._replays(self, self.forward_nhwc, to_nhwc(x)))

    def forward_nhwc(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The same on (B, *S, C) -> (B, *S, C), plus ``residual`` where given."""
        batch = len(x)
        if not self.local:
            normed = x if self.norm_kv is None else self.norm_kv(x)
            qkv = self.qkv(normed)
            if self.head_dim <= MAX_HEAD_DIM and gemm_fits(self.qkv, normed, self.head_dim):
                return self.proj(cpu.full_attention(qkv.flatten(1, -2), self.head_dim).view(x.shape), residual)
            qkv = qkv.view(batch, x.shape[1:-1].numel(), 3, self.num_heads, self.head_dim)
            out = attend(*qkv.permute(2, 0, 3, 1, 4), fused=self.fused_attn)  # (B, h, N, d)
            return self.proj(out.transpose(1, 2).reshape(x.shape), residual)

        merged, ratio = x, (1,) * self.ndim
        steps: list[tuple[Tensor, tuple[int, ...]]] = []  # A₁, A₂, ..., each (B, *⌈S/ratio⌉, C), and its ratio
        for step, pool_ratio in zip(self.local, self.pool_ratios, strict=True):
            a = step(merged)
            steps.append((a, ratio))
            merged = _merge(a, pool_ratio)
            ratio = product(ratio, pool_ratio)
        (a1, _), *further = steps
        merged = merged if self.norm_kv is None else self.norm_kv(merged)
        kv = self.kv(merged).flatten(1, -2)  # (B, M, 2C)
        a1, further = _as_map(a1, further)
        residual = None if residual is None else residual.reshape(a1.shape)
        return self._global_step(a1, kv, further, residual).view(x.shape)

    def _global_step(
        self, a1: Tensor, kv: Tensor, further: list[tuple[Tensor, int]], residual: Tensor | None
    ) -> Tensor:
        """Attention of all positions to the merged tokens, the sum and the last projection, (B, H, W, C)."""
        if self.head_dim <= MAX_HEAD_DIM and gemm_fits(self.q, a1, self.head_dim):
            q, proj = self.q.packed(), self.proj.packed()
            return cpu.global_attention(a1, residual, q, kv, proj, further, self.head_dim)
        kv = kv.unflatten(2, (2, self.num_heads, self.head_dim))  # (B, M, 2, h, d)

        def compute(tile: Tile) -> Tensor:
            a = a1[tile]
            q = self.q(a).view(len(a), a.shape[1] * a.shape[2], self.num_heads, self.head_dim)
            y = attend(q.transpose(1, 2), *kv[tile[0]].permute(2, 0, 3, 1, 4), fused=self.fused_attn)  # (b, h, n, d)
            y = y.transpose(1, 2).reshape(a.shape).add_(a)
            for level, ratio in further:
                y.add_(_spread(level, ratio, tile))
            return self.proj(y, None if residual is None else residual[tile])

        return in_tiles(compute, a1, 3 * self.dim, out=a1)  # a tile of which is read before it is written


def _as_map(a1: Tensor, further: list[tuple[Tensor, tuple[int, ...]]]) -> tuple[Tensor, list[tuple[Tensor, int]]]:
    """A₁ as (B, H, W, C) of however many rows, and further levels with one ratio each."""
    ndim = a1.ndim - 2
    if ndim == 1:
        return a1[:, None], [(a[:, None], ratio[0]) for a, ratio in further]
    if ndim == 2 and all(len(set(ratio)) == 1 for _, ratio in further):
        return a1, [(a, ratio[0]) for a, ratio in further]
    whole = [to_nhwc(spread(to_nchw(a), ratio, to_nchw(a1))).flatten(1, -3) for a, ratio in further]
    return a1.flatten(1, -3), [(a, 1) for a in whole]


def _merge(x: Tensor, ratio: Size) -> Tensor:
    """:func:`transcnn.attention.merge` on (B, *S, C) -> (B, *⌈S/r⌉, C)."""
    if x.ndim == 4 and isinstance(ratio, int) and ratio > 1 and fits_triton(x):
        from ..triton.pool import average_pool

        return average_pool(x.contiguous(), ratio)
    if ratio != 1 and x.ndim in (3, 4) and fits_cpu(x, gemm=False):
        ratios = (1, *per_axis(ratio, 1)) if x.ndim == 3 else per_axis(ratio, 2)
        y = average_pool_on_cpu(x[:, None] if x.ndim == 3 else x, ratios)  # pyright: ignore
        return y[:, 0] if x.ndim == 3 else y
    return to_nhwc(merge(to_nchw(x), ratio))


def _spread(x: Tensor, ratio: int, tile: Tile) -> Tensor:
    """A tile of :func:`transcnn.attention.spread` on (B, ⌈H/r⌉, ⌈W/r⌉, C) -> (b, h, w, C)."""
    images, *sides = tile
    x = x[images]
    for dim, side in enumerate(sides, start=1):
        x = x.index_select(dim, torch.arange(side.start, side.stop, device=x.device) // ratio)
    return x
