"""Packed data: what is written, that it is the same data, and what happens to damaged and hostile shards."""

from __future__ import annotations

import csv
import http.server
import io
import json
import os
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander

from transcnn import cli
from transcnn.commands.pack import pack
from transcnn.commands.train import train
from transcnn.data import packing as pack_module
from transcnn.data.loading.loader import make_loader
from transcnn.data.loading.sampler import EpochSampler
from transcnn.data.sets.classify import open_set, open_splits
from transcnn.data.sources import opening, remote
from transcnn.data.sources.packed import open_packed
from transcnn.data.sources.source import SourceSplits
from transcnn.data.transforms.classify import eval_transform
from transcnn.errors import UserError
from transcnn.text import printable


@pytest.fixture
def packed(split_folder: Path, tmp_path: Path) -> Path:
    """Three classes of eight images each for training and for validation, in shards of a few images."""
    out = tmp_path / "shards"
    pack(str(split_folder), out=str(out), shard_mb=0.01, num_workers=2, quiet=True)
    return out


def assert_same_part(one: Any, two: Any) -> None:
    assert len(one) == len(two)
    assert one.class_names == two.class_names
    for i in range(len(one)):
        a, b = one.read(i), two.read(i)
        assert a[1:] == b[1:]
        assert np.array_equal(np.asarray(a[0]), np.asarray(b[0]))


def test_packed_data_are_the_same_data(split_folder, packed):
    folder, shards = open_splits(str(split_folder)), open_splits(str(packed))
    assert_same_part(folder.train, shards.train)
    assert_same_part(folder.val, shards.val)
    assert shards.name == folder.name
    assert len(list(packed.glob("train-*.tar"))) > 2
    again = pickle.loads(pickle.dumps(shards.train.source))
    assert np.array_equal(np.asarray(again.load(5)), np.asarray(shards.train.source.load(5)))


@pytest.mark.usefixtures("no_report")
def test_training_on_shards_equals_training_on_the_folder(split_folder, packed, tmp_path):
    options = dict(model="transcnn_test", img_size=32, batch_size=6, epochs=1, precision="32", accelerator="cpu")
    weights = []
    for name, data, workers in (("a", split_folder, 0), ("b", packed, 2)):
        run = train(str(data), out=str(tmp_path / name), num_workers=workers, quiet=True, **options)
        assert run.metrics["images"] == 24
        weights.append(torch.load(tmp_path / name / "last.ckpt", weights_only=True)["state_dict"])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_other_programs_read_the_shards(packed):
    manifest = json.loads((packed / "manifest.json").read_text())
    urls = [str(packed / shard["file"]) for shard in manifest["parts"]["train"]["shards"]]
    samples: list[Any] = []
    for url in urls:  # WebDataset(urls) does the same, but leaves the files open
        with open(url, "rb") as file:
            samples += group_by_keys(tar_file_expander([{"url": url, "stream": file}]))
    assert sorted(int(sample["__key__"]) for sample in samples) == list(range(24))
    assert [int(s["__key__"]) for s in samples] != list(range(24))  # mixed, for those who read in order
    assert manifest["parts"]["train"]["per_class"] == [8, 8, 8]
    source = open_packed(str(packed)).train
    for sample in samples:
        at = int(sample["__key__"])
        assert int(sample["cls"]) == source.labels[at]
        assert sample["png"] == source.raw(at)


