"""``transcnn export``: a network as a file for other engines, put in place only after it answered the same.

One trace by ``torch.export`` serves the three formats. Batch, height and width stay free unless a size is given; the
grids at a map's border then always carry their mask, because a graph can't ask whether sizes divide.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.export import Dim, ExportedProgram

from . import __version__
from .data.images import read_image
from .errors import UserError, require
from .onnx_predict import to_input
from .plug import plug_spec
from .runs import Loaded, load

__all__ = ["Exported", "check", "export", "export_model"]

Run = Callable[[np.ndarray], np.ndarray]
TASKS = ("classify", "segment")  # those whose network makes one tensor of one tensor
INPUT = "images"
OUTPUT = "logits"


@dataclass(frozen=True)
class Row:
    """One line of the comparison between the network and the file.

    ``difference`` is the largest between two outputs, ``relative`` the same over the largest output; times are
    milliseconds an image, the median of five runs.
    """

    batch: int
    height: int
    width: int
    difference: float
    relative: float
    torch_ms: float
    file_ms: float


@dataclass(frozen=True)
class Exported:
    """What an export made: the ``file`` (beside it a JSON of what it holds), its ``info``, and the comparison."""

    file: Path
    info: dict[str, Any]
    rows: list[Row]


def export(
    checkpoint: str,
    *,
    format: Literal["onnx", "torch", "openvino"] = "onnx",
    out: str | None = None,
    static: int | None = None,
    images: list[str] | None = None,
    tolerance: float = 1e-5,
    quiet: bool = False,
) -> Exported:
    """Write a trained network as a file for other engines, and check that it answers the same.

    The file takes images (B, C, H, W) that are resized and normalised already; how is written in the file itself and
    in a small JSON beside it, with the class names. transcnn predict FILE.onnx does it by ONNX Runtime alone.

    Args:
        checkpoint: A run's directory, a .safetensors or .ckpt of ours, or the name of a published model.
        format: onnx for ONNX Runtime and most others, torch for torch.export's .pt2, openvino for its .xml and .bin.
        out: The file; without it model.onnx (.pt2, .xml) in the run's directory, else a name after the checkpoint.
        static: One side of image alone, which makes a simpler and faster graph; the batch stays free.
        images: Images to compare on; without it made ones.
        tolerance: Largest difference, relative to the largest output; a file beyond it is not kept.
        quiet: Print nothing but errors.

    Raises:
        UserError: No such checkpoint, a missing extra, a network that can't be exported, or one whose file answers
            otherwise.
    """
    if format not in FORMATS:
        raise UserError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    loaded = load(checkpoint)
    target = Path(out) if out else _default_target(checkpoint, FORMATS[format].suffix)
    result = export_model(loaded, target, format=format, static=static, images=images, tolerance=tolerance)
    if not quiet:
        _print(result, format)
    return result


def export_model(
    loaded: Loaded,
    out: str | os.PathLike[str],
    *,
    format: str = "onnx",
    static: int | None = None,
    images: Sequence[str] | None = None,
    tolerance: float = 1e-5,
) -> Exported:
    """:func:`export` for a network in memory, such as a plugged CNN: ``Loaded(model, task, names, config, source)``.

    The file is written and compared in a temporary folder beside ``out``, and moved into place when it is right.
    """
    kind, out = FORMATS[format], Path(out)
    if out.suffix != kind.suffix:
        raise UserError(f"a file of format {format} ends in {kind.suffix}, got {out}")
    if loaded.task not in TASKS:
        raise UserError(f"networks for {loaded.task} can't be exported; those for {', '.join(TASKS)} can")
    if static is not None and static < 1:
        raise UserError(f"static must be 1 or more, got {static}")
    for module, extra in kind.needs:
        require(module, extra)
    model = loaded.model.cpu().float().eval()
    info = _describe(loaded, static)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as folder:
            file = Path(folder) / out.name
            with _quiet():
                kind.write(_capture(model, loaded.preprocessing["input_size"], static), file, info)
            rows = check(model, kind.open(file), _comparisons(loaded, static, images))
            _judge(rows, tolerance, out)
            text = json.dumps(info, indent=2, ensure_ascii=False) + "\n"
            file.with_suffix(".json").write_text(text, encoding="utf-8")
            for made in Path(folder).iterdir():
                shutil.move(made, out.parent / made.name)
    except OSError as error:
        raise UserError(f"can't write {out}: {error.strerror or error}") from error
    return Exported(out, info, rows)


def check(model: nn.Module, run: Run, batches: Iterator[np.ndarray]) -> list[Row]:
    """Compare the answers and the speed of a network and an engine, a row for each batch (B, C, H, W)."""
    rows = []
    for batch in batches:
        tensor = torch.from_numpy(batch)
        try:
            with torch.inference_mode():
                wanted, torch_time = _timed(lambda tensor=tensor: model(tensor))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"the network itself fails on images of shape {batch.shape}: {reason}") from error
        try:
            found, file_time = _timed(lambda batch=batch: run(batch))
        except Exception as error:  # each engine has its own
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise UserError(f"the file fails on images of shape {batch.shape}: {reason}") from error
        wanted = wanted.numpy()
        if wanted.shape != found.shape:
            raise UserError(f"the file answers {batch.shape} with {found.shape} instead of {wanted.shape}")
        difference = float(np.abs(wanted - found).max())
        relative = difference / max(float(np.abs(wanted).max()), 1e-12)
        if not np.isfinite(found).all():
            difference = relative = float("inf")
        count, _, height, width = batch.shape
        each = (1000 * seconds / count for seconds in (torch_time, file_time))
        rows.append(Row(count, height, width, difference, relative, *each))
    return rows


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
        program, input_names=[INPUT], output_names=[OUTPUT], dynamic_shapes=(names,), dynamo=True, verbose=False
    )
    assert made is not None
    made.model.metadata_props.update({key: json.dumps(value) for key, value in info.items()})
    made.save(path, external_data=False)  # one file: without this the weights go into a second one


def _open_onnx(path: Path) -> Run:
    from .onnx_predict import OnnxModel

    return OnnxModel(path, accelerator="cpu", threads=torch.get_num_threads())


def _write_torch(program: ExportedProgram, path: Path, info: dict[str, Any]) -> None:
    # The conditions noted while tracing say how strides came out at the example's size, not what the graph can do: with
    # them the file would refuse sizes that grids divide. What it answers is compared below, such a size among them.
    program._guards_code = []
    torch.export.save(program, path, extra_files={"transcnn.json": json.dumps(info)})


def _open_torch(path: Path) -> Run:
    model = torch.export.load(path).module()

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(images)).numpy()

    return run


def _write_openvino(program: ExportedProgram, path: Path, info: dict[str, Any]) -> None:
    import openvino

    model = openvino.convert_model(program)
    model.inputs[0].get_tensor().set_names({INPUT})
    model.outputs[0].get_tensor().set_names({OUTPUT})
    for key, value in info.items():
        model.set_rt_info(json.dumps(value), ["transcnn", key])
    openvino.save_model(model, path, compress_to_fp16=False)


def _open_openvino(path: Path) -> Run:
    import openvino

    # On processors with bf16 OpenVINO would compute in it, with 5e-3 of relative error.
    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    model = openvino.Core().compile_model(path, "CPU", hints)
    return lambda images: model(images)[0]


FORMATS = {
    "onnx": Format(
        ".onnx", (("onnx", "export"), ("onnxscript", "export"), ("onnxruntime", "export")), _write_onnx, _open_onnx
    ),
    "torch": Format(".pt2", (), _write_torch, _open_torch),
    "openvino": Format(".xml", (("openvino", "export"),), _write_openvino, _open_openvino),
}


# --- steps ------------------------------------------------------------------------------------------------------


def _capture(model: nn.Module, input_size: Sequence[int], static: int | None) -> ExportedProgram:
    """The network as one graph; a batch of 2 and odd, unequal sides, so that nothing is taken for a constant."""
    channels, height, width = input_size
    sides = (static, static) if static else (height + 33, width + 67)
    free = {0: Dim.AUTO} if static else {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
    try:
        with torch.no_grad():
            program = torch.export.export(model, (torch.zeros(2, channels, *sides),), dynamic_shapes=(free,))
    except Exception as error:  # what a network does that can't be traced shows in many ways
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
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
    return {
        **known,
        **({"plug": plugged} if plugged else {}),
        "task": loaded.task,
        "class_names": loaded.class_names,
        "data_config": config,
        "input": {"name": INPUT, "dtype": "float32", "shape": ["batch", config["input_size"][0], *sides]},
        "output": {"name": OUTPUT, "dtype": "float32"},
        "steps": _steps(config),
        "transcnn": __version__,
    }


def _steps(config: dict[str, Any]) -> list[str]:
    """How to make the input in any language."""
    channels, height, width = config["input_size"]
    mode = {1: "grey", 2: "grey and alpha", 3: "RGB", 4: "RGBA"}.get(channels, f"{channels} channels")
    tall, wide = (int(side / config["crop_pct"]) for side in (height, width))
    return [
        f"decode, turn upright (EXIF), {mode}",
        f"resize ({config['interpolation']}) with the aspect kept until it just covers {tall}x{wide} (H x W)",
        f"cut out the middle {height}x{width}",
        "divide by 255, subtract mean, divide by std (data_config), for each channel",
        "order as (batch, channel, row, column), float32",
        "softmax of the output over its second axis gives probabilities",
    ]


def _comparisons(loaded: Loaded, static: int | None, files: Sequence[str] | None) -> Iterator[np.ndarray]:
    """Batches of three sizes, one of them odd and not square; with a fixed size, three batch sizes."""
    _, height, width = loaded.preprocessing["input_size"]
    if static:
        shapes = [(1, static, static), (2, static, static), (3, static, static)]
    else:
        odd = (3, height * 3 // 4 + 1 | 1, width + 9 | 1)
        shapes = [(1, height, width), odd, (2, height * 3 // 2, width * 3 // 2)]
    sources = [read_image(file) for file in files] if files else [_made_image(seed) for seed in range(3)]
    for count, *size in shapes:
        config = {**loaded.preprocessing, "input_size": [loaded.preprocessing["input_size"][0], *size]}
        yield np.stack([to_input(sources[i % len(sources)], config) for i in range(count)])


def _made_image(seed: int, side: int = 256) -> Image.Image:
    """Coloured noise with as much coarse as fine structure, as photographs have."""
    rng = np.random.default_rng(seed)
    total = np.zeros((side, side, 3))
    for cells in (2, 4, 8, 16, 32, 64):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        total += np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC)) / cells**0.5
    return Image.fromarray((255 * (total - total.min()) / np.ptp(total)).astype(np.uint8))


def _judge(rows: list[Row], tolerance: float, out: Path) -> None:
    worst = max(rows, key=lambda row: row.relative)
    if not worst.relative <= tolerance:
        raise UserError(
            f"{out} is not kept: at {worst.batch}x{worst.height}x{worst.width} it differs from the network by "
            f"{worst.relative:.1e} of the largest output, the tolerance is {tolerance:.1e}"
        )


def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """A function's result, and the median seconds of five calls after a first one."""
    result = function()
    times = []
    for _ in range(5):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return result, sorted(times)[2]


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


def _default_target(checkpoint: str, suffix: str) -> Path:
    path = Path(checkpoint)
    if path.is_dir():
        return path / f"model{suffix}"
    stem = path.with_suffix("").name if path.is_file() else checkpoint.replace(":", "-").replace("/", "-")
    return Path(f"{stem}{suffix}")


def _print(result: Exported, format: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for column in ("images", "largest difference", "relative", "torch ms/image", f"{format} ms/image"):
        table.add_column(column, justify="right")
    for row in result.rows:
        size = f"{row.batch}x{row.height}x{row.width}"
        numbers = (f"{row.difference:.1e}", f"{row.relative:.1e}", f"{row.torch_ms:.2f}", f"{row.file_ms:.2f}")
        table.add_row(size, *numbers)
    Console(highlight=False).print(table)
    size = sum(file.stat().st_size for file in (result.file, result.file.with_suffix(".bin")) if file.exists())
    print(f"written: {result.file} ({size / 1e6:.1f} MB) and {result.file.with_suffix('.json')}")
