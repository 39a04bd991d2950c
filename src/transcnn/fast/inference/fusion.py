"""Blocks of any CNN with sums and activations fused into the convolutions and linear layers before them.

A block's forward pass is traced, and with it that of the modules in it where they can be traced, too; where it reads
``act(conv(x) + y)`` or ``act(conv(x))``, the block runs a plan in which that is one operation. Its modules and
attributes stay what and where they are, and its own forward pass runs wherever the plan doesn't fit: in traces, on a
GPU, with other arguments, where gradients are asked for, and when one of the modules that were fused got a hook or a
child, was replaced, or is in training mode again.
"""

from __future__ import annotations

import functools
import inspect
import operator
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from ..dispatch import hooked
from .activations import NONE, Activation
from .chains import chain_names, squeeze_of, with_chains
from .convolutions import FastLayerNorm, FastLayerNorm2d, FastMaxPool2d, Fused, by_kernel
from .entry import InferenceOnly
from .plan import Plan, Ref, Step, free, mapped, plain_class
from .tracing import NOTHING, Tracer, activation_of, graph_of, passes

__all__ = ["fuse_blocks"]

_PURE = (
    *NOTHING,
    *(nn.MaxPool2d, FastMaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.BatchNorm2d),
    *(nn.LayerNorm, FastLayerNorm, FastLayerNorm2d),
)
_PURE_FUNCTIONS = (operator.add, operator.mul, operator.sub, torch.add, torch.mul, torch.cat)


def fuse_blocks(model: nn.Module, left: list[nn.Module]) -> int:
    """Have the blocks of ``model`` (in place; not itself, nor those ``left`` alone) run fused; how many do."""
    count = 0
    for module in list(model.modules()):
        if isinstance(module, _Planned):  # of a network that is optimized again
            vars(module).pop("_plan", None)
            object.__setattr__(module, "__class__", module._plain_class)
        skipped = isinstance(module, InferenceOnly | Fused | torch.jit.ScriptModule) or squeeze_of(module) is not None
        if module is model or skipped or any(module is other for other in left) or hooked(module):
            continue
        plan = _plan(module)
        if plan is not None:
            object.__setattr__(module, "__class__", _class(type(module)))
            module._plan = plan  # pyright: ignore
            count += 1
    return count


def _plan(block: nn.Module) -> Plan | None:
    """What fuses something of this block; None where nothing can be, or the block can't be traced."""
    if not _computes(block) or len(inspect.signature(block.forward).parameters) != 1:
        return None
    graph = graph_of(block, Tracer(_opens))
    if graph is None and any(isinstance(m, Fused) for m in _near(block)):
        graph = graph_of(block, Tracer())
    if graph is None:
        return None
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    outputs = [node for node in graph.nodes if node.op == "output"]
    if len(inputs) != 1 or (inputs[0].type is not None and "Tensor" not in str(inputs[0].type)):
        return None
    modules = dict(block.named_modules())
    ends = _ends(nodes, modules)
    inner = {node for chain, _ in ends.values() for node in chain}  # what a fused step computes, but for its end
    ref = {inputs[0]: Ref(0)}
    steps: list[Step] = []
    for node in nodes:
        if node in inner and node not in ends:
            continue
        if node in ends:
            (layer, *rest), act = ends[node]
            others = [one for add in (*rest, node) if _is_sum(add) for one in add.args if one not in (layer, *rest)]
            step = Step("fused", str(layer.target), [layer.args[0], *others], {}, len(steps) + 1, act)
        elif node.op == "call_module" and type(modules[str(node.target)]) in NOTHING and node.args:
            ref[node] = ref[node.args[0]]  # pyright: ignore
            continue
        else:
            step = Step(node.op, node.target, node.args, dict(node.kwargs), len(steps) + 1)
        step.by_kernel = by_kernel(modules.get(str(step.target)))
        step.args, step.kwargs = (_refer(given, ref) for given in (step.args, step.kwargs))
        steps.append(step)
        ref[node] = Ref(step.number)
    output = _refer(outputs[0].args[0], ref)
    steps = with_chains(steps, output, modules)
    if not ends and not any(step.parts for step in steps):
        return None
    called = {str(step.target) for step in steps if step.kind == "call_module"}
    skipped = {
        # Layers that are called count, too: a hook might keep a map that a sum is written over.
        *(name for name in called if isinstance(modules[name], Fused)),
        *_skipped(nodes, inner | set(ends), modules),
        *(name for step in steps for name in chain_names(step, modules)),
    }
    kept = [(name, plain_class(modules[name]), len(modules[name]._modules)) for name in ("", *sorted(skipped))]
    plan = Plan(steps, output, kept)
    free(plan, modules)
    return plan


