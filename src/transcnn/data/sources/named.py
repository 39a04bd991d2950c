"""Data sets by name, through timm's readers: ``torch/NAME`` of torchvision, ``hfds/NAME`` of the Hugging Face hub."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import create_dataset

from ...errors import UserError, require
from ..images import BrokenImage, read_bytes, read_image
from .folder import split_folder
from .source import SPLITS, Source, SourceSplits, abbreviate, first_line, merge_splits

__all__ = ["open_hfds", "open_torch"]


def open_torch(rest: str) -> SourceSplits:
    """torch/NAME or torch/NAME:FOLDER, a torchvision dataset in (or downloaded to) FOLDER, by default ``data``."""
    name, _, root = rest.partition(":")
    root = root or "data"
    if name in ("image_folder", "folder"):
        if not os.path.isdir(root):
            raise UserError(f"no such folder: {root!r} (torch/{name}:FOLDER)")
        present = [split for split in SPLITS if split_folder(Path(root), SPLITS[split])]
        theirs = {split: split for split in present} if "train" in present else {"train": ""}
    elif name in ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist"):
        theirs = {"train": "train", "test": "test"}
    else:
        theirs = {"train": "train", "val": "val"}
    sources = {ours: _torch_split(name, root, split) for ours, split in theirs.items()}
    return merge_splits(sources, name, f"torch/{rest}")  # of a folder each split numbers its own classes


def _torch_split(name: str, root: str, split: str) -> Source:
    if name in ("image_folder", "folder"):
        folder = split_folder(Path(root), SPLITS[split]) if split else Path(root)
        root, split = str(folder), ""
    try:
        dataset: Any = create_dataset(f"torch/{name}", root=root, split=split, download=not name.endswith("folder"))
    except (AssertionError, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"torch/{name} can't be opened in {root!r}: {first_line(error)}") from error
    targets = getattr(dataset, "targets", None)
    if targets is None:
        targets = [target for _, target in getattr(dataset, "samples", None) or dataset.imgs]
    classes = [str(value) if isinstance(value, str) else str(value[0]) for value in dataset.classes]
    labels = np.asarray(targets, dtype=np.int64).reshape(len(dataset), -1)[:, 0]
    raw = partial(_torch_raw, dataset) if hasattr(dataset, "samples") else None
    name_of = partial(_torch_name, dataset, f"{name}/{split}")
    return Source(labels, classes, partial(_torch_load, dataset), name_of, raw=raw)


def _torch_load(dataset: Any, i: int) -> Image.Image:
    if hasattr(dataset, "samples"):
        return read_image(dataset.samples[i][0])
    return dataset[i][0]


def _torch_raw(dataset: Any, i: int) -> bytes:
    return read_bytes(dataset.samples[i][0])


def _torch_name(dataset: Any, prefix: str, i: int) -> str:
    if hasattr(dataset, "samples"):
        return os.path.relpath(dataset.samples[i][0], dataset.root)
    return f"{prefix}/{i}"


def open_hfds(name: str) -> SourceSplits:
    """hfds/NAME, a data set of the Hugging Face hub or a local folder of one."""
    datasets: Any = require("datasets", "data")
    try:
        available = datasets.get_dataset_split_names(name)
        theirs = {ours: next((s for s in names if s in available), None) for ours, names in SPLITS.items()}
        sources = {ours: _hfds_split(name, split) for ours, split in theirs.items() if split}
    except UserError:
        raise
    except Exception as error:  # the library raises its own, the hub's and the network's errors
        raise UserError(f"hfds/{name} can't be opened: {first_line(error)}") from error
    if not sources:
        raise UserError(f"hfds/{name} has splits {abbreviate(available)}; expected train, validation or test")
    return merge_splits(sources, name.strip("/").rpartition("/")[2], f"hfds/{name}")


def _hfds_split(name: str, split: str) -> Source | None:
    reader: Any = create_dataset(f"hfds/{name}", split=split).reader  # pyright: ignore[reportAttributeAccessIssue]
    labels = np.asarray(list(reader.iter_targets()), dtype=np.int64)
    if len(labels) and (labels < 0).all():
        return None
    names = sorted(reader.class_to_idx, key=reader.class_to_idx.get) if reader.class_to_idx else None
    names = names or [str(i) for i in range(int(labels.max()) + 1)]
    name_of = partial(_hfds_name, reader, f"{name}/{split}")
    return Source(labels, names, partial(_hfds_load, reader), name_of, raw=partial(_hfds_raw, reader))


def _hfds_load(reader: Any, i: int) -> Image.Image:
    return read_image(_hfds_raw(reader, i))


def _hfds_raw(reader: Any, i: int) -> bytes:
    try:
        file, _ = reader[i]
    except (AssertionError, OSError) as error:
        raise BrokenImage(first_line(error)) from error
    with file:
        return file.read()


def _hfds_name(reader: Any, prefix: str, i: int) -> str:
    try:
        return reader.filename(i)
    except (AssertionError, KeyError, TypeError):  # this set keeps no file names
        return f"{prefix}/{i}"
