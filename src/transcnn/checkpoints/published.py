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
import zipfile
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import adapt_input_conv
from torch import Tensor, nn

from ..errors import UserError, first_line

__all__ = ["Classes", "convert_state_dict", "load_body", "load_checkpoint", "sizes_of", "torch_load", "why_unreadable"]

Model = TypeVar("Model", bound=nn.Module)
_logger = logging.getLogger(__name__)

RUNS_CODE = "reading it would run code"
MAX_PICKLE = 32 << 20  # bytes of what stands beside tensors, each of which may make a list of 64

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


@dataclass(frozen=True)
class Classes:
    """The classes of a file's last layer and of the model's: names, in the order of the outputs."""

    theirs: Sequence[str]
    ours: Sequence[str]


def load_checkpoint(
    model: Model, path: str | Path, *, strict: bool = True, new_head: bool = True, classes: Classes | None = None
) -> Model:
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
        new_head: Whether a head for another number of classes may stay fresh; else it is an error.
        classes: The classes of the file and of the model: where they differ, the last layer's outputs are taken by
            name, and what has no namesake stays fresh; a logged warning says which. Without it, and for equal numbers,
            they are taken as they stand.

    Raises:
        UserError: No such file, one that can't be read or would run code; or tensors that are missing, unexpected, of
            another shape or kind of number, or not finite (counted, the first ones named).
    """
    match = _match(model, path, classes)
    if not new_head and match.fresh:
        match.misshapen += [f"{name} (another number of classes)" for name in match.fresh]
    problems = match.problems()
    if match.unusable or (problems and (strict or not match.fitting)):
        raise UserError(f"{path} does not fit this {type(model).__name__}: {problems}")
    model.load_state_dict(match.fitting, strict=False)
    if match.by_name:
        _logger.warning("%s is for other classes: %s", path, match.by_name)
    elif match.fresh:
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
    if match.unusable:
        raise UserError(f"{path} does not fit this {type(body).__name__}: {match.problems()}")
    lacks = [*match.missing, *match.misshapen]
    if lacks:
        known = len(match.fitting) + len(lacks)
        raise UserError(
            f"{path} is of another network: {len(lacks)} of the backbone's {known} tensors are missing or of another "
            f"shape, such as {', '.join(lacks[:3])}"
        )
    body.load_state_dict(match.fitting)
    return len(match.fitting), match.unexpected


def sizes_of(model: nn.Module, path: str | Path) -> tuple[int, int]:
    """Outputs and input channels that a file of weights is for; ``model`` is such a network of any sizes.

    Raises:
        UserError: As :func:`load_checkpoint`; a file without the network's first or last layer.
    """
    content = _read_for(model, path)
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    found = []
    for layer, axis in ((_layers(cfg, "classifier", "head.fc")[0], 0), (_layers(cfg, "first_conv", "stem.0")[0], 1)):
        weight = content.get(f"{layer}.weight")
        if not isinstance(weight, Tensor) or weight.ndim <= axis or not weight.numel():
            raise UserError(f"{path} is no weights of {type(model).__name__}: it holds no {layer}.weight")
        found.append(weight.shape[axis])
    return found[0], found[1]


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
    unusable: list[str]  # whatever the model is like
    by_name: str  # what was taken of a last layer for other classes

    def problems(self) -> str:
        lists = {"missing": self.missing, "unexpected": self.unexpected, "of another shape": self.misshapen}
        lists |= {"not usable": self.unusable}
        return "; ".join(f"{len(names)} {kind}: {_first(names)}" for kind, names in lists.items() if names)


def _match(model: nn.Module, path: str | Path, classes: Classes | None = None) -> _Match:
    content = _read_for(model, path)
    wanted = model.state_dict()
    found = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    unusable = [
        f"{name} {why}" for name, value in found.items() if name in wanted and (why := _why_not(value, wanted[name]))
    ]
    if unusable:
        return _Match({}, [], [], [], [], unusable, "")
    cfg = getattr(model, "pretrained_cfg", None) or {}
    by_name = _match_classes(found, wanted, cfg, classes) if classes else ""
    fresh = _adapt(found, wanted, cfg)
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
    return _Match(fitting, fresh, missing, unexpected, misshapen, [], by_name)


def _why_not(value: Tensor, wanted: Tensor) -> str:
    """Why a file's tensor can't be copied, or would be cast to other numbers; "" for one that can."""
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        return "(sparse, quantized, or without values)"
    if value.is_floating_point() != wanted.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        return f"({str(value.dtype).removeprefix('torch.')} instead of {str(wanted.dtype).removeprefix('torch.')})"
    if value.shape == wanted.shape and value.is_floating_point() and not bool(torch.isfinite(value).all()):
        return "(not finite: NaN or infinity)"
    return ""


def convert_state_dict(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a checkpoint under the names of ``model``; also timm's ``pretrained_filter_fn``.

    Args:
        state_dict: What a file held: tensors by name, or such a dictionary nested in another. Names in the published
            layout become ours, ours stay, and a prefix that a wrapper put before them is taken off.
        model: The model they are meant for, also with ``features_only``, where timm flattens ``stages.0`` to
            ``stages_0``; its names show what is a prefix.
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


def _layers(cfg: dict[str, Any], key: str, default: str) -> list[str]:
    """The layers that a network's pretrained_cfg names, such as its ``classifier``."""
    names = cfg.get(key) or default
    return [names] if isinstance(names, str) else list(names)


