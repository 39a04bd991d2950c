"""Networks that a file asks for, made with no more time and memory than the file's own size warrants."""

from __future__ import annotations

import inspect
import os
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from .. import variants as _registers_our_models  # noqa: F401
from ..errors import UserError, first_line
from .arguments import check_model_args, check_model_name
from .header import refused

__all__ = ["build_bounded", "own_arguments", "registered"]

# A network may have layers that its file lacks: those that ``features_only`` drops, heads above all.
TENSORS_PER_TENSOR, SPARE_TENSORS = 4, 3000
WEIGHTS_PER_BYTE, SPARE_WEIGHTS = 3, 1 << 24


def build_bounded(build: Callable[[], nn.Module], path: Path) -> nn.Module:
    """What ``build`` makes, unless it has more weights than the file at ``path`` has room for.

    It is made twice: on the meta device first, where nothing takes memory. Both times it is given up as soon as it has
    far more tensors than the file holds, so that ten thousand blocks are refused within a second.

    Raises:
        UserError: The network is larger than its file, can't be made without memory, or ``build`` raised it.
    """
    try:
        size, tensors = path.stat().st_size, _count_tensors(path)
    except (OSError, SafetensorError, zipfile.BadZipFile, ValueError) as error:
        raise UserError(f"can't read {path}: {first_line(error)}") from error
    most = TENSORS_PER_TENSOR * tensors + SPARE_TENSORS
    try:
        with torch.device("meta"), _limited(path, most, None):
            weights = sum(parameter.numel() for parameter in build().parameters())
        if weights > size:
            raise UserError(f"{path} has {size:,} bytes, too few for a network of {weights:,} weights")
        with _limited(path, most, WEIGHTS_PER_BYTE * size + SPARE_WEIGHTS):
            return build()
    except UserError:
        raise
    except Exception as error:  # sizes that don't go together fail in as many ways as there are networks
        raise UserError(f"the network that {path} names can't be made: {first_line(error)}") from error


@contextmanager
def _limited(path: Path, most_tensors: int, most_weights: int | None) -> Iterator[None]:
    """Give up what this thread makes inside as soon as it has more tensors, or more numbers in them."""
    thread = threading.get_ident()
    tensors = weights = 0

    def count(module: nn.Module, name: str, tensor: Any) -> None:
        nonlocal tensors, weights
        if threading.get_ident() != thread or not isinstance(tensor, torch.Tensor):
            return
        tensors += 1
        weights += tensor.numel()
        if tensors > most_tensors:
            raise UserError(
                f"{path} says it is for a network of more than {most_tensors:,} tensors, which it can't hold"
            )
        if most_weights is not None and weights > most_weights:
            raise UserError(
                f"{path} says it is for a network of more than {most_weights:,} weights, which it can't hold"
            )

    handles = [
        register_module_parameter_registration_hook(count),
        register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _count_tensors(path: Path) -> int:
    """How many tensors a file holds; for those that only torch can read, at least so many."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return len(file.keys())
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            return sum("/data/" in name for name in file.namelist())
    return path.stat().st_size // 256


def registered(name: Any, args: Any, path: str | os.PathLike[str]) -> str:
    """The network's name that a file gives, if it is one of timm's registry, and ``args`` may stand in a file.

    Raises:
        UserError: It isn't, or they may not.
    """
    with refused(path):
        check_model_name(name)
        check_model_args(args, own_arguments(name))
    if not timm.is_model(name.split(".")[0]):
        raise UserError(f"{os.fspath(path)} is for a network {name!r}, which neither this package nor timm has")
    return name


def own_arguments(name: str) -> list[str]:
    """Arguments of a network that neither this package nor timm has registered, but the user's own code."""
    base = name.split(".")[0]
    if not timm.is_model(base):
        return []
    entry = timm.models.model_entrypoint(base)
    if entry.__module__.partition(".")[0] in ("timm", __name__.partition(".")[0]):
        return []
    others = {*inspect.signature(timm.create_model).parameters, "features_only", "out_indices", "feature_cls"}
    return [name for name in inspect.signature(entry).parameters if name not in others]