def _computes(module: nn.Module) -> bool:
    """Whether anything in this can be fused with something else."""
    return any(isinstance(m, Fused) for m in module.modules())


def _opens(module: nn.Module) -> bool:
    """Whether the forward pass of a module in a block is traced as the block's own."""
    closed = isinstance(module, InferenceOnly | Fused | torch.jit.ScriptModule)
    library = type(module).__module__.startswith("torch.nn.")
    return not (closed or library) and _computes(module) and squeeze_of(module) is None


def _near(block: nn.Module) -> list[nn.Module]:
    """The modules that a block's own forward pass calls, as far as names tell."""
    near: list[nn.Module] = []
    for child in block.children():
        near += _near(child) if type(child) is nn.Sequential else [child]
    return near


def _refer(given: Any, ref: dict[Any, Ref]) -> Any:
    return mapped(given, lambda one: ref[one] if isinstance(one, torch.fx.Node) else one)


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
            made = activation_of(user, modules)
            summed = any(_is_sum(node) for node in chain)
            if made is not None:
                act = made
            elif not passes(user, modules) and (summed or not _sums(user, chain[-1], modules)):
                break
            chain.append(user)
        while len(chain) > 1 and passes(chain[-1], modules):
            chain.pop()
        if len(chain) > 1:
            found[chain[-1]] = (chain[:-1], act)
            taken.update(chain)
    return found


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


def _skipped(nodes: list[torch.fx.Node], fused: set[torch.fx.Node], modules: dict[str, nn.Module]) -> set[str]:
    """The modules that the plan doesn't call: fused ones, those that do nothing, and sequences."""
    names: set[str] = set()
    for node in nodes:
        if node.op != "call_module":
            continue
        name = str(node.target)
        if node in fused or type(modules[name]) in NOTHING:
            names.add(name)
        parent = name.rpartition(".")[0]
        while parent:
            names.add(parent)
            parent = parent.rpartition(".")[0]
    return names


class _Planned(nn.Module):
    """A block with a plan; its class was ``_plain_class``."""

    _plain_class: type[nn.Module]
    _plan: Plan | None = None  # of a slice of a sequence, say, which is made as one of this class

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = super().__reduce_ex__(2)[2]  # pyright: ignore
        return _rebuild, (self._plain_class,), state


def _rebuild(plain: type[nn.Module]) -> nn.Module:
    kind = _class(plain)
    return kind.__new__(kind)


@functools.cache
def _class(plain: type[nn.Module]) -> type[nn.Module]:
    def run(self: _Planned, *args: Any, **kwargs: Any) -> Any:
        if self._plan is not None and self._plan.fits(self, args, kwargs):
            return self._plan.run(self, args[0])
        return plain.forward(self, *args, **kwargs)

    @functools.wraps(plain.forward)
    def forward(self: _Planned, *args: Any, **kwargs: Any) -> Any:
        if self._plan is None or len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            return run(self, *args, **kwargs)
        return self._plan.replays(self, functools.partial(run, self), args[0])

    members = {"forward": forward, "_plain_class": plain, "__module__": plain.__module__, "__doc__": plain.__doc__}
    return type(plain.__name__, (_Planned, plain), members)
