"""Modules whose kernels run without Python in between (:mod:`..cpu.replay`), from the third input of a size on."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import repeat
from operator import attrgetter, is_, itemgetter, methodcaller
from typing import Any

import torch
from torch import Tensor, nn

from ..cpu.call import recording
from ..cpu.replay import Replay, record
from ..dispatch import fits_cpu, globally_hooked

__all__ = ["Replays"]

_SIZES = 8  # of inputs that are remembered
_UNKNOWN = object()
_HOOKS = [itemgetter(f"_{name}_hooks") for name in ("forward", "forward_pre", "backward", "backward_pre")]
_version, _pointer, _training = attrgetter("_version"), methodcaller("data_ptr"), attrgetter("training")
_SAME_IN_TRAINING = tuple(f"torch.nn.modules.{name}" for name in ("activation", "container", "linear", "pooling"))
_SAME_IN_TRAINING += ("transcnn.fast.inference.",)
_LIBRARIES = ("torch", "torchvision", "timm", "transcnn")  # whose modules keep nothing of a call


class _State:
    """What a module and those in it compute with: weights, modules, classes. Reading all of it must be quick."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._modules = list(module.modules())
        self._classes = list(map(type, self._modules))
        self._vars = list(map(vars, self._modules))
        self._dicts = [own for m in self._modules for own in (m._parameters, m._buffers, m._modules)]
        self._sizes = list(map(len, self._dicts))
        self._owners, self._names, self._values = [], [], []
        for own in self._dicts:
            for name, value in own.items():
                self._owners.append(own)
                self._names.append(name)
                self._values.append(value)
        self._tensors = [value for value in self._values if isinstance(value, Tensor)]
        # Those of inference mode don't count their versions.
        self.counts = not any(x.is_inference() for x in self._tensors)
        self._versions = list(map(_version, self._tensors)) if self.counts else []
        self._pointers = list(map(_pointer, self._tensors))
        self._may_train = [m for m in self._modules if not type(m).__module__.startswith(_SAME_IN_TRAINING)]
        # Others may keep what they see, as a module does that is put between two to watch them.
        self.keeps_nothing = all(map(_keeps_nothing, self._classes))

    def same(self) -> bool:
        """Whether all of it is as it was."""
        return (
            list(map(len, self._dicts)) == self._sizes
            and all(map(is_, map(dict.get, self._owners, self._names), self._values))  # pyright: ignore
            and all(map(is_, map(type, self._modules), self._classes))
            and (not self.counts or list(map(_version, self._tensors)) == self._versions)
            and list(map(_pointer, self._tensors)) == self._pointers
        )

    def hooked(self) -> bool:
        """Whether anything wants to see the modules' calls, or dropout is switched on again."""
        own = any(any(map(hooks, self._vars)) for hooks in _HOOKS)
        own = own or any(map(dict.__contains__, self._vars, repeat("forward")))
        return own or any(map(_training, self._may_train)) or globally_hooked()

    def differentiated(self) -> bool:
        """Whether gradients of the weights are asked for."""
        return torch.is_grad_enabled() and any(weight.requires_grad for weight in self._tensors)


def _keeps_nothing(kind: type[nn.Module]) -> bool:
    return hasattr(kind, "_plain_class") or kind.__module__.partition(".")[0] in _LIBRARIES


class Replays:
    """The recorded calls of a module's kernels, for each size of input; made anew when its weights have changed."""

    def __init__(self) -> None:
        self._state: _State | None = None
        self._known: dict[Any, Replay | None] = {}
        self._seen: set[Any] = set()

    def fresh(self, module: nn.Module) -> bool:
        """Whether recorded calls of this module's kernels can be made, for nothing has changed since."""
        state = self._state
        if state is None or state.module is not module or not state.same():
            state = _State(module)
            self._known, self._seen, self._state = {}, set(), state  # another thread reads the state first
        return state.counts and not state.hooked() and not state.differentiated()

    def __call__(self, module: nn.Module, function: Callable[..., Tensor], *maps: Tensor) -> Tensor:
        """function(*maps), which computes with the weights of ``module`` and keeps nothing."""
        if not _usable(maps):
            return function(*maps)
        key = _key(None, maps)
        never = self._known.get(key, _UNKNOWN) is None
        if never or not self.fresh(module) or not self._state.keeps_nothing:  # pyright: ignore
            return function(*maps)
        return self._run(key, function, maps)

    def part(self, name: Hashable, function: Callable[..., Tensor], *maps: Tensor) -> Tensor:
        """The same of a part of the module, which must be :meth:`fresh`."""
        return self._run(_key(name, maps), function, maps) if _usable(maps) else function(*maps)

    def _run(self, key: tuple[Hashable, ...], function: Callable[..., Tensor], maps: Sequence[Tensor]) -> Tensor:
        known, seen = self._known, self._seen  # those of now: another thread may begin anew
        replay = known.get(key, _UNKNOWN)
        if isinstance(replay, Replay):
            return replay(*maps)
        if replay is None:
            return function(*maps)
        if key not in seen:  # weights may have to be packed
            _bound(seen, key)
            seen.add(key)
            return function(*maps)
        result, made = record(function, *maps)
        _bound(known, key)
        known[key] = made
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        return Replays, ()  # a copy records its own


def _usable(maps: Sequence[Tensor]) -> bool:
    """Whether kernels run on these maps, whose gradients nobody asks for, and nobody records their calls."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in maps):
        return False
    return not recording() and all(fits_cpu(x, gemm=False) for x in maps)


def _key(name: Hashable, maps: Sequence[Tensor]) -> tuple[Hashable, ...]:
    return name, torch.get_num_threads(), *((x.shape, x.stride(), x.dtype) for x in maps)


def _bound(remembered: dict[Any, Any] | set[Any], key: tuple[Hashable, ...]) -> None:
    """Make room for another size of a part of a module."""
    if sum(other[0] == key[0] for other in list(remembered)) >= _SIZES:  # other threads add to it
        remembered.clear()
