"""Blocks, downsampling and stem for inference: layers of :mod:`.layers`, or a kernel for several of them at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ...attention import HMHSA
from ..cpu import inference as cpu
from ..cpu.call import KERNEL_SIZES
from ..cpu.inverted_residual import InvertedResiduals, pack_inverted_residual
from ..dispatch import fits_cpu, hooked, to_nchw, to_nhwc
from .attention import FastHMHSA
from .convolutions import FastMaxPool2d
from .entry import InferenceOnly, entry, refuse_mask
from .layers import NHWC, FastGroupNorm, Pointwise, SpatialConv, fuse, gemm_fits
from .replays import Replays
from .tiles import Tile, in_tiles

__all__ = ["FastBlock", "FastDualDownsample", "FastInvertedResidual", "FastStages", "FastStem"]


class FastInvertedResidual(InferenceOnly):
    """Expansion, depthwise convolution and projection in tiles, (B, H, W, C) -> (B, H, W, C').

    The hidden map of a tile includes the halo of the depthwise convolution, which is computed twice.
    """

    def __init__(self, expand: Pointwise, depthwise: SpatialConv, project: Pointwise) -> None:
        super().__init__()
        self.expand, self.depthwise, self.project = expand, depthwise, project
        self.halo = depthwise.weight.shape[2] // 2
        self._pack = cpu.Packed(_packed)

    def forward(self, x: Tensor, residual: Tensor | None = None, overwrite: bool = False) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C'), plus ``residual`` (B, H, W, C') where given.

        With ``overwrite`` the result may be written over ``residual``.
        """
        if self._matches_pattern() and gemm_fits(self.expand, x, x.shape[3], len(self.project.weight)):
            layers = (self.expand, self.depthwise, self.project)
            ready = self._pack(*(tensor for layer in layers for tensor in (layer.weight, layer.bias)))
            reuse = overwrite and residual is not None and residual.dtype == x.dtype and residual.is_contiguous()
            return ready(x)(x, residual, residual if reuse else None)

        def compute(tile: Tile) -> Tensor:
            images, rows, columns = tile
            padded_rows, inner_rows = self._with_halo(rows, x.shape[1])
            padded_columns, inner_columns = self._with_halo(columns, x.shape[2])
            y = self.depthwise(self.expand(x[images, padded_rows, padded_columns].contiguous()))
            y = y[:, inner_rows, inner_columns].contiguous()
            return self.project(y, None if residual is None else residual[tile].contiguous())

        return in_tiles(compute, x, self.expand.weight.shape[0], halo=self.halo)

    def _matches_pattern(self) -> bool:
        """Whether the layers are those that the kernel computes."""
        hidden, _, size, width = self.depthwise.weight.shape
        matches = self.depthwise.options == ((1, 1), (size // 2,) * 2, (1, 1), hidden)
        matches = matches and size == width in KERNEL_SIZES
        return matches and self.expand.silu and self.depthwise.silu and not self.project.silu

    def _with_halo(self, side: slice, length: int) -> tuple[slice, slice]:
        """``side`` of a tile with its halo, cut off at ``length``, and the tile's own positions within."""
        start, stop = max(0, side.start - self.halo), min(length, side.stop + self.halo)
        return slice(start, stop), slice(side.start - start, side.stop - start)


def _packed(*weights: Tensor) -> InvertedResiduals:
    return InvertedResiduals(pack_inverted_residual(*weights))


class FastBlock(InferenceOnly):
    """A block of TransCNN or HAT-Net for inference, (B, C, *S) -> (B, C, *S)."""

    def __init__(self, attn: HMHSA, irb: Iterable[nn.Module]) -> None:
        super().__init__()
        self.attn = FastHMHSA(attn)
        self.irb = _fuse_inverted_residual(fuse(irb))
        self._replays = Replays()

    def weight_like(self) -> Tensor:
        """That of the attention."""
        return self.attn.proj.weight

    @entry
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C, *S) -> (B, C, *S)."""
        refuse_mask(mask)
        return to_nchw(self._replays(self, self.forward_nhwc, to_nhwc(x)))

    def forward_nhwc(self, x: Tensor) -> Tensor:
        """(B, *S, C) -> (B, *S, C)."""
        if hooked(self.attn):  # by those who know a plain block
            x = to_nhwc(self.attn(to_nchw(x))).add(x)
        else:
            x = self.attn.forward_nhwc(x, residual=x)
        *first, last = self.irb
        y = x
        for layer in first:
            y = layer(y)
        if isinstance(last, FastInvertedResidual | FastGroupNorm):
            return last(y, x, overwrite=True)  # which saves the memory of a map
        if isinstance(last, Pointwise):
            return last(y, x)
        return last(y).add(x)


class FastStages(nn.Sequential):
    """The stages of a network for inference, (B, C, *S) -> (B, C', *S')."""

    def __init__(self, *args: Any) -> None:  # of a slice, too
        super().__init__(*args)
        self._replays = Replays()

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, *S) -> (B, C', *S')."""
        return self._replays(self, super().forward, input)

    @staticmethod
    def made_of(stages: nn.Module) -> None:
        """Make stages, whose blocks are for inference, be of this class."""
        if type(stages) is nn.Sequential:
            stages.__class__ = FastStages
            stages._replays = Replays()  # pyright: ignore


class FastDualDownsample(InferenceOnly):
    """TransCNN's downsampling for inference, (B, C, *S) -> (B, C', *⌈S/2⌉)."""

    def __init__(
        self, conv: Iterable[nn.Module], pool: nn.Module, residual: Iterable[nn.Module], act: nn.Module
    ) -> None:
        super().__init__()
        self.conv, self.pool, self.residual, self.act = fuse(conv), pool, fuse(residual), act

    @entry
    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ⌈H/2⌉, ⌈W/2⌉)."""
        nhwc = to_nhwc(x)
        y = self.conv(nhwc)
        matrix = self.residual[0]
        if self._matches_pattern() and gemm_fits(matrix, nhwc, *matrix.weight.shape):  # pyright: ignore
            return to_nchw(cpu.downsample(nhwc, y, matrix.packed()))  # pyright: ignore
        return self.act(to_nchw(y.add_(self.residual(to_nhwc(self.pool(x))))))

    def _matches_pattern(self) -> bool:
        """Whether the layers are those that the kernel computes."""
        pool = self.pool
        pools = type(pool) in (nn.MaxPool2d, FastMaxPool2d) and (pool.kernel_size, pool.stride, pool.ceil_mode) == (
            2,
            2,
            True,
        )
        plain = type(self.act) is nn.SiLU and len(self.residual) == 1 and isinstance(self.residual[0], Pointwise)
        return pools and plain and len(self.conv) == 1


class FastStem(NHWC):
    """TransCNN's stem for inference: two convolutions, the map between which C++ kernels never store as a whole."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__(layers)
        self._pack = cpu.Packed(cpu.pack_stem)

    @entry
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C, *S) -> (B, C', *S')."""
        if mask is not None or not self._matches_pattern():
            return super().forward(x, mask)
        first, second = self._convolutions()
        widths = len(first.weight), len(second.weight)
        matches = x.ndim == 4 and x.shape[1] == first.weight.shape[1]
        if not matches or not fits_cpu(x, *widths, gemm=False):
            return super().forward(x)
        affine1, affine2 = self._pack(first.weight, first.bias, second.weight, second.bias)
        strides = first.options[0][0], second.options[0][0]
        return to_nchw(cpu.stem(x, affine1, affine2, strides))

    def _matches_pattern(self) -> bool:
        """Whether the layers are those that the kernel computes."""
        row = self._convolutions()
        if len(self.layers) != 2 or len(row) != 2 or any(layer.bias is None for layer in row):
            return False
        options = [((stride, stride), (1, 1), (1, 1), 1) for stride in (1, 2)]
        matches = all(layer.options in options and layer.weight.shape[2:] == (3, 3) for layer in row)
        return matches and row[0].silu and not row[1].silu

    def _convolutions(self) -> list[SpatialConv]:
        return [layer for layer in self.layers if isinstance(layer, SpatialConv)]


def _fuse_inverted_residual(layers: nn.Sequential) -> nn.Sequential:
    """``layers`` with the three convolutions of an inverted residual as one layer."""
    row = list(layers)
    for i, three in enumerate(zip(row, row[1:], row[2:], strict=False)):
        expand, depthwise, project = three
        if isinstance(expand, Pointwise) and isinstance(depthwise, SpatialConv) and isinstance(project, Pointwise):
            if depthwise.weight.ndim != 4:
                break  # its tiles have rows and columns
            return nn.Sequential(*row[:i], FastInvertedResidual(expand, depthwise, project), *row[i + 3 :])
    return layers
