"""The kernels as functions of tensors. Each says in ``fits`` what it can do; where it can't, PyTorch's own run."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..parts import eager_cpu, recorded
from .build import library, supports

__all__ = [
    "Packed",
    "add_pooled",
    "attend_globally",
    "attend_locally",
    "call",
    "fits",
    "inverted_residual",
    "pack_matrix",
    "pack_residual",
    "pack_stem",
    "stem",
]

PANEL = 32
MOST = 256  # channels of a head
SIZES = (3, 5, 7)  # of a depthwise convolution
Affine = tuple[Tensor, Tensor]  # weight and bias


class _Step(ctypes.Structure):
    _fields_ = (("map", ctypes.c_void_p), ("ratio", ctypes.c_long))


class _Images(ctypes.Structure):
    _fields_ = (("numbers", ctypes.c_void_p), ("sizes", ctypes.c_long * 4), ("apart", ctypes.c_long * 4))


def fits(x: Tensor, *channels: int, products: bool = True) -> bool:
    """Whether the kernels run on tensors like this one, and on maps and heads of so many channels each.

    Those without matrix products take 16 channels at a time in bf16, too.

    Nothing that records operations sees them: what traces, compiles or exports is given PyTorch's own.
    """
    if not eager_cpu(x):  # first of all: torch.compile would stumble over what follows
        return False
    unit = 32 if products and x.dtype == torch.bfloat16 else 16
    plain = type(x) in (Tensor, torch.nn.Parameter) and x.numel() > 0
    return plain and not recorded() and not any(n % unit for n in channels) and supports(x.dtype)


class Packed:
    """What the kernels read in place of a module's weights: made when first needed, and anew when those changed.

    Changes are told by PyTorch's count of them, which ``tensor.data.mul_()`` and its like evade.
    """

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make, self._kept = make, None

    def __call__(self, *weights: Tensor | None) -> Any:
        """What ``make(*weights)`` gives."""
        kept = self._kept
        if kept is None or not all(map(_same, kept[0], weights)):
            # The tensors are held, so that nothing else can come to lie where they lie.
            of = [None if w is None else (w.detach(), w._version) for w in weights]
            kept = self._kept = of, self._make(*weights)
        return kept[1]

    def __reduce__(self) -> tuple[Any, ...]:
        return Packed, (self._make,)  # a copy, or what is read from a file, makes its own


def _same(kept: tuple[Tensor, int] | None, weight: Tensor | None) -> bool:
    if kept is None or weight is None:
        return kept is weight
    tensor, version = kept
    return weight.data_ptr() == tensor.data_ptr() and weight.dtype == tensor.dtype and weight._version == version


def pack_matrix(weight: Tensor, bias: Tensor) -> Affine:
    """Weights (N, K), 32 rows at a time, turned, with zeros beyond N, in bf16 K two by two; and the bias in fp32."""
    n, k = weight.shape
    weight = F.pad(weight, (0, 0, 0, -n % PANEL))
    word = 1 if weight.dtype == torch.float32 else 2
    return weight.view(-1, PANEL, k // word, word).transpose(1, 2).contiguous(), bias.float()


def pack_residual(
    expand: Tensor, expand_bias: Tensor, mix: Tensor, mix_bias: Tensor | None, project: Tensor, project_bias: Tensor
) -> tuple[Affine, Affine, Affine]:
    """The weights of an inverted residual as :func:`inverted_residual` takes them."""
    mix_bias = expand_bias * 0 if mix_bias is None else mix_bias
    more = -len(expand) % PANEL
    expand, project = F.pad(expand, (0, 0, 0, more)), F.pad(project, (0, more))
    mix = F.pad(mix.float().squeeze(1).permute(1, 2, 0), (0, more)).contiguous()  # (k, k, hidden)
    return (
        pack_matrix(expand, F.pad(expand_bias, (0, more))),
        (mix, F.pad(mix_bias.float(), (0, more))),
        pack_matrix(project, project_bias),
    )


def inverted_residual(
    x: Tensor, residual: Tensor | None, expand: Affine, mix: Affine, project: Affine, out: Tensor | None = None
) -> Tensor:
    """Expansion, SiLU, depthwise convolution, SiLU, projection, plus residual; (B, H, W, C) -> (B, H, W, C').

    The result is written to ``out`` where given, which may be ``x`` or ``residual``.
    """
    x = x.contiguous()
    batch, height, width, channels = x.shape
    size, _, hidden = mix[0].shape
    if out is None:
        out = x.new_empty(batch, height, width, len(project[1]))
    residual = None if residual is None else residual.to(x.dtype).contiguous()
    call("residual", x, x, residual, out, *expand, *mix, *project, batch, height, width, channels, hidden,
          out.shape[3], size)  # fmt: skip
    return out


def pack_stem(first: Tensor, first_bias: Tensor, second: Tensor, second_bias: Tensor) -> tuple[Affine, Affine]:
    """The weights of two 3x3 convolutions as :func:`stem` takes them."""
    rows = second.permute(0, 2, 3, 1).flatten(1)  # (C", 9·C')
    if rows.dtype == torch.bfloat16:
        rows = F.pad(rows, (0, -rows.shape[1] % PANEL))
    return (first.float().flatten(1).t().contiguous(), first_bias.float()), pack_matrix(rows, second_bias)


def stem(x: Tensor, first: Affine, second: Affine, strides: tuple[int, int]) -> Tensor:
    """3x3 convolution, SiLU, 3x3 convolution, with these strides (1 or 2); (B, C, H, W) -> (B, H', W', C')."""
    batch, _, height, width = x.shape
    for stride in strides:
        height, width = -(-height // stride), -(-width // stride)
    weight, bias = second
    out = x.new_empty(batch, height, width, len(bias))
    images = _Images(x.data_ptr(), (ctypes.c_long * 4)(*x.shape), (ctypes.c_long * 4)(*x.stride()))
    call("stem", x, ctypes.addressof(images), out, *first, weight, bias, len(first[1]), len(bias),
         weight.shape[1] * weight.shape[3], *strides)  # fmt: skip
    return out


def add_pooled(x: Tensor, y: Tensor, matrix: Affine) -> Tensor:
    """SiLU(y + matrix · the largest of each 2x2 patch of x), (B, H, W, C) -> (B, ⌈H/2⌉, ⌈W/2⌉, C'), written over y."""
    x, y = x.contiguous(), y.contiguous()
    call("pooled", x, x, y, *matrix, *x.shape, y.shape[3])
    return y


def attend_locally(x: Tensor, normed: Tensor, qkv: Affine, scale: Tensor | None, head_dim: int, size: int) -> Tensor:
    """x, times ``scale`` where given, plus the attention inside each grid, all (B, H, W, C)."""
    x, normed = x.contiguous(), normed.to(x.dtype).contiguous()
    out = torch.empty_like(x)
    call("local", x, x, normed, out, *qkv, scale, *x.shape, head_dim, size)
    return out


def attend_globally(
    own: Tensor,
    residual: Tensor | None,
    q: Affine,
    kv: Tensor,
    proj: Affine,
    further: Sequence[tuple[Tensor, int]],
    head_dim: int,
) -> Tensor:
    """The global step and the sum of all, (B, H, W, C) and kv (B, M, 2C) -> (B, H, W, C), written over ``own``."""
    own = own.contiguous()
    batch, height, width, channels = own.shape
    residual = None if residual is None else residual.to(own.dtype).contiguous()
    maps = [(step.contiguous(), ratio) for step, ratio in further]
    steps = (_Step * len(maps))(*(_Step(step.data_ptr(), ratio) for step, ratio in maps))
    tokens = kv.shape[1]
    padded = -(-tokens // PANEL) * PANEL
    packed = own.new_empty(batch * channels // head_dim * padded * (head_dim + -(-head_dim // PANEL) * PANEL))
    call("global", own, own, residual, *q, kv.contiguous(), *proj, ctypes.addressof(steps), len(maps), packed, batch,
          height, width, channels, head_dim, tokens)  # fmt: skip
    return own


def call(name: str, like: Tensor, *arguments: Tensor | int | None) -> None:
    """Call the kernel for tensors like this one with as many threads as PyTorch uses; tensors must be contiguous."""
    kernels = library()
    assert kernels is not None
    kernel = getattr(kernels, f"{name}_{'fp32' if like.dtype == torch.float32 else 'bf16'}")
    kernel(*(_argument(x) for x in arguments), ctypes.c_long(torch.get_num_threads()))


def _argument(x: Tensor | int | None) -> ctypes.c_void_p | ctypes.c_long:
    if isinstance(x, int):
        return ctypes.c_long(x)
    return ctypes.c_void_p(None if x is None else x.data_ptr())
