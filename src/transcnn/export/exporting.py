"""A network as a file for other engines, put in place only after it answered the same.

One trace by ``torch.export`` serves the three formats. Batch, height and width stay free unless a size is given; the
grids at a map's border then always carry their mask, because a graph can't ask whether sizes divide. A detector goes in
whole, from normalised images to boxes after non-maximum suppression (:mod:`transcnn.export.detect`).
"""

from __future__ import annotations

import copy
import io
import itertools
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from .. import __version__
from ..checkpoints.arguments import DENSE, PRIVATE
from ..checkpoints.loading import Loaded
from ..errors import UserError, first_line, require
from ..plugging.plug import plug_spec
from ..text import json_text
from .check import Row, Run, check, check_detections, comparisons, example_images, refuse_beyond
from .steps import steps

__all__ = ["Exported", "export_model"]

INPUT = "images"
OUTPUT = "logits"
TOLERANCES = {"segment": 1e-4, "detect": 1e-4}
TOLERANCE = 1e-5  # of all other tasks
LEAST = (288, 384)  # of a detector's example: its coarsest map, of stride 128, must not be 1 position, a constant


@dataclass(frozen=True)
class Exported:
    """What an export made: the ``file`` (beside it a JSON of what it holds), its ``info``, and the comparison."""

    file: Path
    info: dict[str, Any]
    rows: list[Row]


def export_model(
    loaded: Loaded,
    out: str | os.PathLike[str],
    *,
    format: str = "onnx",
    static: int | None = None,
    images: Sequence[str] | None = None,
    tolerance: float | None = None,
    calibrate: str | None = None,
    max_loss: float = 0.5,
) -> Exported:
    """:func:`export` for a network in memory, such as a plugged CNN: ``Loaded(model, task, names, config, source)``.

    The file is written and compared in a temporary folder beside ``out``, and moved into place when it is right. The
    network stays as it is, on its device and of its dtype.
    """
    kind, out = FORMATS[format], Path(out)
    if out.suffix != kind.suffix:
        raise UserError(f"a file of format {format} ends in {kind.suffix}, got {out}")
    if static is not None and static < 1:
        raise UserError(f"static must be 1 or more, got {static}")
    for module, extra in kind.needs:
        require(module, extra)
    _check_beside(out)
    loaded = _as_exported(loaded)
    model, info = _graph_of(loaded), _describe(loaded, static)
    side = info["task_args"]["short_side"] if loaded.task == "detect" else None
    if not side:
        _check_outputs(model, info)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as folder:
            file = Path(folder) / out.name
            with _quiet():
                program = _capture(model, info["data_config"]["input_size"], static, LEAST if side else (0, 0))
                try:
                    kind.write(program, file, info)
                except OSError:
                    raise
                except Exception as error:  # each exporter has its own
                    reason = first_line(error)
                    raise UserError(
                        f"the format {format} can't hold {type(loaded.model).__name__}: {reason}"
                    ) from error
            rows = _compare(loaded, model, kind, file, info, static, images, tolerance)
            refuse_beyond(rows, TOLERANCES.get(loaded.task, TOLERANCE) if tolerance is None else tolerance, out)
            if calibrate is not None:
                from .int8 import note, to_int8

                sized = replace(loaded, preprocessing=info["data_config"])  # of the one size that a file may take
                info["int8"] = to_int8(sized, file, calibrate, max_loss, torch.get_num_threads())
                note(file, info)
                rows = check(model, kind.open(file), comparisons(info["data_config"], static, images))
            text = json_text(info, indent=2) + "\n"
            file.with_suffix(".json").write_text(text, encoding="utf-8")
            for made in Path(folder).iterdir():
                shutil.move(made, out.parent / made.name)
    except OSError as error:
        raise UserError(f"can't write {out}: {error.strerror or error}") from error
    return Exported(out, info, rows)


def _compare(
    loaded: Loaded,
    model: nn.Module,
    kind: Format,
    file: Path,
    info: dict[str, Any],
    static: int | None,
    images: Sequence[str] | None,
    tolerance: float | None,
) -> list[Row]:
    """The network and the file, on batches; detectors as ``transcnn predict`` runs them, whose images have any size."""
    run, config = kind.open(file), info["data_config"]
    if loaded.task != "detect":
        # Graphs of torch.export refuse images of a single grid (docs/export.md).
        batches = comparisons(config, static, images, small=kind.suffix != ".pt2")
        return check(model, run, batches, TOLERANCES.get(loaded.task, TOLERANCE) if tolerance is None else None)
    names = _outputs(info)
    if static is None:
        return check_detections(
            loaded.model, lambda x: dict(zip(names, run(x), strict=True)), example_images(config, images), info
        )
    return check(model, run, comparisons(config, static, images))


