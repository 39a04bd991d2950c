"""BatchNorms folded into the convolutions before them, in any network."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.fx
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ...layers import drop_columns
from ..dispatch import hooked
from ..training.depthwise import KernelDepthwise
from ..training.layers import KernelPointwise
from .entry import InferenceOnly
from .layers import affine, is_plain_conv

__all__ = ["fold_batchnorms"]


def fold_batchnorms(model: nn.Module) -> list[str]:
    """Fold every BatchNorm of ``model`` (in evaluation mode, in place) that follows a convolution read by it alone.

    They are found by symbolic tracing; where a network can't be traced, its children are. Modules with hooks are left
    alone. Returns the names of the folded norms, which identities replace.
    """
    modules = dict(model.named_modules())
    folded = []
    for conv_name, norm_name in _pairs(model):
        conv, norm = modules[conv_name], modules[norm_name]
        parent, _, child = norm_name.rpartition(".")
        conv_parent, _, conv_child = conv_name.rpartition(".")
        setattr(modules[conv_parent], conv_child, fuse_conv_bn_eval(conv, norm))  # pyright: ignore
        setattr(modules[parent], child, _after_norm(norm))
        folded.append(norm_name)
    return folded


class _Tracer(torch.fx.Tracer):
    """Treats as leaves PyTorch's layers, norms of any library, and what was replaced already."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = InferenceOnly | KernelDepthwise | KernelPointwise | nn.modules.batchnorm._BatchNorm
        return isinstance(m, own) or super().is_leaf_module(m, module_qualified_name)


def _pairs(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names of each convolution and the BatchNorm that is the only one to read it."""
    if isinstance(model, InferenceOnly) or not any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()
    ):
        return
    try:
        graph = _Tracer().trace(model)
    except Exception:  # tracing runs the network's own code, which may fail on a proxy in any way
        for name, child in model.named_children():
            yield from _pairs(child, f"{prefix}{name}.")
        return
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
        ):
            yield prefix + str(source.target), prefix + str(node.target)


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
