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
Checked = tuple[str, Tensor, torch.dtype, tuple[int, ...]]  # name, tensor, and what the kernel takes it for
FP32 = torch.float32


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
    plain = type(x) in (Tensor, torch.nn.Parameter) and x.numel() > 0 and x.layout == torch.strided and not x.is_neg()
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
    outputs, dtype = out.shape[3], x.dtype
    of_out = (batch, height, width, outputs)
    require(
        size in SIZES and channels % _unit(dtype) == outputs % _unit(dtype) == 0, "residual", channels, outputs, size
    )
    call(
        "residual",
        dtype,
        ("x", x, dtype, (batch, height, width, channels)),
        optional("residual", residual, dtype, of_out),
        ("out", out, dtype, of_out),
        *_matrix("expand", expand, dtype, hidden, channels),
        ("mix", mix[0], FP32, (size, size, hidden)),
        ("mix bias", mix[1], FP32, (hidden,)),
        *_matrix("project", project, dtype, outputs, hidden),
        *(batch, height, width, channels, hidden, outputs, size),
    )
    return out


def pack_stem(first: Tensor, first_bias: Tensor, second: Tensor, second_bias: Tensor) -> tuple[Affine, Affine]:
    """The weights of two 3x3 convolutions as :func:`stem` takes them."""
    rows = second.permute(0, 2, 3, 1).flatten(1)  # (C", 9·C')
    if rows.dtype == torch.bfloat16:
        rows = F.pad(rows, (0, -rows.shape[1] % PANEL))
    return (first.float().flatten(1).t().contiguous(), first_bias.float()), pack_matrix(rows, second_bias)


