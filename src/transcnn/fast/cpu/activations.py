"""The activations that the C++ kernels know."""

from __future__ import annotations

import ctypes

__all__ = ["ACTIVATIONS", "IDENTITY", "SIGMOID", "SILU", "Activation", "CActivation", "activation"]

# In the order of activations.h.
ACTIVATIONS = ("none", "relu", "clamp", "silu", "gelu", "gelu_tanh", "hardswish", "sigmoid", "hardsigmoid")
Activation = tuple[str, float, float]  # its name, and the bounds of "clamp"
IDENTITY: Activation = ("none", 0.0, 0.0)
SILU: Activation = ("silu", 0.0, 0.0)
SIGMOID: Activation = ("sigmoid", 0.0, 0.0)


class CActivation(ctypes.Structure):
    """The struct of activations.h."""

    _fields_ = (("kind", ctypes.c_long), ("low", ctypes.c_float), ("high", ctypes.c_float))


def activation(act: Activation) -> CActivation:
    """What a kernel gets."""
    return CActivation(ACTIVATIONS.index(act[0]), act[1], act[2])
