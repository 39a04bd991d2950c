"""A row of kernel calls that is recorded once and then made as one call, with other maps.

Between two kernels Python takes some fifty microseconds, as long as a kernel takes on a small map. A function of maps
that computes by kernels alone makes the same calls with the same weights and sizes, so it needs Python only once.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import build
from .call import Address, recorded, refuse_failed_allocations

__all__ = ["Replay", "record"]

_Word = ctypes.c_ssize_t  # as wide as an address
_ALIGNMENT = 64  # bytes
_KEPT = 1 << 26  # bytes of memory that a thread keeps for the maps between kernels
_MAKE = {torch.empty, torch.empty_like, Tensor.new_empty}
_VIEW = {
    *(Tensor.view, Tensor.permute, Tensor.flatten, Tensor.unflatten, Tensor.reshape, Tensor.contiguous, Tensor.to),
    *(Tensor.transpose, Tensor.detach, Tensor.unsqueeze, Tensor.squeeze, Tensor.__getitem__),
}
_ASK = {
    *("__get__", "__len__", "data_ptr", "dim", "element_size", "is_contiguous", "is_floating_point", "is_inference"),
    *("is_neg", "numel", "size", "storage_offset", "stride"),
}
_local = threading.local()


class _CCall(ctypes.Structure):
    _fields_ = (("kernel", ctypes.c_void_p), ("first", _Word), ("count", _Word))


class _CAddress(ctypes.Structure):
    _fields_ = (("argument", _Word), ("map", _Word), ("offset", _Word))


@dataclass
class _Call:
    kernel: Any
    arguments: list[int]
    maps: dict[int, tuple[int, int]]  # which arguments point into maps: the number of the map, and where in it


class _NoReplayError(Exception):
    """What was recorded can't be replayed."""


