"""``transcnn pack``: any classification data as WebDataset shards with a manifest (:mod:`.packed` reads them)."""

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
from .opening import open_parts
from .packed import FORMAT, INDEX, MANIFEST, VERSION, FileSum, PartFiles, read_manifest, sha256
from .shards import read_contents
from .sources import PARTS, Parts, Source, few
from .tolerant import write_skipped

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
    parts = open_parts(data)
    job = _Job(_empty_folder(out), int(shard_mb * 10**6), seed, decode, num_workers or os.cpu_count() or 1)
    try:
        manifest = job.run(parts, quiet)
    except OSError as error:
        job.undo()
        raise UserError(f"can't write to {out}: {error.strerror or error}") from error
    except BaseException:
        job.undo()
        raise
    if not quiet:
        _say(manifest, job, out)
    return manifest


def _empty_folder(out: str) -> Path:
    path = Path(os.path.abspath(out))
    try:
        path.mkdir(parents=True, exist_ok=True)
        held = [entry.name for entry in os.scandir(path)]
    except OSError as error:
        raise UserError(f"can't write to {out}: {error.strerror}") from error
    if held:
        raise UserError(f"{out} is not empty (it holds {few(sorted(held)[:3])}); give a new folder as --out")
    return path


@dataclass
class _Sample:
    """One image on its way into a shard."""

    place: int  # in the source
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

    def run(self, parts: Parts, quiet: bool) -> dict[str, Any]:
        sources = _split(parts)
        class_names = next(iter(sources.values()))[0].class_names
        other = [part for part, (source, _) in sources.items() if source.class_names != class_names]
        if other:
            raise UserError(f"the {' and '.join(other)} part has other classes than the rest, or another order of them")
        total = sum(len(places) for _, places in sources.values())
        hide = quiet or not sys.stderr.isatty()
        columns = (TextColumn("packing {task.fields[part]}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        done: dict[str, Any] = {}
        with Progress(*columns, console=Console(stderr=True), transient=True, disable=hide) as progress:
            bar = progress.add_task("", total=total, part="")
            for part, (source, places) in sources.items():
                progress.update(bar, part=part)
                self.skipped += source.broken
                done[part] = self._write_part(part, source, places, lambda: progress.advance(bar))
        if not any(part["images"] for part in done.values()):
            raise UserError(f"none of the {total} images can be read; the first is {few(self.skipped[0])}")
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "written_by": f"transcnn {version('transcnn')}",
            "name": parts.name,
        }
        manifest |= {"class_names": class_names, "left_out": len(self.skipped), "parts": done}
        if self.skipped:
            write_skipped(self.new("skipped.csv"), self.skipped)
        temporary = self.new(f".{MANIFEST}.tmp")
        temporary.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, self.new(MANIFEST))  # last: a folder with a manifest is complete
        return manifest

    def _write_part(self, part: str, source: Source, places: np.ndarray, advance: Callable[[], None]) -> dict[str, Any]:
        """Shards and index of one part, and what the manifest says of them."""
        order = np.random.default_rng(self.seed).permutation(places) if part == "train" else places
        with ThreadPoolExecutor(self.threads) as pool, closing(_Writer(self, part, source)) as writer:
            for sample in _ahead(pool, lambda place: self._read(source, place), order.tolist(), 16 * self.threads):
                advance()
                if sample.problem:
                    self.skipped.append((source.name_of(sample.place), sample.problem))
                else:
                    writer.add(sample)
        rows = sorted(writer.rows)
        index = np.array([row[1:] for row in rows], INDEX)
        names = b"".join(os.fsencode(source.name_of(row[0])).replace(b"\0", b" ") + b"\0" for row in rows)
        path = self.new(f"{part}.index")
        path.write_bytes(index.tobytes() + names)
        entry = PartFiles(len(rows), FileSum(path.name, path.stat().st_size, sha256(path)), writer.shards)
        return {**asdict(entry), "per_class": np.bincount(index["label"], minlength=len(source.class_names)).tolist()}

    def _read(self, source: Source, place: int) -> _Sample:
        """An image's bytes, known to be good."""
        try:
            if source.raw is None:
                buffer = io.BytesIO()
                source.load(place).save(buffer, "PNG")
                return _Sample(place, buffer.getvalue(), "png")
            content = source.raw(place)
            if len(content) >= 1 << 32:
                raise BrokenImage("it has 4 GiB or more")
            if self.decode:
                read_image(content)
            with Image.open(io.BytesIO(content)) as image:
                kind = str(image.format)
            return _Sample(place, content, ENDINGS.get(kind, kind.lower()))
        except BrokenImage as error:
            return _Sample(place, problem=str(error))
        except Exception as error:  # Pillow's, without decode, on what is no image
            return _Sample(place, problem=f"damaged: {str(error) or type(error).__name__}".splitlines()[0])

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
    """The shards of one part, one after another; ``rows`` become the index, each behind its place in the source."""

    def __init__(self, job: _Job, part: str, source: Source) -> None:
        self.job, self.part, self.source = job, part, source
        self.tars: Any = require("webdataset", "data")
        self.shards: list[FileSum] = []
        self.rows: list[tuple[int, ...]] = []
        self._file: Any = None
        self._tar: Any = None
        self._size = 0
        self._here: list[tuple[int, int]] = []  # place and CRC-32 of the images in the shard that is being written

    def add(self, sample: _Sample) -> None:
        """Write one image and its class."""
        if self._tar is None:
            self._file = self.job.new(f"{self.part}-{len(self.shards):06}.tar").open("wb")
            self._tar = self.tars.TarWriter(self._file, mtime=0.0, encoder=False)
        label = str(int(self.source.labels[sample.place])).encode()
        self._size += self._tar.write({"__key__": _key(sample.place), sample.kind: sample.content, "cls": label})
        self._here.append((sample.place, zlib.crc32(sample.content)))
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
        contents = read_contents(path)
        for place, crc in self._here:
            offset, size = contents.images[_key(place)]
            self.rows.append((place, len(self.shards), offset, size, int(self.source.labels[place]), crc))
        self.shards.append(FileSum(os.path.basename(path), os.path.getsize(path), sha256(path)))
        self._here.clear()


