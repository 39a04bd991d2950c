"""Inverted residuals of any CNN, and perceptrons of each position, by their C++ kernel."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import build
from . import call as cpu
from .activations import IDENTITY, SIGMOID, SILU, Activation, CActivation, activation
from .call import FP32, KERNEL_SIZES, optional, require, round_up
from .inference import Affine, pack_pointwise, packed_matrix
from .passes import CSqueeze, squeeze_struct

__all__ = [
    "InvertedResidual",
    "InvertedResiduals",
    "Layers",
    "Weights",
    "inverted_residual",
    "pack_inverted_residual",
    "pack_squeeze",
]

KERNEL = "inverted_residual"
Weights = tuple[Affine | None, Affine | None, Affine | None]  # of expansion, depthwise convolution and projection


class Layers(NamedTuple):
    """What is between the products of an inverted residual; as it stands, what is in ours."""

    channels: int | None = None  # hidden ones, without those that fill up a panel; None: all
    stride: int = 1
    padding: tuple[int, int, int, int] | None = None  # above, below, before and after; None: half of the kernel's size
    acts: tuple[Activation, Activation, Activation] = (SILU, SILU, IDENTITY)
    squeeze_acts: tuple[Activation, Activation] = (SILU, SIGMOID)


OURS = Layers()
_SIZES = 8  # of inputs that are kept


class _Shape(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_long)
        for name in (
            *("batch", "height", "width", "channels", "depth", "hidden", "used", "out_height", "out_width", "outputs"),
            *("size", "stride", "above", "before"),
        )
    )


def pack_inverted_residual(
    expand: Tensor | None,
    expand_bias: Tensor | None,
    depthwise: Tensor | None,
    depthwise_bias: Tensor | None,
    project: Tensor | None,
    project_bias: Tensor | None,
) -> Weights:
    """The weights of an inverted residual as :func:`inverted_residual` takes them; biases may be missing.

    Matrices are (outputs, inputs), with more inputs than the map has where a product wants that. A depthwise
    convolution that comes first may make several outputs of each input: one of all inputs, then the next of all.
    """
    hidden = len(expand if depthwise is None else depthwise)  # pyright: ignore
    wide = round_up(hidden)
    expanded = projected = None
    if expand is not None:
        depth = _depth(expand.shape[1], expand.dtype)
        expand = F.pad(expand, (0, depth - expand.shape[1], 0, wide - hidden))
        expanded = pack_pointwise(expand, _filled(expand_bias, hidden, wide, expand))
    if project is not None:
        outputs = len(project)
        projected = pack_pointwise(
            F.pad(project, (0, wide - hidden)), _filled(project_bias, outputs, round_up(outputs, 16), project)
        )
    convolved = None
    if depthwise is not None:
        kernel = F.pad(depthwise.float().squeeze(1).permute(1, 2, 0), (0, wide - hidden)).contiguous()  # (k, k, hidden)
        convolved = kernel, _filled(depthwise_bias, hidden, wide, depthwise).float()
    return expanded, convolved, projected


def _depth(channels: int, dtype: torch.dtype) -> int:
    """So many at least do products sum over: AMX takes them by 32, other instructions for bf16 in pairs."""
    if dtype == FP32:
        return channels
    return max(32, round_up(channels, 16)) if build.isa_support() & 4 else round_up(channels, 2)


def pack_squeeze(
    reduce: Tensor, reduce_bias: Tensor | None, expand: Tensor, expand_bias: Tensor | None
) -> tuple[Affine, Affine]:
    """The matrices (outputs, inputs) of squeeze-and-excitation as :func:`inverted_residual` takes them."""
    squeezed, hidden = reduce.shape
    few, wide = round_up(squeezed, 16), round_up(hidden)
    reduced = F.pad(reduce.float().t(), (0, few - squeezed, 0, wide - hidden)).contiguous()
    expanded = F.pad(expand.float().t(), (0, wide - hidden, 0, few - squeezed)).contiguous()
    return (
        (reduced, _filled(reduce_bias, squeezed, few, reduce).float()),
        (expanded, _filled(expand_bias, hidden, wide, expand).float()),
    )


def _filled(bias: Tensor | None, channels: int, wide: int, like: Tensor) -> Tensor:
    return like.new_zeros(wide) if bias is None else F.pad(bias, (0, wide - channels))


def inverted_residual(
    x: Tensor,
    residual: Tensor | None,
    expand: Affine | None,
    depthwise: Affine | None,
    project: Affine | None,
    out: Tensor | None = None,
    squeeze: tuple[Affine, Affine] | None = None,
    layers: Layers = OURS,
    outputs: int | None = None,
) -> Tensor:
    """Expansion, depthwise convolution, squeeze-and-excitation, projection, residual: (B, H, W, C) -> (B, H', W', C').

    Args:
        x: The map.
        residual: (B, H', W', C'), added before the last activation; None without a projection.
        expand, depthwise, project: Packed weights; None for what isn't there: one of the first two is.
        out: Where the result is written, which may be ``x`` or ``residual`` where all is as in our networks.
        squeeze: Packed weights, None where there is none; only with a projection.
        layers: What is between the products.
        outputs: C'; None: as many as the projection's bias has.
    """
    ready = InvertedResidual(tuple(x.shape), x.dtype, (expand, depthwise, project), squeeze, layers, outputs)
    return ready(x, residual, out)


class InvertedResidual:
    """:func:`inverted_residual` for inputs of one size, its weights checked."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        weights: Weights,
        squeeze: tuple[Affine, Affine] | None = None,
        layers: Layers = OURS,
        outputs: int | None = None,
    ) -> None:
        batch, height, width, channels = shape
        expand, depthwise, project = weights
        require(expand is not None or depthwise is not None, KERNEL)
        size, _, hidden = (1, 1, len(expand[1])) if depthwise is None else depthwise[0].shape  # pyright: ignore
        above, below, before, after = layers.padding or (size // 2,) * 4
        stride = layers.stride
        sides = (height + above + below - size) // stride + 1, (width + before + after - size) // stride + 1
        if outputs is None:
            outputs = channels if project is None else len(project[1])
        self._adds = project is not None
        depth = channels if expand is None else expand[0].shape[1] * expand[0].shape[3]
        used = round_up(layers.channels or hidden, 16)
        fits = size in KERNEL_SIZES and stride in (1, 2) and min(sides) > 0 and used <= hidden
        if depthwise is None:
            fits = stride == 1 and used <= hidden and project is not None and squeeze is None
        fits = fits and all(0 <= n < size for n in (above, below, before, after))
        if expand is None:
            fits = fits and (round_up(channels, 16) == used or (channels % 16 == 0 == used % channels and self._adds))
        else:
            fits = fits and channels <= depth == _depth(depth, dtype)
        if project is None:
            fits = fits and round_up(outputs, 16) == used and squeeze is None
        require(fits, KERNEL, channels, outputs, size, stride)
        self._in, self._out, self._dtype = shape, (batch, *sides, outputs), dtype
        sizes = _Shape(*shape, depth, hidden, used, *sides, outputs, size, stride, above, before)
        acts = (CActivation * 3)(*map(activation, layers.acts))
        fixed = (
            *((None, None) if expand is None else packed_matrix("expand", expand, dtype, hidden, depth)),
            optional("depthwise", depthwise and depthwise[0], FP32, (size, size, hidden)),
            optional("depthwise bias", depthwise and depthwise[1], FP32, (hidden,)),
            *(
                (None, None)
                if project is None
                else packed_matrix("project", project, dtype, round_up(outputs, 16), hidden)
            ),
        )
        self._fixed = [cpu.argument(KERNEL, x) for x in fixed]
        self._fixed += [cpu.argument(KERNEL, x) for x in (sizes, acts)]
        self._squeeze = None
        if squeeze is not None:
            struct, self._maps = _squeeze(squeeze, layers, (batch, *sides, hidden))
            self._squeeze = cpu.argument(KERNEL, struct)

    def __call__(self, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """(B, H, W, C) -> (B, H', W', C')."""
        require(residual is None or self._adds, KERNEL)
        x = x.contiguous()
        if out is None:
            out = x.new_empty(self._out)
        residual = None if residual is None else residual.to(self._dtype).contiguous()
        maps = None if self._squeeze is None else ("maps", x.new_empty(self._maps), self._dtype, self._maps)
        cpu.call(
            KERNEL,
            self._dtype,
            ("x", x, self._dtype, self._in),
            optional("residual", residual, self._dtype, self._out),
            ("out", out, self._dtype, self._out),
            *self._fixed,
            self._squeeze,
            maps,
        )
        return out


class InvertedResiduals:
    """:class:`InvertedResidual` of the same layers for inputs of several sizes, each made once."""

    def __init__(
        self,
        weights: Weights,
        squeeze: tuple[Affine, Affine] | None = None,
        layers: Layers = OURS,
        outputs: int | None = None,
    ) -> None:
        self._given, self._ready = (weights, squeeze, layers, outputs), {}

    def __call__(self, x: Tensor) -> InvertedResidual:
        """What computes inputs (B, H, W, C) like this one."""
        key = x.shape, x.dtype, torch.get_num_threads()
        found = self._ready.get(key)
        if found is None:
            if len(self._ready) >= _SIZES:
                self._ready.clear()
            found = self._ready[key] = InvertedResidual(tuple(x.shape), x.dtype, *self._given)
        return found


def _squeeze(
    squeeze: tuple[Affine, Affine], layers: Layers, shape: tuple[int, int, int, int]
) -> tuple[CSqueeze, tuple[int, int, int, int]]:
    """What the kernel gets, and the size of the map that it needs."""
    batch, height, width, hidden = shape
    require(len(squeeze[1][1]) == hidden, KERNEL, hidden)
    images = min(batch, torch.get_num_threads() * max(1, 512 // (height * width)))  # enough for every thread
    return squeeze_struct(KERNEL, squeeze, layers.squeeze_acts, images), (images, height, width, hidden)
