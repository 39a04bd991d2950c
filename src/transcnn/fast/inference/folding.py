"""BatchNorms and layer scales folded into the convolutions and linear layers before them, in any network."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator

import torch
import torch.fx
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ...layers import drop_columns
from ..dispatch import hooked
from ..training.depthwise import DepthwiseNd
from ..training.layers import KernelPointwise, KernelPointwise3d
from .entry import InferenceOnly
from .layers import affine, constant, is_plain_conv
from .tracing import graph_of, passes

__all__ = ["fold_batchnorms", "fold_layer_scales"]


def fold_batchnorms(model: nn.Module) -> list[str]:
    """Fold every BatchNorm of ``model`` (in evaluation mode, in place) that follows a convolution read by it alone.

    They are found by symbolic tracing; where a network can't be traced, its children are. Modules with hooks are left
    alone. Returns the names of the folded norms, which identities replace.
    """
    names, folded = _Names(model), []
    for conv, norm in _pairs(model, names):
        names.exchange(conv, fuse_conv_bn_eval(conv, norm))  # pyright: ignore
        names.exchange(norm, _after_norm(norm))
        folded.append(names.of[norm][0])
    return folded


def fold_layer_scales(model: nn.Module) -> list[str]:
    """Fold every layer scale of timm's that follows a convolution or linear layer read by it alone, in place.

    Returns the names of the folded parameters, which are gone.
    """
    names, folded = _Names(model), []
    for layer, owner in _scaled(model, names):
        gamma = owner.gamma.detach().double().flatten()  # pyright: ignore
        weight = layer.weight.detach().double() * gamma.view(-1, *(1,) * (layer.weight.ndim - 1))  # pyright: ignore
        layer.weight = constant(weight, layer.weight)  # pyright: ignore
        if layer.bias is not None:
            layer.bias = constant(layer.bias.detach().double() * gamma, layer.bias)  # pyright: ignore
        if type(owner).__name__ == "ConvNeXtBlock":
            owner.gamma = None  # pyright: ignore
        else:
            names.exchange(owner, nn.Identity())
        folded.append(f"{names.of[owner][0]}.gamma")
    return folded


class _Names:
    """Every name of each module in a network: some have several."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self.of: dict[nn.Module, list[str]] = {}
        for name, module in network.named_modules(remove_duplicate=False):
            self.of.setdefault(module, []).append(name)

    def only_in(self, part: nn.Module, *modules: nn.Module) -> bool:
        """Whether each of these modules is a part of the network, or in it and nowhere else, however it is reached."""
        parts = tuple(f"{name}." if name else "" for name in self.of[part])
        return all(name.startswith(parts) for module in modules if module is not part for name in self.of[module])

    def exchange(self, module: nn.Module, new: nn.Module) -> None:
        """Put another module in the place of one, under each of its names."""
        for name in self.of[module]:
            parent, _, child = name.rpartition(".")
            setattr(self._network.get_submodule(parent), child, new)


class _Tracer(torch.fx.Tracer):
    """Treats as leaves PyTorch's layers, norms of any library, and what was replaced already."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = InferenceOnly | DepthwiseNd | KernelPointwise | KernelPointwise3d | nn.modules.batchnorm._BatchNorm
        return isinstance(m, own) or super().is_leaf_module(m, module_qualified_name)


def _graphs(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> Iterator[tuple[nn.Module, torch.fx.Graph]]:
    """What computes any that are ``wanted``: the model, or those of its parts that can be traced."""
    if isinstance(model, InferenceOnly) or not any(map(wanted, model.modules())):
        return
    graph = graph_of(model, _Tracer())
    if graph is not None:
        yield model, graph
        return
    for child in model.children():
        yield from _graphs(child, wanted)


def _pairs(network: nn.Module, names: _Names) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Each convolution and the BatchNorm that is the only one to read it."""
    for model, graph in _graphs(network, lambda m: isinstance(m, nn.modules.batchnorm._BatchNorm)):
        modules = dict(model.named_modules())
        calls = [node.target for node in graph.nodes if node.op == "call_module"]
        read = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
        for node in graph.nodes:
            source = node.args[0] if node.op == "call_module" and node.args else None
            if isinstance(source, torch.fx.Node) and source.target is drop_columns and len(source.users) == 1:
                source = source.args[0]  # a norm computes the same before columns are dropped and after
            if not isinstance(source, torch.fx.Node) or source.op != "call_module" or len(source.users) != 1:
                continue
            conv, norm = modules[str(source.target)], modules[str(node.target)]
            once = calls.count(source.target) == 1 and calls.count(node.target) == 1
            if (
                once
                and is_plain_conv(conv)
                and not any(name.startswith(f"{source.target}.") for name in read)  # its weights, by something else
                and _foldable(norm)
                and not hooked(conv)
                and not hooked(norm)
                and names.only_in(model, conv, norm)
            ):
                yield conv, norm


