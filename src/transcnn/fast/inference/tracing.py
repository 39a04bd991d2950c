"""Forward passes of blocks as graphs of the layers and functions that they call."""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from timm.layers import DropPath
from torch import nn

from ..dispatch import hooked
from .activations import Activation, activation, activation_of_function

__all__ = ["NOTHING", "Tracer", "activation_of", "graph_of", "passes"]

NOTHING = (nn.Identity, nn.Dropout, nn.Dropout2d, DropPath)  # in evaluation


class _Proxy(torch.fx.Proxy):
    """Records what changes a tensor in place as that; fx takes ``x += y`` for ``x = x + y``."""

    def _in_place(self, function: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    __iadd__ = functools.partialmethod(_in_place, operator.iadd)
    __isub__ = functools.partialmethod(_in_place, operator.isub)
    __imul__ = functools.partialmethod(_in_place, operator.imul)
    __itruediv__ = functools.partialmethod(_in_place, operator.itruediv)
    __ipow__ = functools.partialmethod(_in_place, operator.ipow)


class Tracer(torch.fx.Tracer):
    """A block's own forward pass, that of sequences in it, and of whatever else ``opens`` says of a module."""

    def __init__(self, opens: Callable[[nn.Module], bool] = lambda module: False) -> None:
        super().__init__()
        self._opens = opens

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return hooked(m) or not (isinstance(m, nn.Sequential) or self._opens(m))


def graph_of(module: nn.Module, tracer: torch.fx.Tracer) -> torch.fx.Graph | None:
    """What a module computes; None where it can't be traced, or keeps something of a call (a cache, a count).

    Of the latter a graph would tell one call, and what the code kept would be of the trace: that is taken back.
    """
    kept = [(one, copy.copy(one)) for m in module.modules() for one in (vars(m), *vars(m).values()) if _holds(one)]
    try:
        graph = tracer.trace(module)
    except Exception:  # tracing runs the module's own code, which may fail on a proxy in any way
        graph = None
    for now, before in kept:
        if not _same(now, before):
            graph = None
            now.clear()
            (now.extend if isinstance(now, list) else now.update)(before)
    return graph


def _holds(value: Any) -> bool:
    return isinstance(value, dict | list | set)


def _same(a: Any, b: Any) -> bool:
    """Whether these hold the very same objects."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(a[key] is b[key] for key in a)
    if isinstance(a, set):
        return a == b
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def activation_of(node: torch.fx.Node, modules: dict[str, nn.Module]) -> Activation | None:
    """The activation that this node computes of one tensor."""
    if len(node.args) != 1:
        return None
    if node.op == "call_module":
        module = modules[str(node.target)]
        return None if hooked(module) or node.kwargs else activation(module)
    plain = node.op == "call_function" and set(node.kwargs) <= {"inplace"}
    return activation_of_function(node.target) if plain else None


def passes(node: torch.fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether this does nothing in evaluation."""
    module = modules[str(node.target)] if node.op == "call_module" else None
    return type(module) in NOTHING and not hooked(module) and len(node.args) == 1  # pyright: ignore
