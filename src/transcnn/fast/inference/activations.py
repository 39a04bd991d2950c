"""The activations that can be fused into layers of any CNN: how networks write them, and what computes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import GELU, GELUTanh, Sigmoid
from torch import Tensor, nn

from ..cpu.activations import ACTIVATIONS
from ..cpu.activations import Activation as KernelActivation

__all__ = [
    "NONE",
    "SWISH",
    "WRITTEN",
    "Activation",
    "activation",
    "activation_of_function",
    "apply",
    "kernel_activation",
]

Activation = tuple[str, tuple[float, ...], str]  # oneDNN's name, numbers and algorithm
NONE: Activation = ("none", (), "")
SWISH: Activation = ("swish", (), "")


class _Kind(NamedTuple):
    """What there is to know of one of oneDNN's activations."""

    apply: Callable[[Tensor, Any, Any], Tensor]  # PyTorch's function, of a map, oneDNN's numbers and algorithm
    written: tuple[Any, ...] = ()  # functions, called without options, and classes of modules
    options: Callable[[Any], tuple[tuple[float, ...], str]] = lambda _: (
        (),
        "",
    )  # numbers and algorithm of one of those


_KINDS = {
    "none": _Kind(lambda x, *_: x),
    "relu": _Kind(lambda x, *_: x.relu(), (F.relu, torch.relu, nn.ReLU)),
    "hardtanh": _Kind(
        lambda x, bounds, _: F.hardtanh(x, *bounds),
        (F.relu6, nn.ReLU6, nn.Hardtanh),
        lambda act: ((0.0, 6.0) if act is F.relu6 else (float(act.min_val), float(act.max_val)), ""),
    ),
    "leaky_relu": _Kind(
        lambda x, slope, _: F.leaky_relu(x, *slope),
        (nn.LeakyReLU,),
        lambda act: ((float(act.negative_slope),), ""),
    ),
    "swish": _Kind(lambda x, *_: F.silu(x), (F.silu, nn.SiLU)),
    "gelu": _Kind(
        lambda x, _, algorithm: F.gelu(x, approximate=algorithm),
        (nn.GELU, GELU, GELUTanh),
        lambda act: ((), "tanh" if type(act) is GELUTanh else getattr(act, "approximate", "none")),
    ),
    "hardswish": _Kind(lambda x, *_: F.hardswish(x), (F.hardswish, nn.Hardswish)),
    "sigmoid": _Kind(lambda x, *_: x.sigmoid(), (torch.sigmoid, nn.Sigmoid, Sigmoid)),
    "hardsigmoid": _Kind(lambda x, *_: F.hardsigmoid(x), (nn.Hardsigmoid,)),
    "tanh": _Kind(lambda x, *_: x.tanh(), (torch.tanh, nn.Tanh)),
}
WRITTEN = {way: name for name, kind in _KINDS.items() for way in kind.written}


def activation(module: nn.Module) -> Activation | None:
    """An activation as oneDNN knows it; None of any other module."""
    return _as_onednn(type(module), module)


def activation_of_function(function: Any) -> Activation | None:
    """The same of a function that is called without options."""
    return _as_onednn(function, function)


def _as_onednn(way: Any, given: Any) -> Activation | None:
    name = WRITTEN.get(way)
    return None if name is None else (name, *_KINDS[name].options(given))


def apply(act: Activation, x: Tensor) -> Tensor:
    """act(x) by PyTorch."""
    return _KINDS[act[0]].apply(x, *act[1:])


def kernel_activation(act: Activation) -> KernelActivation | None:
    """The same for our C++ kernels; None of those that they don't have."""
    name, numbers, algorithm = act
    if name == "hardtanh":
        return "clamp", *numbers  # pyright: ignore
    name = {"swish": "silu", "gelu": "gelu_tanh" if algorithm == "tanh" else "gelu"}.get(name, name)
    return (name, 0.0, 0.0) if name in ACTIVATIONS else None