def test_broken_files_are_left_out_and_listed(class_folder, tmp_path, capsys):
    (class_folder / "class_1" / "new\nline.jpg").write_bytes(b"no image")
    cut = (class_folder / "class_0" / "000.png").read_bytes()[:-200]
    (class_folder / "class_0" / "cut.png").write_bytes(cut)
    out = tmp_path / "out"
    assert cli.main(["pack", str(class_folder), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "24 train images of 3 classes in 1 shard" in said
    assert "2 files can't be read and were left out" in said
    with (out / "skipped.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert {row[0] for row in rows[1:]} == {"class_1/new\\nline.jpg", "class_0/cut.png"}
    assert json.loads((out / "manifest.json").read_text())["left_out"] == 2
    assert len(open_set(str(out), "all")) == 24
    with_cut = pack(str(class_folder), out=str(tmp_path / "fast"), decode=False, quiet=True)
    assert with_cut["left_out"] == 1  # whoever doesn't look keeps what begins well
    shutil.rmtree(class_folder / "class_0")
    for path in class_folder.rglob("*.png"):
        path.write_bytes(b"x")
    with pytest.raises(UserError, match="none of the 17 images can be read"):
        pack(str(class_folder), out=str(tmp_path / "none"), quiet=True)


def test_what_has_no_files_is_packed_too(tmp_path):
    pack(None, out=str(tmp_path / "digits"), quiet=True)
    ours, theirs = open_splits(str(tmp_path / "digits")), open_splits(None)
    assert theirs.test is not None
    assert_same_images(ours.test, theirs.test)
    assert len(ours.train) + len(ours.val) == len(theirs.train) + len(theirs.val)
    assert ours.in_chans == 1


def assert_same_images(one: Any, two: Any) -> None:
    assert [one.name(i) for i in range(len(one))] == [two.name(i) for i in range(len(two))]
    assert np.array_equal(np.asarray(one.read(3)[0]), np.asarray(two.read(3)[0]))


def test_odd_names_come_back(tmp_path):
    names = ["a b.png", "new\nline.png", "😀.png", "x" * 196 + ".png", "%s%d.png"]
    for label in ("0", "1 %d"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for name in [*names, os.fsdecode(b"\xff.png")]:
            Image.new("L", (9, 9)).save(tmp_path / "data" / label / name)
    out = str(tmp_path / "100 %d pipe:")
    pack(str(tmp_path / "data"), out=out, quiet=True)
    dataset = open_set(out, "all")
    assert {dataset.name(i) for i in range(len(dataset))} == {
        f"{c}/{printable(n)}" for c in ("0", "1 %d") for n in [*names, "\\xff.png"]
    }


# --- sharing out ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 0), (3, 2), (5, 0)])
def test_each_image_once_for_any_number_of_processes_and_workers(packed, ranks, workers):
    seen: list[int] = []
    for rank in range(ranks):
        dataset = open_set(str(packed), "val")
        dataset.labels = np.arange(len(dataset))  # to know them again
        dataset.transform = eval_transform(16)
        seen += chain(
            *(
                labels.tolist()
                for _, labels in make_loader(dataset, 4, num_workers=workers, rank=rank, world_size=ranks)
            )
        )
    assert sorted(label for label in seen if label >= 0) == list(range(24))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_slow_files_are_shuffled_in_windows(world_size):
    groups = np.repeat(np.arange(40), 7)
    orders = []
    for epoch in (3, 3, 4):
        ranks = [
            EpochSampler(280, training=True, rank=r, world_size=world_size, groups=groups) for r in range(world_size)
        ]
        for sampler in ranks:
            sampler.set_epoch(epoch)
        mine = [[sample.i for sample in sampler] for sampler in ranks]
        assert sorted(chain(*mine)) == list(range(280))
        orders.append(list(chain(*zip(*mine, strict=True))))
    assert orders[0] == orders[1] != orders[2]
    assert all(len(set(groups[orders[0][start : start + 56]].tolist())) == 8 for start in range(0, 280, 56))
    assert np.diff(groups[orders[0][:56]]).std() > 5  # mixed within a window
    sampler = EpochSampler(280, training=True, groups=groups)
    sampler.fast_forward(3, 100)
    rest = [sample.i for sample in sampler]
    sampler.fast_forward(3, 0)
    assert [sample.i for sample in sampler][100:] == rest


# --- damage -----------------------------------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_damaged_shard_is_noticed_by_name(packed, capsys):
    assert cli.main(["pack", "--check", str(packed)]) == 0
    assert "files are as they were written, 48 images" in capsys.readouterr().out
    shard = packed / "train-000001.tar"
    dataset = open_packed(str(packed)).train
    assert dataset is not None
    index = dataset.load.__self__.index  # pyright: ignore
    at = int(np.flatnonzero(index["shard"] == 1)[0])
    flip(shard, int(index["offset"][at]) + 60)
    assert cli.main(["pack", "--check", str(packed)]) == 2
    assert "1 of" in (said := capsys.readouterr().err)
    assert "'train-000001.tar'" in said
    images = open_splits(str(packed)).train
    images.transform = eval_transform(16)
    assert len(next(iter(make_loader(images, 24)))[0]) == 24  # another takes its at
    assert [reason for _, reason in images.broken] == [
        f"shard train-000001.tar is damaged at byte {index['offset'][at]}: the checksum is another"
    ]
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"train-000001\.tar is damaged or not copied whole: it has 5000 bytes"):
        open_splits(str(packed))
    shard.unlink()
    with pytest.raises(UserError, match=r"train-000001\.tar is in the manifest but can't be read: No such file"):
        open_splits(str(packed))
    with pytest.raises(UserError, match=r"1 of .* are damaged or missing: 'train-000001\.tar'"):
        pack(str(packed), check=True)


def test_a_damaged_index_is_refused(packed):
    flip(packed / "train.index", 40)
    with pytest.raises(UserError, match=r"train\.index is damaged"):
        open_splits(str(packed))


HOSTILE: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("plain name, got '../", lambda m: m["parts"]["train"]["shards"][0].update(file="../secret.tar")),
    ("plain name, got '/etc", lambda m: m["parts"]["train"]["index"].update(file="/etc/passwd")),
    ("plain name, got 'pipe", lambda m: m["parts"]["train"]["shards"][0].update(file="pipe:id")),
    ("plain name, got 'a..b", lambda m: m["parts"]["train"]["shards"][0].update(file="a..b\n")),
    ("named twice", lambda m: m["parts"]["train"]["shards"].append(m["parts"]["train"]["shards"][0])),
    ("64 hexadecimal", lambda m: m["parts"]["train"]["index"].update(sha256="0")),
    ("expected a whole number", lambda m: m["parts"]["train"].update(images=-1)),
    ("expected a whole number", lambda m: m["parts"]["train"].update(images=1 << 60)),
    ("too short for", lambda m: m["parts"]["train"].update(images=1 << 40)),
    ("names .. images instead of 23", lambda m: m["parts"]["train"].update(images=23)),
    ("different names", lambda m: m.update(class_names=["a", "a"])),
    ("offsets or classes that there are not", lambda m: m.update(class_names=["a", "b"])),
    ("offsets or classes that there are not", lambda m: m["parts"]["train"]["shards"].pop()),
    ("parts must be among", lambda m: m.update(parts={})),
    ("parts must be among", lambda m: m["parts"].update({"../x": {}})),
    ("its version is 2", lambda m: m.update(version=2)),
    ("its format is", lambda m: m.update(format="other")),
    ("'class_names' is missing", lambda m: m.pop("class_names")),
    ("is wrong", lambda m: m.update(parts=[1])),
]


@pytest.mark.parametrize(("match", "change"), HOSTILE)
def test_a_hostile_manifest_is_refused(packed, match, change):
    content = json.loads((packed / "manifest.json").read_text())
    change(content)
    (packed / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=match) as caught:
        open_splits(str(packed))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"null", b"7", b'{"format": 1e999}'])
