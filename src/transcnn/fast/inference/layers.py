"""Layers for inference: on channels-last (NHWC) tensors, norms folded, activations fused.

A map (B, C, H, W) whose memory is channels-last is, without a copy, a (B, H, W, C) tensor, on which a 1x1 convolution
is one matrix product. Every layer here takes and returns (B, H, W, C), or (B, *S, C) of a sequence or a volume. They
equal the modules that they are made from up to rounding.

Folding. In evaluation a BatchNorm is ``a·x + b`` with fixed a and b for each channel, so it folds into the
convolution before it, or into a 1x1 convolution after it. GridNorm follows a sum, ``a·(X + Attn) + b``: as the rows
of a softmax sum to one, scaling and shifting V does to Attn what ``a·Attn + b`` would, and ``a·X + Attn'`` remains,
one multiply-add. The 1/√d of attention is folded into the rows of Q.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from timm.layers import GroupNorm1
from torch import Tensor, nn

from ...attention import BATCH_NORMS, CONVS, Conv
from ...grids import channels_first, channels_last
from ..cpu import inference as cpu
from ..cpu.activations import IDENTITY, SILU
from ..cpu.passes import group_norm
from ..dispatch import HALF_DTYPES, autotune, fits_cpu, fits_triton, hooked, to_nchw, to_nhwc
from ..training.depthwise import DepthwiseNd
from ..training.layers import KernelPointwise, KernelPointwise3d
from ..training.norms import KernelBatchNorm2d
from .activations import NONE, SWISH
from .convolutions import Convolution, onednn_fits
from .entry import InferenceOnly, entry, refuse_mask

__all__ = [
    "NHWC",
    "FastGroupNorm",
    "Pointwise",
    "SpatialConv",
    "affine",
    "channels_last_memory",
    "constant",
    "fuse",
    "gemm_fits",
    "is_plain_conv",
]

CONVOLVE: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_FEW_ROWS = 4096
MEMORY = {4: torch.channels_last, 5: torch.channels_last_3d}
Affine = tuple[Tensor, Tensor]  # scale and shift of each channel, in double precision


def constant(tensor: Tensor, like: Tensor) -> nn.Parameter:
    """A parameter of the dtype of ``like`` that requires no gradient."""
    with torch.inference_mode(False):  # whose tensors have no version counter
        return nn.Parameter(tensor.to(like.dtype, copy=True).contiguous(), requires_grad=False)


def channels_last_memory(tensor: Tensor) -> Tensor:
    """A weight or map (B, C, *S) whose memory is (B, *S, C), which PyTorch has for 2-D and 3-D; others as they are."""
    return tensor.contiguous(memory_format=MEMORY[tensor.ndim]) if tensor.ndim in MEMORY else tensor


def affine(norm: nn.Module) -> Affine | None:
    """The scale and shift that a BatchNorm applies in evaluation; None for any other layer."""
    if type(norm) not in (*BATCH_NORMS.values(), KernelBatchNorm2d) or hooked(norm):
        return None
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    if norm.running_mean is None or norm.running_var is None:  # it normalises by the batch's own statistics
        return None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return scale.detach(), shift.detach()


class Pointwise(InferenceOnly):
    """A 1x1 convolution with the norms before and after it folded in, (..., C) -> (..., C').

    ``silu`` fuses that activation, ``forward(x, residual)`` adds to the result.
    """

    def __init__(self, conv: Conv, before: Affine | None = None, after: Affine | None = None) -> None:
        super().__init__()
        weight = conv.weight.detach().double().flatten(1)  # (C', C)
        bias = weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.detach().double()
        if before is not None:
            bias = bias + weight @ before[1]
            weight = weight * before[0]
        if after is not None:
            weight = weight * after[0][:, None]
            bias = bias * after[0] + after[1]
        self.weight = constant(weight, conv.weight)
        self.bias = constant(bias, conv.weight)
        self.silu = False
        self._pack = cpu.Packed(cpu.pack_pointwise)

    def packed(self) -> tuple[Tensor, Tensor]:
        """Weight and bias in the layout of the C++ kernels."""
        return self._pack(self.weight, self.bias)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(..., C) -> (..., C'), plus ``residual`` (..., C') where given."""
        few = x.numel() <= _FEW_ROWS * x.shape[-1]  # of more, oneDNN reads ahead better
        if few and not self.silu and gemm_fits(self, x, *self.weight.shape):
            return cpu.pointwise(x, self.packed(), residual)
        if onednn_fits(x):
            op = torch.ops.mkldnn._linear_pointwise
            if residual is not None:
                return op.binary(x, residual, self.weight, self.bias, "add")
            return op(x, self.weight, self.bias, "swish" if self.silu else "none", [], "")
        if (
            (self.silu or residual is not None)
            and x.dtype == self.weight.dtype
            and x.dtype in HALF_DTYPES
            and fits_triton(x)
        ):
            return self._on_gpu(x, residual)
        y = F.linear(x, self.weight, self.bias)
        if self.silu:
            y = F.silu(y, inplace=True)
        return y if residual is None else y.add_(residual)

    def _on_gpu(self, x: Tensor, residual: Tensor | None) -> Tensor:
        from ..triton.linear import linear, plain_linear

        arguments = (x, self.weight, self.bias, residual, self.silu)
        rows = (x.numel() // x.shape[-1]).bit_length()  # autotuned for powers of two, not for every size of image
        key = ("linear", rows, *self.weight.shape, x.dtype, residual is None, self.silu)
        functions = (linear, plain_linear)
        return functions[autotune(key, lambda: [partial(f, *arguments) for f in functions])](*arguments)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, silu={self.silu}"


class SpatialConv(InferenceOnly, Convolution):
    """Any other convolution, with the norm after it folded in, (B, *S, C) -> (B, *S', C')."""

    def __init__(self, conv: Conv, after: Affine | None = None) -> None:
        super().__init__()
        weight = conv.weight.detach().double()
        bias = None if conv.bias is None else conv.bias.detach().double()
        if after is not None:
            weight = weight * after[0].view(-1, *(1,) * (weight.ndim - 1))
            bias = after[1] if bias is None else bias * after[0] + after[1]
        self.weight = constant(weight, conv.weight)
        self.weight.data = channels_last_memory(self.weight.data)
        self.bias = None if bias is None else constant(bias, conv.weight)
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups
        self.silu = False
        self.prepare()

    def forward(self, x: Tensor) -> Tensor:
        """(B, *S, C) -> (B, *S', C')."""
        if (self.silu or self.bias is not None) and x.dtype == self.weight.dtype and fits_triton(x):
            return self._on_gpu(x.contiguous())
        x = channels_first(x)
        y = self.by_kernel(x, SWISH if self.silu else NONE)
        return to_nhwc(self.on_wide(x, self._by_others) if y is None else y)

    def _by_others(self, x: Tensor) -> Tensor:
        y = self.by_onednn(x, SWISH if self.silu else NONE)
        if y is not None:
            return y
        y = self._by_pytorch(x, self.bias)
        return F.silu(y, inplace=True) if self.silu else y

    def _by_pytorch(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return CONVOLVE[x.ndim - 2](x, self.weight, bias, *self.options)

    def _on_gpu(self, x: Tensor) -> Tensor:
        """The same with bias and SiLU in one pass, for which PyTorch's operations need two."""
        from ..triton.norms import affine_silu

        y = to_nhwc(self.on_wide(channels_first(x), self._by_pytorch))
        return affine_silu(y, None, self.bias, self.silu, out=y)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, options={self.options}, silu={self.silu}"


class _NCHWModule(InferenceOnly):
    """Any module that takes (B, C, *S), on (B, *S, C) -> (B, *S', C')."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """(B, *S, C) -> (B, *S', C')."""
        return to_nhwc(self.module(channels_first(x)))


class FastGroupNorm(InferenceOnly):
    """GroupNorm with one group, and SiLU where ``silu`` says so, (B, *S, C) -> (B, *S, C)."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.silu = norm.weight, norm.bias, norm.eps, False
        self._pack = cpu.Packed(cpu.in_fp32)

    def forward(self, x: Tensor, residual: Tensor | None = None, overwrite: bool = False) -> Tensor:
        """(B, *S, C) -> (B, *S, C), plus ``residual`` where given.

        With ``overwrite`` the result may be written over ``residual``, or over x where there is none.
        """
        alike = self.weight is not None and x.shape[-1] == len(self.weight) and x.dtype == self.weight.dtype
        if alike and fits_cpu(x, gemm=False):
            act, out = SILU if self.silu else IDENTITY, x if residual is None else residual
            out = out if overwrite and out.dtype == x.dtype and out.is_contiguous() else None
            scale, shift = self._pack(self.weight, self.bias)
            return group_norm(x, scale, shift, self.eps, act, residual, out)
        x = channels_first(x.contiguous())
        y = F.group_norm(x, 1, self.weight, self.bias, self.eps)
        y = channels_last(F.silu(y, inplace=True) if self.silu else y)
        return y if residual is None else y.add_(residual)


def fuse(layers: Iterable[nn.Module]) -> nn.Sequential:
    """Norms, convolutions and activations on (B, C, *S), as layers on (B, *S, C) with all folded that can be."""
    row = [layer for layer in _flatten(layers) if type(layer) not in (nn.Identity, nn.Dropout)]
    fused: list[nn.Module] = []
    i, before = 0, None
    while i < len(row):
        layer = row[i]
        following = row[i + 1] if i + 1 < len(row) else None
        scale = affine(layer)
        if scale is not None and before is None and following is not None and _is_pointwise(following):
            before = scale
        elif is_plain_conv(layer):
            after = None if following is None else affine(following)
            i += after is not None
            fused.append(Pointwise(layer, before, after) if _is_pointwise(layer) else SpatialConv(layer, after))
            before = None
        elif type(layer) in (nn.GroupNorm, GroupNorm1) and layer.num_groups == 1:
            fused.append(FastGroupNorm(layer))  # pyright: ignore
        else:
            fused.append(_NCHWModule(layer))
        if fused and hasattr(fused[-1], "silu") and i + 1 < len(row) and type(row[i + 1]) is nn.SiLU:
            fused[-1].silu = True  # pyright: ignore
            i += 1
        i += 1
    return nn.Sequential(*fused)


class NHWC(InferenceOnly):
    """Layers on (B, *S, C) where others take and return maps, (B, C, *S) -> (B, C', *S')."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = fuse(layers)

    @entry
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C, *S) -> (B, C', *S')."""
        refuse_mask(mask)
        return to_nchw(self.layers(to_nhwc(x)))


def gemm_fits(first: Pointwise, x: Tensor, *channels: int) -> bool:
    """Whether a C++ kernel runs on this input of ``first``; inputs that don't match fail as in PyTorch."""
    matches = x.dtype == first.weight.dtype and x.shape[-1] == first.weight.shape[1]
    return matches and fits_cpu(x, *channels)


def _flatten(layers: Iterable[nn.Module]) -> Iterable[nn.Module]:
    for layer in layers:
        if type(layer) is nn.Sequential:
            yield from _flatten(layer)
        else:
            yield layer


def is_plain_conv(module: nn.Module) -> TypeGuard[Conv]:
    """Whether this is a convolution of exactly PyTorch's or our classes, padded with zeros."""
    plain = isinstance(module, DepthwiseNd) or type(module) in (*CONVS.values(), KernelPointwise, KernelPointwise3d)
    return plain and module.padding_mode == "zeros"


def _is_pointwise(conv: nn.Module) -> bool:
    if not is_plain_conv(conv):
        return False
    padded = conv.padding != "valid" and any(conv.padding)
    return set(conv.kernel_size) == set(conv.stride) == {1} and conv.groups == 1 and not padded
