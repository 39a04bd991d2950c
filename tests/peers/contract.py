"""The networks that the contracts of other libraries are applied to: all of ours, on the meta device where values
don't matter, and one of each design with values.

``TRANSCNN_CONTRACT=resnet18,convnext_atto pytest tests/peers`` applies the same contracts to other networks of timm.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import timm
import torch
from torch import Tensor, nn

import transcnn
from transcnn.variants import VARIANTS

OTHERS = [name for name in os.environ.get("TRANSCNN_CONTRACT", "").split(",") if name]
NETWORKS = OTHERS or transcnn.list_models()
SMALL: dict[str, tuple[str, dict[str, Any]]] = (
    {name: (name, {}) for name in OTHERS}
    if OTHERS
    else {
        "transcnn": ("transcnn_test", {}),
        "hatnet": ("hatnet_tiny", {"dims": (16, 16, 32, 32), "head_dim": 16, "depths": (1, 2, 1, 1), "stem_width": 8}),
    }
)


def shallow(name: str) -> dict[str, Any]:
    """Arguments for a network of ours where depth can't matter."""
    return {} if OTHERS else {"depths": (1,) * len(VARIANTS[name]["dims"])}


def on_meta(name: str, **kwargs: Any) -> Any:
    """A network without memory."""
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


@functools.cache
def shared(name: str) -> Any:
    """One on the meta device, in evaluation mode, for tests that leave it as it is."""
    return on_meta(name).eval()


def small(kind: str, **kwargs: Any) -> Any:
    """A small network with values, of five classes, in evaluation mode."""
    torch.manual_seed(0)
    name, options = SMALL[kind]
    model = timm.create_model(name, **{"num_classes": 5, **options, **kwargs}).eval()
    for module in model.modules():  # an untrained network answers nearly nothing
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight, std=1 / module.weight[0].numel() ** 0.5)
    return model


def images(batch: int = 2, size: int = 64, channels: int = 3, device: str = "cpu") -> Tensor:
    """Images (B, C, H, W)."""
    return torch.randn(batch, channels, size, size, device=device)


def without_gradient(model: nn.Module) -> list[str]:
    """Names of the trainable parameters that a backward pass has not reached."""
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
