"""``transcnn embed``: images as vectors, and what is alike among them."""

from __future__ import annotations

import csv as csv_format
import os
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..checkpoints.files import atomic_write, check_writable
from ..data.paths import StrPath, as_text, same_path
from ..data.sources.source import with_progress
from ..errors import MAX_SIDE, UserError, check_range
from ..imports import gc_paused
from ..predictor.loading import FEW, load
from ..report.answers import Embedding
from ..text import csv_cell, printable, rich_text, stdout_console
from ..vectors.file import SUFFIXES, Vectors, holds_vectors, is_vector_file, read_vectors, write_vectors
from ..vectors.items import Item, find_items
from ..vectors.neighbours import Pair, duplicates, knn_accuracy, nearest
from ..weights import NOTES

__all__ = ["embed"]

SHOWN = 20  # rows of a table on the screen


def embed(
    checkpoint: StrPath,
    images: StrPath | list[StrPath] | None = None,
    *,
    out: StrPath | None = None,
    layer: str | None = None,
    normalize: bool = False,
    knn: int | None = None,
    duplicates: float | None = None,
    search: StrPath | None = None,
    top: int = 10,
    csv: StrPath | None = None,
    model: str | None = None,
    batch_size: int = 32,
    img_size: int | None = None,
    precision: Literal["auto", "32", "bf16", "16"] = "32",
    accelerator: str = "auto",
    quiet: bool = False,
) -> dict[str, Any]:
    """Turn images into vectors; find what is alike among them: neighbours, duplicates, one image's nearest.

    Vectors that were written before may stand for the images: transcnn embed vectors.parquet --duplicates 0.98.

    Args:
        checkpoint: What transcnn predict takes: a run's directory, weights, the name of a model, an .onnx file; or a
            file of vectors that transcnn embed wrote.
        images: Files, folders and patterns; or one data set (a folder of class folders, perhaps in train, val and test,
            a table, a Parquet file, ...), whose labels and splits are kept; or a file of vectors to search in.
        out: File for the vectors: .parquet (file, label, split, vector) or .npy (names in a .csv beside it).
        layer: Whose output is averaged over the image: a module, of an ONNX file a tensor. Without it, what the
            classifier's last layer is given.
        normalize: Vectors of length 1.
        knn: Score a labelled data set by so many nearest neighbours: of the test or validation split among the
            training images, or of each image among all others.
        duplicates: List pairs of images whose vectors have this cosine or more, such as 0.98; those of two splits
            first.
        search: List the images nearest to this one.
        top: How many of them.
        csv: Also write the duplicates, or else the nearest, as a CSV file.
        model: The network that a file of weights is for which doesn't say so, such as the authors' .pth files.
        batch_size: Images at a time.
        img_size: Another size than the network was trained at; not to segment or detect.
        precision: Arithmetic; 32 is exact, auto is bf16 where the CPU has it.
        accelerator: cpu, gpu, or auto.
        quiet: Print nothing but errors.

    Returns:
        ``images``, ``size`` of the vectors, ``errors`` by file; ``knn``, ``duplicates`` and ``search`` where asked for.

    Raises:
        UserError: No such network, image, layer or file, or nothing that was asked for.
    """
    check_range(1, batch_size=batch_size, top=top, knn=knn)
    check_range(1, MAX_SIDE, img_size=img_size)
    check_range(-1, 1, duplicates=duplicates)
    names = [as_text(name) for name in (images if isinstance(images, list) else [images] if images else ())]
    if out is None and knn is None and duplicates is None and search is None:
        raise UserError("say what for: --out FILE, --knn K, --duplicates 0.98 or --search IMAGE")
    if csv is not None and (duplicates is None) == (search is None):
        raise UserError("csv is for one list: that of --duplicates, or that of --search")
    _check_targets(out, csv, names)
    network = _Network(as_text(checkpoint), layer, normalize, model, img_size, precision, accelerator)
    stored = _stored(network.name, names)
    errors: dict[str, str] = {}
    if stored is not None:
        vectors = read_vectors(stored)
        vectors = vectors.normalized() if normalize else vectors
        network.follow(vectors.about, stored)
        if search is not None and not quiet:
            network.say_if_another(vectors.about)
    else:
        vectors = network.embed(find_items(names, knn is not None, errors), batch_size, errors, quiet)
    found: dict[str, Any] = {"images": len(vectors.files), "size": vectors.values.shape[1], "errors": errors}
    if out is not None:
        write_vectors(Path(out), vectors)
    if knn is not None:
        found["knn"] = _knn(vectors, knn)
    if duplicates is not None:
        found["duplicates"] = _pairs(vectors, duplicates)
    if search is not None:
        found["search"] = _nearest(vectors, network.one(search), top)
    if csv is not None:
        atomic_write(Path(csv), lambda path: _write_csv(path, found))
    if not quiet:
        _print(found, out)
    return found


