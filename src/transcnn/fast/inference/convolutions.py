"""Convolutions and linear layers of any CNN by oneDNN's operations, which fuse a sum and an activation.

PyTorch's own convolution takes twice as long where it is 1x1 and in fp32, and its linear layers go to MKL, which is
slow on CPUs that aren't Intel's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, LayerNorm2d
from torch import Tensor, nn

from ...grids import channels_last
from ...layers import drop_columns, widen
from ..cpu.inference import Packed, convolution, in_fp32, pack_convolution, pack_stem, stem
from ..cpu.passes import Window, layer_norm, max_pool
from ..dispatch import eager_cpu, fits_cpu, onednn_has_bf16, to_nchw, to_nhwc, traced
from .activations import NONE, Activation, kernel_activation

__all__ = [
    "Convolution",
    "FastConv2d",
    "FastLayerNorm",
    "FastLayerNorm2d",
    "FastLinear",
    "FastMaxPool2d",
    "Fused",
    "by_kernel",
    "make_fast",
    "needs_gradients",
    "onednn_fits",
]

_IMAGE_CHANNELS = 4  # at most
_SMALL = 1 << 28  # multiply-adds of a convolution up to which what Python does beside oneDNN counts


def onednn_fits(x: Tensor) -> bool:
    """Whether oneDNN's operations with fused sums and activations can run; tracers don't know them."""
    if not isinstance(x, Tensor) or not eager_cpu(x) or traced():  # a proxy of a trace
        return False
    if needs_gradients(x):
        return False
    if x.dtype != torch.float32 and (x.dtype != torch.bfloat16 or not onednn_has_bf16()):
        return False
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def needs_gradients(*tensors: Tensor | None) -> bool:
    """Whether gradients of any of these are asked for, which neither our kernels nor oneDNN's fused operations have.

    An optimized network refuses them, but a part of it may be called by itself.
    """
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


class Fused(nn.Module):
    """A layer that can also be followed by a sum and an activation in one pass."""

    def fused(self, x: Tensor, other: Tensor | None, act: Activation, reuse: bool = False) -> Tensor | None:
        """act(layer(x) + other), written over ``other`` if that may be reused; None where that can't be fused."""
        raise NotImplementedError


class PackedConv:
    """A convolution's weight in the layout that oneDNN wants for one size of input; made again when either changes."""

    def __init__(self) -> None:
        self._cached: tuple[Any, ...] | None = None

    def __call__(self, weight: Tensor, options: tuple[Any, ...], size: torch.Size) -> Tensor:
        if weight.is_inference():  # such tensors don't count their versions
            return weight
        cached, key = self._cached, (weight.data_ptr(), weight.dtype, weight._version, size)
        if cached is None or cached[0] != key:
            made = torch.ops.mkldnn._reorder_convolution_weight(weight.detach(), *options, list(size))
            # The reference keeps the weight's memory from being used by another, with the same address.
            cached = self._cached = key, made, weight.detach()
        return cached[1]

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedConv, ()  # a copy packs its own


