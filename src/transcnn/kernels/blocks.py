"""The blocks of the networks as inference wants them: layers of :mod:`.tokens`, or kernels of our own for them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import HMHSA, LocalStep, merge, real_positions
from .attend import attend
from .entry import Frozen, entry
from .gpu.runs import fits
from .grid import takes_grids
from .native import calls as native
from .parts import Part, in_parts
from .tokens import Convolution, Matrix, OnTokens, affine, frozen, fuse, has_kernels, to_map, to_tokens

__all__ = ["FastBlock", "FastDualDownsample", "FastHMHSA", "FastLocalStep", "FastResidual", "FastStem"]


class FastResidual(Frozen):
    """Expansion, depthwise convolution and projection, a part at a time, (B, H, W, C) -> (B, H, W, C').

    A part's hidden map reaches as far beyond it as the convolution looks; that border is computed twice.
    """

    def __init__(self, expand: Matrix, mix: Convolution, project: Matrix) -> None:
        super().__init__()
        self.expand, self.mix, self.project = expand, mix, project
        self.reach = mix.weight.shape[2] // 2
        self._pack = native.Packed(native.pack_residual)

    def forward(self, x: Tensor, residual: Tensor | None = None, spent: bool = False) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C'), plus ``residual`` (B, H, W, C') where given.

        ``spent`` tells that nobody else needs ``residual``, so that the result may be written over it.
        """
        if self._is_usual() and has_kernels(self.expand, x, x.shape[3], len(self.project.weight)):
            layers = (self.expand, self.mix, self.project)
            weights = self._pack(*(tensor for layer in layers for tensor in (layer.weight, layer.bias)))
            over = spent and residual is not None and residual.dtype == x.dtype and residual.is_contiguous()
            return native.inverted_residual(x, residual, *weights, out=residual if over else None)

        def part(where: Part) -> Tensor:
            images, rows, columns = where
            wide_rows, own_rows = self._widen(rows, x.shape[1])
            wide_columns, own_columns = self._widen(columns, x.shape[2])
            y = self.mix(self.expand(x[images, wide_rows, wide_columns].contiguous()))[:, own_rows, own_columns]
            return self.project(y.contiguous(), None if residual is None else residual[where].contiguous())

        return in_parts(part, x, self.expand.weight.shape[0], reach=self.reach)

    def _is_usual(self) -> bool:
        """Whether these are the layers that the kernel has."""
        hidden, _, size, width = self.mix.weight.shape
        usual = self.mix.options == ((1, 1), (size // 2,) * 2, (1, 1), hidden) and size == width in native.SIZES
        return usual and self.expand.silu and self.mix.silu and not self.project.silu

    def _widen(self, part: slice, length: int) -> tuple[slice, slice]:
        """What a part of ``length`` positions sees, and where in that the part itself lies."""
        start, stop = max(0, part.start - self.reach), min(length, part.stop + self.reach)
        return slice(start, stop), slice(part.start - start, part.stop - start)


class FastLocalStep(Frozen):
    """:class:`transcnn.attention.LocalStep` on tokens, (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, step: LocalStep) -> None:
        super().__init__()
        self.head_dim, self.grid_size = step.head_dim, step.grid_size
        before, grid = affine(step.norm), affine(step.grid_norm)
        one = step.qkv.weight.new_ones(step.qkv.in_channels, dtype=torch.double)
        scale, shift = (one, 0 * one) if grid is None else grid
        after = torch.cat((one * step.head_dim**-0.5, one, scale)), torch.cat((0 * one, 0 * one, shift))
        self.norm = None if before is not None else fuse([step.norm])
        self.qkv = Matrix(step.qkv, before, after)
        self.scale = None if grid is None else frozen(grid[0], step.qkv.weight)
        self.grid_norm = None if grid is not None else fuse([step.grid_norm])
        self._scale = native.Packed(Tensor.float)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        normed = x if self.norm is None else self.norm(x)
        if x.dtype == self.qkv.weight.dtype and takes_grids(x, self.head_dim, self.grid_size):
            from .gpu.grids import attend as fused

            a = fused(self.qkv(normed), self.head_dim, self.grid_size, 1.0, own=x, factor=self.scale)
        elif self.head_dim <= native.MOST and has_kernels(self.qkv, x, self.head_dim):
            scale = None if self.scale is None else self._scale(self.scale)
            a = native.attend_locally(x, normed, self.qkv.packed(), scale, self.head_dim, self.grid_size)
        else:

            def part(where: Part) -> Tensor:
                return self._cut_and_attend(x[where], normed[where])

            a = in_parts(part, x, 3 * x.shape[3], self.grid_size)
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
        mask = _real(height, width, rows, columns, size, batch, x.device) if ragged else None
        out = attend(q, k, v, mask).transpose(1, 2).reshape(batch, rows, columns, size, size, channels)
        a = torch.empty_like(x)  # sum and join in one pass: each result is written to its place in the map
        if self.scale is None:
            torch.add(out, grids(x), out=grids(a))
        else:
            torch.addcmul(out, grids(x), self.scale, out=grids(a))
        return a[:, :height, :width].contiguous()


class FastHMHSA(Frozen):
    """:class:`transcnn.HMHSA` for inference, (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, attn: HMHSA) -> None:
        super().__init__()
        self.dim, self.head_dim, self.num_heads = attn.dim, attn.head_dim, attn.num_heads
        self.grid_sizes, self.pool_ratios = attn.grid_sizes, attn.pool_ratios
        self.local = nn.ModuleList(FastLocalStep(step) for step in attn.local)  # pyright: ignore
        self.norm_kv = None
        one = attn.proj.weight.new_ones(attn.dim, dtype=torch.double)
        if self.local:
            before = affine(attn.ds_norm)
            self.norm_kv = None if before is not None else fuse([attn.ds_norm])
            self.q = Matrix(attn.q, after=(one * attn.head_dim**-0.5, 0 * one))
            self.kv = Matrix(attn.kv, before)
        else:
            before = affine(attn.norm)
            self.norm_kv = None if before is not None else fuse([attn.norm])
            after = torch.cat((one * attn.head_dim**-0.5, one, one)), torch.cat((0 * one, 0 * one, 0 * one))
            self.qkv = Matrix(attn.qkv, before, after)
        self.proj = Matrix(attn.proj)

    def weight_like(self) -> Tensor:
        """The last projection's, which every one has."""
        return self.proj.weight

    @entry
    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if x.ndim != 4 or x.shape[1] != self.dim:
            raise ValueError(f"expected a (B, {self.dim}, H, W) tensor, got {tuple(x.shape)}")
        return to_map(self.tokens(to_tokens(x)))

    def tokens(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The same on tokens, (B, H, W, C) -> (B, H, W, C), plus ``residual`` where given."""
        batch, height, width, _ = x.shape
        if not self.local:
            normed = x if self.norm_kv is None else self.norm_kv(x)
            qkv = self.qkv(normed).view(batch, height * width, 3, self.num_heads, self.head_dim)
            out = attend(*qkv.permute(2, 0, 3, 1, 4))  # (B, h, H·W, d)
            return self.proj(out.transpose(1, 2).reshape(x.shape), residual)

        merged, ratio = x, 1
        steps = []  # what each gives, (B, ⌈H/ratio⌉, ⌈W/ratio⌉, C), and its ratio
        for step, pool_ratio in zip(self.local, self.pool_ratios, strict=True):
            a = step(merged)
            steps.append((a, ratio))
            merged = _merge(a, pool_ratio)
            ratio *= pool_ratio
        (a1, _), *further = steps
        merged = merged if self.norm_kv is None else self.norm_kv(merged)
        kv = self.kv(merged)
        if self.head_dim <= native.MOST and has_kernels(self.q, x, self.head_dim):
            q, proj = self.q.packed(), self.proj.packed()
            return native.attend_globally(a1, residual, q, kv.flatten(1, 2), proj, further, self.head_dim)
        kv = kv.view(batch, -1, 2, self.num_heads, self.head_dim)

        def part(where: Part) -> Tensor:
            own = a1[where]
            q = self.q(own).view(len(own), -1, self.num_heads, self.head_dim)
            seen = attend(q.transpose(1, 2), *kv[where[0]].permute(2, 0, 3, 1, 4))  # (b, h, n, d)
            seen = seen.transpose(1, 2).reshape(own.shape).add_(own)
            for a, ratio in further:
                seen.add_(_spread(a, ratio, where))
            return self.proj(seen, None if residual is None else residual[where])

        return in_parts(part, x, 3 * self.dim, out=a1)  # whose part is read before it is written


class FastBlock(Frozen):
    """A block of TransCNN or HAT-Net for inference, (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, attn: HMHSA, irb: Iterable[nn.Module]) -> None:
        super().__init__()
        self.attn = FastHMHSA(attn)
        self.irb = _as_residual(fuse(irb))

    def weight_like(self) -> Tensor:
        """That of the attention."""
        return self.attn.proj.weight

    @entry
    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = to_tokens(x)
        x = self.attn.tokens(x, residual=x)
        *first, last = self.irb
        y = x
        for layer in first:
            y = layer(y)
        if isinstance(last, FastResidual):
            return to_map(last(y, x, spent=True))  # attention made it, and a large map less is much less memory
        if isinstance(last, Matrix):
            return to_map(last(y, x))
        return to_map(last(y).add(x))


class FastDualDownsample(Frozen):
    """TransCNN's halving for inference, (B, C, H, W) -> (B, C', ⌈H/2⌉, ⌈W/2⌉)."""

    def __init__(
        self, conv: Iterable[nn.Module], pool: nn.Module, residual: Iterable[nn.Module], act: nn.Module
    ) -> None:
        super().__init__()
        self.conv, self.pool, self.residual, self.act = fuse(conv), pool, fuse(residual), act

    @entry
    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ⌈H/2⌉, ⌈W/2⌉)."""
        tokens = to_tokens(x)
        y = self.conv(tokens)
        matrix = self.residual[0]
        if self._is_usual() and has_kernels(matrix, tokens, *matrix.weight.shape):  # pyright: ignore
            return to_map(native.add_pooled(tokens, y, matrix.packed()))  # pyright: ignore
        return self.act(to_map(y.add_(self.residual(to_tokens(self.pool(x))))))

    def _is_usual(self) -> bool:
        """Whether these are the layers that the kernel has."""
        pool = self.pool
        halves = type(pool) is nn.MaxPool2d and (pool.kernel_size, pool.stride, pool.ceil_mode) == (2, 2, True)
        plain = type(self.act) is nn.SiLU and len(self.residual) == 1 and isinstance(self.residual[0], Matrix)
        return halves and plain and len(self.conv) == 1


class FastStem(OnTokens):
    """TransCNN's stem for inference: two convolutions, whose first map is never whole in memory where kernels run."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__(layers)
        self._pack = native.Packed(native.pack_stem)

    @entry
    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        if not self._is_usual():
            return super().forward(x)
        first, second = self._convolutions()
        widths = len(first.weight), len(second.weight)
        matches = x.ndim == 4 and x.shape[1] == first.weight.shape[1]
        if not matches or not native.fits(x, *widths, products=False):
            return super().forward(x)
        affine1, affine2 = self._pack(first.weight, first.bias, second.weight, second.bias)
        strides = first.options[0][0], second.options[0][0]
        return to_map(native.stem(x, affine1, affine2, strides))

    def _is_usual(self) -> bool:
        """Whether these are the layers that the kernel has."""
        row = self._convolutions()
        if len(self.layers) != 2 or len(row) != 2 or any(layer.bias is None for layer in row):
            return False
        known = [((stride, stride), (1, 1), (1, 1), 1) for stride in (1, 2)]
        usual = all(layer.options in known and layer.weight.shape[2:] == (3, 3) for layer in row)
        return usual and row[0].silu and not row[1].silu

    def _convolutions(self) -> list[Convolution]:
        return [layer for layer in self.layers if isinstance(layer, Convolution)]


def _merge(x: Tensor, ratio: int) -> Tensor:
    """:func:`transcnn.attention.merge` on tokens, (B, H, W, C) -> (B, ⌈H/r⌉, ⌈W/r⌉, C)."""
    if ratio > 1 and fits(x):
        from .gpu.pool import average

        return average(x.contiguous(), ratio)
    return to_tokens(merge(to_map(x), ratio))


def _spread(x: Tensor, ratio: int, where: Part) -> Tensor:
    """A part of :func:`transcnn.attention.spread` on tokens, (B, ⌈H/r⌉, ⌈W/r⌉, C) -> (b, h, w, C)."""
    images, *sides = where
    x = x[images]
    for dim, side in enumerate(sides, start=1):
        x = x.index_select(dim, torch.arange(side.start, side.stop, device=x.device) // ratio)
    return x


def _as_residual(layers: nn.Sequential) -> nn.Sequential:
    """``layers`` with the three of an inverted residual, if they follow each other, as one."""
    row = list(layers)
    for i, three in enumerate(zip(row, row[1:], row[2:], strict=False)):
        expand, mix, project = three
        if isinstance(expand, Matrix) and isinstance(mix, Convolution) and isinstance(project, Matrix):
            return nn.Sequential(*row[:i], FastResidual(expand, mix, project), *row[i + 3 :])
    return layers


def _real(height: int, width: int, rows: int, columns: int, size: int, batch: int, device: torch.device) -> Tensor:
    """Which positions of each grid lie inside the map, (B·G, 1, 1, N)."""
    return real_positions(height, width, rows, columns, size, device).repeat(batch, 1)[:, None, None]