def _check_targets(out: StrPath | None, csv: StrPath | None, names: list[str]) -> None:
    """Refuse files that can't be written, before anything takes time."""
    if out is not None and Path(out).suffix.lower() not in SUFFIXES:
        raise UserError(f"out must end in {' or '.join(SUFFIXES)}, got {os.fspath(out)}")
    inputs = [name for name in names if os.path.isfile(name)]
    written = [Path(target) for target in (out, csv) if target is not None]
    if out is not None and Path(out).suffix.lower() == ".npy":
        names_beside = Path(out).with_suffix(".csv")
        if names_beside.exists() and not Path(out).exists():
            raise UserError(f"the names would be written to {names_beside}, which is there already; give another --out")
        written.append(names_beside)
    for target in written:
        check_writable(target, inputs)
    if len({os.path.realpath(target) for target in written}) < len(written):
        raise UserError(f"csv would be written over what out writes, {os.fspath(csv or '')}; give another --csv")


def _stored(first: str, names: list[str]) -> Path | None:
    """The file of vectors that was given instead of images, if one was."""
    if not names and is_vector_file(first):
        return Path(first)
    if not names:
        raise UserError("IMAGES is missing: files, folders, a data set, or a file of vectors")
    if len(names) == 1 and names[0].lower().endswith(".npy"):
        names_beside = Path(names[0]).with_suffix(".csv").is_file()  # else it is an image
        return Path(names[0]) if names_beside or not os.path.isfile(names[0]) else None
    if len(names) == 1 and is_vector_file(names[0]) and os.path.isfile(names[0]):
        from ..data.sources.parquet import holds_images

        path = Path(names[0])
        return None if holds_images(path) or not holds_vectors(path) else path
    return None


class _Network:
    """The network of one call, loaded when it is first needed."""

    def __init__(
        self,
        name: str,
        layer: str | None,
        normalize: bool,
        model: str | None,
        img_size: int | None,
        precision: str,
        accelerator: str,
    ) -> None:
        self.name, self.layer, self.normalize = name, layer, normalize
        self.chosen = img_size is not None
        self.model, self.img_size, self.precision, self.accelerator = model, img_size, precision, accelerator

    def follow(self, about: dict[str, Any], path: Path) -> None:
        """Take the layer and the size that a file says its vectors were made with, and the network if none was named.

        The file may be a stranger's: only what is on this machine is loaded.

        Raises:
            UserError: Another layer or size was given.
        """
        name, layer, size = about.get("network"), about.get("layer"), about.get("img_size")
        made = {
            "layer": layer if isinstance(layer, str) else None,
            "img_size": size if isinstance(size, int) and 0 < size <= MAX_SIDE else None,
        }
        for key, known in made.items():
            given = getattr(self, key)
            if given is not None and key in about and given != known:
                how = f"{key} {printable(known)}" if known is not None else f"the network's own {key}"
                raise UserError(f"{path} holds vectors of {how}, got {key} {given}: leave out --{key}")
            setattr(self, key, known if given is None else given)
        if is_vector_file(self.name):
            known_here = isinstance(name, str) and (name in NOTES or os.path.exists(name))
            self.name = str(name) if known_here else ""
        self.path = path

    def say_if_another(self, about: dict[str, Any]) -> None:
        """A line on standard error where the network that was named isn't the one that a file says it is of."""
        name = about.get("network")
        if self.name and isinstance(name, str) and not same_path(name, self.name):
            line = (
                f"{self.path} says that its vectors are of {name}; if {self.name} is another, similarities mean nothing"
            )
            print(f"transcnn: {printable(line)}", file=sys.stderr)

    def embed(self, items: list[Item], batch_size: int, errors: dict[str, str], quiet: bool) -> Vectors:
        """Vectors of all images that can be read; the others' reasons go to ``errors``."""
        predictor = self._load(self.layer is None and len(items) >= FEW, min(batch_size, len(items)))
        found = predictor.embed_iter(
            (item.image for item in items), layer=self.layer, normalize=self.normalize, batch_size=batch_size
        )
        shown = with_progress(found, f"{len(items):,} images", not quiet and sys.stderr.isatty(), len(items))
        rows, kept = [], []
        for item, one in zip(items, shown, strict=True):
            if isinstance(one, Embedding):
                rows.append(one.vector)
                kept.append(item)
            else:
                errors[item.name] = str(one.error)
        if not rows:
            name, reason = next(iter(errors.items()))
            raise UserError(f"no image can be read; the first: {name}: {reason}")
        about = {"network": self.name, "layer": self.layer, "normalized": self.normalize, "img_size": self.img_size}
        labels, splits = [item.label for item in kept], [item.split for item in kept]
        return Vectors(np.stack(rows), [item.name for item in kept], labels, splits, about)

    def one(self, image: StrPath) -> np.ndarray:
        """The vector of one image."""
        found = self._load(optimize=False).embed(image, layer=self.layer)
        if not isinstance(found, Embedding):
            raise UserError(f"can't read {found.file}: {found.error}")
        return found.vector

    def _load(self, optimize: bool, images: int = 1) -> Any:
        if not self.name:
            raise UserError(f"{self.path} doesn't say which network on this machine made it: name it before the file")
        accelerator, precision = self.accelerator, self.precision
        with gc_paused():
            predictor = load(self.name, self.model, accelerator=accelerator, precision=precision, optimize=optimize)
        predictor.resize_input(self.img_size)
        predictor.check_memory(images, chosen=self.chosen)
        return predictor


