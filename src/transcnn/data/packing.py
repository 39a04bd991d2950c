"""Any classification data as WebDataset shards with a manifest (read by :mod:`.sources.packed`)."""

from __future__ import annotations

import io
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
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import UserError, require
from ..text import json_text
from .images import BrokenImage, decode, format_of
from .sets.fault_tolerant import write_skipped
from .sources.packed import FORMAT, INDEX, MANIFEST, VERSION, FileSum, SplitFiles, sha256
from .sources.source import SPLITS, Source, SourceSplits, abbreviate
from .sources.webdataset import read_shard

__all__ = ["PackJob"]

ENDINGS = {"JPEG": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}  # of other formats it is their name


@dataclass
class _Sample:
    """One image on its way into a shard."""

    index: int  # in the source
    content: bytes = b""
    kind: str = ""
    problem: str = ""


@dataclass
class PackJob:
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
        temporary.write_text(json_text(manifest, indent=1) + "\n", encoding="utf-8")
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
            kind = format_of(content)
            if self.decode:
                decode(io.BytesIO(content), finish=lambda image: image)
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

    def __init__(self, job: PackJob, split: str, source: Source) -> None:
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
