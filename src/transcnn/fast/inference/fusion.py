"""Blocks of any CNN with sums and activations fused into the convolutions and linear layers before them.

A block's forward pass is traced; where it reads ``act(conv(x) + y)`` or ``act(conv(x))``, the block runs a plan in
which that is one operation. Its modules and attributes stay what and where they are, and its own forward pass runs
wherever the plan doesn't fit: in traces, on a GPU, with other arguments, and when one of the modules that were fused
got a hook or was replaced.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
from timm.layers import DropPath
from torch import Tensor, nn
from torch.fx.node import map_aggregate

from ..dispatch import hooked
from .convolutions import NONE, Activation, Fused, activation, fused_activation, onednn_fits
from .entry import InferenceOnly

__all__ = ["fuse_blocks"]

_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout2d, DropPath)  # in evaluation
_PURE = (*_NOTHING, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.LayerNorm, nn.BatchNorm2d)
_PURE_FUNCTIONS = (operator.add, operator.mul, operator.sub, torch.add, torch.mul, torch.cat)


def fuse_blocks(model: nn.Module, left: list[nn.Module]) -> int:
    """Have the blocks of ``model`` (in place; not itself, nor those ``left`` alone) run fused; how many do."""
    count = 0
    for module in list(model.modules()):
        if isinstance(module, _Planned):  # of a network that is optimized again
            del module._plan
            object.__setattr__(module, "__class__", module._plain_class)
        skipped = isinstance(module, InferenceOnly | Fused | nn.Sequential | torch.jit.ScriptModule)
        if module is model or skipped or any(module is other for other in left) or hooked(module):
            continue
        plan = _plan(module)
        if plan is not None:
            object.__setattr__(module, "__class__", _class(type(module)))
            module._plan = plan  # pyright: ignore
            count += 1
    return count


@dataclass(frozen=True)
class Ref:
    """The result of a step."""

    number: int


@dataclass
class Step:
    """One operation of a plan. ``kind`` is fx's, or "fused" for a layer with what follows it."""

    kind: str
    target: Any
    args: Any
    kwargs: dict[str, Any]
    act: Activation = NONE
    free: list[int] = field(default_factory=list)  # results that nothing reads later


