"""Reading weights: the published layouts, our own files, Lightning checkpoints.

The published files (releases v1.0 and v2.0 of the paper's repository) name their tensors otherwise than we do;
:func:`convert_state_dict` is the dictionary between the two, used by :func:`load_checkpoint` and, for
``pretrained=True``, by timm's loader.
"""

from __future__ import annotations

import argparse
import logging
import pickle
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import adapt_input_conv
from torch import Tensor, nn

from ..errors import UserError

__all__ = ["convert_state_dict", "load_body", "load_checkpoint"]

Model = TypeVar("Model", bound=nn.Module)
_logger = logging.getLogger(__name__)

# Where training scripts put a model's tensors in what they save; averaged weights come first, as in timm.
_NESTS = ("state_dict_ema", "model_ema", "state_dict", "model")

# The published layout's names -> ours; names that no line matches stay.
_RENAMES = [
    (re.compile(pattern), ours)
    for pattern, ours in (
        (r"patch_embed\.(\d+)\.", r"stem.\1."),
        (r"blocks\.(\d+)\.(\d+)\.attn\.proj_norm\.", r"stages.\1.blocks.\2.proj_norm."),
        (r"blocks\.(\d+)\.(\d+)\.attn\.", r"stages.\1.blocks.\2.attn."),
        (r"blocks\.(\d+)\.(\d+)\.conv\.", r"stages.\1.blocks.\2.irb."),
        (r"ds2\.", "stages.1.downsample."),
        (r"ds3\.", "stages.2.downsample."),
        (r"ds4\.", "stages.3.downsample."),
        (r"classifier\.1\.", "head.fc."),
    )
]
# There, the layers of a local step lie beside those of the global step.
_LOCAL_LAYER = re.compile(r"^(stages\.\d+\.blocks\.\d+\.attn\.)(norm|qkv|grid_norm)(?=\.)")


def load_checkpoint(model: Model, path: str | Path, *, strict: bool = True) -> Model:
    """Load a file's weights into ``model`` and return it; on an error the model stays as it was.

    The file may hold the published layout or ours, as ``.safetensors``, as what ``torch.save`` wrote, or as a
    Lightning checkpoint; bare or under ``model``, ``state_dict`` or averaged weights (``model_ema``,
    ``state_dict_ema``: preferred); with any prefix to the names, such as ``module.`` or ``model.``. Where the model has
    another number of classes than the file, its head stays fresh, and for another number of input channels the stem's
    first convolution is adapted, both as timm does. Pickles are read with ``weights_only=True``.

    Args:
        model: A model of this package, or any other whose own names the file uses.
        path: The file.
        strict: Whether each tensor must fit. If not, what fits is loaded, and a logged warning names what stays fresh
            and what was left out (for a network with more levels than the published one, say).

    Raises:
        UserError: No such file, one that can't be read or would run code, or tensors that are missing, unexpected or
            of another shape (counted, the first ones named).
    """
    match = _match(model, path)
    lists = {"missing": match.missing, "unexpected": match.unexpected, "of another shape": match.misshapen}
    problems = "; ".join(f"{len(names)} {kind}: {_first(names)}" for kind, names in lists.items() if names)
    if problems and (strict or not match.fitting):
        raise UserError(f"{path} does not fit this {type(model).__name__}: {problems}")
    model.load_state_dict(match.fitting, strict=False)
    if match.fresh:
        _logger.warning("%s is for another number of classes: %s stay fresh", path, ", ".join(match.fresh))
    if problems:
        _logger.warning("%s fits in part, what is missing or of another shape stays fresh: %s", path, problems)
    return model


def load_body(body: nn.Module, path: str | Path) -> tuple[int, list[str]]:
    """Load what a file holds for ``body``, the layers below a decoder or detector; the rest of the file is left out.

    Args:
        body: A network of timm with ``features_only``, of this package or another.
        path: A classifier's weights, or those of a network with such a body and something else on top.

    Returns:
        How many tensors were loaded, and the names of those that were left out.

    Raises:
        UserError: As :func:`load_checkpoint`; a tensor of ``body`` that is missing or of another shape.
    """
    match = _match(body, path)
    lacks = [*match.missing, *match.misshapen]
    if lacks:
        known = len(match.fitting) + len(lacks)
        raise UserError(
            f"{path} is of another network: {len(lacks)} of the backbone's {known} tensors are missing or of another "
            f"shape, such as {', '.join(lacks[:3])}"
        )
    body.load_state_dict(match.fitting)
    return len(match.fitting), match.unexpected


def _first(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@dataclass
class _Match:
    """A file's tensors beside a model's: names and values that fit, names that don't."""

    fitting: dict[str, Tensor]
    fresh: list[str]  # a head for other classes
    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]


