"""A block's forward pass as steps, some of which do what several of its layers would."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.fx.node import map_aggregate

from ..dispatch import hooked
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


@dataclass
class Plan:
    """A block's forward pass of one tensor, as steps; and the modules that must have no hooks, by name and class.

    Those are the modules that the steps don't call, and the layers whose results may be written over.
    """

    steps: list[Step]
    output: Any
    skipped: list[tuple[str, type[nn.Module]]]
    replays: Replays = field(default_factory=Replays)

    def fits(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the plan computes what the block does now."""
        if len(args) != 1 or kwargs or not onednn_fits(args[0]):
            return False
        modules = ((submodule(block, name), kind) for name, kind in self.skipped)
        return all(plain_class(module) is kind and not hooked(module) for module, kind in modules)

    def run(self, block: nn.Module, x: Tensor) -> Any:
        """The block's result."""
        found: dict[int, Any] = {0: x}
        for step in self.steps:
            if not (step.parts and _as_one(block, step, found)):
                for part in step.parts or (step,):
                    found[part.number] = _do(block, part, *_values((list(part.args), part.kwargs), found))
            for number in step.free:
                found.pop(number, None)
        return _values(self.output, found)


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
    return name.split(".")


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