@dataclass
class Plan:
    """A block's forward pass of one tensor, as steps; and the modules that they don't call, by name and class."""

    steps: list[Step]
    output: Any
    skipped: list[tuple[str, type[nn.Module]]]

    def fits(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the plan computes what the block does now."""
        if len(args) != 1 or kwargs or not onednn_fits(args[0]):
            return False
        modules = ((block.get_submodule(name), kind) for name, kind in self.skipped)
        return all(type(module) is kind and not hooked(module) for module, kind in modules)

    def run(self, block: nn.Module, x: Tensor) -> Any:
        """The block's result."""
        found: dict[int, Any] = {0: x}

        def value(given: Any) -> Any:
            return _mapped(given, lambda one: found[one.number] if isinstance(one, Ref) else one)

        for i, step in enumerate(self.steps, start=1):
            args = [found[one.number] if isinstance(one, Ref) else value(one) for one in step.args]
            found[i] = _do(block, step, args, value(step.kwargs) if step.kwargs else {})
            for index in step.free:
                del found[index]
        return value(self.output)


def _do(block: nn.Module, step: Step, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if step.kind == "fused":
        layer, others = block.get_submodule(step.target), args[1:]
        other = others[0] if others else None
        y = layer.fused(args[0], other, step.act)  # pyright: ignore
        if y is None:
            y = layer(args[0])
            y = _ACTS[step.act[0]](y if other is None else y + other, step.act)
        return y
    if step.kind == "call_module":
        return block.get_submodule(step.target)(*args, **kwargs)
    if step.kind == "call_method":
        return getattr(args[0], step.target)(*args[1:], **kwargs)
    if step.kind == "get_attr":
        return operator.attrgetter(step.target)(block)
    return step.target(*args, **kwargs)


_ACTS: dict[str, Any] = {
    "none": lambda x, act: x,
    "relu": lambda x, act: x.relu(),
    "hardtanh": lambda x, act: nn.functional.hardtanh(x, *act[1]),
    "leaky_relu": lambda x, act: nn.functional.leaky_relu(x, *act[1]),
    "swish": lambda x, act: nn.functional.silu(x),
    "gelu": lambda x, act: nn.functional.gelu(x, approximate=act[2]),
    "hardswish": lambda x, act: nn.functional.hardswish(x),
    "sigmoid": lambda x, act: x.sigmoid(),
    "hardsigmoid": lambda x, act: nn.functional.hardsigmoid(x),
    "tanh": lambda x, act: x.tanh(),
}


class _Proxy(torch.fx.Proxy):
    """Records what changes a tensor in place as that; fx takes ``x += y`` for ``x = x + y``."""

    def _in_place(self, function: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    __iadd__ = functools.partialmethod(_in_place, operator.iadd)
    __isub__ = functools.partialmethod(_in_place, operator.isub)
    __imul__ = functools.partialmethod(_in_place, operator.imul)
    __itruediv__ = functools.partialmethod(_in_place, operator.itruediv)
    __ipow__ = functools.partialmethod(_in_place, operator.ipow)


class _Tracer(torch.fx.Tracer):
    """Only a block's own forward pass, and that of sequences in it."""

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) is not nn.Sequential or hooked(m)


def _plan(block: nn.Module) -> Plan | None:
    """What fuses something of this block; None where nothing can be, or the block can't be traced."""
    if not any(isinstance(m, Fused) for m in _near(block)) or len(inspect.signature(block.forward).parameters) != 1:
        return None
    try:
        graph = _Tracer().trace(block)
    except Exception:  # tracing runs the block's own code, which may fail on a proxy in any way
        return None
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    outputs = [node for node in graph.nodes if node.op == "output"]
    if len(inputs) != 1 or (inputs[0].type is not None and "Tensor" not in str(inputs[0].type)):
        return None
    modules = dict(block.named_modules())
    ends = _ends(nodes, modules)
    if not ends:
        return None
    inner = {node for chain, _ in ends.values() for node in chain}  # what a fused step computes, but for its end
    ref = {inputs[0]: Ref(0)}
    steps: list[Step] = []
    for node in nodes:
        if node in inner and node not in ends:
            continue
        if node in ends:
            (layer, *rest), act = ends[node]
            others = [one for add in (*rest, node) if _is_sum(add) for one in add.args if one not in (layer, *rest)]
            step = Step("fused", str(layer.target), [layer.args[0], *others], {}, act)
        elif node.op == "call_module" and type(modules[str(node.target)]) in _NOTHING and node.args:
            ref[node] = ref[node.args[0]]  # pyright: ignore
            continue
        else:
            step = Step(node.op, node.target, node.args, dict(node.kwargs))
        step.args, step.kwargs = (_refer(given, ref) for given in (step.args, step.kwargs))
        steps.append(step)
        ref[node] = Ref(len(steps))
    plan = Plan(steps, _refer(outputs[0].args[0], ref), _skipped(nodes, inner | set(ends), modules))
    _free(plan)
    return plan


def _near(block: nn.Module) -> list[nn.Module]:
    """The modules that a block's own forward pass calls, as far as names tell."""
    near: list[nn.Module] = []
    for child in block.children():
        near += _near(child) if type(child) is nn.Sequential else [child]
    return near


def _mapped(given: Any, change: Callable[[Any], Any]) -> Any:
    """The arguments of a node with ``change`` of each that isn't a tuple, list, dict or slice."""
    return map_aggregate(given, change)


def _refer(given: Any, ref: dict[Any, Ref]) -> Any:
    return _mapped(given, lambda one: ref[one] if isinstance(one, torch.fx.Node) else one)


def _ends(
    nodes: list[torch.fx.Node], modules: dict[str, nn.Module]
) -> dict[torch.fx.Node, tuple[list[torch.fx.Node], Activation]]:
    """The last node of what one step can compute, with the nodes before it from the layer on, and the activation."""
    place = {node: i for i, node in enumerate(nodes)}
    found: dict[torch.fx.Node, tuple[list[torch.fx.Node], Activation]] = {}
    taken: set[torch.fx.Node] = set()
    for layer in reversed(nodes):  # of two layers that are summed, the later one takes the sum
        if layer.op != "call_module" or not isinstance(modules[str(layer.target)], Fused) or layer.kwargs:
            continue
        if hooked(modules[str(layer.target)]):
            continue
        chain, act = [layer], NONE
        while act == NONE and len(chain[-1].users) == 1:
            (user,) = chain[-1].users
            if (
                user not in place
                or user in taken
                or not _nothing_changes(nodes[place[chain[-1]] + 1 : place[user]], modules)
            ):
                break
            made = _activation_of(user, modules)
            summed = any(_is_sum(node) for node in chain)
            if made is not None:
                act = made
            elif not _passes(user, modules) and (summed or not _sums(user, chain[-1], modules)):
                break
            chain.append(user)
        while len(chain) > 1 and _passes(chain[-1], modules):
            chain.pop()
        if len(chain) > 1:
            found[chain[-1]] = (chain[:-1], act)
            taken.update(chain)
    return found


def _activation_of(node: torch.fx.Node, modules: dict[str, nn.Module]) -> Activation | None:
    """The activation that this node computes of one tensor."""
    if len(node.args) != 1:
        return None
    if node.op == "call_module":
        module = modules[str(node.target)]
        return None if hooked(module) or node.kwargs else activation(module)
    plain = node.op == "call_function" and set(node.kwargs) <= {"inplace"}
    return fused_activation(node.target) if plain else None


def _passes(node: torch.fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether this does nothing in evaluation."""
    module = modules[str(node.target)] if node.op == "call_module" else None
    return type(module) in _NOTHING and not hooked(module) and len(node.args) == 1  # pyright: ignore


def _is_sum(node: torch.fx.Node) -> bool:
    plain = node.op == "call_function" and len(node.args) == 2 and not node.kwargs
    return plain and node.target in (operator.add, operator.iadd, torch.add)


def _sums(node: torch.fx.Node, of: torch.fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether this adds another tensor to ``of``, and changes none that anything else reads."""
    if not _is_sum(node) or not all(isinstance(one, torch.fx.Node) for one in node.args):
        return False
    first, second = node.args
    if node.target is not operator.iadd or first is of:
        return first is not second
    assert isinstance(first, torch.fx.Node)  # that is changed
    own = first.op == "call_module" and isinstance(modules[str(first.target)], Fused)
    return own and len(first.users) == 1


def _nothing_changes(between: list[torch.fx.Node], modules: dict[str, nn.Module]) -> bool:
    """Whether none of these nodes changes a tensor in place."""
    for node in between:
        if node.op == "call_module":
            module = modules[str(node.target)]
            if not isinstance(module, Fused) and (type(module) not in _PURE or hooked(module)):
                return False
        elif node.op != "get_attr" and node.target not in _PURE_FUNCTIONS:
            return False
    return True


def _skipped(
    nodes: list[torch.fx.Node], fused: set[torch.fx.Node], modules: dict[str, nn.Module]
) -> list[tuple[str, type[nn.Module]]]:
    """The modules that the plan doesn't call: fused ones, those that do nothing, and sequences."""
    names: set[str] = set()
    for node in nodes:
        if node.op != "call_module":
            continue
        name = str(node.target)
        if node in fused or type(modules[name]) in _NOTHING:
            names.add(name)
        parent = name.rpartition(".")[0]
        while parent:
            names.add(parent)
            parent = parent.rpartition(".")[0]
    return [(name, type(modules[name])) for name in sorted(names)]


def _free(plan: Plan) -> None:
    """Say after which step each result is read no more."""
    last: dict[int, int] = {}

    def read(i: int, given: Any) -> None:
        _mapped(given, lambda one: last.update({one.number: i}) if isinstance(one, Ref) else None)

    for i, step in enumerate(plan.steps, start=1):
        last[i] = i
        read(i, (list(step.args), step.kwargs))
    read(len(plan.steps) + 1, plan.output)
    for index, i in last.items():
        if i <= len(plan.steps):
            plan.steps[i - 1].free.append(index)


class _Planned(nn.Module):
    """A block with a plan; its class was ``_plain_class``."""

    _plain_class: type[nn.Module]
    _plan: Plan

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = super().__reduce_ex__(2)[2]  # pyright: ignore
        return _rebuild, (self._plain_class,), state


def _rebuild(plain: type[nn.Module]) -> nn.Module:
    kind = _class(plain)
    return kind.__new__(kind)


@functools.cache
def _class(plain: type[nn.Module]) -> type[nn.Module]:
    @functools.wraps(plain.forward)
    def forward(self: _Planned, *args: Any, **kwargs: Any) -> Any:
        if self._plan.fits(self, args, kwargs):
            return self._plan.run(self, args[0])
        return plain.forward(self, *args, **kwargs)

    members = {"forward": forward, "_plain_class": plain, "__module__": plain.__module__, "__doc__": plain.__doc__}
    return type(plain.__name__, (_Planned, plain), members)