def _scaled(network: nn.Module, names: _Names) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Each layer and the module that scales its channels by a parameter ``gamma``, which can be left out."""
    for model, graph in _graphs(network, _is_scale):
        modules = dict(model.named_modules())
        calls = Counter(str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr"))
        for node in graph.nodes:
            gamma, last = _factor(node, model)
            if gamma is None or not isinstance(node.args[0], torch.fx.Node):
                continue
            layer, last = _scaled_layer(node.args[0], modules, last)
            owner = modules[str(gamma.target).rpartition(".")[0]]
            if layer is None or not last or not _is_scale(owner):
                continue
            if any(calls[str(one.target)] > 1 for one in (layer, gamma)):
                continue
            if any(name.startswith(f"{layer.target}.") for name in calls):  # its weights, by something else
                continue
            scaled = modules[str(layer.target)]
            if names.only_in(model, scaled, owner):
                yield scaled, owner


def _is_scale(module: nn.Module) -> bool:
    """Whether this multiplies by a parameter that can be left out: timm's layer scales, and ConvNeXt's block."""
    named = type(module).__name__ in ("LayerScale", "LayerScale2d", "ConvNeXtBlock")
    own = isinstance(getattr(module, "gamma", None), nn.Parameter)
    return named and own and type(module).__module__.startswith("timm.") and not hooked(module)


def _factor(node: torch.fx.Node, model: nn.Module) -> tuple[torch.fx.Node | None, bool]:
    """The parameter that a node multiplies by; and whether it scales the last dimension, not the third from the end."""
    times = node.op == "call_method" and node.target in ("mul", "mul_")
    times = times or (node.op == "call_function" and node.target in (operator.mul, torch.mul))
    gamma = node.args[1] if times and len(node.args) == 2 and not node.kwargs else None
    if not isinstance(gamma, torch.fx.Node) or len(gamma.users) != 1:
        return None, False
    if gamma.op == "get_attr":
        shape = operator.attrgetter(str(gamma.target))(model).shape
        return (gamma if shape in ((shape.numel(),), (shape.numel(), 1, 1)) else None), len(shape) == 1
    shaped = gamma.op == "call_method" and gamma.target in ("view", "reshape") and gamma.args[1:] == (1, -1, 1, 1)
    source = gamma.args[0] if shaped else None
    plain = isinstance(source, torch.fx.Node) and source.op == "get_attr" and len(source.users) == 1
    return (source if plain else None), False  # pyright: ignore


def _scaled_layer(node: torch.fx.Node, modules: dict[str, nn.Module], last: bool) -> tuple[torch.fx.Node | None, bool]:
    """The layer whose result alone this is; and whether ``last``, the dimension that is scaled, is of its channels."""
    while len(node.users) == 1 and node.args and isinstance(node.args[0], torch.fx.Node):
        module = modules[str(node.target)] if node.op == "call_module" else None
        moves = node.op == "call_method" and node.target == "permute" and node.args[1:] == (0, 3, 1, 2)
        if type(module) is nn.Linear or (isinstance(module, nn.Conv2d) and is_plain_conv(module)):
            return (None if hooked(module) else node), last == (type(module) is nn.Linear)
        if moves and not last:
            last = True
        elif module is None or not passes(node, modules):
            break
        node = node.args[0]
    return None, False


def _foldable(norm: nn.Module) -> bool:
    """Whether this is a BatchNorm with fixed statistics, PyTorch's or timm's with an activation of its own."""
    if type(norm) is not BatchNormAct2d:
        return affine(norm) is not None
    plain = type(norm.drop) is nn.Identity and not any(map(hooked, norm.modules()))
    return plain and norm.running_mean is not None


def _after_norm(norm: nn.Module) -> nn.Module:
    """What replaces a folded BatchNorm: its activation, if it has one."""
    act = getattr(norm, "act", None)
    return act if isinstance(act, nn.Module) else nn.Identity()