def _match(model: nn.Module, path: str | Path) -> _Match:
    content = convert_state_dict(_read(Path(path)), model)
    wanted = model.state_dict()
    found = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    fresh = _adapt(found, wanted, getattr(model, "pretrained_cfg", None) or {})
    fitting: dict[str, Tensor] = {}
    unexpected = [name for name, value in content.items() if not isinstance(value, Tensor) and name not in wanted]
    misshapen = []
    for name, value in found.items():
        if name not in wanted:
            unexpected.append(name)
        elif value.shape != wanted[name].shape:
            misshapen.append(f"{name} {tuple(value.shape)} instead of {tuple(wanted[name].shape)}")
        else:
            fitting[name] = value
    missing = [name for name in wanted if name not in found and name not in fresh]
    return _Match(fitting, fresh, missing, unexpected, misshapen)


def convert_state_dict(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a checkpoint under the names of ``model``; also timm's ``pretrained_filter_fn``.

    Args:
        state_dict: What a file held: tensors by name, or such a dictionary nested in another. Names in the published
            layout become ours, ours stay, and a prefix that a wrapper put before them is taken off.
        model: The model they are meant for, also with ``features_only``, where timm flattens ``stages.0`` to
            ``stages_0``; its names tell what is a prefix.
    """
    while nest := next((key for key in _NESTS if isinstance(state_dict.get(key), dict)), None):
        state_dict = state_dict[nest]
    own = set(model.state_dict())
    return {_place(name, own): value for name, value in _unwrap(state_dict, own).items()}


def _place(name: str, own: Collection[str]) -> str:
    """What the model calls a tensor; for one that it doesn't know, the name in our layout."""
    if name in own:
        return name
    renamed = next((p.sub(ours, name, count=1) for p, ours in _RENAMES if p.match(name)), name)
    local = _LOCAL_LAYER.sub(r"\1local.0.\2", renamed)
    flat = [re.sub(r"^(stem|stages)\.(\d+)\.", r"\1_\2.", choice) for choice in (renamed, local)]
    return next((choice for choice in (renamed, local, *flat) if choice in own), renamed)


def _unwrap(state_dict: dict[str, Any], own: Collection[str]) -> dict[str, Any]:
    """Without the prefix of most names that the model knows; of several copies of a model the average, if there is one.

    Lightning puts the name of its module's attribute before the names, ``DataParallel`` and averages put ``module.``.
    """

    def prefix_of(name: str) -> str | None:
        starts = [0, *(dot.end() for dot in re.finditer(r"\.", name))]
        return next((name[:i] for i in starts if name[i:] in own or _place(name[i:], own) != name[i:]), None)

    prefixes = {name: prefix_of(name) for name in state_dict}
    counts = Counter(prefix for prefix in prefixes.values() if prefix is not None)
    if not counts:
        return state_dict
    most = max(counts.values())
    copies = [prefix for prefix, count in counts.items() if count == most]
    chosen = next((prefix for prefix in copies if "ema" in prefix), copies[0])
    return {
        name.removeprefix(chosen): value
        for name, value in state_dict.items()
        if prefixes[name] == chosen or prefixes[name] not in copies
    }


def _adapt(found: dict[str, Any], wanted: dict[str, Tensor], cfg: dict[str, Any]) -> list[str]:
    """Fit the stem to the model's input channels and drop a head of other classes; the names that stay fresh."""

    def layers(key: str, default: str) -> list[str]:
        names = cfg.get(key) or default
        return [names] if isinstance(names, str) else list(names)

    for layer in layers("first_conv", "stem.0"):
        for name in (f"{layer}.weight", f"{layer.replace('.', '_')}.weight"):
            theirs, ours = found.get(name), wanted.get(name)
            if theirs is not None and ours is not None and theirs.ndim == ours.ndim == 4:
                found[name] = adapt_input_conv(ours.shape[1], theirs, base_chans=theirs.shape[1])

    fresh = []
    for layer in layers("classifier", "head.fc"):
        weight = f"{layer}.weight"
        theirs, ours = found.get(weight), wanted.get(weight)
        if theirs is None or (ours is not None and theirs.shape[0] == ours.shape[0]):
            continue
        for name in (weight, f"{layer}.bias"):
            found.pop(name, None)
            fresh += [name] if name in wanted else []
    return fresh


def _read(path: Path) -> dict[str, Any]:
    """The dictionary that a file holds, without running any code of it."""
    if not path.is_file():
        raise UserError(f"no checkpoint file at {path}")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            # Training scripts of the time (DeiT's, which the authors follow) keep their arguments beside the weights.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file makes the readers raise almost anything
        asks = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and asks:
            raise UserError(f"{path} is refused: reading it would run code ({asks[1]}), weights need none") from error
        says_why = isinstance(error, RuntimeError | OSError | SafetensorError) and str(error)
        reason = str(error).splitlines()[0] if says_why else "torch.save did not write it"
        raise UserError(f"{path} is no checkpoint that can be read: {reason}") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UserError(f"{path} holds no weights by name, but a {type(content).__name__}")
    return content
