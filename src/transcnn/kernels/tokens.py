"""The layers of the networks as inference wants them: on channels-last tokens, norms folded, activations fused.

A map (B, C, H, W) whose memory is channels-last is, without a copy, a row of tokens (B, H, W, C): a 1x1 convolution is
then one matrix product. Every layer here takes and gives tokens; :mod:`transcnn.fast` puts them where modules were.
They equal the modules that they are made from up to rounding, and are for inference alone.

Folding. In evaluation a BatchNorm is ``a·x + b`` with fixed a and b for each channel, so it disappears into the
convolution before it, or into a 1x1 convolution after it. GridNorm stands after a sum, ``a·(X + Attn) + b``: as the
rows of a softmax sum to one, scaling and shifting V does to Attn what ``a·Attn + b`` would, and ``a·X + Attn'``
remains, one multiply-add. The 1/√d of attention goes into the rows of Q.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import strided_conv2d
from .entry import Frozen, entry
from .gpu.runs import HALVES, fastest, fits
from .layers import KernelBatchNorm2d
from .native import calls as native
from .parts import eager_cpu

__all__ = [
    "Convolution",
    "Matrix",
    "OnTokens",
    "affine",
    "frozen",
    "fuse",
    "has_kernels",
    "to_map",
    "to_tokens",
]

Affine = tuple[Tensor, Tensor]  # scale and shift of each channel, in double precision


def frozen(tensor: Tensor, like: Tensor) -> nn.Parameter:
    """A parameter of the dtype of ``like`` that nothing trains."""
    with torch.inference_mode(False):  # whose tensors don't tell when they change
        return nn.Parameter(tensor.to(like.dtype, copy=True).contiguous(), requires_grad=False)


def affine(norm: nn.Module) -> Affine | None:
    """The scale and shift that a BatchNorm applies in evaluation; None for a layer that isn't that simple."""
    if type(norm).forward not in (nn.BatchNorm2d.forward, KernelBatchNorm2d.forward):
        return None
    assert isinstance(norm, nn.BatchNorm2d)
    if norm.running_mean is None or norm.running_var is None:  # it would normalise by the batch's own statistics
        return None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return scale.detach(), shift.detach()


