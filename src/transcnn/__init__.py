"""Hierarchical multi-head self-attention (H-MHSA) in convolutional networks."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "HMHSA",
    "Box",
    "Classification",
    "Detections",
    "Embedding",
    "Failure",
    "HMHSA1d",
    "HMHSA2d",
    "HMHSA3d",
    "Label",
    "Loaded",
    "MultiLabel",
    "Prediction",
    "Predictor",
    "Regression",
    "Segmentation",
    "Share",
    "TransCNN",
    "attention_maps",
    "attention_rollout",
    "create_model",
    "from_pretrained",
    "list_models",
    "load",
    "load_checkpoint",
    "load_host",
    "optimize",
    "plug",
    "plug_like",
    "plug_spec",
    "plugged_parameters",
    "push_to_hub",
    "save_pretrained",
    "unplug",
]

if TYPE_CHECKING:
    from . import commands as commands
    from . import errors as errors
    from . import explain as explain
    from . import export as export
    from . import fast as fast
    from . import settings as settings
    from .attention import HMHSA, HMHSA1d, HMHSA2d, HMHSA3d
    from .backbone import TransCNN
    from .checkpoints.folders import from_pretrained
    from .checkpoints.hub import push_to_hub, save_pretrained
    from .checkpoints.loading import Loaded
    from .checkpoints.published import load_checkpoint
    from .explain import attention_maps, attention_rollout
    from .fast import optimize
    from .plugging.plug import load_host, plug, plug_like, plug_spec, plugged_parameters, unplug
    from .predictor.base import Predictor
    from .predictor.loading import load
    from .report.answers import (
        Box,
        Classification,
        Detections,
        Embedding,
        Failure,
        Label,
        MultiLabel,
        Prediction,
        Regression,
        Segmentation,
        Share,
    )
    from .variants import create_model, list_models

_HOMES = {
    **dict.fromkeys(
        (
            *("Box", "Classification", "Detections", "Embedding", "Failure", "Label", "MultiLabel"),
            *("Prediction", "Regression", "Segmentation", "Share"),
        ),
        "report.answers",
    ),
    "HMHSA": "attention",
    "HMHSA1d": "attention",
    "HMHSA2d": "attention",
    "HMHSA3d": "attention",
    "Loaded": "checkpoints.loading",
    "Predictor": "predictor.base",
    "TransCNN": "backbone",
    "attention_maps": "explain",
    "attention_rollout": "explain",
    "create_model": "variants",
    "from_pretrained": "checkpoints.folders",
    "list_models": "variants",
    "load": "predictor.loading",
    "load_checkpoint": "checkpoints.published",
    "load_host": "plugging.plug",
    "optimize": "fast",
    "plug": "plugging.plug",
    "plug_like": "plugging.plug",
    "plug_spec": "plugging.plug",
    "plugged_parameters": "plugging.plug",
    "push_to_hub": "checkpoints.hub",
    "save_pretrained": "checkpoints.hub",
    "unplug": "plugging.plug",
}
_MODULES = (
    "commands",
    "errors",
    "explain",
    "export",
    "fast",
    "settings",
)  # imported when first used


def __getattr__(name: str) -> Any:
    """Import what is asked for from where it lives."""
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


class _AfterTimm(MetaPathFinder):
    """Registers our networks with timm as soon as timm is imported.

    So importing this package needs no torch: the command line's help is there at once, and ``transcnn predict
    model.onnx`` works without it. Where a module of ours imports timm, they are registered when that module is
    complete, for ``variants`` may need it.
    """

    def __init__(self) -> None:
        self._unfinished = 0  # modules of ours, or timm, that are being imported

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != "timm" and not fullname.startswith(f"{__name__}."):
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                self._unfinished += 1
                try:
                    load(module)
                finally:
                    self._unfinished -= 1
                self._register()

            spec.loader.exec_module = exec_module  # of this spec's own loader
        return spec

    def _register(self) -> None:
        if "timm" in sys.modules and not self._unfinished and self in sys.meta_path:
            sys.meta_path.remove(self)
            importlib.import_module(".variants", __name__)


if "timm" in sys.modules:
    importlib.import_module(".variants", __name__)
else:
    sys.meta_path.insert(0, _AfterTimm())
