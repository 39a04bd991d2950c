"""H-MHSA for inference on (B, H, W, C): by kernels where they fit, else by PyTorch's operations in tiles."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...attention import HMHSA, LocalStep, merge, real_positions
from ..cpu import inference as cpu
from ..cpu.call import MAX_HEAD_DIM
from ..dispatch import fits_triton, to_nchw, to_nhwc, uses_triton_grids
from .attend import attend
from .entry import InferenceOnly, entry
from .layers import Pointwise, affine, constant, fuse, gemm_fits
from .tiles import Tile, in_tiles

__all__ = ["FastHMHSA", "FastLocalStep"]


class FastLocalStep(InferenceOnly):
    """:class:`transcnn.attention.LocalStep` for inference, (B, H, W, C) -> (B, H, W, C)."""

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
        """(B, H, W, C) -> (B, H, W, C)."""
        normed = x if self.norm is None else self.norm(x)
        if x.dtype == self.qkv.weight.dtype and uses_triton_grids(x, self.head_dim, self.grid_size):
            from ..triton import local_attention

            qkv = self.qkv(normed)
            a = local_attention.attend(qkv, self.head_dim, self.grid_size, 1.0, residual=x, factor=self.scale)
        elif self.head_dim <= MAX_HEAD_DIM and gemm_fits(self.qkv, x, self.head_dim):
            scale = None if self.scale is None else self._scale(self.scale)
            a = cpu.local_attention(x, normed, self.qkv.packed(), scale, self.head_dim, self.grid_size)
        else:

            def compute(tile: Tile) -> Tensor:
                return self._cut_and_attend(x[tile], normed[tile])

            a = in_tiles(compute, x, 3 * x.shape[3], self.grid_size)
        return a if self.grid_norm is None else self.grid_norm(a)

    def _cut_and_attend(self, x: Tensor, normed: Tensor) -> Tensor:
        """The sum of x, scaled where GridNorm is folded, and the attention inside each grid, (B, H, W, C)."""
        batch, height, width, channels = x.shape
        size = self.grid_size
        rows, columns = (height + size - 1) // size, (width + size - 1) // size
        padding = (0, 0, 0, columns * size - width, 0, rows * size - height)
        ragged = any(padding)
        if ragged:
            normed, x = F.pad(normed, padding), F.pad(x, padding)

        def grids(tokens: Tensor) -> Tensor:  # a view, (B, rows, columns, g, g, C)
            return tokens.view(batch, rows, size, columns, size, channels).transpose(2, 3)

        qkv = self.qkv(grids(normed).reshape(-1, size * size, channels))  # (B·G, N, 3C)
        qkv = qkv.unflatten(2, (3, channels // self.head_dim, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B·G, h, N, d) each
        mask = _inside(height, width, rows, columns, size, batch, x.device) if ragged else None
        out = attend(q, k, v, mask, self.fused_attn).transpose(1, 2).reshape(batch, rows, columns, size, size, channels)
        a = torch.empty_like(x)  # sum and join in one pass: results are written to their positions in the map
        if self.scale is None:
            torch.add(out, grids(x), out=grids(a))
        else:
            torch.addcmul(out, grids(x), self.scale, out=grids(a))
        return a[:, :height, :width].contiguous()


class FastHMHSA(InferenceOnly):
    """:class:`transcnn.HMHSA` for inference, (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, attn: HMHSA) -> None:
        super().__init__()
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

    def weight_like(self) -> Tensor:
        """The last projection's, which every one has."""
        return self.proj.weight

    @entry
    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if x.ndim != 4 or x.shape[1] != self.dim:
            raise ValueError(f"expected a (B, {self.dim}, H, W) tensor, got {tuple(x.shape)}")
        return to_nchw(self.forward_nhwc(to_nhwc(x)))

    def forward_nhwc(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The same on (B, H, W, C) -> (B, H, W, C), plus ``residual`` where given."""
        batch, height, width, _ = x.shape
        if not self.local:
            normed = x if self.norm_kv is None else self.norm_kv(x)
            qkv = self.qkv(normed).view(batch, height * width, 3, self.num_heads, self.head_dim)
            out = attend(*qkv.permute(2, 0, 3, 1, 4), fused=self.fused_attn)  # (B, h, H·W, d)
            return self.proj(out.transpose(1, 2).reshape(x.shape), residual)

        merged, ratio = x, 1
        steps = []  # A₁, A₂, ..., each (B, ⌈H/ratio⌉, ⌈W/ratio⌉, C), and its ratio
        for step, pool_ratio in zip(self.local, self.pool_ratios, strict=True):
            a = step(merged)
            steps.append((a, ratio))
            merged = _merge(a, pool_ratio)
            ratio *= pool_ratio
        (a1, _), *further = steps
        merged = merged if self.norm_kv is None else self.norm_kv(merged)
        kv = self.kv(merged)
        if self.head_dim <= MAX_HEAD_DIM and gemm_fits(self.q, x, self.head_dim):
            q, proj = self.q.packed(), self.proj.packed()
            return cpu.global_attention(a1, residual, q, kv.flatten(1, 2), proj, further, self.head_dim)
        kv = kv.view(batch, kv.shape[1] * kv.shape[2], 2, self.num_heads, self.head_dim)

        def compute(tile: Tile) -> Tensor:
            a = a1[tile]
            q = self.q(a).view(len(a), a.shape[1] * a.shape[2], self.num_heads, self.head_dim)
            y = attend(q.transpose(1, 2), *kv[tile[0]].permute(2, 0, 3, 1, 4), fused=self.fused_attn)  # (b, h, n, d)
            y = y.transpose(1, 2).reshape(a.shape).add_(a)
            for level, ratio in further:
                y.add_(_spread(level, ratio, tile))
            return self.proj(y, None if residual is None else residual[tile])

        return in_tiles(compute, x, 3 * self.dim, out=a1)  # a tile of which is read before it is written


def _merge(x: Tensor, ratio: int) -> Tensor:
    """:func:`transcnn.attention.merge` on (B, H, W, C) -> (B, ⌈H/r⌉, ⌈W/r⌉, C)."""
    if ratio > 1 and fits_triton(x):
        from ..triton.pool import average_pool

        return average_pool(x.contiguous(), ratio)
    return to_nhwc(merge(to_nchw(x), ratio))


def _spread(x: Tensor, ratio: int, tile: Tile) -> Tensor:
    """A tile of :func:`transcnn.attention.spread` on (B, ⌈H/r⌉, ⌈W/r⌉, C) -> (b, h, w, C)."""
    images, *sides = tile
    x = x[images]
    for dim, side in enumerate(sides, start=1):
        x = x.index_select(dim, torch.arange(side.start, side.stop, device=x.device) // ratio)
    return x


def _inside(height: int, width: int, rows: int, columns: int, size: int, batch: int, device: torch.device) -> Tensor:
    """Which positions of each grid lie inside the map, (B·G, 1, 1, N)."""
    return real_positions(height, width, rows, columns, size, device).repeat(batch, 1)[:, None, None]
