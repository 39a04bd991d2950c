"""Parquet files at a URL: labels first, images when they are needed, nothing twice, nothing believed."""

from __future__ import annotations

import http.server
import pickle
import re
import threading
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from made_parquet import parquet_rows, write_parquet
from transcnn.commands.train import train
from transcnn.data.loading.loader import make_loader
from transcnn.data.sets.classify import open_set, open_splits
from transcnn.data.sources import remote
from transcnn.data.transforms.classify import eval_transform
from transcnn.errors import UserError
from transcnn.training import callbacks

NAMES = ["cat", "dog", "cow"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where what was fetched is kept."""
    monkeypatch.setenv("TRANSCNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files of training images and one of validation images, as the hub holds them."""
    for i in range(3):
        write_parquet(tmp_path / "set" / "data" / f"train-{i:05}-of-00003.parquet", parquet_rows(8, first=8 * i), NAMES)
    write_parquet(tmp_path / "set" / "data" / "validation-00000-of-00001.parquet", parquet_rows(6, first=60), NAMES)
    return tmp_path / "set"


@pytest.fixture
def bucket(folder: Path) -> Iterator[str]:
    """The same at the URL of a bucket."""
    memory = fsspec.filesystem("memory")
    upload(folder)
    yield "memory://bucket/set"
    memory.rm("/bucket", recursive=True)


def upload(folder: Path) -> None:
    for path in folder.rglob("*.parquet"):
        fsspec.filesystem("memory").pipe(f"/bucket/set/{path.relative_to(folder)}", path.read_bytes())


def greys(dataset: Any) -> list[tuple[int, int]]:
    return [(int(np.asarray(image)[0, 0, 0]), label) for image, label, _ in map(dataset.read, range(len(dataset)))]


def kept(cache: Path, ending: str) -> list[str]:
    return sorted(re.sub(r"^\w{12}-", "", path.name) for path in cache.rglob(f"*{ending}"))


def test_the_same_as_from_disk(bucket, folder, cache):
    here, there = open_splits(str(folder)), open_splits(bucket, in_chans=3)
    assert not kept(cache, ".arrow")  # labels and names come without the images
    assert len(kept(cache, ".labels")) == 4
    assert (there.class_names, there.name, there.test) == (NAMES, "set", None)
    assert there.train.name(9) == "data/train-00001-of-00003/1"
    assert greys(there.val) == greys(here.val)
    assert kept(cache, ".arrow") == ["data-validation-00000-of-00001.parquet.arrow"]
    assert greys(there.train) == greys(here.train) == [(i, i % 3) for i in range(24)]
    assert not kept(cache, ".tmp") + kept(cache, ".parquet")
    assert greys(pickle.loads(pickle.dumps(there.train))) == greys(here.train)


def test_one_file(bucket):
    dataset = open_set(bucket + "/data/train-00001-of-00003.parquet")
    assert [grey for grey, _ in greys(dataset)] == list(range(8, 16))


def test_fetched_once_and_anew_when_it_changed(bucket, folder, cache, monkeypatch):
    fetched: list[str] = []
    copy = remote._download
    monkeypatch.setattr(remote, "_download", lambda url, *rest: (fetched.append(url), copy(url, *rest))[1])
    for _ in range(2):
        greys(open_splits(bucket).train)
    assert sorted(url for url in fetched if url.endswith(".parquet")) == [
        f"{bucket}/data/train-{i:05}-of-00003.parquet" for i in range(3)
    ]
    write_parquet(folder / "data" / "train-00001-of-00003.parquet", parquet_rows(10, first=80), NAMES)
    upload(folder)
    assert len(open_splits(bucket).train) == 26


@pytest.mark.parametrize("workers", [0, 2])
def test_each_image_once_in_loader_processes(bucket, workers):
    splits = open_splits(bucket, in_chans=3)
    splits.train.transform = eval_transform(16, mean=(0.0,), std=(1 / 255,))
    assert splits.train.groups is not None
    batches = make_loader(splits.train, 4, training=True, num_workers=workers)
    seen = list(chain(*(images[:, 0, 0, 0].round().int().tolist() for images, _ in batches)))
    assert sorted(seen) == list(range(24))
    assert seen != sorted(seen)


@pytest.mark.usefixtures("no_report")
def test_a_run_resumes_in_the_middle_of_an_epoch(bucket, tmp_path, monkeypatch):
    settings: dict[str, Any] = dict(model="transcnn_test", epochs=2, batch_size=4, img_size=32, quiet=True)
    settings |= {"precision": "32", "num_workers": 0, "in_chans": 3}
    train(bucket, out=str(tmp_path / "whole"), **settings)

    def die(self: Any, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 4:
            raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.History, "on_train_batch_end", die)
        with pytest.raises(ZeroDivisionError):
            train(bucket, out=str(tmp_path / "cut"), save_every=1, **settings)
    train(bucket, resume=str(tmp_path / "cut"), quiet=True)  # a URL is named again to be fetched
    whole, cut = (load_file(tmp_path / run / "best.safetensors") for run in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_unusable_urls_are_reported(bucket, folder, cache, monkeypatch):
    memory = fsspec.filesystem("memory")
    with pytest.raises(UserError, match=r"memory://bucket/nothing holds neither a manifest\.json .* nor Parquet files"):
        open_splits("memory://bucket/nothing")
    with pytest.raises(UserError, match=r"can't fetch memory://bucket/set/none\.parquet: "):
        open_splits(bucket + "/none.parquet")
    for name in ("large", "small"):
        memory.pipe(f"/bucket/two/{name}/train.parquet", (folder / "data/train-00000-of-00003.parquet").read_bytes())
    with pytest.raises(
        UserError, match=r"has Parquet files in 'large', 'small'; name one of them: memory://bucket/two"
    ):
        open_splits("memory://bucket/two")
    assert len(open_set("memory://bucket/two/small")) == 8
    memory.pipe("/bucket/bad/train.parquet", b"PAR1 this is none PAR1")
    with pytest.raises(UserError, match=r"can't fetch memory://bucket/bad/train\.parquet: "):
        open_splits("memory://bucket/bad")
    pq.write_table(pa.table({"text": ["a"], "label": [0]}), folder / "x.parquet")
    memory.pipe("/bucket/text/x.parquet", (folder / "x.parquet").read_bytes())
    with pytest.raises(UserError, match=r"'x\.parquet' has columns 'text', 'label'; expected one named image or "):
        open_splits("memory://bucket/text")
    pq.write_table(pa.table({"image": [b""], "label": ["a"]}), folder / "x.parquet")
    memory.pipe("/bucket/set/data/train-00009.parquet", (folder / "x.parquet").read_bytes())
    with pytest.raises(UserError, match=r"of memory://bucket/set have labels of different kinds"):
        open_splits(bucket)
    memory.rm("/bucket/set/data/train-00009.parquet")
    splits = open_splits(bucket, in_chans=3)
    path = "/bucket/set/data/train-00000-of-00003.parquet"
    memory.pipe(path, memory.cat(path)[:-1])  # cut off while the run goes on
    with pytest.raises(UserError, match=r"train-00000-of-00003\.parquet: \d+ bytes came, expected \d+"):
        splits.train.read(0)
    assert not kept(cache, ".tmp") + kept(cache, ".arrow")


@pytest.mark.parametrize("form", ["images", "labels", "rows"])
def test_one_value_for_many_rows(monkeypatch, tmp_path, form):
    """A dictionary's value takes its bytes once in the file, and once for each row when it is read."""
    monkeypatch.setattr("transcnn.data.sources.parquet.IN_MEMORY", 1 << 20)
    monkeypatch.setattr("transcnn.data.sources.parquet.MIN_BOMB_ROWS", 100)
    image, label = b"x" * (1 << 15 if form == "images" else 1), "x" * (1 << 15 if form == "labels" else 1)
    count = 1000 if form != "rows" else 100_000
    table = pa.table({"image": [image] * count, "label": [label, "y"] * (count // 2)})
    pq.write_table(table, tmp_path / "x.parquet", compression="none")
    fsspec.filesystem("memory").pipe("/bucket/many/x.parquet", (tmp_path / "x.parquet").read_bytes())
    words = "100,000 rows and" if form == "rows" else "repeats its values"
    with pytest.raises(UserError, match=words):
        open_splits("memory://bucket/many", in_chans=3).train.source.raw(0)


def test_damaged_copies_are_told_from_damaged_files(bucket, cache):
    assert greys(open_splits(bucket, in_chans=3).val)
    for ending in (".arrow", ".labels"):
        for path in cache.rglob(f"*{ending}"):
            path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(UserError, match=rf"can't read .*{ending}.*fetched anew once it is removed"):
            greys(open_splits(bucket, in_chans=3).val)
        for path in cache.rglob(f"*{ending}"):
            path.unlink()
    assert len(greys(open_splits(bucket, in_chans=3).val)) == 6


def test_labels_are_read_without_the_images(tmp_path):
    rows = parquet_rows(40)
    for i, row in enumerate(rows):
        row["image"] = np.random.default_rng(i).bytes(40_000)
    write_parquet(tmp_path / "web" / "train.parquet", rows)
    sent: list[int] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        """Python's own server doesn't know ranges."""

        def do_GET(self) -> None:
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if not asked:
                super().do_GET()
                return
            content = Path(self.translate_path(self.path)).read_bytes()
            first, last = int(asked[1]), min(int(asked[2]), len(content) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            self.send_header("Content-Length", str(last - first + 1))
            self.end_headers()
            self.wfile.write(content[first : last + 1])
            sent.append(last - first + 1)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "web")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        for url in (f"http://127.0.0.1:{server.server_port}", f"http://127.0.0.1:{server.server_port}/train.parquet"):
            dataset = open_set(url)
            assert dataset.labels.tolist() == [i % 3 for i in range(40)]
            assert 0 < sum(sent) < (tmp_path / "web" / "train.parquet").stat().st_size / 4
    finally:
        server.shutdown()
        server.server_close()