# --- formats ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """How one kind of file is written, and read to be run; ``needs`` are modules with the extra that brings each."""

    suffix: str
    needs: tuple[tuple[str, str], ...]
    write: Callable[[ExportedProgram, Path, dict[str, Any]], None]
    open: Callable[[Path], Run]


def _write_onnx(program: ExportedProgram, path: Path, info: dict[str, Any]) -> None:
    names = {axis: side for axis, side in enumerate(info["input"]["shape"]) if isinstance(side, str)}
    made = torch.onnx.export(
        program, input_names=[INPUT], output_names=_outputs(info), dynamic_shapes=(names,), dynamo=True, verbose=False
    )
    assert made is not None
    made.model.metadata_props.update({key: json.dumps(value) for key, value in info.items()})
    made.save(path, external_data=False)  # one file: without this the weights go into a second one


def _open_onnx(path: Path) -> Run:
    from ..onnx.predict import OnnxModel

    model = OnnxModel(path, accelerator="cpu", threads=torch.get_num_threads())
    return lambda images: _one_or_all(list(model.outputs(images).values()))


def _write_torch(program: ExportedProgram, path: Path, info: dict[str, Any]) -> None:
    # The conditions noted while tracing say how strides came out at the example's size, not what the graph can do: with
    # them the file would refuse sizes that grids divide. What it answers is compared below, such a size among them.
    program._guards_code = []
    buffer = io.BytesIO()  # PyTorch's own writer ends the process where the disk is full
    torch.export.save(program, buffer, extra_files={"transcnn.json": json.dumps(info)})
    path.write_bytes(buffer.getbuffer())


def _open_torch(path: Path) -> Run:
    model = torch.export.load(path).module()

    def run(images: np.ndarray) -> Any:
        with torch.inference_mode():
            answer = model(torch.from_numpy(images))
        return [part.numpy() for part in answer] if isinstance(answer, tuple) else answer.numpy()

    return run


def _write_openvino(program: ExportedProgram, path: Path, info: dict[str, Any]) -> None:
    import openvino

    if info.get("task", "classify") not in DENSE:
        model = openvino.convert_model(program)
    else:  # sizes that are computed, in which these go, OpenVINO reads from ONNX files alone
        require("onnxscript", "export")
        with tempfile.TemporaryDirectory() as folder:
            _write_onnx(program, Path(folder) / "model.onnx", info)
            model = openvino.convert_model(Path(folder) / "model.onnx")
    model.inputs[0].get_tensor().set_names({INPUT})
    for output, name in zip(model.outputs, _outputs(info), strict=True):
        output.get_tensor().set_names({name})
    for key, value in info.items():
        model.set_rt_info(json.dumps(value), ["transcnn", key])
    openvino.save_model(model, path, compress_to_fp16=False)


def _open_openvino(path: Path) -> Run:
    import openvino

    # On CPUs with bf16 OpenVINO would compute in it, with 5e-3 of relative error.
    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    model = openvino.Core().compile_model(path, "CPU", hints)
    return lambda images: _one_or_all(list(model(images).to_tuple()))


FORMATS = {
    "onnx": Format(
        ".onnx", (("onnx", "export"), ("onnxscript", "export"), ("onnxruntime", "export")), _write_onnx, _open_onnx
    ),
    "torch": Format(".pt2", (), _write_torch, _open_torch),
    "openvino": Format(".xml", (("openvino", "export"),), _write_openvino, _open_openvino),
}


def _outputs(info: dict[str, Any]) -> list[str]:
    return [output["name"] for output in info.get("outputs", ())] or [OUTPUT]


def _one_or_all(parts: list[np.ndarray]) -> Any:
    return parts[0] if len(parts) == 1 else parts


# --- steps ------------------------------------------------------------------------------------------------------


def _check_beside(out: Path) -> None:
    """Refuse to write over what an export would put beside its file, unless an export wrote it."""
    about, weights = out.with_suffix(".json"), out.with_suffix(".bin")
    try:
        info = json.loads(about.read_text(encoding="utf-8"))
        ours = isinstance(info, dict) and {"transcnn", "class_names", "input"} <= {*info}
    except FileNotFoundError:
        ours = True
    except (OSError, ValueError, RecursionError):
        ours = False
    if not ours:
        raise UserError(f"{about} is there already, and is none that an export wrote; give another --out")
    if out.suffix == ".xml" and weights.exists() and not out.exists():
        raise UserError(f"{weights} is there already, without {out.name}; give another --out")