def _split(parts: Parts) -> dict[str, tuple[Source, np.ndarray]]:
    """The parts with the places of their images; a test part that is one by convention becomes one of its own."""
    found = {}
    for part in PARTS:
        source = getattr(parts, part)
        if source is not None:
            found[part] = (source, np.arange(len(source)))
    if parts.train is not None and parts.test_indices is not None:
        found["train"] = (parts.train, np.setdiff1d(np.arange(len(parts.train)), parts.test_indices))
        found["test"] = (parts.train, parts.test_indices)
    return found


def _ahead(pool: ThreadPoolExecutor, work: Any, places: list[int], count: int) -> Iterator[_Sample]:
    """``work`` on each place in order, on up to ``count`` of them at a time."""
    for start in range(0, len(places), count):
        yield from pool.map(work, places[start : start + count])


def _key(place: int) -> str:
    return f"{place:09}"


def _say(manifest: dict[str, Any], job: _Job, out: str) -> None:
    parts = manifest["parts"].values()
    files = [shard for part in parts for shard in part["shards"]]
    megabytes = sum(shard["bytes"] for shard in files) / 1e6
    sizes = ", ".join(f"{part['images']:,} {name}" for name, part in manifest["parts"].items())
    shards = f"{len(files)} shard{'s' * (len(files) != 1)}"
    print(f"{sizes} images of {len(manifest['class_names'])} classes in {shards}, {megabytes:,.1f} MB: {out}")
    if job.skipped:
        print(f"{len(job.skipped)} files can't be read and were left out, see {Path(out) / 'skipped.csv'}")


def _check(data: str | None, quiet: bool) -> dict[str, Any]:
    """Compare all files with the manifest's sums; damaged ones end in an error that names them."""
    folder = Path(data or ".")
    _, class_names, parts = read_manifest(folder / MANIFEST, str(folder))
    files = [file for part in parts.values() for file in (part.index, *part.shards)]
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
        raise UserError(f"{len(damaged)} of {len(files)} files of {folder} are damaged or missing: {few(damaged)}")
    images = sum(part.images for part in parts.values())
    if not quiet:
        print(f"{folder}: all {len(files)} files are as they were written, {images:,} images")
    return {"files": len(files), "images": images, "classes": len(class_names)}
