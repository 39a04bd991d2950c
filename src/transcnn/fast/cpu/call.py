"""Calls into the compiled library. Every tensor is checked first: kernels read and write raw memory."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import build

__all__ = [
    "FP32",
    "KERNEL_SIZES",
    "MAX_HEAD_DIM",
    "PANEL",
    "Address",
    "Argument",
    "Checked",
    "any_size",
    "argument",
    "call",
    "check",
    "check_memory",
    "depth_fits",
    "heads_fit",
    "optional",
    "recorded",
    "recording",
    "refuse_failed_allocations",
    "require",
    "round_up",
    "thread_sums",
]

PANEL = 32  # columns of a packed matrix that lie together
MAX_HEAD_DIM = 256
KERNEL_SIZES = (3, 5, 7)  # of a depthwise convolution
FP32 = torch.float32
Checked = tuple[str, Tensor, torch.dtype, tuple[int, ...]]  # name, tensor, and the dtype and shape that it must have
_Data = ctypes.Structure | ctypes.Array | ctypes.c_float


class Address(ctypes.c_void_p):
    """What a kernel gets for a tensor or a struct, which it keeps."""

    owner: Any = None


Argument = Checked | _Data | int | Address | ctypes.c_long | None


class _Recorder(Protocol):
    def add(self, kernel: Any, given: Sequence[Address | ctypes.c_long]) -> None: ...


_local = threading.local()


@contextmanager
def recorded(recorder: _Recorder) -> Iterator[None]:
    """Tell a recorder of each call of a kernel that this thread makes meanwhile."""
    _local.recorder = recorder
    try:
        yield
    finally:
        _local.recorder = None


def recording() -> bool:
    """Whether this thread's calls are being recorded."""
    return getattr(_local, "recorder", None) is not None


def call(name: str, dtype: torch.dtype, *arguments: Argument, threads: int | None = None) -> None:
    """Call a kernel.

    Args:
        name: The kernel's name, without the suffix for its dtype.
        dtype: What it computes in.
        arguments: Integers, structs, None for a tensor that the kernel can do without, or (name, tensor, dtype, shape),
            where dtype and shape are what the kernel takes the memory for; or what :func:`argument` made of it.
        threads: How many it uses; None for as many as PyTorch.

    Raises:
        ValueError: A tensor has another dtype or shape, is empty, isn't contiguous or isn't a plain one on the CPU; or
            there is no such kernel on this CPU.
        MemoryError: The kernel, or another that ran at the same time, found none; what it wrote isn't whole.
    """
    library = build.library()
    if library is None or not build.isa_support() & {FP32: 1, torch.bfloat16: 2}.get(dtype, 0):
        raise ValueError(f"there is no kernel {name!r} for {dtype} on this CPU")
    kernel = getattr(library, f"{name}_{'fp32' if dtype == FP32 else 'bf16'}")
    given = [argument(name, x) for x in (*arguments, threads or torch.get_num_threads())]
    failed = library.allocations_that_failed()
    kernel(*given)
    refuse_failed_allocations(library, failed, name)
    recorder = getattr(_local, "recorder", None)
    if recorder is not None:
        recorder.add(kernel, given)


def refuse_failed_allocations(library: ctypes.CDLL, before: int, name: str) -> None:
    """Raise a MemoryError where there were others since there were so many."""
    if library.allocations_that_failed() != before:
        raise MemoryError(f"kernel {name!r} finds no memory")


def argument(kernel: str, x: Argument) -> Address | ctypes.c_long:
    """What the kernel gets for this; a tensor is checked."""
    if isinstance(x, int):
        return ctypes.c_long(x)
    if x is None:
        return Address(None)
    if isinstance(x, Address | ctypes.c_long):
        return x
    if isinstance(x, _Data):
        made, owner = Address(ctypes.addressof(x)), x
    else:
        check(kernel, *x)
        made, owner = Address(x[1].data_ptr()), x[1]
    made.owner = owner
    return made


def check(kernel: str, name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Refuse a tensor whose memory isn't that of a contiguous one of this dtype and shape."""
    check_memory(kernel, name, x, dtype, shape)
    if not x.is_contiguous():
        raise ValueError(f"kernel {kernel!r}: {name} must be contiguous, got strides {x.stride()} of {shape}")


def check_memory(kernel: str, name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The same for a tensor with any strides."""
    if type(x) not in (Tensor, nn.Parameter) or x.layout != torch.strided or not x.is_cpu or x.is_neg():
        raise ValueError(f"kernel {kernel!r}: {name} must be a plain tensor on the CPU, got {_describe(x)}")
    if x.dtype != dtype or x.shape != shape or not x.numel():
        raise ValueError(f"kernel {kernel!r}: {name} must be {dtype} {shape}, got {_describe(x)}")


def require(condition: bool, kernel: str, *sizes: int) -> None:
    """Refuse sizes that a kernel isn't made for."""
    if not condition:
        raise ValueError(f"kernel {kernel!r} can't be called with these sizes: {', '.join(map(str, sizes))}")


def any_size(name: str, x: Tensor) -> Checked:
    """An argument of :func:`call` whose dtype and shape are its own: those of the others go by it."""
    return name, x, x.dtype, tuple(x.shape)


def optional(name: str, x: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> Checked | None:
    """An argument of :func:`call` that may be missing."""
    return None if x is None else (name, x, dtype, shape)


def heads_fit(channels: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether attention kernels take heads of this size."""
    return 0 < head_dim <= MAX_HEAD_DIM and channels % head_dim == 0 and depth_fits(head_dim, dtype)


def depth_fits(channels: int, dtype: torch.dtype) -> bool:
    """Whether the kernels' matrix products sum over so many channels, in bf16 at least AMX's 32 at a time."""
    return channels % 16 == 0 and channels >= (16 if dtype == FP32 else 32)


def thread_sums(x: Tensor) -> Tensor:
    """Zeros (threads, 2, C) in double precision for two sums over a map (..., C), each thread's apart."""
    return x.new_zeros(torch.get_num_threads(), 2, x.shape[-1], dtype=torch.double)


def round_up(n: int, multiple: int = PANEL) -> int:
    """The next multiple."""
    return -(-n // multiple) * multiple


def _describe(x: object) -> str:
    if not isinstance(x, Tensor):
        return type(x).__name__
    return f"{type(x).__name__} {x.dtype} {tuple(x.shape)} on {x.device}, {x.layout}"