class _Operations(TorchFunctionMode):
    """Keeps the tensors that PyTorch's operations make without computing; notes whether others compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []
        self.compute = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _MAKE:
            self.made.append(result)
        elif isinstance(result, Tensor):
            self.compute |= func not in _VIEW or _memory(result) != _memory(args[0])
        else:
            self.compute |= getattr(func, "__name__", "") not in _ASK
        return result


@dataclass
class _Recorder:
    """The calls of kernels, and what they were given, which is kept so that no memory is used twice meanwhile."""

    calls: list[tuple[Any, list[int], list[Any]]] = field(default_factory=list)

    def add(self, kernel: Any, given: Sequence[Address | ctypes.c_long]) -> None:
        owners = [address.owner if isinstance(address, Address) else None for address in given]
        self.calls.append((kernel, [int(address.value or 0) for address in given], owners))


class Replay:
    """The calls that :func:`record` has seen."""

    def __init__(self, calls: list[_Call], kept: list[Any], workspace: int, result: tuple[Any, ...]) -> None:
        self._kept, self._workspace, self._result = kept, workspace, result
        arguments = [value for call in calls for value in call.arguments]
        rows, places, first = [], [], 0
        for call in calls:
            kernel = ctypes.cast(call.kernel, ctypes.c_void_p).value
            rows.append(_CCall(kernel, first, len(call.arguments)))
            places += [_CAddress(first + i, number, offset) for i, (number, offset) in call.maps.items()]
            first += len(call.arguments)
        self._library = build.library()
        self._arguments = (
            *((_CCall * len(rows))(*rows), _Word(len(rows))),
            *((_Word * len(arguments))(*arguments), _Word(len(arguments))),
            *((_CAddress * len(places))(*places), _Word(len(places))),
        )

    def __call__(self, *maps: Tensor) -> Tensor:
        """What the function would give of maps with the sizes, strides and dtype of those that it was recorded with."""
        size, stride, dtype, over = self._result
        out = torch.empty_strided(size, stride, dtype=dtype, device="cpu") if over is None else maps[over]
        memory = _workspace(self._workspace)
        pointers = *(x.data_ptr() for x in maps), out.data_ptr(), 0 if memory is None else memory.data_ptr()
        library: Any = self._library
        failed = library.allocations_that_failed()
        library.replay(*self._arguments, (_Word * len(pointers))(*pointers))
        refuse_failed_allocations(library, failed, "replay")
        return out if over is None else out.as_strided(size, stride)


def record(function: Callable[..., Any], *maps: Tensor) -> tuple[Any, Replay | None]:
    """What a function of maps gives, and its calls of kernels; None where anything else computes in it.

    None, too, where it gives something else than a map: lists of maps, say.

    The function must give what kernels compute by weights and sizes that don't change, of maps without gradients.
    """
    recorder, operations = _Recorder(), _Operations()
    with recorded(recorder), operations:
        result = function(*maps)
    if operations.compute or not isinstance(result, Tensor):
        return result, None
    try:
        return result, _replay(recorder.calls, operations.made, maps, result)
    except _NoReplayError:
        return result, None


def _replay(
    recorded: list[tuple[Any, list[int], list[Any]]], made: list[Tensor], maps: Sequence[Tensor], result: Tensor
) -> Replay:
    sizes = dict(map(_memory, (*made, *maps)))  # of each memory, by where it begins
    given = {_memory(x)[0]: i for i, x in enumerate(maps)}
    own, size = _memory(result)
    over = given.get(own)
    if not recorded or len(given) != len(maps):
        raise _NoReplayError("no kernel, or maps that share memory")
    if over is None and (own not in sizes or result.numel() * result.element_size() != size):
        raise _NoReplayError("the result isn't a map of its own")
    if over is not None and result.data_ptr() != maps[over].data_ptr():
        raise _NoReplayError("the result is a part of a map")
    calls = [_addresses(arguments, owners, sizes) for _, arguments, owners in recorded]
    lives: dict[int, tuple[int, int, int]] = {}
    for i, places in enumerate(calls):
        for begin, _ in places.values():
            if begin not in given and begin != own:
                lives[begin] = lives.get(begin, (i,))[0], i, sizes[begin]
    offsets, workspace = _layout(lives)

    def where(begin: int, offset: int) -> tuple[int, int]:
        if begin in given:
            return given[begin], begin + offset - maps[given[begin]].data_ptr()
        return (len(maps), offset) if begin == own else (len(maps) + 1, offsets[begin] + offset)

    kept = [owner for _, _, owners in recorded for owner in owners if not _is_in(owner, sizes)]
    rows = [
        _Call(kernel, arguments, {i: where(*place) for i, place in places.items()})
        for (kernel, arguments, _), places in zip(recorded, calls, strict=True)
    ]
    return Replay(rows, kept, workspace, (tuple(result.shape), result.stride(), result.dtype, over))


def _addresses(arguments: list[int], owners: list[Any], sizes: dict[int, int]) -> dict[int, tuple[int, int]]:
    """Which of a call's arguments point into memory that differs from time to time: where it begins, how far in it."""
    found: dict[int, tuple[int, int]] = {}
    for i, (address, owner) in enumerate(zip(arguments, owners, strict=True)):
        if _is_in(owner, sizes):
            begin = _memory(owner)[0]
            found[i] = begin, address - begin
        elif isinstance(owner, ctypes.Structure | ctypes.Array) and any(
            begin <= word < begin + sizes[begin] for word in _words(owner) for begin in sizes
        ):
            raise _NoReplayError("a struct points into a map")
    return found


def _is_in(owner: Any, sizes: dict[int, int]) -> bool:
    return isinstance(owner, Tensor) and _memory(owner)[0] in sizes


def _memory(x: Tensor) -> tuple[int, int]:
    """Where a tensor's memory begins, and how long it is."""
    storage = x.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _words(data: Any) -> tuple[int, ...]:
    """What may be addresses in a struct."""
    raw = bytes(data)
    return struct.unpack(f"{len(raw) // 8}Q", raw[: len(raw) // 8 * 8])


def _layout(lives: dict[int, tuple[int, int, int]]) -> tuple[dict[int, int], int]:
    """Where in one piece of memory maps lie of which each is used from a first call to a last, and how long it is."""
    offsets: dict[int, int] = {}
    end = 0
    for begin, (first, last, length) in sorted(lives.items(), key=lambda item: item[1]):
        others = sorted(
            (offsets[other], offsets[other] + lives[other][2])
            for other in offsets
            if lives[other][0] <= last and first <= lives[other][1]
        )
        place = 0
        for low, high in others:
            if place + length <= low:
                break
            place = max(place, -(-high // _ALIGNMENT) * _ALIGNMENT)
        offsets[begin] = place
        end = max(end, place + length)
    return offsets, end


def _workspace(size: int) -> Tensor | None:
    """Memory for the maps between kernels, which a thread has for itself until it asks again."""
    if not size:
        return None
    kept: Tensor | None = getattr(_local, "memory", None)
    if kept is None or kept.numel() < size:
        kept = torch.empty(size, dtype=torch.uint8, device="cpu")
        if size <= _KEPT:
            _local.memory = kept
    return kept