def stem(x: Tensor, first: Affine, second: Affine, strides: tuple[int, int]) -> Tensor:
    """3x3 convolution, SiLU, 3x3 convolution, with these strides (1 or 2); (B, C, H, W) -> (B, H', W', C')."""
    batch, channels, height, width = x.shape
    for stride in strides:
        height, width = -(-height // stride), -(-width // stride)
    weight, bias = second
    middle, outputs, dtype = len(first[1]), len(bias), x.dtype
    depth = 9 * middle if dtype == FP32 else -(-9 * middle // PANEL) * PANEL
    require(set(strides) <= {1, 2} and middle % 16 == outputs % 16 == 0, "stem", middle, outputs, *strides)
    check_memory("stem", "x", x, dtype, tuple(x.shape))
    out = x.new_empty(batch, height, width, outputs)
    images = _Images(x.data_ptr(), (ctypes.c_long * 4)(*x.shape), (ctypes.c_long * 4)(*x.stride()))
    call(
        "stem",
        dtype,
        ctypes.addressof(images),
        ("out", out, dtype, (batch, height, width, outputs)),
        ("first", first[0], FP32, (9 * channels, middle)),
        ("first bias", first[1], FP32, (middle,)),
        *_matrix("second", (weight, bias), dtype, outputs, depth),
        *(middle, outputs, depth, *strides),
    )
    return out


def add_pooled(x: Tensor, y: Tensor, matrix: Affine) -> Tensor:
    """SiLU(y + matrix · the largest of each 2x2 patch of x), (B, H, W, C) -> (B, ⌈H/2⌉, ⌈W/2⌉, C'), written over y."""
    x, y = x.contiguous(), y.contiguous()
    batch, height, width, channels = x.shape
    outputs, dtype = y.shape[-1], x.dtype
    require(channels % _unit(dtype) == outputs % 16 == 0, "pooled", channels, outputs)
    call(
        "pooled",
        dtype,
        ("x", x, dtype, (batch, height, width, channels)),
        ("y", y, dtype, (batch, (height + 1) // 2, (width + 1) // 2, outputs)),
        *_matrix("matrix", matrix, dtype, outputs, channels),
        *(batch, height, width, channels, outputs),
    )
    return y


def attend_locally(x: Tensor, normed: Tensor, qkv: Affine, scale: Tensor | None, head_dim: int, size: int) -> Tensor:
    """x, times ``scale`` where given, plus the attention inside each grid, all (B, H, W, C)."""
    x, normed = x.contiguous(), normed.to(x.dtype).contiguous()
    out = torch.empty_like(x)
    batch, height, width, channels = x.shape
    dtype, shape = x.dtype, (batch, height, width, channels)
    require(heads_fit(channels, head_dim, dtype) and size >= 1, "local", channels, head_dim, size)
    call(
        "local",
        dtype,
        ("x", x, dtype, shape),
        ("normed", normed, dtype, shape),
        ("out", out, dtype, shape),
        *_matrix("qkv", qkv, dtype, 3 * channels, channels),
        optional("scale", scale, FP32, (channels,)),
        *(batch, height, width, channels, head_dim, size),
    )
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
    own, kv = own.contiguous(), kv.contiguous()
    batch, height, width, channels = own.shape
    dtype, shape, tokens = own.dtype, (batch, height, width, channels), kv.shape[1]
    residual = None if residual is None else residual.to(dtype).contiguous()
    maps = [(step.contiguous(), ratio) for step, ratio in further]
    whole = heads_fit(channels, head_dim, dtype) and tokens >= 1 and all(ratio >= 1 for _, ratio in maps)
    require(whole, "global", channels, head_dim, tokens, *(ratio for _, ratio in maps))
    for step, ratio in maps:
        check("global", "step", step, dtype, (batch, -(-height // ratio), -(-width // ratio), channels))
    steps = (_Step * len(maps))(*(_Step(step.data_ptr(), ratio) for step, ratio in maps))
    padded = -(-tokens // PANEL) * PANEL
    room = batch * channels // head_dim * padded * (head_dim + -(-head_dim // PANEL) * PANEL)
    call(
        "global",
        dtype,
        ("own", own, dtype, shape),
        optional("residual", residual, dtype, shape),
        *_matrix("q", q, dtype, channels, channels),
        ("kv", kv, dtype, (batch, tokens, 2 * channels)),
        *_matrix("proj", proj, dtype, channels, channels),
        ctypes.addressof(steps),
        len(maps),
        ("packed", own.new_empty(room), dtype, (room,)),
        *(batch, height, width, channels, head_dim, tokens),
    )
    return own


def call(name: str, dtype: torch.dtype, *arguments: Checked | int | None, threads: int | None = None) -> None:
    """Call the kernel for this dtype.

    Args:
        name: The kernel's.
        dtype: What it computes in.
        arguments: Numbers, None for a tensor that the kernel can do without, or a name, a tensor, and the dtype and
            shape that the kernel takes it for. It reads and writes that much memory, whatever is there.
        threads: How many it uses; None for as many as PyTorch.

    Raises:
        ValueError: A tensor isn't what the kernel takes it for, or doesn't lie in this process's memory row by row.
    """
    kernels = library()
    if kernels is None or not supports(dtype):
        raise ValueError(f"there is no kernel {name!r} for {dtype} on this processor")
    kernel = getattr(kernels, f"{name}_{'fp32' if dtype == FP32 else 'bf16'}")
    kernel(*(_argument(name, x) for x in arguments), ctypes.c_long(threads or torch.get_num_threads()))


def _argument(kernel: str, x: Checked | int | None) -> ctypes.c_void_p | ctypes.c_long:
    if isinstance(x, int):
        return ctypes.c_long(x)
    if x is None:
        return ctypes.c_void_p(None)
    check(kernel, *x)
    return ctypes.c_void_p(x[1].data_ptr())


def check(kernel: str, name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Refuse a tensor whose memory isn't that of a contiguous one of this dtype and shape."""
    check_memory(kernel, name, x, dtype, shape)
    if not x.is_contiguous():
        raise ValueError(f"kernel {kernel!r}: {name} must be contiguous, got strides {x.stride()} of {shape}")


def check_memory(kernel: str, name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if type(x) not in (Tensor, torch.nn.Parameter) or x.layout != torch.strided or not x.is_cpu or x.is_neg():
        raise ValueError(f"kernel {kernel!r}: {name} must be a plain tensor on the CPU, got {_words(x)}")
    if x.dtype != dtype or x.shape != shape or not x.numel():
        raise ValueError(f"kernel {kernel!r}: {name} must be {dtype} {shape}, got {_words(x)}")


def _words(x: object) -> str:
    if not isinstance(x, Tensor):
        return type(x).__name__
    return f"{type(x).__name__} {x.dtype} {tuple(x.shape)} on {x.device}, {x.layout}"


def _matrix(name: str, packed: Affine, dtype: torch.dtype, outputs: int, inputs: int) -> tuple[Checked, Checked]:
    """What :func:`pack_matrix` makes of weights (outputs, inputs), to be checked."""
    word = 1 if dtype == FP32 else 2
    panels = (-(-outputs // PANEL), inputs // word, PANEL, word)
    return (name, packed[0], dtype, panels), (f"{name} bias", packed[1], FP32, (outputs,))


def optional(name: str, x: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> Checked | None:
    return None if x is None else (name, x, dtype, shape)


def require(condition: bool, kernel: str, *numbers: int) -> None:
    if not condition:
        raise ValueError(f"kernel {kernel!r} can't be called with these sizes: {', '.join(map(str, numbers))}")


def _unit(dtype: torch.dtype) -> int:
    """How many channels kernels with matrix products take at a time."""
    return 16 if dtype == FP32 else 32


def heads_fit(channels: int, head_dim: int, dtype: torch.dtype) -> bool:
    return 0 < head_dim <= MOST and channels % head_dim == head_dim % _unit(dtype) == 0