def _adapt(found: dict[str, Any], wanted: dict[str, Tensor], cfg: dict[str, Any]) -> list[str]:
    """Fit the stem to the model's input channels and drop a head of other classes; the names that stay fresh."""
    for layer in _layers(cfg, "first_conv", "stem.0"):
        for name in (f"{layer}.weight", f"{layer.replace('.', '_')}.weight"):
            theirs, ours = found.get(name), wanted.get(name)
            if theirs is not None and ours is not None and theirs.ndim == ours.ndim == 4:
                found[name] = adapt_input_conv(ours.shape[1], theirs, base_chans=theirs.shape[1])

    fresh = []
    for layer in _layers(cfg, "classifier", "head.fc"):
        weight = f"{layer}.weight"
        theirs, ours = found.get(weight), wanted.get(weight)
        if theirs is None or (ours is not None and theirs.shape[:1] == ours.shape[:1]):
            continue
        fresh += _drop(found, wanted, layer)
    return fresh


def _drop(found: dict[str, Any], wanted: dict[str, Tensor], layer: str) -> list[str]:
    """Leave a layer out of a file's tensors; the model's own of these names."""
    names = [f"{layer}.{kind}" for kind in ("weight", "bias")]
    for name in names:
        found.pop(name, None)
    return [name for name in names if name in wanted]


def _match_classes(found: dict[str, Any], wanted: dict[str, Tensor], cfg: dict[str, Any], classes: Classes) -> str:
    """Put the file's outputs where the model has classes of the same names, in ``found``; what was done, in words.

    Of classes of one name, the first is taken for the first, and so on. Layers with more than one output a class (those
    of detectors) are taken whole or not at all.
    """
    theirs, ours = (_numbered(names) for names in (classes.theirs, classes.ours))
    if list(theirs) == list(ours):
        return ""
    shared = [name for name in ours if name in theirs]
    rows = torch.tensor([(ours[name], theirs[name]) for name in shared]).view(-1, 2)
    taken = False
    for layer in _layers(cfg, "classifier", "head.fc"):
        names = [name for name in (f"{layer}.weight", f"{layer}.bias") if name in found and name in wanted]
        plain = all(len(found[name]) == len(theirs) and len(wanted[name]) == len(ours) for name in names)
        if not shared or not plain or any(found[name].shape[1:] != wanted[name].shape[1:] for name in names):
            for name in names:
                found[name] = wanted[name].detach().cpu()
            continue
        for name in names:
            merged = wanted[name].detach().cpu().clone()
            merged[rows[:, 0]] = found[name][rows[:, 1]].to(merged)
            found[name] = merged
            taken = True
    if not taken:
        return "the last layer starts anew"
    new = [name for name, _ in ours if (name, _) not in theirs]
    rest = f", those of {_first(new)} start anew" if new else ""
    return (
        f"the last layer's outputs of {len(shared)} classes are taken by name ({_first([n for n, _ in shared])}){rest}"
    )


def _numbered(names: Sequence[str]) -> dict[tuple[str, int], int]:
    """The index of each name, which stands with how many of the same come before it."""
    seen: Counter[str] = Counter()
    found = {}
    for i, name in enumerate(names):
        found[name, seen[name]] = i
        seen[name] += 1
    return found


def _read_for(model: nn.Module, path: str | Path) -> dict[str, Any]:
    """What a file holds, under the names of ``model``; none of its tensors has more numbers than the file has bytes."""
    path = Path(path)
    content, size = convert_state_dict(_read(path), model), path.stat().st_size
    for name, value in content.items():
        if isinstance(value, Tensor) and value.numel() > size:  # one number, given a shape by strides of 0
            raise UserError(f"{path} has {size:,} bytes, but says that {name[:80]!r} has {value.numel():,} numbers")
    return content


def why_unreadable(error: Exception) -> str:
    """What keeps a file of weights from being read, in one line. (torch's own text advises to let it run code.)"""
    if isinstance(error, pickle.UnpicklingError) and (asks := re.search(r"GLOBAL (\S+)", str(error))):
        return f"{RUNS_CODE} ({asks[1]}), weights need none"
    says_why = isinstance(error, RuntimeError | ValueError | OSError | SafetensorError) and str(error)
    return first_line(error) if says_why else "torch.save did not write it"


def _read(path: Path) -> dict[str, Any]:
    """The dictionary that a file holds, without running any code of it."""
    if not path.is_file():
        best = path / "best.safetensors"
        raise UserError(f"no checkpoint file at {path}{f', which is a folder: give {best}' if best.is_file() else ''}")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch_load(path)
    except Exception as error:  # a broken file makes the readers raise almost anything
        reason = why_unreadable(error)
        what = "refused" if reason.startswith(RUNS_CODE) else "no checkpoint that can be read"
        raise UserError(f"{path} is {what}: {reason}") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UserError(f"{path} holds no weights by name, but a {type(content).__name__}")
    return content


def torch_load(path: Path, *, mmap: bool = False) -> Any:
    """What ``torch.save`` wrote, without running any code of it; raises whatever torch or zipfile raise.

    Refused is what takes far more memory than the file has bytes: compressed archives (torch writes none), archives
    whose parts lie over each other, and pickles that ask for bytes by their number (``bytearray(10**10)``).
    """
    if _contains(path, b"\nbytearray\n"):
        raise ValueError("it makes a bytearray, as no weights do")
    zipped = zipfile.is_zipfile(path)
    if zipped:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is a compressed archive, as torch.save writes none")
            if any(entry.file_size > MAX_PICKLE for entry in archive.infolist() if entry.filename.endswith(".pkl")):
                raise ValueError("what it says beside its tensors is more than any network needs")
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise ValueError("its parts are larger than the file, as those of torch.save never are")
    # Training scripts of the time (DeiT's, which the authors follow) keep their arguments beside the weights.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipped)


def _contains(path: Path, words: bytes) -> bool:
    """Whether a file holds these bytes anywhere."""
    rest = b""
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            if words in rest + block:
                return True
            rest = block[-len(words) :]
    return False