def test_what_is_no_manifest_is_refused(packed, content):
    (packed / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json is (damaged|wrong)"):
        open_splits(str(packed))


# --- writing ----------------------------------------------------------------------------------------------------------


def test_unusable_targets(class_folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="say where"):
        pack(str(class_folder))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(UserError, match=r"full is not empty \(it holds 'x'\)"):
        pack(str(class_folder), out=str(tmp_path / "full"))
    with pytest.raises(UserError, match=r"can't write to .*x"):
        pack(str(class_folder), out=str(tmp_path / "full" / "x"))
    for options, match in (
        ({"shard_mb": 0}, "shard_mb must be above 0"),
        ({"num_workers": 0}, "num_workers must be 1"),
    ):
        with pytest.raises(UserError, match=match):
            pack(str(class_folder), out=str(tmp_path / "o"), **options)
    with pytest.raises(UserError, match="holds no manifest"):
        pack(str(class_folder), check=True)
    one = opening.open_source(str(class_folder)).train
    two = replace(one, class_names=list(reversed(one.class_names)))  # pyright: ignore
    monkeypatch.setattr("transcnn.commands.pack.open_source", lambda _: SourceSplits("x", one, two))
    with pytest.raises(UserError, match="the val split has other classes than the rest"):
        pack("x", out=str(tmp_path / "p"))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_interrupted_it_leaves_nothing(class_folder, tmp_path, monkeypatch, error):
    finish, calls = pack_module._Writer.close, []

    def failing(self: Any) -> None:
        finish(self)
        calls.append(1)
        if len(calls) == 2:
            raise error

    monkeypatch.setattr(pack_module._Writer, "close", failing)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else UserError):
        pack(str(class_folder), out=str(tmp_path / "out"), shard_mb=0.01, quiet=True)
    assert not list((tmp_path / "out").iterdir())


