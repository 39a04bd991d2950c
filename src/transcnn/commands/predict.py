"""``transcnn predict``: what images show, by a trained network.

Nothing here imports torch before a checkpoint is loaded: an exported ONNX file needs none. (Imports for type checkers
alone would: jsonargparse runs them.)
"""

from __future__ import annotations

import glob
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from ..checkpoints.files import atomic_write, check_writable
from ..data.images import BrokenImage, is_image_name, list_images, read_image
from ..data.loading.read_ahead import read_ahead
from ..data.paths import find_images
from ..data.sources.table import ListedFiles, is_table, list_files
from ..errors import MAX_SIDE, UserError, check_range
from ..report.predictions import finite, print_table, write_csv
from ..text import json_text
from ..weights import PACKAGED

if TYPE_CHECKING:
    from ..report.overlay import OutputFolder

__all__ = ["predict"]

FEW = 16  # images; for fewer, optimizing and loading kernels takes longer than it saves


def predict(
    checkpoint: str,
    images: list[str] | None = None,
    *,
    model: str | None = None,
    image_dir: str | None = None,
    file_column: str | None = None,
    top_k: int = 5,
    json: bool = False,
    csv: str | None = None,
    batch_size: int = 32,
    img_size: int | None = None,
    min_score: float | None = None,
    precision: Literal["auto", "32", "bf16", "16"] = "32",
    accelerator: str = "auto",
    optimize: bool = True,
    out: str = "predictions",
    strict: bool = False,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Predict what images show: a table on the screen, a JSON list, or a CSV file; images where pixels are classified.

    Args:
        checkpoint: A run's directory, a .safetensors or .ckpt of ours, the name of a published model, or an .onnx file
            of transcnn export, which needs no torch. Left out, the packaged small network is used.
        images: Files, folders (with all below them) and patterns such as 'photos/*.jpg'; or a table of files (.csv,
            .tsv, .jsonl, .parquet), each of whose rows gets an answer.
        model: The network that a file of weights is for which doesn't say so, such as the authors' .pth files.
        image_dir: Folder that a table's files are relative to; without it, that of the table.
        file_column: A table's column of files; without it file, file_name, filename, path or image.
        top_k: Classes to list for each image.
        json: Print a JSON list on standard output, one object an image, instead of the table.
        csv: Also write a CSV file here: file, error, label and score of each rank; of a table its own columns first.
        batch_size: Images at a time.
        img_size: Another size than the network was trained at.
        min_score: To detect: leave out detections of a lower score; without it, what the network was trained to keep.
        precision: Arithmetic; 32 is exact, auto is bf16 where the CPU has it.
        accelerator: cpu, gpu, or auto.
        optimize: For more than a few images, run the network as transcnn.optimize makes it: the same predictions up to
            rounding, several times as fast.
        out: Folder for the images of a network that segments or detects: label maps and overlays; boxes also as
            predictions.json in COCO's format.
        strict: Let a file that can't be read be an error (exit code 1), once all others are done.
        quiet: Print nothing but errors.

    Returns:
        For each image in order ``{"file": ..., "top": [{"label": ..., "score": ...}, ...]}`` (to segment ``"classes"``
        with ``"share"``, ``"mask"`` and ``"overlay"``; to detect ``"boxes"`` and ``"overlay"``), or
        ``{"file": ..., "error": ...}`` for one that can't be read.

    Raises:
        UserError: No such checkpoint, or a path or pattern that names nothing; with ``strict``, a file that can't be
            read.
    """
    check_range(1, top_k=top_k, batch_size=batch_size)
    check_range(1, MAX_SIDE, img_size=img_size)
    check_range(0, 1, min_score=min_score)
    if _means_images(checkpoint, alone=not images):
        checkpoint, images = PACKAGED, [checkpoint, *(images or ())]
    named = _listed(images or (), image_dir, file_column)
    files = find_images(images or ()) if named is None else named.files
    table = None if named is None else named.columns
    if csv:
        check_writable(Path(csv), [*files, *(images or ())])
    if checkpoint.lower().endswith(".onnx"):
        if model is not None:
            raise UserError(f"model is for a file of weights that doesn't name its network; got {checkpoint}")
        rows = list(_predict_onnx(checkpoint, files, top_k, batch_size, img_size, min_score, accelerator, out))
    else:
        from ..checkpoints.loading import load
        from ..distributed.runtime import check_accelerator, quiet_libraries

        check_accelerator(accelerator)
        with quiet_libraries():
            loaded = load(checkpoint, model)
        if checkpoint == PACKAGED and not quiet:
            names = ", ".join(loaded.class_names)
            print(f"The packaged network knows ten classes: {names}.", file=sys.stderr)
        loaded.resize_input(img_size)
        rows = list(_predict(loaded, files, top_k, batch_size, min_score, precision, accelerator, optimize, out))
    if csv:
        atomic_write(Path(csv), lambda path: write_csv(path, rows, top_k, table))
    if json:
        print(json_text(rows, indent=2))
    elif not quiet:
        print_table(rows, top_k)
    if unread := [row for row in rows if "error" in row]:
        summary = f"{len(unread)} of {len(rows)} files can't be read"
        if strict:
            error = UserError(f"{summary}; the first: {unread[0]['file']}: {unread[0]['error']}")
            error.code = 1 if len(unread) < len(rows) else 2
            raise error
        if not quiet:
            print(summary, file=sys.stderr)
    return rows


def _listed(images: Sequence[str], image_dir: str | None, file_column: str | None) -> ListedFiles | None:
    """The files that a table names; None where images are named themselves.

    Raises:
        UserError: A table among other things, or one that can't be read.
    """
    tables = [name for name in images if is_table(name)]
    if not tables:
        if image_dir is not None or file_column is not None:
            raise UserError("image_dir and file_column are for a table of files (.csv, .tsv, .jsonl, .parquet)")
        return None
    if len(images) > 1:
        raise UserError(f"one table of files is read at a time, got {len(images)} names, {tables[0]} among them")
    return list_files(Path(tables[0]), image_dir, file_column)


def _check_min_score(min_score: float | None, task: str, task_args: dict[str, Any] | None) -> None:
    if min_score is None:
        return
    if task != "detect":
        raise UserError(f"min_score is for detectors; this network is for the task {task}")
    kept = float((task_args or {}).get("min_score", 0.0))
    if not kept <= min_score <= 1:
        raise UserError(
            f"min_score must be from {kept:g}, below which this network keeps nothing, to 1, got {min_score}"
        )


def _means_images(name: str, alone: bool) -> bool:
    """Whether what stands in the checkpoint's place is an image or, all alone, a pattern or a folder of images."""
    path = Path(name)
    if path.is_dir():
        network = any(
            (path / file).exists() for file in ("config.yaml", "config.json", "best.safetensors", "last.ckpt")
        )
        return alone and not network and any(True for _ in list_images(path))
    return is_image_name(path.name) or (alone and glob.has_magic(name) and not path.exists())


def _predict(
    loaded: Any,
    files: list[str],
    top_k: int,
    batch_size: int,
    min_score: float | None,
    precision: str,
    accelerator: str,
    optimize: bool,
    out: str,
) -> Iterator[dict[str, Any]]:
    """One row for each file, in order, by a network as ``checkpoints.loading.load`` gives it."""
    import torch

    from ..distributed.runtime import choose_precision
    from ..fast.inference.optimize import try_optimize
    from ..report.overlay import OutputFolder
    from ..tasks import get_task

    task = get_task(loaded.task)
    transform = task.image_transform(loaded.preprocessing, loaded.info.get("task_args"))
    _check_min_score(min_score, loaded.task, loaded.info.get("task_args"))
    detect = loaded.task == "detect"
    folder = OutputFolder(Path(out), files, coco=detect, min_score=min_score) if task.writes_images else None
    if folder is not None:
        folder.prepare()
    device = torch.device("cuda" if torch.cuda.is_available() and accelerator != "cpu" else "cpu")
    loaded.model.to(device)
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(choose_precision(precision, accelerator))
    if optimize and len(files) >= FEW and (fast := try_optimize(loaded.model, dtype)) is not None:
        loaded, dtype = replace(loaded, model=fast), None  # autocast would do nothing inside

    def predict_inputs(images: list[Any]) -> list[dict[str, Any]]:
        with torch.inference_mode(), torch.autocast(device.type, dtype) if dtype else nullcontext():
            return task.predict_batch(loaded, images, device, top_k, folder)

    each = 1 if task.writes_images else batch_size  # whole photographs take memory, and go one by one anyway
    pixel_range = loaded.preprocessing.get("pixel_range")
    yield from _in_batches(
        files, each, lambda image, file: task.model_input(transform, image, file), predict_inputs, pixel_range
    )
    if folder is not None:
        folder.finish()


def _predict_onnx(
    file: str,
    files: list[str],
    top_k: int,
    batch_size: int,
    img_size: int | None,
    min_score: float | None,
    accelerator: str,
    out: str,
) -> Iterator[dict[str, Any]]:
    """The same by an exported file."""
    from ..onnx.answers import answers
    from ..onnx.predict import DENSE, OnnxModel, to_input
    from ..report.overlay import OutputFolder

    model = OnnxModel(file, accelerator=accelerator)
    if img_size is not None:
        model.resize_to(img_size)
    _check_min_score(min_score, model.task, model.info.get("task_args"))
    if model.task in DENSE:
        folder = OutputFolder(Path(out), files, coco=model.task == "detect", min_score=min_score)
        folder.prepare()
        yield from _predict_dense(model, files, top_k, folder)
        return

    def predict_inputs(images: list[np.ndarray]) -> list[dict[str, Any]]:
        return answers(model.task, model(np.stack(images)), model.class_names, model.info.get("task_args"), top_k)

    pixel_range = model.data_config.get("pixel_range")
    yield from _in_batches(
        files, batch_size, lambda image, _: to_input(image, model.data_config), predict_inputs, pixel_range
    )


def _predict_dense(model: Any, files: list[str], top_k: int, folder: OutputFolder) -> Iterator[dict[str, Any]]:
    """The same by a file that segments or detects, one image at a time."""
    from ..onnx.dense import class_map, detections
    from ..report.overlay import detection_row, segmentation_row

    if model.fixed:
        raise UserError(f"images to {model.task} have many sizes, the file takes one alone; export it without --static")
    names, args = model.class_names, model.info["task_args"]

    def row_of(image: Image.Image, file: str) -> dict[str, Any]:
        if model.task == "segment":
            return segmentation_row(
                image, class_map(model.outputs, image, model.info), file, names, args, folder, top_k
            )
        return detection_row(image, detections(model.outputs, image, model.info), file, names, args, folder)

    pixel_range = model.data_config.get("pixel_range")
    yield from _in_batches(
        files, 1, lambda *given: given, lambda inputs: [row_of(*given) for given in inputs], pixel_range
    )
    folder.finish()


def _in_batches(
    files: list[str],
    batch_size: int,
    make_input: Callable[[Image.Image, str], Any],
    predict_inputs: Callable[[list[Any]], list[dict[str, Any]]],
    pixel_range: list[float] | None = None,
) -> Iterator[dict[str, Any]]:
    """One row for each file, in order; those that can't be read get their error."""
    inputs: list[Any] = []
    batch: list[tuple[str, str | None]] = []  # files with their errors

    def rows() -> Iterator[dict[str, Any]]:
        results = iter(predict_inputs(inputs) if inputs else ())
        for file, error in batch:
            yield {"file": file, **(finite(next(results)) if error is None else {"error": error})}

    with closing(
        read_ahead(files, lambda file: make_input(read_image(file, pixel_range), file), 2 * batch_size)
    ) as read:
        for file, found in read:
            broken = isinstance(found, BrokenImage)
            batch.append((file, str(found) if broken else None))
            inputs += [] if broken else [found]
            if len(batch) == batch_size:
                yield from rows()
                inputs, batch = [], []
    yield from rows()
