"""Run directories, and models loaded from whatever names one.

A run directory holds ``config.yaml`` (every setting), ``metrics.csv`` (a row an epoch), TensorBoard events,
``last.ckpt`` (to go on from; ``previous.ckpt`` and ``checksums.sha256`` go with it), ``best.safetensors`` (to use),
``metrics.json``, ``report/``, ``skipped.csv`` where files could not be read, and ``faults.log`` where something else
went wrong.
"""

from __future__ import annotations

import difflib
import importlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.data import ImageNetInfo, resolve_data_config
from torch import nn

from . import variants as _registers_our_models  # noqa: F401
from .checkpoints import load_checkpoint
from .errors import UserError
from .plug import plug_like
from .processes import attempt, launch_name
from .stored import check_stored

__all__ = ["Loaded", "build_model", "data_config_of", "load", "new_run_dir", "save_weights", "write_whole"]

LAUNCH = ".launch"  # the file of a run directory that holds the name of the torchrun command that made it


@dataclass
class Loaded:
    """A model ready for use.

    Attributes:
        model: In evaluation mode.
        task: ``classify``, ``segment`` or ``detect``.
        class_names: In the order of the outputs.
        preprocessing: timm's data config (``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``, ...).
        source: Where it was read from.
        info: All that was stored beside the weights.
    """

    model: nn.Module
    task: str
    class_names: list[str]
    preprocessing: dict[str, Any]
    source: str
    info: dict[str, Any] = field(default_factory=dict)


def new_run_dir(out: str | os.PathLike[str] | None, model: str, data: str) -> Path:
    """Make a fresh run directory, ``runs/<date-time>-<model>-<data>`` unless ``out`` says otherwise.

    Raises:
        UserError: ``out`` holds something already, or can't be made or written to.
    """
    if out is None:
        name = re.sub(r"[^\w.-]+", "-", f"{time.strftime('%Y%m%d-%H%M%S')}-{model}-{data}").strip("-")
        path = Path("runs") / name
        for i in range(2, 1000):
            if not path.exists():
                break
            path = Path("runs") / f"{name}-{i}"
    else:
        path = Path(out)
    try:
        if path.is_dir() and any(path.iterdir()) and not (attempt() and made_by_this_launch(path)):
            raise UserError(f"the run directory {path} is not empty; give another --out, or go on with --resume {path}")
        path.mkdir(parents=True, exist_ok=True)
        (path / ".probe").write_bytes(b"\0" * 4096)
        (path / ".probe").unlink()
        if launch_name():
            (path / LAUNCH).write_text(launch_name(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"can't write to the run directory {path}: {error.strerror or error}") from error
    return path


def made_by_this_launch(path: Path) -> bool:
    """Whether a run directory is that of an earlier attempt of the torchrun command that started this process."""
    try:
        return (path / LAUNCH).read_text(encoding="utf-8") == launch_name() != ""
    except (OSError, UnicodeDecodeError):
        return False


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file under a temporary name, then put it in place: whole, or not at all.

    Raises:
        UserError: The disk is full or can't be written; what was there before is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # safetensors lets only its owner read what it writes
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"can't write {path}: {reason}") from error
    finally:
        temporary.unlink(missing_ok=True)  # there only if something failed


def clear_leavings(folder: Path) -> None:
    """Remove what a killed process left half written (see :func:`write_whole`)."""
    for temporary in folder.glob(".*.tmp"):
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Have a new name in a folder on disk too, where the system can do that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def build_model(name: str, plug: Any = None, **kwargs: Any) -> nn.Module:
    """``timm.create_model``, with errors for users: near names of one that is unknown, arguments that it refuses.

    ``plug`` puts H-MHSA in, as :func:`transcnn.plug_like` takes it: a spec, names or patterns.
    """
    base = name.split(".")[0].split("/")[-1]
    if ":" not in name and not timm.is_model(base):
        near = difflib.get_close_matches(base, timm.list_models(), n=4, cutoff=0.5)
        hint = f"near ones: {', '.join(near)}" if near else "transcnn models lists ours, timm.list_models() all"
        raise UserError(f"no model is named {name!r}; {hint}")
    try:
        model = timm.create_model(name, **kwargs)
        return plug_like(model, plug) if plug else model
    except UserError:
        raise
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"can't make {name} with {kwargs}: {error}") from error
    except RuntimeError as error:
        raise UserError(f"can't make {name}: {str(error).splitlines()[0]}") from error


# Networks that are more than a backbone, by task: the module whose ``build`` makes them.
BUILDERS = {"segment": "segmenters", "detect": "detectors"}


