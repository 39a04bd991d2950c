"""``transcnn pack``: write classification data as WebDataset shards, or check what was written."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..data.packing import PackJob
from ..data.paths import StrPath, as_text
from ..data.sources.opening import open_source
from ..data.sources.packed import MANIFEST, read_manifest, sha256
from ..data.sources.source import abbreviate
from ..errors import UserError, require
from ..text import printable

__all__ = ["pack"]


def pack(
    data: StrPath | None = None,
    *,
    out: StrPath | None = None,
    check: bool = False,
    shard_mb: float = 256,
    seed: int = 0,
    decode: bool = True,
    num_workers: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write data as WebDataset shards with a manifest and checksums, or check what was written.

    Images are copied byte for byte; those that can't be read are left out, counted, and listed in skipped.csv. What is
    trained on the result is the same as on the data itself. Interrupted, it removes what it wrote.

    Args:
        data: What transcnn train takes: a folder of class folders, Parquet, torch/..., hfds/..., wds/...; with --check
            a folder that was packed.
        out: Folder for the shards, new or empty.
        check: Compare all files of a packed folder with their checksums.
        shard_mb: Size of a shard in megabytes (10^6 bytes), about.
        seed: Of the order of the training images in the shards, which is random, for programs that read one after
            another.
        decode: Decode each image to be sure that it can be read; --no-decode only looks at what it begins with.
        num_workers: Threads that read; without it as many as there are cores.
        quiet: Print nothing but errors.

    Returns:
        What the manifest holds.

    Raises:
        UserError: Data that can't be opened, a folder that is not empty or can't be written, or files that are damaged.
    """
    data, out = as_text(data), as_text(out)
    if check:
        return _check(data, quiet)
    if shard_mb <= 0:
        raise UserError(f"shard_mb must be above 0, got {shard_mb}")
    if num_workers is not None and num_workers < 1:
        raise UserError(f"num_workers must be 1 or more, got {num_workers}")
    if out is None:
        raise UserError("say where to put the shards: --out FOLDER")
    require("webdataset", "data")
    splits = open_source(data)
    job = PackJob(_empty_folder(out), int(shard_mb * 10**6), seed, decode, num_workers or os.cpu_count() or 1)
    try:
        manifest = job.run(splits, quiet)
    except OSError as error:
        job.undo()
        raise UserError(f"can't write to {out}: {error.strerror or error}") from error
    except BaseException:
        job.undo()
        raise
    if not quiet:
        _print_summary(manifest, job, out)
    return manifest


def _empty_folder(out: str) -> Path:
    path = Path(os.path.abspath(out))
    try:
        path.mkdir(parents=True, exist_ok=True)
        held = [entry.name for entry in os.scandir(path)]
    except OSError as error:
        raise UserError(f"can't write to {out}: {error.strerror}") from error
    if held:
        raise UserError(f"{out} is not empty (it holds {abbreviate(sorted(held)[:3])}); give a new folder as --out")
    return path


def _print_summary(manifest: dict[str, Any], job: PackJob, out: str) -> None:
    splits = manifest["parts"].values()
    files = [shard for split in splits for shard in split["shards"]]
    megabytes = sum(shard["bytes"] for shard in files) / 1e6
    sizes = ", ".join(f"{split['images']:,} {name}" for name, split in manifest["parts"].items())
    shards = f"{len(files)} shard{'s' * (len(files) != 1)}"
    print(
        f"{sizes} images of {len(manifest['class_names'])} classes in {shards}, {megabytes:,.1f} MB: {printable(out)}"
    )
    if job.skipped:
        print(f"{len(job.skipped)} files can't be read and were left out, see {printable(Path(out) / 'skipped.csv')}")


def _check(data: str | None, quiet: bool) -> dict[str, Any]:
    """Compare all files with the manifest's sums; damaged ones end in an error that names them."""
    folder = Path(data or ".")
    _, class_names, splits = read_manifest(folder / MANIFEST, str(folder))
    files = [file for split in splits.values() for file in (split.index, *split.shards)]
    damaged = []
    hide = quiet or not sys.stderr.isatty()
    columns = (TextColumn("checking"), BarColumn(), TextColumn("{task.percentage:.0f} %"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=hide) as progress:
        bar = progress.add_task("", total=sum(file.bytes for file in files))
        for file in files:
            try:
                good = (folder / file.file).is_file() and sha256(folder / file.file) == file.sha256
            except OSError:
                good = False
            if not good:
                damaged.append(file.file)
            progress.advance(bar, file.bytes)
    if damaged:
        raise UserError(
            f"{len(damaged)} of {len(files)} files of {folder} are damaged or missing: {abbreviate(damaged)}"
        )
    images = sum(split.images for split in splits.values())
    if not quiet:
        print(f"{printable(folder)}: all {len(files)} files are as they were written, {images:,} images")
    return {"files": len(files), "images": images, "classes": len(class_names)}