# --- elsewhere --------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[str]]]:
    """The packed data at a URL, and the list of what is asked for."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            if self.command == "GET":
                asked.append(self.path.rpartition("/")[2])

    monkeypatch.setenv("TRANSCNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(packed)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", asked
    server.shutdown()
    server.server_close()


def test_shards_are_fetched_when_needed_and_once(served, packed, tmp_path):
    url, asked = served
    splits = open_splits(url)
    assert asked[:3] == ["manifest.json", "train.index", "val.index"]
    assert len(asked) == 4  # one shard, to see whether images are grey
    assert splits.in_chans == 3
    assert_same_part(splits.train, open_splits(str(packed)).train)
    shards = [path.name for path in packed.glob("train-*.tar")]
    assert sorted(asked[3:]) == sorted(shards)
    splits.train.transform = eval_transform(16)
    assert len(list(chain(*(labels for _, labels in make_loader(splits.train, 6, training=True, num_workers=2))))) == 24
    assert splits.train.groups is not None
    assert len(asked) == 3 + len(shards)
    assert not [path.name for path in (tmp_path / "cache").rglob("*.tmp")]


def test_half_a_file_that_is_kept_is_no_file(served, packed, tmp_path, monkeypatch):
    """A power cut may leave one under its name; so what is kept is on disk before it has its name."""
    url, asked = served
    open_splits(url, in_chans=3)
    index = next((tmp_path / "cache").rglob("*-train.index"))
    index.write_bytes(index.read_bytes()[:-1])
    asked.clear()
    assert_same_part(open_splits(url, in_chans=3).val, open_splits(str(packed)).val)
    assert asked.count("train.index") == 1
    order: list[str] = []
    for name in ("fsync", "replace"):
        true = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, true=true: (order.append(name), true(*args))[1])
    index.unlink()
    open_splits(url, in_chans=3)
    assert order[-2:] == ["fsync", "replace"]


def test_what_the_disk_cannot_hold_is_not_begun(served, monkeypatch):
    url, asked = served
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(UserError, match=r"train\.index in .*: it has \d+ bytes, and 10 are free; TRANSCNN_CACHE names"):
        open_splits(url, in_chans=3)
    assert "train.index" not in asked


@pytest.mark.parametrize("name", ["manifest.json", "train.index", "train-000000.tar"])
def test_pipes_are_not_waited_for(packed, name):
    """Who unpacks a stranger's archive may have one."""
    path = packed / name
    path.unlink()
    os.mkfifo(path)
    manifest = packed / "manifest.json"
    if name != "manifest.json":  # a pipe's size is 0
        described = json.loads(manifest.read_text())
        files = [described["parts"]["train"]["index"], *described["parts"]["train"]["shards"]]
        next(file for file in files if file["file"] == name)["bytes"] = 0
        manifest.write_text(json.dumps(described))
        with pytest.raises(UserError, match="is no file"):
            open_packed(str(packed))
    with pytest.raises(UserError, match=r"it is no file|damaged or missing"):
        pack(str(packed), check=True, quiet=True)


def test_names_that_are_no_utf8_are_packed(class_folder, tmp_path):
    for folder in sorted(class_folder.iterdir())[:1]:
        folder.rename(os.fsdecode(os.fsencode(class_folder) + b"/caf\xe9"))
    root = class_folder.rename(os.fsdecode(os.fsencode(class_folder.parent) + b"/r\xe9"))
    manifest = pack(os.fspath(root), out=str(tmp_path / "out"), quiet=True)
    found = open_packed(str(tmp_path / "out"))
    assert found.train is not None
    assert found.train.class_names == manifest["class_names"]


def test_failed_downloads_are_reported(served, packed):
    url, asked = served
    with pytest.raises(UserError, match=r"^http.*/nothing holds neither a manifest\.json .* nor Parquet files$"):
        open_splits(url + "nothing")
    splits = open_splits(url, in_chans=3)
    for path in packed.glob("train-*.tar"):
        path.write_bytes(path.read_bytes()[:-1])
    asked.clear()
    splits.train.transform = eval_transform(16)
    with pytest.raises(UserError, match=r"^can't fetch http.*/train-00000\d\.tar: \d+ bytes came, expected \d+$"):
        list(make_loader(splits.train, 4, num_workers=2))
    assert len(asked) >= remote.MAX_TRIES
    for path in packed.glob("train-*.tar"):
        path.write_bytes(path.read_bytes() + b"x")  # as long as it was, but not the same
    with pytest.raises(
        UserError, match=r"^can't fetch http.*: what came is damaged: its SHA-256 is not the manifest's$"
    ):
        list(make_loader(splits.train, 4, num_workers=2))


def test_other_schemes_go_through_fsspec(packed, tmp_path, monkeypatch):
    monkeypatch.setenv("TRANSCNN_CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    for path in packed.iterdir():
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    assert_same_part(open_splits("memory://bucket", in_chans=3).val, open_splits(str(packed)).val)
    monkeypatch.setattr(remote, "MAX_TRIES", 1)
    with pytest.raises(UserError, match=r"can't fetch s3://"):
        open_splits("s3://no-such-bucket-for-tests/x")
    with pytest.raises(UserError, match="no such data"):
        open_splits("pipe:echo hello")
    with pytest.raises(UserError, match="no such data"):
        open_splits("simplecache::file:///etc")


def test_images_larger_than_a_shard(tmp_path):
    for label in ("a", "b"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(2):
            buffer = io.BytesIO()
            Image.effect_noise((60, 60), 90).save(buffer, "PNG")
            (tmp_path / "data" / label / f"{i}.png").write_bytes(buffer.getvalue())
    manifest = pack(str(tmp_path / "data"), out=str(tmp_path / "out"), shard_mb=1e-6, quiet=True)
    assert len(manifest["parts"]["train"]["shards"]) == 4