def build_network(task: str, name: str, task_args: dict[str, Any] | None, **kwargs: Any) -> nn.Module:
    """The network of a task: the named one itself, or what the task puts around it, as ``task_args`` says."""
    if task not in BUILDERS:
        return build_model(name, **kwargs)
    return importlib.import_module(f".{BUILDERS[task]}", __package__).build(name, task_args or {}, **kwargs)


def data_config_of(model: nn.Module, in_chans: int, img_size: int | None = None) -> dict[str, Any]:
    """How images become the model's input, in timm's words, with plain lists and numbers."""
    config = resolve_data_config({"img_size": img_size, "in_chans": in_chans}, model=model)
    size = tuple(config["input_size"])[1:]
    if in_chans != 3:  # RGB figures of ImageNet say nothing about other channels
        config |= {"mean": (0.5,) * in_chans, "std": (0.25,) * in_chans}
    config["input_size"] = (in_chans, *size)
    if max(size) <= 64:  # cutting a margin off small images loses what they show
        config["crop_pct"] = 1.0
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


def save_weights(path: Path, weights: nn.Module | Mapping[str, torch.Tensor], info: dict[str, Any]) -> None:
    """Weights (a module's, or a state dict) and what is needed to use them (``info``, as JSON in the header)."""
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    header = {key: json.dumps(value) for key, value in info.items()}
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata=header))


def load(source: str | os.PathLike[str]) -> Loaded:
    """The model that a run directory, a .safetensors or .ckpt of ours, or the name of published weights stands for.

    A directory that ``save_pretrained`` wrote is one as well.

    Raises:
        UserError: There is no such thing, it is damaged, or its weights don't fit.
    """
    path = Path(source)
    if path.is_dir():
        if (path / "config.json").is_file():
            from .share import load_folder  # the hub's libraries take time to import

            return load_folder(path)
        found = [path / name for name in ("best.safetensors", "last.ckpt") if (path / name).is_file()]
        if not found:
            raise UserError(f"{path} is no run directory: it holds neither best.safetensors nor last.ckpt")
        path = found[0]
    if path.is_file():
        return _load_file(path)
    name = os.fspath(source)
    if (os.sep in name and ":" not in name) or path.suffix in (".safetensors", ".ckpt", ".pth", ".pt"):
        raise UserError(f"no such file or directory: {name}")
    return _load_published(name)


def read_info(path: Path) -> dict[str, Any]:
    """What was stored beside the weights of a file of ours; empty for files of others."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
            return {key: json.loads(value) for key, value in metadata.items() if key != "format"}
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        info = checkpoint.get("transcnn", {}) if isinstance(checkpoint, dict) else {}
        return info if isinstance(info, dict) else {}
    except (json.JSONDecodeError, AttributeError):
        return {}
    except Exception as error:  # damaged files fail in many ways; torch's refusal of code has a long text
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"can't read {path}: {reason}") from error


def _load_file(path: Path) -> Loaded:
    info = read_info(path)
    if not info.get("model"):
        raise UserError(
            f"{path} doesn't say which model it is for; from Python: transcnn.load_checkpoint(create_model(...), path)"
        )
    check_stored(info, path)
    config = info["data_config"]
    names = info["class_names"]
    task = info.get("task", "classify")
    args = {"num_classes": len(names), "in_chans": config["input_size"][0], **(info.get("model_args") or {})}
    build = partial(build_network, task, str(info["model"]), info.get("task_args"), **args)
    _refuse_too_large(build, path)
    model = build()
    load_checkpoint(model, path)
    return Loaded(model.eval(), task, names, config, str(path), info)


def _refuse_too_large(build: Callable[[], nn.Module], path: Path) -> None:
    """Refuse a network with more weights than its file has bytes, before memory is taken for it."""
    weights = 0
    with suppress(NotImplementedError, RuntimeError), torch.device("meta"):  # some networks can't be built without data
        weights = sum(parameter.numel() for parameter in build().parameters())
    if weights > path.stat().st_size:
        raise UserError(
            f"{path} has {path.stat().st_size:,} bytes, but says it is for a network of {weights:,} weights"
        )


def _load_published(name: str) -> Loaded:
    model = build_model(name, pretrained=True).eval()
    classes = int(model.num_classes)  # pyright: ignore
    names: list[str] = list((getattr(model, "pretrained_cfg", None) or {}).get("label_names") or ())
    if len(names) != classes:
        names = [str(i) for i in range(classes)]
        if classes == 1000:
            info = ImageNetInfo()
            names = [str(info.index_to_description(i)).split(",")[0] for i in range(classes)]
    in_chans = int(getattr(model, "in_chans", 3))
    return Loaded(model, "classify", names, data_config_of(model, in_chans), name, {"model": name})
