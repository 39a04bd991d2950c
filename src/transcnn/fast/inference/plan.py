"""A block's forward pass as steps, some of which do what several of its layers would."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.fx.node import map_aggregate

from ..cpu.call import recording
from ..dispatch import globally_hooked, hooked
from .activations import NONE, Activation, apply
from .convolutions import Fused, onednn_fits
from .replays import Replays

__all__ = ["Plan", "Ref", "Step", "free", "mapped", "plain_class", "submodule"]


@dataclass(frozen=True)
class Ref:
    """The result of a step."""

    number: int


@dataclass
class Step:
    """One operation of a plan.

    ``kind`` is fx's, "fused" for a layer with what follows it, or "chain" for ``parts`` that ``target`` does at once.
    """

    kind: str
    target: Any
    args: Any
    kwargs: dict[str, Any]
    number: int  # of its result
    act: Activation = NONE
    free: list[int] = field(default_factory=list)  # results that nothing reads later
    reuse: bool = False  # whether the result may be written over the map that is added
    parts: list[Step] = field(default_factory=list)
    by_kernel: bool = False  # whether our kernels may compute it


@dataclass
class Plan:
    """A block's forward pass of one tensor, as steps; and the modules that must stay what they are.

    Those are the block (its name is ""), the modules that the steps don't call, and the layers whose results may be
    written over: by name, class and number of children. All but the block must have no hooks, either.
    """

    steps: list[Step]
    output: Any
    skipped: list[tuple[str, type[nn.Module], int]]
    replays: Replays = field(default_factory=Replays)

    def __post_init__(self) -> None:
        self._rows = _rows(self.steps, self.output)
        self._parts = any(row.output is not None for row in self._rows)

    def fits(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the plan computes what the block does now."""
        if len(args) != 1 or kwargs or not onednn_fits(args[0]) or (self.skipped and globally_hooked()):
            return False
        modules = ((name, submodule(block, name), kind, children) for name, kind, children in self.skipped)
        return all(
            plain_class(module) is kind
            and len(module._modules) == children
            and not module.training  # dropout that is switched on again
            and not (name and hooked(module))
            for name, module, kind, children in modules
        )

    def run(self, block: nn.Module, x: Tensor) -> Any:
        """The block's result."""
        found: dict[int, Any] = {0: x}
        fresh = self._parts and not recording() and self.replays.fresh(block)
        for i, row in enumerate(self._rows):
            if fresh and row.output is not None:
                maps = [found[number] for number in row.inputs]
                found[row.output] = self.replays.part(i, functools.partial(_alone, block, row), *maps)
                del maps
                _forget(row.steps, found)
            else:
                _run(block, row.steps, found)
        return _values(self.output, found)


@dataclass
class _Row:
    """Steps in a row that kernels may compute alone."""

    steps: list[Step]
    inputs: list[int]  # what it reads of other steps' results
    output: int | None  # the only result that others read; None where it has to be run step by step


def _rows(steps: list[Step], output: Any) -> list[_Row]:
    """The steps, those in a row that kernels may compute together."""
    return [_row(list(some), steps, output) for _, some in itertools.groupby(steps, lambda step: step.by_kernel)]


def _row(some: list[Step], steps: list[Step], output: Any) -> _Row:
    own = {step.number for step in some}
    read = _numbers([(list(step.args), step.kwargs) for step in some])
    later = _numbers([[(list(step.args), step.kwargs) for step in steps if step.number not in own], output])
    results = own & later
    alone = some[0].by_kernel and len(results) == 1
    return _Row(some, sorted(read - own), results.pop() if alone else None)


def _numbers(given: Any) -> set[int]:
    """The results that are read here."""
    found: set[int] = set()
    mapped(given, lambda one: found.add(one.number) if isinstance(one, Ref) else None)
    return found


def _alone(block: nn.Module, row: _Row, *maps: Tensor) -> Any:
    found = dict(zip(row.inputs, maps, strict=True))
    _run(block, row.steps, found)
    return found[row.output]  # pyright: ignore