def _check_outputs(model: nn.Module, info: dict[str, Any]) -> None:
    """Refuse a network that gives something else than one number for each name."""
    classes = len(info["class_names"])
    try:
        with torch.inference_mode():
            answer = model(torch.zeros(1, *info["data_config"]["input_size"]))
    except Exception:  # the trace says what is wrong
        return
    if not isinstance(answer, torch.Tensor) or tuple(answer.shape[:2]) != (1, classes):
        what = str(tuple(answer.shape)) if isinstance(answer, torch.Tensor) else type(answer).__name__
        raise UserError(
            f"{type(model).__name__} must give a number for each of {classes} names, (B, {classes}), got {what}"
        )


def _as_exported(loaded: Loaded) -> Loaded:
    """The network on the CPU, of float32 and in evaluation mode: a copy, unless it is so already."""
    model = loaded.model
    tensors = itertools.chain(model.parameters(), model.buffers())
    moved = any(t.device.type != "cpu" or (t.is_floating_point() and t.dtype != torch.float32) for t in tensors)
    if not moved and not any(module.training for module in model.modules()):
        return loaded
    model = copy.deepcopy(model).cpu().float()
    model.eval()
    return replace(loaded, model=model)


def _graph_of(loaded: Loaded) -> nn.Module:
    """What is exported: the network itself, or a detector as one graph."""
    if loaded.task != "detect":
        return loaded.model
    from .detect import DetectorGraph

    return DetectorGraph(loaded.model).eval()  # pyright: ignore


def _capture(
    model: nn.Module, input_size: Sequence[int], static: int | None, least: tuple[int, int] = (0, 0)
) -> ExportedProgram:
    """The network as one graph; a batch of 2 and odd, unequal sides, so that nothing is taken for a constant."""
    channels, height, width = input_size
    sides = (static, static) if static else (max(height, least[0]) + 33, max(width, least[1]) + 67)
    free = {0: Dim.AUTO} if static else {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
    try:
        with torch.no_grad():
            program = torch.export.export(model, (torch.zeros(2, channels, *sides),), dynamic_shapes=(free,))
    except Exception as error:  # what a network does that can't be traced shows in many ways
        reason = first_line(error)
        raise UserError(f"{type(model).__name__} can't be traced for export: {reason}") from error
    image = next(node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs)
    fixed = [axis for axis in free if str(image.meta["val"].shape[axis]).isdigit()]  # free ones have names
    if fixed:
        words = [("batch", "", "height", "width")[axis] for axis in fixed]
        hint = "" if fixed == [0] else "; give --static SIZE"
        raise UserError(f"{type(model).__name__} works at a fixed {' and '.join(words)} only{hint}")
    return program


def _describe(loaded: Loaded, static: int | None) -> dict[str, Any]:
    """What goes into the file: what it is, what it names, and how images become its input."""
    config = dict(loaded.preprocessing)
    if static:
        config["input_size"] = [config["input_size"][0], static, static]
    sides = [static, static] if static else ["height", "width"]
    known = {
        key: loaded.info[key] for key in ("model", "model_args", "data", "val_top1", "epoch") if key in loaded.info
    }
    plugged = plug_spec(loaded.model)
    about: dict[str, Any] = {"output": {"name": OUTPUT, "dtype": "float32"}}
    if loaded.task != "classify":
        known_args = loaded.info.get("task_args") or {}
        about["task_args"] = {key: value for key, value in known_args.items() if key not in PRIVATE}
    if loaded.task == "detect":
        transform: Any = loaded.model.net.transform  # pyright: ignore
        config |= {"mean": list(transform.image_mean), "std": list(transform.image_std)}
        masks = hasattr(loaded.model.net, "roi_heads") and loaded.model.net.roi_heads.has_mask()  # pyright: ignore
        names = ("boxes", "scores", "labels", "image", *(["masks"] if masks else []))
        kinds = {name: "int64" if name in ("labels", "image") else "float32" for name in names}
        about["outputs"] = [{"name": name, "dtype": kind} for name, kind in kinds.items()]
        del about["output"]
    return {
        **known,
        **({"plug": plugged} if plugged else {}),
        "task": loaded.task,
        "class_names": loaded.class_names,
        "data_config": config,
        "input": {"name": INPUT, "dtype": "float32", "shape": ["batch", config["input_size"][0], *sides]},
        **about,
        "steps": steps(loaded.task, config, about.get("task_args") or {}),
        "transcnn": __version__,
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' notes to their own developers."""
    names = ("torch.onnx", "onnxscript", "torch.export", "onnx_ir")
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
