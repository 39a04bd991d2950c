"""The network of a task: a classifier, or a decoder or detector on a backbone."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..plugging.build import build_model

__all__ = ["build_network"]


def build_network(task: str, name: str, task_args: dict[str, Any] | None, **kwargs: Any) -> nn.Module:
    """The network of a task: the named one itself, or what the task puts around it, as ``task_args`` says."""
    if task == "segment":  # decoders and detectors take time to import
        from .segmenters import build

        return build(name, task_args or {}, **kwargs)
    if task == "detect":
        from .detectors import build

        return build(name, task_args or {}, **kwargs)
    return build_model(name, **kwargs)