def _run(block: nn.Module, steps: list[Step], found: dict[int, Any]) -> None:
    for step in steps:
        if not (step.parts and _as_one(block, step, found)):
            for part in step.parts or (step,):
                found[part.number] = _do(block, part, *_values((list(part.args), part.kwargs), found))
        _forget([step], found)


def _forget(steps: list[Step], found: dict[int, Any]) -> None:
    """Drop the results that nothing reads after these steps."""
    for step in steps:
        for number in step.free:
            found.pop(number, None)


def _values(given: Any, found: dict[int, Any]) -> Any:
    return mapped(given, lambda one: found[one.number] if isinstance(one, Ref) else one)


def _as_one(block: nn.Module, step: Step, found: dict[int, Any]) -> bool:
    """Whether a kernel has computed all parts of this step at once."""
    y = step.target.run(block, *_values(list(step.args), found), reuse=step.reuse)
    if y is not None:
        found[step.number] = y
    return y is not None


def _do(block: nn.Module, step: Step, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if step.kind == "fused":
        layer, others = submodule(block, step.target), args[1:]
        other = others[0] if others else None
        y = layer.fused(args[0], other, step.act, step.reuse)  # pyright: ignore
        if y is not None:
            return y
        y = None if other is None else layer.fused(args[0], other, NONE, step.reuse)  # pyright: ignore
        if y is None:
            y = layer(args[0])
            y = y if other is None else y + other
        return apply(step.act, y)
    if step.kind == "call_module":
        return submodule(block, step.target)(*args, **kwargs)
    if step.kind == "call_method":
        return getattr(args[0], step.target)(*args[1:], **kwargs)
    if step.kind == "get_attr":
        return operator.attrgetter(step.target)(block)
    return step.target(*args, **kwargs)


def submodule(block: nn.Module, name: str) -> Any:
    """``block.get_submodule(name)`` in a third of the time; None where there is none."""
    found: Any = block
    for part in _parts(name):
        found = None if found is None else found._modules.get(part)
    return found


@functools.cache
def _parts(name: str) -> list[str]:
    return name.split(".") if name else []


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, before it got a plan."""
    return getattr(type(module), "_plain_class", type(module))


def mapped(given: Any, change: Callable[[Any], Any]) -> Any:
    """The arguments of a node with ``change`` of each that isn't a tuple, list, dict or slice."""
    return map_aggregate(given, change)


def free(plan: Plan, modules: dict[str, nn.Module]) -> None:
    """Say after which step each result is read no more, and which step may write its own over one of those."""
    last: dict[int, int] = {}

    def read(i: int, given: Any) -> None:
        mapped(given, lambda one: last.update({one.number: i}) if isinstance(one, Ref) else None)

    for i, step in enumerate(plan.steps):
        for part in (*step.parts, step):
            last[part.number] = i
        read(i, (list(step.args), step.kwargs))
    read(len(plan.steps), plan.output)
    for number, i in last.items():
        if i < len(plan.steps):
            plan.steps[i].free.append(number)
    _reuse(plan.steps, modules)


def _reuse(steps: list[Step], modules: dict[str, nn.Module]) -> None:
    """Have sums written over the map that is added, where a layer made that map and only layers have read it; likewise
    what a kernel can write over its input.

    Neither makes a view, so nothing else has that memory.
    """
    own: set[int] = set()
    for step in steps:
        layer = step.kind in ("fused", "chain") or isinstance(modules.get(str(step.target)), Fused)
        if layer:
            own.add(step.number)
        else:
            mapped(
                (list(step.args), step.kwargs), lambda one: own.discard(one.number) if isinstance(one, Ref) else None
            )
        takes = layer and (len(step.args) == 2 or getattr(step.target, "over_input", False))
        over = step.args[-1] if takes else None
        step.reuse = isinstance(over, Ref) and over not in step.args[:-1]
        step.reuse = step.reuse and over.number in own and over.number in step.free  # pyright: ignore