class Matrix(Frozen):
    """A 1x1 convolution with the norms before and after it folded in, (..., C) -> (..., C').

    ``silu`` fuses that activation, ``forward(x, residual)`` adds to the result.
    """

    def __init__(self, conv: nn.Conv2d, before: Affine | None = None, after: Affine | None = None) -> None:
        super().__init__()
        weight = conv.weight.detach().double().flatten(1)  # (C', C)
        bias = weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.detach().double()
        if before is not None:
            bias = bias + weight @ before[1]
            weight = weight * before[0]
        if after is not None:
            weight = weight * after[0][:, None]
            bias = bias * after[0] + after[1]
        self.weight = frozen(weight, conv.weight)
        self.bias = frozen(bias, conv.weight)
        self.silu = False
        self._pack = native.Packed(native.pack_matrix)

    def packed(self) -> tuple[Tensor, Tensor]:
        """Weight and bias as the kernels of :mod:`transcnn.kernels.native` read them."""
        return self._pack(self.weight, self.bias)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(..., C) -> (..., C'), plus ``residual`` (..., C') where given."""
        if _onednn(x):
            op = torch.ops.mkldnn._linear_pointwise
            if residual is not None:
                return op.binary(x, residual, self.weight, self.bias, "add")
            return op(x, self.weight, self.bias, "swish" if self.silu else "none", [], "")
        if (self.silu or residual is not None) and x.dtype == self.weight.dtype and x.dtype in HALVES and fits(x):
            return self._on_gpu(x, residual)
        y = F.linear(x, self.weight, self.bias)
        if self.silu:
            y = F.silu(y, inplace=True)
        return y if residual is None else y.add_(residual)

    def _on_gpu(self, x: Tensor, residual: Tensor | None) -> Tensor:
        from .gpu.product import product, usual

        arguments = (x, self.weight, self.bias, residual, self.silu)
        rows = (x.numel() // x.shape[-1]).bit_length()  # images of all sizes are not worth a race each
        key = ("product", rows, *self.weight.shape, x.dtype, residual is None, self.silu)
        ways = (product, usual)
        return ways[fastest(key, lambda: [partial(way, *arguments) for way in ways])](*arguments)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, silu={self.silu}"


class Convolution(Frozen):
    """Any other convolution with the norm after it folded in, (B, H, W, C) -> (B, H', W', C')."""

    def __init__(self, conv: nn.Conv2d, after: Affine | None = None) -> None:
        super().__init__()
        weight = conv.weight.detach().double()
        bias = None if conv.bias is None else conv.bias.detach().double()
        if after is not None:
            weight = weight * after[0][:, None, None, None]
            bias = after[1] if bias is None else bias * after[0] + after[1]
        self.weight = frozen(weight, conv.weight)
        self.weight.data = self.weight.data.to(memory_format=torch.channels_last)
        self.bias = None if bias is None else frozen(bias, conv.weight)
        self.options = (conv.stride, conv.padding, conv.dilation, conv.groups)
        self.silu = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H', W', C')."""
        if (self.silu or self.bias is not None) and x.dtype == self.weight.dtype and fits(x):
            return self._on_gpu(x.contiguous())
        y = self._convolve(x, self.bias)
        y = F.silu(y, inplace=True) if self.silu else y
        return y.permute(0, 2, 3, 1).contiguous()

    def _convolve(self, x: Tensor, bias: Tensor | None) -> Tensor:
        stride, *others = self.options
        if tuple(self.weight.shape[2:]) == (3, 3) and others == [(1, 1), (1, 1), 1]:
            return strided_conv2d(x.permute(0, 3, 1, 2), self.weight, bias, stride)
        return F.conv2d(x.permute(0, 3, 1, 2), self.weight, bias, *self.options)  # pyright: ignore

    def _on_gpu(self, x: Tensor) -> Tensor:
        """The same with bias and SiLU in one pass, for which PyTorch's own need two."""
        from .gpu.norms import activate

        y = self._convolve(x, None).permute(0, 2, 3, 1).contiguous()
        return activate(y, None, self.bias, self.silu, out=y)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, options={self.options}, silu={self.silu}"


class OnMap(Frozen):
    """Any module made for maps, on tokens: (B, H, W, C) -> (B, H', W', C')."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H', W', C')."""
        return self.module(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()


class WholeNorm(Frozen):
    """GroupNorm with one group: all of an image's numbers together, (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        x = x.contiguous()
        return F.group_norm(x.permute(0, 3, 1, 2), 1, self.weight, self.bias, self.eps).permute(0, 2, 3, 1)


def fuse(layers: Iterable[nn.Module]) -> nn.Sequential:
    """A row of norms, convolutions and activations on maps, as one on tokens with all folded that can be."""
    row = [layer for layer in _flatten(layers) if not isinstance(layer, nn.Identity | nn.Dropout)]
    fused: list[nn.Module] = []
    i, before = 0, None
    while i < len(row):
        layer = row[i]
        following = row[i + 1] if i + 1 < len(row) else None
        scale = affine(layer)
        if scale is not None and before is None and isinstance(following, nn.Conv2d) and _pointwise(following):
            before = scale
        elif isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros":
            after = None if following is None else affine(following)
            i += after is not None
            fused.append(Matrix(layer, before, after) if _pointwise(layer) else Convolution(layer, after))
            before = None
            if i + 1 < len(row) and isinstance(row[i + 1], nn.SiLU):
                fused[-1].silu = True  # pyright: ignore
                i += 1
        elif isinstance(layer, nn.GroupNorm) and layer.num_groups == 1:
            fused.append(WholeNorm(layer))
        else:
            fused.append(OnMap(layer))
        i += 1
    return nn.Sequential(*fused)


class OnTokens(Frozen):
    """A row of token layers where a map is expected, (B, C, H, W) -> (B, C', H', W'); casts to the layers' dtype."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = fuse(layers)

    @entry
    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        return to_map(self.layers(to_tokens(x)))


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W, C), a copy only if the memory isn't channels-last."""
    return x.permute(0, 2, 3, 1).contiguous()


def to_map(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, C, H, W), never a copy."""
    return x.permute(0, 3, 1, 2)


def has_kernels(first: Matrix, x: Tensor, *channels: int) -> bool:
    """Whether kernels.native runs on these tokens, of which ``first`` makes something; other inputs fail as ever."""
    matches = x.dtype == first.weight.dtype and x.shape[3] == first.weight.shape[1]
    return matches and native.fits(x, *channels)


def _flatten(layers: Iterable[nn.Module]) -> Iterable[nn.Module]:
    for layer in layers:
        if isinstance(layer, nn.Sequential):
            yield from _flatten(layer)
        else:
            yield layer


def _pointwise(conv: nn.Conv2d) -> bool:
    padded = conv.padding not in ((0, 0), 0, "valid")
    return conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.groups == 1 and not padded


def _onednn(x: Tensor) -> bool:
    """Whether oneDNN's matrix product with fused bias, sum and activation can run."""
    if not eager_cpu(x) or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