def _knn(vectors: Vectors, k: int) -> dict[str, Any]:
    if "" in vectors.labels:
        raise UserError("nearest neighbours are scored by labels, and these images have none")
    return knn_accuracy(vectors.values, vectors.labels, vectors.splits, k)


def _pairs(vectors: Vectors, threshold: float) -> list[dict[str, Any]]:
    """Duplicates as rows, those between two splits first."""

    def row(pair: Pair) -> dict[str, Any]:
        ends = {
            key: [values[pair.first], values[pair.second]]
            for key, values in (("files", vectors.files), ("labels", vectors.labels), ("splits", vectors.splits))
        }
        return {**ends, "similarity": round(pair.similarity, 6)}

    rows = [row(pair) for pair in duplicates(vectors.values, threshold)]
    return sorted(rows, key=lambda row: row["splits"][0] == row["splits"][1])


def _nearest(vectors: Vectors, query: np.ndarray, top: int) -> list[dict[str, Any]]:
    return [
        {"file": vectors.files[i], "label": vectors.labels[i], "similarity": round(similarity, 6)}
        for i, similarity in nearest(vectors.values, query, top)
    ]


def _write_csv(path: Path, found: dict[str, Any]) -> None:
    """The pairs of duplicates, or the nearest."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv_format.writer(file)
        if "duplicates" in found:
            ends = ("file", "label", "split")
            writer.writerow([*(f"{word}_{i}" for i in (1, 2) for word in ends), "similarity"])
            for row in found["duplicates"]:
                cells = [row[f"{word}s"][i] for i in (0, 1) for word in ends]
                writer.writerow(map(csv_cell, [*cells, row["similarity"]]))
            return
        for i, row in enumerate(found["search"]):
            if i == 0:
                writer.writerow(row)
            writer.writerow(map(csv_cell, row.values()))


def _print(found: dict[str, Any], out: StrPath | None) -> None:
    from rich.table import Table

    console = stdout_console()
    if found["errors"]:
        name, reason = next(iter(found["errors"].items()))
        print(f"{len(found['errors'])} can't be read; the first: {printable(f'{name}: {reason}')}", file=sys.stderr)
    console.print(f"{found['images']:,} images, vectors of {found['size']} numbers")
    if out is not None:
        print(f"written: {printable(out)}")
    if knn := found.get("knn"):
        split = "each among all others" if knn["split"] == "all" else f"{knn['split']} among train"
        console.print(f"{knn['k']} nearest neighbours: top-1 {knn['top1']:.2f} % of {knn['images']:,} images ({split})")
    table = Table(box=None, header_style="bold")
    if "duplicates" in found:
        pairs = found["duplicates"]
        across = sum(row["splits"][0] != row["splits"][1] for row in pairs)
        console.print(f"{len(pairs):,} pairs of near-duplicates, {across:,} of them between splits")
        for head in ("similarity", "image", "and"):
            table.add_column(head, overflow="fold")
        for row in pairs[:SHOWN]:
            table.add_row(f"{row['similarity']:.4f}", *(rich_text(file) for file in row["files"]))
        if len(pairs) > SHOWN:
            table.add_row("...", f"{len(pairs) - SHOWN:,} more", "")
    if "search" in found:
        table = Table(box=None, header_style="bold")
        for head in ("similarity", "image", "label"):
            table.add_column(head, overflow="fold")
        for row in found["search"]:
            table.add_row(f"{row['similarity']:.4f}", rich_text(row["file"]), rich_text(row["label"]))
    if table.row_count:
        console.print(table)
