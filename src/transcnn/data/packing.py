"""``transcnn pack``: any classification data as WebDataset shards with a manifest (read by :mod:`.sources.packed`)."""

from __future__ import annotations

import io
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import UserError, require
from .images import BrokenImage, read_image
from .sets.fault_tolerant import write_skipped
from .sources.opening import open_source
from .sources.packed import FORMAT, INDEX, MANIFEST, VERSION, FileSum, SplitFiles, read_manifest, sha256
from .sources.source import SPLITS, Source, SourceSplits, abbreviate
from .sources.webdataset import read_shard

__all__ = ["pack"]

ENDINGS = {"JPEG": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}  # of other formats it is their name


def pack(
    data: str | None = None,
    *,
    out: str | None = None,
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
    job = _Job(_empty_folder(out), int(shard_mb * 10**6), seed, decode, num_workers or os.cpu_count() or 1)
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


@dataclass
class _Sample:
    """One image on its way into a shard."""

    index: int  # in the source
    content: bytes = b""
    kind: str = ""
    problem: str = ""


@dataclass
class _Job:
    """One run of ``pack``."""

    out: Path
    shard_bytes: int
    seed: int
    decode: bool
    threads: int
    written: list[Path] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def run(self, splits: SourceSplits, quiet: bool) -> dict[str, Any]:
        sources = _split(splits)
        class_names = next(iter(sources.values()))[0].class_names
        other = [split for split, (source, _) in sources.items() if source.class_names != class_names]
        if other:
            raise UserError(
                f"the {' and '.join(other)} split has other classes than the rest, or another order of them"
            )
        total = sum(len(indices) for _, indices in sources.values())
        hide = quiet or not sys.stderr.isatty()
        columns = (TextColumn("packing {task.fields[split]}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        done: dict[str, Any] = {}
        with Progress(*columns, console=Console(stderr=True), transient=True, disable=hide) as progress:
            bar = progress.add_task("", total=total, split="")
            for split, (source, indices) in sources.items():
                progress.update(bar, split=split)
                self.skipped += source.broken
                done[split] = self._write_split(split, source, indices, lambda: progress.advance(bar))
        if not any(split["images"] for split in done.values()):
            raise UserError(f"none of the {total} images can be read; the first is {abbreviate(self.skipped[0])}")
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "written_by": f"transcnn {version('transcnn')}",
            "name": splits.name,
        }
        manifest |= {"class_names": class_names, "left_out": len(self.skipped), "parts": done}
        if self.skipped:
            write_skipped(self.new("skipped.csv"), self.skipped)
        temporary = self.new(f".{MANIFEST}.tmp")
        temporary.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, self.new(MANIFEST))  # last: a folder with a manifest is complete
        return manifest

    def _write_split(
        self, split: str, source: Source, indices: np.ndarray, advance: Callable[[], None]
    ) -> dict[str, Any]:
        """Shards and index of one split, and what the manifest says of them."""
        order = np.random.default_rng(self.seed).permutation(indices) if split == "train" else indices
        with ThreadPoolExecutor(self.threads) as pool, closing(_Writer(self, split, source)) as writer:
            for sample in _ahead(pool, lambda index: self._read(source, index), order.tolist(), 16 * self.threads):
                advance()
                if sample.problem:
                    self.skipped.append((source.name_of(sample.index), sample.problem))
                else:
                    writer.add(sample)
        rows = sorted(writer.rows)
        index = np.array([row[1:] for row in rows], INDEX)
        names = b"".join(os.fsencode(source.name_of(row[0])).replace(b"\0", b" ") + b"\0" for row in rows)
        path = self.new(f"{split}.index")
        path.write_bytes(index.tobytes() + names)
        entry = SplitFiles(len(rows), FileSum(path.name, path.stat().st_size, sha256(path)), writer.shards)
        return {**asdict(entry), "per_class": np.bincount(index["label"], minlength=len(source.class_names)).tolist()}

    def _read(self, source: Source, index: int) -> _Sample:
        """An image's bytes, known to be good."""
        try:
            if source.raw is None:
                buffer = io.BytesIO()
                source.load(index).save(buffer, "PNG")
                return _Sample(index, buffer.getvalue(), "png")
            content = source.raw(index)
            if len(content) >= 1 << 32:
                raise BrokenImage("it has 4 GiB or more")
            if self.decode:
                read_image(content)
            with Image.open(io.BytesIO(content)) as image:
                kind = str(image.format)
            return _Sample(index, content, ENDINGS.get(kind, kind.lower()))
        except BrokenImage as error:
            return _Sample(index, problem=str(error))
        except Exception as error:  # Pillow's, without decode, on what is no image
            return _Sample(index, problem=f"damaged: {str(error) or type(error).__name__}".splitlines()[0])

    def new(self, name: str) -> Path:
        """The path of a file to write, remembered for ``undo``."""
        self.written.append(self.out / name)
        return self.written[-1]

    def undo(self) -> None:
        """Remove what was written."""
        for path in self.written:
            with suppress(OSError):
                path.unlink(missing_ok=True)


class _Writer:
    """The shards of one split, one after another; ``rows`` become the index, each behind its index in the source."""

    def __init__(self, job: _Job, split: str, source: Source) -> None:
        self.job, self.split, self.source = job, split, source
        self.tars: Any = require("webdataset", "data")
        self.shards: list[FileSum] = []
        self.rows: list[tuple[int, ...]] = []
        self._file: Any = None
        self._tar: Any = None
        self._size = 0
        self._here: list[tuple[int, int]] = []  # index and CRC-32 of the images in the shard that is being written

    def add(self, sample: _Sample) -> None:
        """Write one image and its class."""
        if self._tar is None:
            self._file = self.job.new(f"{self.split}-{len(self.shards):06}.tar").open("wb")
            self._tar = self.tars.TarWriter(self._file, mtime=0.0, encoder=False)
        label = str(int(self.source.labels[sample.index])).encode()
        self._size += self._tar.write({"__key__": _key(sample.index), sample.kind: sample.content, "cls": label})
        self._here.append((sample.index, zlib.crc32(sample.content)))
        if self._size >= self.job.shard_bytes:
            self.close()

    def close(self) -> None:
        """Finish the present shard and look up where its images lie."""
        if self._tar is None:
            return
        tar, self._tar, self._size = self._tar, None, 0
        with self._file:
            tar.close()
        path = self._file.name
        contents = read_shard(path)
        for index, crc in self._here:
            offset, size = contents.images[_key(index)]
            self.rows.append((index, len(self.shards), offset, size, int(self.source.labels[index]), crc))
        self.shards.append(FileSum(os.path.basename(path), os.path.getsize(path), sha256(path)))
        self._here.clear()


def _split(splits: SourceSplits) -> dict[str, tuple[Source, np.ndarray]]:
    """The splits with the indices of their images; a test split that is one by convention becomes one of its own."""
    found = {}
    for split in SPLITS:
        source = getattr(splits, split)
        if source is not None:
            found[split] = (source, np.arange(len(source)))
    if splits.train is not None and splits.test_indices is not None:
        found["train"] = (splits.train, np.setdiff1d(np.arange(len(splits.train)), splits.test_indices))
        found["test"] = (splits.train, splits.test_indices)
    return found


def _ahead(pool: ThreadPoolExecutor, work: Any, indices: list[int], count: int) -> Iterator[_Sample]:
    """``work`` on each index in order, on up to ``count`` of them at a time."""
    for start in range(0, len(indices), count):
        yield from pool.map(work, indices[start : start + count])


def _key(index: int) -> str:
    return f"{index:09}"


def _print_summary(manifest: dict[str, Any], job: _Job, out: str) -> None:
    splits = manifest["parts"].values()
    files = [shard for split in splits for shard in split["shards"]]
    megabytes = sum(shard["bytes"] for shard in files) / 1e6
    sizes = ", ".join(f"{split['images']:,} {name}" for name, split in manifest["parts"].items())
    shards = f"{len(files)} shard{'s' * (len(files) != 1)}"
    print(f"{sizes} images of {len(manifest['class_names'])} classes in {shards}, {megabytes:,.1f} MB: {out}")
    if job.skipped:
        print(f"{len(job.skipped)} files can't be read and were left out, see {Path(out) / 'skipped.csv'}")


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
                good = sha256(folder / file.file) == file.sha256
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
        print(f"{folder}: all {len(files)} files are as they were written, {images:,} images")
    return {"files": len(files), "images": images, "classes": len(class_names)}
