"""``transcnn predict``: what images show, by a trained network.

Nothing here imports torch before a checkpoint is loaded: an exported ONNX file needs none. (Imports for type checkers
alone would: jsonargparse runs them.)
"""

from __future__ import annotations

import glob
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ..checkpoints.arguments import DENSE
from ..checkpoints.files import atomic_write, check_writable
from ..data.listing import is_image_name, list_images
from ..data.paths import StrPath, as_text, find_images
from ..data.sources.table import ListedFiles, is_table, list_files
from ..errors import MAX_SIDE, UserError, check_range
from ..imports import gc_paused
from ..predictor.loading import FEW, load
from ..report.answers import Detections
from ..report.dataset_writer import DatasetWriter
from ..report.output_folder import OutputFolder
from ..report.predictions import print_table, write_csv
from ..text import json_text
from ..weights import PACKAGED

__all__ = ["predict"]


def predict(
    checkpoint: StrPath,
    images: StrPath | list[StrPath] | None = None,
    *,
    model: str | None = None,
    image_dir: StrPath | None = None,
    file_column: str | None = None,
    top_k: int = 5,
    json: bool = False,
    csv: StrPath | None = None,
    batch_size: int = 32,
    img_size: int | None = None,
    min_score: float | None = None,
    precision: Literal["auto", "32", "bf16", "16"] = "32",
    accelerator: str = "auto",
    optimize: bool = True,
    out: StrPath | None = None,
    format: Literal["coco", "voc", "yolo"] | None = None,
    strict: bool = False,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Predict what images show: a table on the screen, a JSON list, or a CSV file; images where pixels are classified.

    Args:
        checkpoint: A run's directory, a .safetensors or .ckpt of this package, the name of a published model, or an
            .onnx file of transcnn export, which needs no torch. Left out, the packaged small network is used.
        images: Files, folders (with all below them), patterns such as 'photos/*.jpg', and URLs; or a table of files
            (.csv, .tsv, .jsonl, .parquet), each of whose rows gets an answer.
        model: The network that a file of weights is for which doesn't say so, such as the authors' .pth files.
        image_dir: Folder that a table's files are relative to; without it, that of the table.
        file_column: A table's column of files; without it file, file_name, filename, path or image.
        top_k: Classes to list for each image.
        json: Print a JSON list on standard output, one object an image, instead of the table.
        csv: Also write a CSV file here: file, error, label and score of each rank; of a table its own columns first.
        batch_size: Images at a time.
        img_size: Another size than the network was trained at; not to segment or detect.
        min_score: To detect: leave out detections of a lower score; without it, what the network was trained to keep.
        precision: Arithmetic; 32 is exact, auto is bf16 where the CPU has it.
        accelerator: cpu, gpu, or auto.
        optimize: For more than a few images, run the network as transcnn.optimize makes it: the same predictions up to
            rounding, several times as fast.
        out: Folder for the images of a network that segments or detects: label maps and overlays; boxes also as
            predictions.json in COCO's format. Without it, predictions.
        format: To detect: also write the boxes as a data set in this format, with copies of the images, into a folder
            of this name in out: for a tool to correct them in, or for transcnn train.
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
    checkpoint, names = _named(as_text(checkpoint), images)
    listed = _listed(names, as_text(image_dir), file_column)
    files = find_images(names) if listed is None else listed.files
    if csv:
        check_writable(Path(csv), [*files, *names])
    fast = optimize and len(files) >= FEW
    with gc_paused():
        predictor = load(checkpoint, model, accelerator=accelerator, precision=precision, optimize=fast)
    if checkpoint == PACKAGED and not quiet:
        known = ", ".join(predictor.class_names)
        print(f"The packaged network knows ten classes: {known}.", file=sys.stderr)
    predictor.resize_input(img_size)
    predictor.check_memory(min(batch_size, len(files)), chosen=img_size is not None)
    predictor.check_min_score(min_score)
    if format is not None and predictor.task != "detect":
        raise UserError(f"format is for detectors; this network is for the task {predictor.task}")
    if out is not None and predictor.task not in DENSE:
        raise UserError(f"out is for networks that segment or detect, this one is to {predictor.task}: give --csv FILE")
    outputs = _Outputs(predictor, Path(out or "predictions"), files, format)
    answers = predictor.predict_iter(files, batch_size=batch_size, top_k=top_k, min_score=min_score)
    rows = [{**found.to_dict(), **outputs.add(found)} for found in answers]
    outputs.finish()
    if csv:
        table = None if listed is None else listed.columns
        atomic_write(Path(csv), lambda path: write_csv(path, rows, top_k, table))
    if json:
        print(json_text(rows, indent=2))
    elif not quiet:
        print_table(rows, top_k)
    _say_unread(rows, strict, quiet)
    return rows


class _Outputs:
    """What a network that segments or detects writes beside its rows: images, and a data set where one is wanted."""

    def __init__(self, predictor: Any, out: Path, files: list[str], format: Any) -> None:
        self.writer = _dataset_writer(predictor, out, format)
        self.folder = OutputFolder(out, files, coco=predictor.task == "detect") if predictor.task in DENSE else None
        if self.folder is not None:
            self.folder.prepare()

    def add(self, found: Any) -> dict[str, Any]:
        """Write what belongs to one image; what its row says of that."""
        row = self.folder.add(found) if self.folder is not None else {}
        if self.writer is not None and isinstance(found, Detections):
            self.writer.add(found)
        return row

    def finish(self) -> None:
        """Write what belongs to all images."""
        for output in (self.folder, self.writer):
            if output is not None:
                output.finish()


def _say_unread(rows: list[dict[str, Any]], strict: bool, quiet: bool) -> None:
    """How many files can't be read, if any; with ``strict`` that is an error."""
    unread = [row for row in rows if "error" in row]
    if not unread:
        return
    summary = f"{len(unread)} of {len(rows)} files can't be read"
    if strict:
        error = UserError(f"{summary}; the first: {unread[0]['file']}: {unread[0]['error']}")
        error.code = 1 if len(unread) < len(rows) else 2
        raise error
    if not quiet:
        print(summary, file=sys.stderr)


def _dataset_writer(predictor: Any, out: Path, format: Any) -> DatasetWriter | None:
    """What writes detections as a data set; None where nothing is to."""
    if format is None:
        return None
    names = predictor.class_names
    ids = (predictor.info.get("task_args") or {}).get("label_ids") or list(range(1, len(names) + 1))
    return DatasetWriter(out / format, format, names, ids)


def _named(checkpoint: str, images: StrPath | list[StrPath] | None) -> tuple[str, list[str]]:
    """The network, the packaged one where an image stands in its place, and the names of images."""
    names = [as_text(name) for name in (images if isinstance(images, list) else [images] if images else ())]
    return (PACKAGED, [checkpoint, *names]) if _means_images(checkpoint, alone=not names) else (checkpoint, names)


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


def _means_images(name: str, alone: bool) -> bool:
    """Whether what stands in the checkpoint's place is an image or, all alone, a pattern or a folder of images."""
    path = Path(name)
    if path.is_dir():
        network = any(
            (path / file).exists() for file in ("config.yaml", "config.json", "best.safetensors", "last.ckpt")
        )
        return alone and not network and any(True for _ in list_images(path))
    return is_image_name(path.name) or (alone and glob.has_magic(name) and not path.exists())