class Convolution(nn.Module):
    """A convolution that C++ kernels and oneDNN compute where it is a 2-D one, and what decides that.

    The methods take and give maps (B, C, H, W), and None where they can't compute this: PyTorch does then, or says what
    is wrong. With ``reuse`` the result may be written over ``other``.
    """

    weight: Tensor
    bias: Tensor | None
    stride: Any
    padding: Any
    dilation: Any
    groups: int
    _known: bool  # whether it is one that the C++ kernel is for
    _pack: Packed  # for that kernel
    _packed: PackedConv  # for oneDNN
    _narrow: bool  # whether PyTorch's and oneDNN's are wrong in bf16 on narrow maps (:mod:`transcnn.layers`)

    def prepare(self) -> None:
        """Set what is kept from call to call."""
        outputs, channels, *sides = self.weight.shape
        square = len({*sides}) == len({*self.stride}) == 1 and {*self.dilation} == {1} and self.groups == 1
        self._known = square and channels % 16 == outputs % 16 == 0 and self.weight[0].numel() >= 32
        self._pack, self._packed = Packed(pack_convolution), PackedConv()
        self._narrow = (tuple(sides), *self.options[:3]) == ((3, 3), (2, 2), (1, 1), (1, 1))

    @property
    def options(self) -> tuple[Any, Any, Any, int]:
        """Stride, padding, dilation and groups."""
        return self.stride, self.padding, self.dilation, self.groups

    def on_wide(self, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        """run(x), with further columns meanwhile where it would be wrong without them."""
        return drop_columns(run(widen(x)), x) if self._narrow else run(x)

    def by_kernel(
        self, x: Tensor, act: Activation, other: Tensor | None = None, reuse: bool = False, most: float = float("inf")
    ) -> Tensor | None:
        """act(conv(x) + other) by a C++ kernel, up to so many multiply-adds."""
        kind = kernel_activation(act) if self._known else None
        if kind is None:
            return None
        weight, bias = self.weight, self.bias
        shape = self._result(x, weight) if _kernel_fits(x, weight, bias) else None
        if shape is None or shape[0] * shape[2] * shape[3] * weight.numel() > most:
            return None
        if other is not None and (other.shape != shape or other.dtype != x.dtype or not fits_cpu(other, gemm=False)):
            return None
        if needs_gradients(other):
            return None
        other = None if other is None else to_nhwc(other)
        matrix, out, size = self._pack(weight, bias), other if reuse else None, weight.shape[2]
        return to_nchw(
            convolution(channels_last(x), matrix, size, self.stride[0], tuple(self.padding), kind, other, out)
        )

    def by_onednn(self, x: Tensor, act: Activation, other: Tensor | None = None, reuse: bool = False) -> Tensor | None:
        """act(conv(x) + other) by oneDNN, which packs the weights once and not at each call."""
        weight, bias = self.weight, self.bias
        shape = self._result(x, weight) if onednn_fits(x) and not needs_gradients(weight, bias, other) else None
        if shape is None:
            return None
        if other is not None and not (
            # All that oneDNN's operations know after a sum; and those of weights that aren't packed know no bf16.
            (act[0] == "none" or (act[0] == "relu" and not weight.is_inference()))
            and _addable(other, shape, x.dtype, torch.channels_last)
        ):
            return None
        options = list(self.padding), list(self.stride), list(self.dilation), self.groups
        weight, op = self._packed(weight, options, x.shape), torch.ops.mkldnn._convolution_pointwise
        if other is None:
            return op(x, weight, bias, *options, act[0], list(act[1]), act[2])
        name = None if act == NONE else act[0]
        more = (weight, bias, *options, "add", 1.0, name, list(act[1]), act[2])
        if reuse:
            return torch.ops.mkldnn._convolution_pointwise_.binary(other, x, *more)
        return op.binary(x, other, *more)

    def _result(self, x: Tensor, weight: Tensor) -> tuple[int, int, int, int] | None:
        """The shape of the result; None where it isn't one of images, or they don't match the weight."""
        if x.ndim != 4 or x.dtype != weight.dtype or not x.numel() or isinstance(self.padding, str):
            return None
        batch, channels, *sides = x.shape
        outputs, depth, *sizes = weight.shape
        height, width = (
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(sides, self.padding, self.dilation, sizes, self.stride, strict=True)
        )
        fits = channels == depth * self.groups and min(height, width) >= 1
        return (batch, outputs, height, width) if fits else None


def _kernel_fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether C++ kernels run on this map and with these weights; not while anything is traced."""
    if not isinstance(x, Tensor) or not fits_cpu(x, len(weight), gemm=False):
        return False  # first of all: torch.compile knows no is_inference
    plain = not weight.is_inference() and not needs_gradients(x, weight, bias)
    return plain and (bias is None or bias.dtype == weight.dtype)


class FastConv2d(Fused, Convolution, nn.Conv2d):
    """A convolution of any CNN."""

    _stem: Packed | None  # of the first convolution of a network

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        y = self._by_own_kernel(input, None, NONE)
        return self.on_wide(input, self._by_others) if y is None else y

    def _by_others(self, x: Tensor) -> Tensor:
        y = self.by_onednn(x, NONE)
        return super().forward(x) if y is None else y

    def fused(self, x: Tensor, other: Tensor | None, act: Activation, reuse: bool = False) -> Tensor | None:
        """act(conv(x) + other), (B, C, H, W) and (B, C', H', W') -> (B, C', H', W'); None where that can't be fused.

        With ``reuse`` the result may be written over ``other``.
        """
        y = self._by_own_kernel(x, other, act, reuse)
        if y is not None:
            return y
        if self._narrow and widen(x) is not x:
            return None
        return self.by_onednn(x, act, other, reuse)

    def _by_own_kernel(self, x: Tensor, other: Tensor | None, act: Activation, reuse: bool = False) -> Tensor | None:
        """The same by a C++ kernel: of images in any memory format, and of small maps. None elsewhere."""
        if self._stem is None:
            return self.by_kernel(x, act, other, reuse, _SMALL)
        kind, weight, bias = kernel_activation(act), self.weight, self.bias
        fits = other is None and kind is not None and _kernel_fits(x, weight, bias)
        if not fits or self._result(x, weight) is None:
            return None
        return to_nchw(stem(x, self._stem(weight, bias)[0], None, (self.stride[0], 1), kind))  # pyright: ignore

    @staticmethod
    def fits(conv: nn.Module) -> bool:
        """Whether a module can be one."""
        return type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


class FastLinear(Fused, nn.Linear):
    """A linear layer of any network."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., C) -> (..., C')."""
        y = self.fused(input, None, NONE)
        return super().forward(input) if y is None else y

    def fused(self, x: Tensor, other: Tensor | None, act: Activation, reuse: bool = False) -> Tensor | None:
        """act(linear(x) + other), (..., C) and (..., C') -> (..., C'); None where that can't be fused."""
        fits = onednn_fits(x) and x.ndim > 1 and x.dtype == self.weight.dtype and x.numel()
        if not fits or x.shape[-1] != self.in_features or needs_gradients(self.weight, self.bias, other):
            return None
        op = torch.ops.mkldnn._linear_pointwise
        if other is None:
            return op(x, self.weight, self.bias, act[0], list(act[1]), act[2])
        if act != NONE or not _addable(other, (*x.shape[:-1], self.out_features), x.dtype, torch.contiguous_format):
            return None
        return op.binary(x, other, self.weight, self.bias, "add")

    @staticmethod
    def fits(linear: nn.Module) -> bool:
        """Whether a module can be one."""
        return type(linear) is nn.Linear


class FastLayerNorm(nn.LayerNorm):
    """LayerNorm over the last dimension, by a C++ kernel."""

    _fp32: Packed

    def forward(self, input: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        fits = isinstance(input, Tensor) and input.ndim > 1 and input.shape[-1:] == self.normalized_shape
        fits = fits and input.dtype == self.weight.dtype and fits_cpu(input, gemm=False)
        if not fits or self.weight.is_inference() or needs_gradients(input, self.weight, self.bias):
            return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
        scale, shift = self._fp32(self.weight, self.bias)
        return layer_norm(input, scale, shift, self.eps)

    @staticmethod
    def fits(norm: nn.Module) -> bool:
        """Whether a module can be one, or a :class:`FastLayerNorm2d`."""
        known = type(norm) in (nn.LayerNorm, LayerNorm, LayerNorm2d)
        return known and len(norm.normalized_shape) == 1 and norm.weight is not None and norm.bias is not None  # pyright: ignore


class FastLayerNorm2d(FastLayerNorm):
    """The same over the channels of a map."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return to_nchw(super().forward(channels_last(input)))


class FastMaxPool2d(nn.MaxPool2d):
    """Max pooling, with square windows by a C++ kernel."""

    def forward(self, input: Tensor) -> Any:
        """(B, C, H, W) -> (B, C, H', W'); indices, too, where the layer returns those."""
        window = self._window(input)
        return super().forward(input) if window is None else to_nchw(max_pool(channels_last(input), window))

    def _window(self, x: Tensor) -> Window | None:
        """What the kernel takes; None where it doesn't fit."""
        if not isinstance(x, Tensor) or x.ndim != 4 or needs_gradients(x) or not fits_cpu(x, gemm=False):
            return None
        (size, *sizes), (stride, *strides), (above, before) = (
            {*_pair(given)} if i < 2 else _pair(given)
            for i, given in enumerate((self.kernel_size, self.stride, self.padding))
        )
        plain = not (sizes or strides or self.return_indices or self.ceil_mode) and {*_pair(self.dilation)} == {1}
        fits = plain and x.is_contiguous(memory_format=torch.channels_last) and 2 * max(above, before) <= size
        fits = fits and size <= min(x.shape[2] + 2 * above, x.shape[3] + 2 * before)
        return Window(size, stride, (above, before)) if fits else None

    @staticmethod
    def fits(pool: nn.Module) -> bool:
        """Whether a module can be one."""
        return type(pool) is nn.MaxPool2d


def _pair(given: Any) -> tuple[int, int]:
    return (given, given) if isinstance(given, int) else tuple(given) * (2 // len(given))  # pyright: ignore


def make_fast(model: nn.Module) -> None:
    """Have convolutions, linear layers and max pooling of exactly PyTorch's classes run by oneDNN or our kernels."""
    for module in model.modules():
        if FastConv2d.fits(module):
            module.__class__ = FastConv2d
            module.prepare()  # pyright: ignore
            first = module._narrow and module.groups == 1 and module.in_channels <= _IMAGE_CHANNELS  # pyright: ignore
            module._stem = Packed(pack_stem) if first else None  # pyright: ignore
        elif FastLinear.fits(module):
            module.__class__ = FastLinear
        elif FastMaxPool2d.fits(module):
            module.__class__ = FastMaxPool2d
        elif FastLayerNorm.fits(module):
            module.__class__ = FastLayerNorm2d if type(module) is LayerNorm2d else FastLayerNorm  # pyright: ignore
            module._fp32 = Packed(in_fp32)  # pyright: ignore


def by_kernel(module: nn.Module | None) -> bool:
    """Whether our kernels may compute this layer."""
    return isinstance(module, FastLayerNorm | FastMaxPool2d) or (isinstance(module, FastConv2d) and module._known)


def _addable(other: Any, shape: tuple[int, ...], dtype: torch.dtype, memory: torch.memory_format) -> bool:
    """Whether oneDNN can add this to a result of that shape."""
    if not isinstance(other, Tensor) or other.shape != shape or other.dtype != dtype or other.device.type != "cpu":
        return False
    return other.is_contiguous(memory_format=memory)
