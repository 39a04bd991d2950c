"""Sets, transforms and loaders for classification: nothing is lost, repeated or left to chance."""

from __future__ import annotations

import io
import logging
import math
import os
import pickle
import random
import shutil
import tarfile
import threading
import time
import tracemalloc
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from made_parquet import SIZE, parquet_rows, write_parquet
from timing import allowed
from transcnn.data.images import BrokenImage
from transcnn.data.loading.data_module import DataModule
from transcnn.data.loading.loader import make_loader
from transcnn.data.loading.sampler import EpochSampler
from transcnn.data.rng import CounterRNG, sample_seeds, seeded
from transcnn.data.sets import channels
from transcnn.data.sets.channels import Channels
from transcnn.data.sets.classify import open_set, open_splits
from transcnn.data.sets.image_dataset import IGNORE, ImageDataset
from transcnn.data.sets.splits import Splits
from transcnn.data.sources.opening import open_source
from transcnn.data.sources.source import Source, read_class_names, split_stratified
from transcnn.data.transforms.classify import channel_stats, eval_transform, train_transform
from transcnn.errors import UserError
from transcnn.explain.image import _crop_box
from transcnn.onnx.predict import to_input
from transcnn.settings import Augment
from transcnn.tasks.classify import Classify


def numbered(count: int, classes: int = 5) -> Source:
    """Images whose grey value is their number, so that samples can be told apart."""
    return Source(
        np.arange(count) % classes,
        [f"c{i}" for i in range(classes)],
        lambda i: Image.new("L", (SIZE, SIZE), i),
        lambda i: f"image {i}",
    )


def plain() -> Any:
    """A transform that only turns 0..255 into itself."""
    return eval_transform(SIZE, in_chans=1, mean=(0.0,), std=(1 / 255,))


def numbers(images: torch.Tensor) -> list[int]:
    return images[:, 0, 0, 0].round().int().tolist()


# --- what is found ------------------------------------------------------------------------------------------------


def test_digits() -> None:
    splits = open_splits(None)
    assert splits.name == "digits"
    assert splits.in_chans == 1
    assert splits.class_names == [str(i) for i in range(10)]
    assert splits.test is not None
    assert len(splits.train) + len(splits.val) + len(splits.test) == 1797
    assert len(splits.test) == pytest.approx(0.2 * 1797, abs=5)
    datasets = [set(dataset.indices.tolist()) for dataset in (splits.train, splits.val, splits.test)]
    assert len(set.union(*datasets)) == 1797  # none is in two
    shares = np.bincount(splits.test.labels) / np.bincount(splits.train.source.labels)
    assert np.abs(shares - 0.2).max() < 0.01
    other = open_splits(None, seed=1)
    assert other.test is not None
    np.testing.assert_array_equal(other.test.indices, splits.test.indices)  # the final figure is always on the same
    assert not np.array_equal(other.val.indices, splits.val.indices)


def test_folder_is_split_off_and_stratified(make_class_folder: Callable[..., Path]) -> None:
    folder = make_class_folder(classes=3, per_class=10)
    splits, again, other = open_splits(str(folder)), open_splits(str(folder)), open_splits(str(folder), seed=3)
    assert splits.class_names == ["class_0", "class_1", "class_2"]
    assert (len(splits.train), len(splits.val), splits.test) == (27, 3, None)
    assert np.bincount(splits.val.labels).tolist() == [1, 1, 1]
    np.testing.assert_array_equal(splits.val.indices, again.val.indices)
    assert not np.array_equal(splits.val.indices, other.val.indices)
    assert (splits.in_chans, splits.name) == (3, "images")
    image, label, name = splits.train.read(0)
    assert image.size == (32, 32)
    assert name.startswith(f"class_{label}{os.sep}")


def test_folder_splits_are_kept(make_class_folder: Callable[..., Path]) -> None:
    splits = open_splits(str(make_class_folder(splits=("train", "val", "test"), per_class=4)))
    assert splits.test is not None
    assert [len(dataset) for dataset in (splits.train, splits.val, splits.test)] == [12, 12, 12]
    splits = open_splits(str(make_class_folder(splits=("train", "test"), per_class=5, name="other")), val_fraction=0.2)
    assert splits.test is not None
    assert [len(dataset) for dataset in (splits.train, splits.val, splits.test)] == [12, 3, 15]


def test_train_may_be_a_class(tmp_path: Path) -> None:
    for label in ("car", "train", "bus"):
        (tmp_path / label).mkdir()
        for i in range(3):
            Image.new("L", (8, 8)).save(tmp_path / label / f"{i}.png")
    splits = open_splits(str(tmp_path))
    assert splits.class_names == ["bus", "car", "train"]
    assert splits.in_chans == 1  # all grey
    assert open_splits(str(tmp_path), in_chans=3).in_chans == 3


@pytest.mark.parametrize(("metadata", "text"), [(True, False), (False, True), (True, True), (False, False)])
def test_parquet_names(tmp_path: Path, metadata: bool, text: bool) -> None:
    write_parquet(tmp_path / "set" / "train.parquet", parquet_rows(30), ["cat", "dog", "cow"] if metadata else None)
    if text:
        (tmp_path / "set" / "classes.txt").write_text("x\ny\nz\n")
    splits = open_splits(str(tmp_path / "set"))
    assert splits.class_names == (["cat", "dog", "cow"] if metadata else ["x", "y", "z"] if text else ["0", "1", "2"])
    image, label, name = splits.train.read(4)
    number = splits.train.indices[4]
    assert (np.asarray(image)[0, 0, 0], label, name) == (number, number % 3, f"{number}.png")


def test_parquet_files_are_put_together(tmp_path: Path) -> None:
    for i in range(2):
        write_parquet(tmp_path / "data" / f"train-0000{i}-of-00002.parquet", parquet_rows(10, first=10 * i))
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", parquet_rows(6, first=40))
    write_parquet(tmp_path / "data" / "validation.parquet", parquet_rows(3, first=60))
    splits = open_splits(str(tmp_path))
    assert splits.test is not None
    assert [len(dataset) for dataset in (splits.train, splits.val, splits.test)] == [20, 3, 6]
    assert np.asarray(splits.train.read(19)[0])[0, 0, 0] == 19
    single = open_splits(str(tmp_path / "data" / "train-00000-of-00002.parquet"))
    assert (len(single.train), len(single.val), single.test) == (7, 3, None)


def test_parquet_splits_may_be_folders(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train" / "0000.parquet", parquet_rows(10))
    write_parquet(tmp_path / "test" / "0000.parquet", parquet_rows(6, first=40))
    splits = open_splits(str(tmp_path))
    assert splits.test is not None
    assert (len(splits.train) + len(splits.val), len(splits.test)) == (10, 6)


def test_parquet_of_names_bytes_and_paths(tmp_path: Path) -> None:
    rows = parquet_rows(9)
    for row in rows:
        row["label"] = ["b", "a", "c"][row["label"]]
        row["image"] = row["image"]["bytes"]
    write_parquet(tmp_path / "a.parquet", rows)
    splits = open_splits(str(tmp_path / "a.parquet"))
    assert splits.class_names == ["a", "b", "c"]
    assert splits.train.name(0).startswith("a/")
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    rows = [
        {"image": {"bytes": None, "path": path}, "label": i % 2} for i, path in enumerate(["0.png", "../b.png"] * 3)
    ]
    write_parquet(tmp_path / "b.parquet", rows)
    dataset = open_set(str(tmp_path / "b.parquet"))
    assert dataset.read(0)[0].size == (4, 4)
    with pytest.raises(ValueError, match="leads out of the data's folder"):
        dataset.read(1)


def test_parquet_larger_than_memory_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr("transcnn.data.sources.parquet.IN_MEMORY", 10)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    write_parquet(tmp_path / "set" / "train.parquet", parquet_rows(12), ["cat", "dog", "cow"])
    dataset = open_set(str(tmp_path / "set"))
    assert dataset.class_names == ["cat", "dog", "cow"]
    assert [np.asarray(dataset.read(i)[0])[0, 0, 0] for i in range(12)] == list(range(12))


def test_unlabelled_test_split_is_no_test_split(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", parquet_rows(12))
    write_parquet(tmp_path / "test.parquet", [{**row, "label": -1} for row in parquet_rows(3)])
    assert open_splits(str(tmp_path)).test is None


def test_cifar10(shared: Path) -> None:
    splits = open_splits(str(shared / "data" / "cifar10"))
    assert splits.test is not None
    assert [len(dataset) for dataset in (splits.train, splits.val, splits.test)] == [45000, 5000, 10000]
    assert np.bincount(splits.val.labels).tolist() == [500] * 10
    assert (splits.name, splits.in_chans, splits.class_names[3]) == ("cifar10", 3, "cat")
    image, label, name = splits.test.read(7)
    assert image.size == (32, 32)
    assert name.split("/")[1] == splits.class_names[label]


def test_shards(tmp_path: Path) -> None:
    def write(name: str, first: int, count: int) -> None:
        with tarfile.open(tmp_path / name, "w") as tar:
            for row in parquet_rows(count, first=first):
                stem = row["image"]["path"].removesuffix(".png")
                for kind, data in (("png", row["image"]["bytes"]), ("cls", str(row["label"]).encode())):
                    member = tarfile.TarInfo(f"{stem}.{kind}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))

    for i in range(3):
        write(f"train-{i:03}.tar", 10 * i, 10)
    write("val-000.tar", 50, 6)
    splits = open_splits(f"wds/{tmp_path}/train-{{000..002}}.tar")
    assert len(splits.train) + len(splits.val) == 30
    splits = open_splits(f"wds/{tmp_path}")
    assert (len(splits.train), len(splits.val)) == (30, 6)
    for i in range(30):
        image, label, name = splits.train.read(i)
        assert (np.asarray(image)[0, 0, 0], label, name) == (i, i % 3, f"train-{i // 10:03}.tar/{i}")
    dataset = pickle.loads(pickle.dumps(splits.train.source))
    assert np.asarray(dataset.load(12))[0, 0, 0] == 12
    # A shard that breaks off costs what is behind the break.
    (tmp_path / "train-001.tar").write_bytes((tmp_path / "train-001.tar").read_bytes()[:4000])
    splits = open_splits(f"wds/{tmp_path}")
    assert 20 < len(splits.train) < 30
    assert any("train-001.tar" in name for name, _ in splits.broken)
    with pytest.raises(UserError, match="must lie on a local disk"):
        open_splits("wds/https://example.org/train-{000..002}.tar")


def test_torchvision_by_name(make_class_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_class_folder(splits=("train", "val"), per_class=4)
    splits = open_splits(f"torch/image_folder:{folder}")
    assert [len(splits.train), len(splits.val), splits.class_names[2]] == [12, 12, "class_2"]
    assert splits.val.read(0)[2] == os.path.join("class_0", "000.png")
    # The files of torchvision's MNIST, made up.
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 40), ("t10k", 20)):
        images = np.arange(count * 784, dtype=np.uint32).astype(np.uint8).tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(np.array([2051, count, 28, 28], ">i4").tobytes() + images)
        labels = (np.arange(count) % 10).astype(np.uint8).tobytes()
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(np.array([2049, count], ">i4").tobytes() + labels)
    splits = open_splits(f"torch/mnist:{tmp_path}")
    assert splits.test is not None
    assert (len(splits.train) + len(splits.val), len(splits.test), splits.in_chans) == (40, 20, 1)
    assert splits.test.read(3)[0].size == (28, 28)
    with pytest.raises(UserError, match="torch/nosuchset can't be opened"):
        open_splits(f"torch/nosuchset:{tmp_path}")


def test_hugging_face_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    write_parquet(tmp_path / "set" / "train.parquet", parquet_rows(12), ["cat", "dog", "cow"])
    write_parquet(tmp_path / "set" / "test.parquet", parquet_rows(6), ["cat", "dog", "cow"])
    splits = open_splits(f"hfds/{tmp_path}/set")
    assert splits.test is not None
    assert (len(splits.train) + len(splits.val), len(splits.test)) == (12, 6)
    assert (splits.class_names, splits.name) == (["cat", "dog", "cow"], "set")
    assert np.asarray(splits.test.read(5)[0])[0, 0, 0] == 5
    with pytest.raises(UserError, match="hfds/nobody/nothing can't be opened"):
        open_splits("hfds/nobody/nothing")


# --- what can't be used is said in one line ---------------------------------------------------------------------------


def refused(data: str | None, match: str, **options: Any) -> None:
    with pytest.raises(UserError, match=match) as caught:
        open_splits(data, **options)
    assert "\n" not in str(caught.value)


def test_unusable_data(tmp_path: Path, make_class_folder: Callable[..., Path]) -> None:
    refused(str(tmp_path / "nowhere"), r"no such data: .*nowhere'; allowed: a folder")
    refused("torch/", "no such data")
    refused(str(tmp_path), "no images in")
    (tmp_path / "a.zip").touch()
    refused(str(tmp_path / "a.zip"), "a.zip' is an archive: unpack it, and give the folder")
    (tmp_path / "a.xyz").touch()
    refused(str(tmp_path / "a.xyz"), "neither a folder nor a Parquet file")
    refused(str(make_class_folder(classes=1, name="one")), r"one class only \('class_0'\); 2 or more")
    refused(str(make_class_folder(splits=("val", "test"), name="no train")), "no train split")
    refused(str(make_class_folder(per_class=1, name="few")), "too few to split off")
    folder = make_class_folder(splits=("train", "val"), name="more")
    (folder / "val" / "class_1").rename(folder / "val" / "stranger")
    refused(str(folder), "classes that training has not: 'stranger'; allowed: 'class_0'")
    (folder / "val" / "stranger").rename(folder / "val" / "Class_1")
    refused(str(folder), r"'Class_1'; allowed: 'class_0', 'class_1', 'class_2' \(the case of letters counts\)$")
    refused(None, "val_fraction must be between 0 and 1, got 1.5", val_fraction=1.5)
    refused(None, "none of 64 images .* with 7 channels; .* it has 1 channel, 7 are wanted", in_chans=7)


def test_unusable_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"nothing of the kind")
    refused(str(path), "can't read .* as Parquet")
    rows = parquet_rows(6)
    for change, match in (
        (lambda row: {"picture": row["image"], "label": 0}, "has columns 'picture', 'label'; expected one named image"),
        (lambda row: {"image": row["image"], "x": 0}, "expected one named label"),
        (lambda row: {**row, "label": 1.5}, "labels of type float64"),
        (lambda row: {**row, "label": None if row["label"] else 1}, "rows without a label"),
        (lambda row: {**row, "label": row["label"] - 1}, "labels from -1 to 1"),
        (lambda row: {**row, "label": 0}, "one class only"),
        (lambda row: {**row, "label": -1}, "nothing in .* has a label"),
    ):
        write_parquet(path, [change(row) for row in rows])
        refused(str(path), match)
    write_parquet(path, rows, ["only", "two"])
    refused(str(path), "labels from 0 to 2; allowed: 0 to 1")


# --- one split, for evaluation ----------------------------------------------------------------------------------------


def test_open_set_chooses_its_split(make_class_folder: Callable[..., Path]) -> None:
    whole = str(make_class_folder(per_class=10))
    datasets = str(make_class_folder(splits=("train", "val", "test"), per_class=2, name="parts"))
    assert len(open_set(whole)) == 30
    assert len(open_set(whole, "all")) == 30
    np.testing.assert_array_equal(open_set(whole, "val").indices, open_splits(whole).val.indices)
    assert "test" in open_set(datasets).source.load.__self__.root  # type: ignore[attr-defined]
    assert len(open_set(None)) == len(open_set(None, "test"))
    assert len(open_set(datasets, "train")) == 6
    for data, split, match in (
        (whole, "test", "has no test split"),
        (datasets, "all", "comes in splits; choose one of train, val, test"),
        (whole, "dev", "split must be one of auto, train, val, test, all, got 'dev'"),
    ):
        with pytest.raises(UserError, match=match):
            open_set(data, split)


def test_a_folder_above_the_class_folders_is_told(
    make_class_folder: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_class_folder(name="photos/animals")
    for root, told in ((folder.parent, "lie in folders within, such as animals/class_0"), (folder, "")):
        caplog.clear()
        open_set(str(root))
        assert told in caplog.text
        assert bool(caplog.text) == bool(told)


def test_open_set_uses_the_models_classes(make_class_folder: Callable[..., Path]) -> None:
    folder = str(make_class_folder(classes=3, per_class=2))
    names = ["class_2", "other", "class_0", "class_1"]
    dataset = open_set(folder, class_names=names)
    assert dataset.class_names == names
    assert dataset.labels.tolist() == [2, 2, 3, 3, 0, 0]
    with pytest.raises(UserError, match=r"has 3 classes, of which the model does not know 'class_1'.*knows 2"):
        open_set(folder, class_names=["class_0", "class_2"])
    with pytest.raises(UserError, match=r"knows 3: .*'Class_2' \(the case of letters counts\)$"):
        open_set(folder, class_names=["class_0", "class_1", "Class_2"])
    assert open_set(None, class_names=[f"digit {i}" for i in range(10)]).class_names[3] == "digit 3"
    with pytest.raises(UserError, match="10 classes, of which the model does not know"):
        open_set(None, class_names=["a", "b"])


# --- bad data --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("policy", ["small", "imagenet"])
def test_of_bad_data_only_the_bad_files_are_lost(
    oddities: tuple[Path, set[str]], num_workers: int, policy: str
) -> None:
    root, bad = oddities
    dataset = open_set(str(root))
    dataset.replace = True
    assert dataset.class_names == ["CLASS_1", "class_0", "class_1"]
    assert len(dataset) == 6 + 6 + 6 + 13 + len(bad)  # the image beside the class folders belongs to no class
    dataset.transform = train_transform(SIZE, policy=policy)
    for images, labels in make_loader(dataset, 8, num_workers=num_workers):
        assert images.isfinite().all()
        assert (labels >= 0).all()
    assert {name for name, _ in dataset.broken} == bad
    assert all(reason for _, reason in dataset.broken)
    good = ImageDataset(dataset.source, transform=eval_transform(SIZE), replace=False)
    labels = torch.cat([labels for _, labels in make_loader(good, 8)])
    assert (labels == IGNORE).sum() == len(bad)
    assert (labels >= 0).sum() == len(dataset) - len(bad)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_threads_give_the_same_batches(oddities: tuple[Path, set[str]], batch_size: int) -> None:
    root, bad = oddities
    dataset = open_set(str(root))

    def batches(num_workers: int | None) -> list[Any]:
        images = ImageDataset(dataset.source, transform=eval_transform(SIZE), replace=False)
        loader = make_loader(images, batch_size, num_workers=num_workers, rank=0, world_size=2)
        found = list(loader)
        assert len(found) == len(loader) == loader.yielded
        assert {name for name, _ in images.broken} <= bad
        return [*found, images.broken]

    torch.testing.assert_close(batches(None)[:-1], batches(0)[:-1], rtol=0, atol=0)
    assert batches(None)[-1] == batches(0)[-1]


def test_threads_read_a_batch_ahead_and_end_with_the_loop(make_class_folder: Callable[..., Path]) -> None:
    dataset = open_set(str(make_class_folder()), strict=True)
    dataset.transform = eval_transform(SIZE)
    read: list[int] = []
    load = dataset.source.load
    dataset.source.load = lambda i: [read.append(i), load(i)][1]
    batches = iter(make_loader(dataset, 4, num_workers=None))
    for step in (1, 2):
        next(batches)
        waited = time.monotonic() + 10
        while len(read) < 4 * (step + 1) and time.monotonic() < waited:
            time.sleep(0.01)
        assert sorted(read) == list(range(4 * (step + 1)))
    batches.close()
    assert not any(thread.name.startswith("reader") for thread in threading.enumerate())

    def fails(i: int) -> Any:
        raise BrokenImage("damaged")

    dataset.source.load = fails
    with pytest.raises(UserError, match=r"can't be read: damaged"):
        list(make_loader(dataset, 4, num_workers=None))
    assert not any(thread.name.startswith("reader") for thread in threading.enumerate())


def test_broken_files_in_memory(oddities: tuple[Path, set[str]]) -> None:
    root, bad = oddities
    splits = open_splits(str(root))
    data = DataModule(splits, train_transform(SIZE), eval_transform(SIZE), batch_size=4, progress=False)
    seen = [sum((labels >= 0).sum().item() for _, labels in loader) for loader in (data.val_dataloader(),)]
    assert len(list(data.train_dataloader())) == len(splits.train) // 4
    assert {name for name, _ in data.broken} == bad
    assert seen[0] == len(splits.val) - len(splits.val.broken)


def test_strict_stops_at_the_first(oddities: tuple[Path, set[str]]) -> None:
    dataset = open_set(str(oddities[0]), strict=True)
    dataset.transform = eval_transform(SIZE)
    with pytest.raises(UserError, match=r"^'class_0/\S+' can't be read: ") as caught:
        list(make_loader(dataset, 8))
    assert "\n" not in str(caught.value)


def test_nothing_readable_is_reported(tmp_path: Path) -> None:
    for label in "ab":
        (tmp_path / label).mkdir()
        for i in range(3):
            (tmp_path / label / f"{i}.jpg").write_bytes(b"no")
    splits = open_splits(str(tmp_path))
    splits.train.transform = train_transform(SIZE)
    with pytest.raises(UserError, match="none of the 4 images can be read; the first is 'a/"):
        splits.train[0]


def test_classes_that_differ_in_case_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for label in ("Cat", "cat", "dog"):
        (tmp_path / label).mkdir()
        for i in range(3):
            Image.new("RGB", (8, 8)).save(tmp_path / label / f"{i}.png")
    (tmp_path / "empty").mkdir()
    if len(os.listdir(tmp_path)) < 4:
        pytest.skip("this file system does not tell them apart")
    with caplog.at_level(logging.WARNING):
        splits = open_splits(str(tmp_path))
    assert splits.class_names == ["Cat", "cat", "dog"]
    assert "'Cat', 'cat' differ only in case and are kept apart" in caplog.text
    assert "no images in class folder 'empty'" in caplog.text


def _folders(root: Path, *names: str) -> str:
    """Small images in these folders."""
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (8, 8), "white").save(root / name / f"{i}.png")
    return str(root)


@pytest.mark.parametrize("words", [("Training", "Testing"), ("TRAIN", "TEST")])
def test_folders_of_splits_in_any_case(tmp_path: Path, words: tuple[str, str]) -> None:
    splits = open_splits(_folders(tmp_path, *(f"{word}/{label}" for word in words for label in ("cat", "dog"))))
    assert splits.class_names == ["cat", "dog"]
    assert splits.test is not None
    (tmp_path / words[0] / "metadata.csv").write_text("file_name,label\ncat/0.png,x\ndog/0.png,y\n")
    assert open_source(str(tmp_path)).train.class_names == ["x", "y"]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    source = open_source(_folders(tmp_path, "Bus/2019", "Bus/2020", "Train/2019", "Train/2020")).train
    assert source is not None
    assert source.class_names == ["Bus", "Train"]
    assert len(source) == 8


def test_a_folder_whose_validation_split_lacks_a_class(tmp_path: Path) -> None:
    data = _folders(tmp_path, "train/a", "train/b", "train/c", "val/b", "val/c")
    for name in (data, f"torch/image_folder:{data}"):
        val = open_splits(name).val
        assert [val.class_names[label] for label in val.labels] == ["b", "b", "c", "c"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("train/a", "train/b", "dev/a"), "folders beside those of the splits are left out: 'dev'"),
        (("a", "b", "."), "images beside the class folders are left out: '0.png', '1.png'"),
        (("seg_train/seg_train/sea", "seg_test/seg_test/sea"), "such as seg_test/seg_test"),
        (("fold1/sea", "fold1/sky", "fold2/sea", "fold2/sky"), "such as fold1/sea"),
        (("a/2019", "a/2020", "b/2020"), ""),
    ],
)
def test_images_that_are_not_taken_as_they_lie_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, names: tuple[str, ...], said: str
) -> None:
    (tmp_path / "data").mkdir()
    data = tmp_path / "data"
    _folders(data, *(name for name in names if name != "."))
    if "." in names:
        for i in range(2):
            Image.new("RGB", (8, 8), "white").save(data / f"{i}.png")
    open_splits(str(data))
    assert said in caplog.text
    assert bool(caplog.text) == bool(said)


def test_files_that_say_no_split_beside_others_that_do_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("train-0.parquet", "dev.parquet"):
        write_parquet(tmp_path / name, parquet_rows(6))
    source = open_source(str(tmp_path)).train
    assert source is not None
    assert len(source) == 12
    assert "that of 'dev.parquet' says neither, and is learnt from" in caplog.text


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_images_that_are_all_nearly_black_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: str) -> None:
    data = _folders(tmp_path, "a", "b")
    for path in tmp_path.glob("*/*.png"):
        Image.new("L", (8, 8), 15).convert(mode).save(path)
    open_splits(data)
    assert "images from all over the training split are nearly black: no value is above 15 of 255" in caplog.text
    caplog.clear()
    Image.new(mode, (8, 8), "white").save(tmp_path / "a" / "0.png")
    Image.new(mode, (8, 8), "white").save(tmp_path / "a" / "1.png")
    open_splits(data)
    assert not caplog.text


def test_augmentation_that_no_policy_reads_is_told(caplog: pytest.LogCaptureFixture) -> None:
    config = {"mean": [0.5], "std": [0.5], "interpolation": "bicubic", "crop_pct": 1.0}
    splits = open_splits()
    for side, unread in ((32, "scale=(0.2, 1.0) has no effect: imagenet reads it"), (96, "degrees=9.0 has no effect")):
        caplog.clear()
        Classify.loaders(splits, {**config, "input_size": [1, side, side]}, Augment(scale=(0.2, 1.0), degrees=9.0), {})
        assert unread in caplog.text
        assert len(caplog.records) == 1
    for augment, unread in (
        (Augment(policy="none", hflip=1.0), "hflip=1.0 has no effect: small or imagenet reads it"),
        (Augment(aa="rand-m9", color_jitter=0.4), "color_jitter=0.4 has no effect beside aa"),
    ):
        caplog.clear()
        Classify.loaders(splits, {**config, "input_size": [1, 32, 32]}, augment, {})
        assert [record.getMessage()[: len(unread)] for record in caplog.records] == [unread]


def test_class_names_in_a_file_may_begin_with_a_mark_of_byte_order(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfcat \r\ndog\r\n")
    assert read_class_names(tmp_path) == ["cat", "dog"]


# --- transforms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_chans", [1, 2, 3, 4])
@pytest.mark.parametrize("policy", ["small", "imagenet", "none"])
def test_every_number_of_channels(in_chans: int, policy: str, class_image: Callable[..., Image.Image]) -> None:
    options: dict[str, Any] = {"aa": "rand-m9-mstd0.5-inc1"} if in_chans in (1, 3) and policy != "none" else {}
    transform = train_transform((24, 16), in_chans=in_chans, policy=policy, re_prob=1.0, **options)
    for mode in ("L", "LA", "RGB", "RGBA"):
        out = transform(class_image(1, size=(40, 30), mode=mode))
        assert out.shape == (in_chans, 24, 16)
        assert out.dtype == torch.float32
        assert out.isfinite().all()


def test_evaluation_is_what_timm_does(class_image: Callable[..., Image.Image]) -> None:
    from timm.data import create_transform

    image = class_image(2, size=(70, 50))
    for size, crop_pct in ((32, 0.9), (48, 1.0)):
        theirs: Any = create_transform(size, interpolation="bicubic", crop_pct=crop_pct)
        ours = eval_transform(size, interpolation="bicubic", crop_pct=crop_pct)
        torch.testing.assert_close(ours(image), theirs(image), rtol=0, atol=1e-5)


@pytest.mark.parametrize("crop_mode", ["center", "border", "squash"])
@pytest.mark.parametrize("size", [(70, 50), (33, 90), (20, 20), (400, 31), (9, 190)])
def test_every_crop_mode_is_timms_in_training_and_in_an_exported_file(
    class_image: Callable[..., Image.Image], crop_mode: str, size: tuple[int, int]
) -> None:
    from timm.data import create_transform

    from transcnn.onnx.predict import to_input

    image = class_image(2, size=size)
    cropped = max(size) > 8 * min(size) and crop_mode == "center"  # of those the ends are left out before
    for target, crop_pct, mean in (
        ((32, 32), 0.9, [0.485, 0.456, 0.406]),
        ((32, 32), 1.0, [0.3, 0.1, 0.7]),  # half-way between two values of a pixel
        ((40, 24), 0.9, [0.485, 0.456, 0.406]),
    ):
        config: dict[str, Any] = {"interpolation": "bicubic", "crop_pct": crop_pct, "crop_mode": crop_mode}
        config |= {"mean": mean, "std": [0.229, 0.224, 0.225]}
        ours = eval_transform(target, **config)(image)
        theirs: Any = create_transform((3, *target), **config)
        if not cropped:
            torch.testing.assert_close(ours, theirs(image), rtol=0, atol=1e-5)
        exported = torch.from_numpy(to_input(image, {**config, "input_size": [3, *target]}))
        torch.testing.assert_close(exported, ours, rtol=0, atol=1e-4)


def test_extreme_images_with_borders_keep_a_pixel() -> None:
    for size in ((30000, 1), (1, 5000)):
        assert eval_transform(32, crop_mode="border")(Image.new("RGB", size)).shape == (3, 32, 32)
        assert eval_transform(32, crop_mode="squash")(Image.new("RGB", size)).shape == (3, 32, 32)
    with pytest.raises(UserError, match="crop_mode must be one of center, border, squash, got 'corner'"):
        eval_transform(32, crop_mode="corner")


def test_the_data_set_decides_which_value_is_white_and_the_run_keeps_it(tmp_path: Path) -> None:
    """12 bits in files of 16, of which an image with a single brighter value makes no exception."""
    for label in ("a", "b"):
        (tmp_path / "d" / label).mkdir(parents=True)
        for i in range(6):
            values = np.linspace(0, 4095, 64).round().astype(np.uint16).reshape(8, 8)
            values[0, 0] = 4096 + i if label == "a" else 0
            Image.fromarray(values).save(tmp_path / "d" / label / f"{i}.png")
    splits = open_splits(str(tmp_path / "d"))
    assert splits.pixel_range == (0.0, 4095.0)
    for images in (splits.train, splits.val):
        grey = np.asarray(images.read(0)[0])
        np.testing.assert_array_equal(grey.ravel()[1:], np.linspace(0, 255, 64).round()[1:].astype(np.uint8))
    images = open_set(str(tmp_path / "d"))
    assert len(np.unique(np.asarray(images.read(0)[0]))) < 20  # nobody said so
    config = {**config_of(8), "pixel_range": list(splits.pixel_range)}
    images = Classify.split_loader(images, config, {}, batch_size=4).dataset
    assert len(np.unique(np.asarray(images.read(0)[0]))) > 60


def test_images_beyond_the_first_ones_count_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(channels, "LOOKED_AT", 2)  # the first and the last
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for i in range(4):
            values = np.full((8, 8), 4000, np.uint16)
            Image.fromarray(values * (15 if (label, i) == ("a", 3) else 1)).save(tmp_path / label / f"{i}.png")
    splits = open_splits(str(tmp_path), val_fraction=0.01)
    assert splits.pixel_range is None  # 60,000 needs all of 16 bits
    assert not caplog.text
    name = splits.train.name(1)
    Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    assert open_splits(str(tmp_path), val_fraction=0.01).in_chans == 1
    assert f"{name!r} is not: --in_chans 3 keeps its colours" in caplog.text


def config_of(side: int) -> dict[str, Any]:
    config = {"input_size": [1, side, side], "mean": [0.5], "std": [0.25], "interpolation": "bicubic"}
    return {**config, "crop_pct": 1.0, "crop_mode": "center"}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([0.0, 0.5, 1.02], np.float32), None),  # floats from 0 to 1, as the dtype says
        (np.array([0.0, 100.0, 250.0], np.float32), (0.0, 255.0)),
        (np.array([-1.0, 0.0, 1.0], np.float32), (-1.0, 1.0)),
        (np.array([0, 100, 256], np.int32), (0.0, 255.0)),
        (np.array([0, 100, 70000], np.int32), None),
        (np.array([0, 100, 1 << 20], np.int32), (0.0, float(1 << 20))),
        (np.array([0, 100, 40000], np.uint16), None),
        (np.array([0, 100, 255], np.uint8), None),
    ],
)
def test_pixel_ranges(tmp_path: Path, values: np.ndarray, expected: tuple[float, float] | None) -> None:
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for i in range(3):
            Image.fromarray(values[None]).save(tmp_path / label / f"{i}.tif")
    assert open_splits(str(tmp_path)).pixel_range == expected


def test_small_policy_shifts_and_flips() -> None:
    image = Image.fromarray(np.arange(1, 65, dtype=np.uint8).reshape(8, 8))
    transform = train_transform(8, in_chans=1, mean=(0.0,), std=(1 / 255,), pad=2, hflip=0.5)
    padded = np.pad(np.asarray(image), 2)
    allowed = {}
    for y in range(5):
        for x in range(5):
            window = padded[y : y + 8, x : x + 8]
            allowed[window.tobytes()] = (y, x, False)
            allowed[window[:, ::-1].tobytes()] = (y, x, True)
    seen = {allowed[transform(image, seed)[0].round().numpy().astype(np.uint8).tobytes()] for seed in range(600)}
    assert len(seen) == 50  # each shift, flipped and not
    still = train_transform(8, in_chans=1, mean=(0.0,), std=(1 / 255,), pad=0, hflip=0.0)
    for seed in range(20):
        np.testing.assert_array_equal(still(image, seed)[0].round().numpy(), np.asarray(image))


def test_probabilities_are_kept() -> None:
    images = torch.zeros(4000, 1, 4, 4, dtype=torch.uint8)
    images[:, 0, :, 0] = 255
    images[:, 0, 0, 1] = 128
    options = {"in_chans": 1, "mean": (0.0,), "std": (1.0,), "pad": 0}
    seeds = sample_seeds(0, 0, np.arange(4000))
    out = train_transform(4, hflip=0.3, vflip=0.2, **options).finish(images, seeds)
    assert (out[:, 0, 1, 3] == 1).float().mean() == pytest.approx(0.3, abs=0.03)
    assert ((out[:, 0, 3] - 0.5).abs() < 0.01).any(1).float().mean() == pytest.approx(0.2, abs=0.03)
    assert images[:, 0, :, 0].eq(255).all()  # the images themselves are left alone
    erased = train_transform(4, hflip=0.0, re_prob=0.25, re_mode="const", **options).finish(images + 255, seeds)
    assert (erased == 0).flatten(1).any(1).float().mean() == pytest.approx(0.25, abs=0.03)


def test_erasing_covers_what_it_should() -> None:
    images = torch.full((2000, 3, 32, 32), 200, dtype=torch.uint8)
    options = {"pad": 0, "hflip": 0.0, "re_prob": 1.0}
    seeds = sample_seeds(5, 0, np.arange(2000))
    clean = train_transform(32, pad=0, hflip=0.0).finish(images, seeds)
    areas = (train_transform(32, re_mode="const", **options).finish(images, seeds) != clean).all(1).float().mean((1, 2))
    assert 0.01 < areas.min() < 0.05
    assert 0.28 < areas.max() < 0.37
    assert areas.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.01)
    noisy = train_transform(32, re_mode="pixel", **options).finish(images, seeds)
    noise = noisy[noisy != clean]
    assert abs(noise.mean()) < 0.02
    assert noise.std() == pytest.approx(1, abs=0.02)


def test_rotation_and_zoom_keep_the_centre(class_image: Callable[..., Image.Image]) -> None:
    image = Image.new("L", (33, 33))
    image.paste(255, (11, 11, 22, 22))
    transform = train_transform(33, in_chans=1, mean=(0.0,), std=(1.0,), pad=0, hflip=0.0, degrees=20, zoom=0.2)
    results = torch.stack([transform(image, seed) for seed in range(64)])
    assert results[:, 0, 16, 16].min() == 1.0
    areas = results.sum((1, 2, 3)) / 121
    assert areas.min() == pytest.approx(0.64, abs=0.06)
    assert areas.max() == pytest.approx(1.44, abs=0.1)
    assert (results != results[0]).flatten(1).any(1).sum() == 63


def test_rotation_keeps_angles_where_sides_differ() -> None:
    image = Image.new("L", (128, 64))
    image.paste(255, (24, 30, 104, 34))  # a bar of 80x4 pixels
    options: dict[str, Any] = {"in_chans": 1, "mean": (0.0,), "std": (1.0,), "pad": 0, "hflip": 0.0, "policy": "small"}
    transform = train_transform((64, 128), degrees=20, **options)
    slopes = []
    for seed in range(16):
        turned = transform(image, seed)[0]
        rows, columns = (turned > 0.5).nonzero().numpy().T
        spread = np.linalg.eigvalsh(np.cov(columns, rows))
        assert np.sqrt(12 * spread).tolist() == pytest.approx([4, 80], abs=2)  # as long and as thick as it was
        slopes.append(abs(np.polyfit(columns, rows, 1)[0]))
    assert max(slopes) == pytest.approx(math.tan(math.radians(20)), abs=0.05)


def test_a_crop_of_more_than_eight_to_one_sees_all_of_an_image_of_its_shape() -> None:
    image = Image.fromarray(np.tile(np.linspace(0, 255, 2048).astype(np.uint8), (64, 1)))  # 32:1
    config = {"input_size": [1, 16, 512], "mean": [0.0], "std": [1 / 255], "interpolation": "bicubic"}
    for crop_pct, (left, right) in ((1.0, (0, 255)), (0.875, (16, 239))):
        options: dict[str, Any] = {"in_chans": 1, "mean": (0.0,), "std": (1 / 255,)}
        ours = eval_transform((16, 512), crop_pct=crop_pct, **options)(image)
        assert ours[0, 8, [0, -1]].tolist() == pytest.approx([left, right], abs=1.5)
        by_file = to_input(image, {**config, "crop_pct": crop_pct, "crop_mode": "center"})
        np.testing.assert_allclose(by_file, ours.numpy(), atol=1e-3)
        assert _crop_box((64, 2048), (16, 512), {**config, "crop_pct": crop_pct})[1] == pytest.approx(
            (2048 * left / 255, 2048 * right / 255), abs=12
        )
    learnt = train_transform((16, 512), policy="small", pad=0, hflip=0.0, **options)(image, 0)
    assert learnt[0, 8, [0, -1]].tolist() == pytest.approx([0, 255], abs=1.5)


@pytest.mark.parametrize("size", [(30000, 1), (1, 30000), (1, 1)])
def test_extreme_aspect_ratios_take_little_memory(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, "red")
    for transform in (eval_transform(64), train_transform(64), train_transform(64, policy="imagenet")):
        assert transform(image).shape == (3, 64, 64)


def test_statistics_fit_the_channels() -> None:
    assert channel_stats((0.1, 0.2, 0.3), 3) == (0.1, 0.2, 0.3)
    assert channel_stats((0.1, 0.2, 0.3), 1) == pytest.approx((0.2,))
    assert channel_stats((0.1, 0.2, 0.3), 2) == pytest.approx((0.2, 0.5))
    assert channel_stats((0.1, 0.2, 0.3), 4) == (0.1, 0.2, 0.3, 0.5)
    assert channel_stats((0.4,), 3) == (0.4, 0.4, 0.4)
    with pytest.raises(UserError, match="need 1, 3 or in_chans=4 values, got 2"):
        channel_stats((0.1, 0.2), 4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"policy": "huge"}, "policy must be one of auto, imagenet, small, none, got 'huge'"),
        ({"re_mode": "rand"}, "re_mode must be const or pixel"),
        ({"hflip": 1.5}, "hflip must be from 0 to 1, got 1.5"),
        ({"aa": "magic"}, "aa must be a RandAugment string"),
        ({"aa": "rand-m9", "in_chans": 4}, "works on 1 or 3 channels, got in_chans=4"),
        ({"interpolation": "cubic"}, "interpolation must be nearest, bilinear, bicubic or lanczos"),
        ({"img_size": (1, 2, 3)}, "img_size must be one side"),
        ({"img_size": 0}, "img_size must be one side"),
    ],
)
def test_transform_arguments(options: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        train_transform(**{"img_size": 32, **options})
    with pytest.raises(UserError, match="crop_pct"):
        eval_transform(32, crop_pct=1.5)


# --- the same data however it is asked for ----------------------------------------------------------------------------


def test_counter_rng_is_uniform_and_uncorrelated() -> None:
    rng = CounterRNG(sample_seeds(0, 3, np.arange(20000)))
    first, second = rng(), rng()
    for values in (first, second):
        assert values.min() >= 0
        assert values.max() < 1
        counts = np.histogram(values, 20, (0, 1))[0]
        assert (np.abs(counts - 1000) < 150).all()  # five standard deviations
    table = [
        first,
        second,
        CounterRNG(sample_seeds(0, 4, np.arange(20000)))(),
        CounterRNG(sample_seeds(1, 3, np.arange(20000)))(),
    ]
    assert np.abs(np.corrcoef([*table, np.roll(first, 1)]) - np.eye(5)).max() < 0.04
    assert len(np.unique(sample_seeds(0, np.arange(50)[:, None], np.arange(1000)))) == 50000


def test_seeding_gives_the_generators_back() -> None:
    def state() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002

    saved = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    expected = state()
    random.setstate(saved[0])
    np.random.set_state(saved[1])  # noqa: NPY002
    torch.set_rng_state(saved[2])
    with seeded(2**63 + 5):
        inside = state()
    assert state() == expected
    with seeded(2**63 + 5):
        assert state() == inside


@pytest.mark.parametrize("policy", ["small", "imagenet"])
def test_samples_depend_on_seed_epoch_and_index_only(class_folder: Path, policy: str) -> None:
    options: dict[str, Any] = {"policy": policy, "aa": "rand-m9-mstd0.5-inc1", "re_prob": 0.5, "degrees": 5}

    def batches(num_workers: int, epoch: int = 2, seed: int = 0, batch_size: int = 7) -> list[torch.Tensor]:
        splits = open_splits(str(class_folder))
        data = DataModule(
            splits,
            train_transform(SIZE, **options),
            eval_transform(SIZE),
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            progress=False,
        )
        data.set_epoch(epoch)
        torch.rand(num_workers + 1)  # the state of global generators doesn't matter
        random.random()
        return [images for images, _ in data.train_dataloader()]

    reference = torch.cat(batches(0))
    for other in (batches(2), batches(0, batch_size=3)):
        torch.testing.assert_close(torch.cat(other), reference, rtol=0, atol=0)
    assert not torch.equal(torch.cat(batches(0, epoch=3)), reference)
    assert not torch.equal(torch.cat(batches(0, seed=1)), reference)


def test_memory_and_disk_give_the_same(class_folder: Path) -> None:
    dataset = open_set(str(class_folder))
    dataset.transform = train_transform(SIZE, re_prob=0.5)
    from_disk = torch.stack([dataset[i][0] for i in range(len(dataset))])
    assert not dataset.fill_cache(10)
    assert dataset.fill_cache()
    in_memory = torch.stack([image for image, _ in dataset.__getitems__(range(len(dataset)))])
    torch.testing.assert_close(in_memory, from_disk, rtol=0, atol=0)
    dataset.transform = eval_transform(2 * SIZE)  # another size than is kept: read again
    assert dataset[0][0].shape == (3, 2 * SIZE, 2 * SIZE)
    dataset.transform = train_transform(SIZE, policy="imagenet")
    assert not dataset.fill_cache()
    with pytest.raises(ValueError, match="no transform"):
        ImageDataset(dataset.source)[0]
    with pytest.raises(IndexError):
        dataset[len(dataset)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_fast_forward_reads_nothing_in_between(num_workers: int) -> None:
    read: list[int] = []
    source = numbered(40)
    load = source.load
    source.load = lambda i: (read.append(i), load(i))[1]
    splits = Splits(ImageDataset(source), ImageDataset(numbered(10)), None, source.class_names, "numbers", Channels(1))
    random_crop = train_transform(
        SIZE, in_chans=1, policy="imagenet", scale=(1, 1), ratio=(1, 1), mean=(0,), std=(1 / 255,)
    )
    data = DataModule(splits, random_crop, plain(), batch_size=4, num_workers=num_workers, progress=False)
    data.set_epoch(3)
    loader = data.train_dataloader()
    whole = [numbers(images) for images, _ in loader]
    assert sorted(chain(*whole)) == list(range(40))
    read.clear()
    data.fast_forward(3, 7)
    assert len(loader) == 10
    assert [numbers(images) for images, _ in loader] == whole[7:]
    if not num_workers:  # workers' reading isn't seen here
        assert len(read) == 12
    loader.set_epoch(4)
    assert len([numbers(images) for images, _ in loader]) == 10


def test_state_of_the_loader() -> None:
    dataset = ImageDataset(numbered(40), transform=plain())
    loader = make_loader(dataset, 4, training=True)
    loader.set_epoch(2)
    whole, states = [], []
    for images, _ in loader:
        whole.append(numbers(images))
        states.append(loader.state_dict())
    assert states[0] == {"epoch": 2, "batch": 1}
    for done in (1, 6):
        other = make_loader(dataset, 4, training=True)
        other.load_state_dict(states[done - 1])
        other.set_epoch(2)  # as Lightning does at an epoch's start
        assert [numbers(images) for images, _ in other] == whole[done:]
    other = make_loader(dataset, 4, training=True)
    other.load_state_dict(states[-1])  # taken at an epoch's end: the next one follows
    assert other.state_dict() == {"epoch": 3, "batch": 0}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_processes_share_without_loss_or_repetition(world_size: int) -> None:
    length, batch = 26, 12 // world_size
    ranks = [EpochSampler(length, training=True, rank=r, world_size=world_size) for r in range(world_size)]
    for sampler in ranks:
        sampler.set_epoch(5)
    mine = [[sample.i for sample in sampler] for sampler in ranks]
    assert len({len(dataset) for dataset in mine}) == 1
    assert len(set(chain(*mine))) == length // world_size * world_size
    one = EpochSampler(length, training=True)
    one.set_epoch(5)
    order = [sample.i for sample in one]
    for step in range(2):  # a global batch is the same whatever the number of processes
        together = chain(*(dataset[step * batch : (step + 1) * batch] for dataset in mine))
        assert set(together) == set(order[12 * step : 12 * step + 12])
    ranks = [EpochSampler(length, training=False, rank=r, world_size=world_size) for r in range(world_size)]
    samples = [list(sampler) for sampler in ranks]
    assert len({len(dataset) for dataset in samples}) == 1
    assert sorted(sample.i for dataset in samples for sample in dataset if sample.counts) == list(range(length))


def test_padding_between_processes_is_not_counted() -> None:
    dataset = ImageDataset(numbered(5), transform=plain(), replace=False)
    labels = [
        label
        for rank in range(2)
        for _, batch in make_loader(dataset, 2, rank=rank, world_size=2)
        for label in batch.tolist()
    ]
    assert sorted(labels) == [IGNORE, 0, 1, 2, 3, 4]


def test_sets_smaller_than_a_batch_are_used() -> None:
    loader = make_loader(ImageDataset(numbered(5), transform=plain()), 8, training=True)
    assert [len(labels) for _, labels in loader] == [5]
    loader = make_loader(ImageDataset(numbered(9), transform=plain()), 4, training=True)
    assert [len(labels) for _, labels in loader] == [4, 4]


def test_data_module_arguments() -> None:
    splits = open_splits(None)
    for options, match in (
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"num_workers": -1}, "num_workers must be 0 or more"),
    ):
        with pytest.raises(UserError, match=match):
            DataModule(splits, plain(), plain(), **options)


def test_loaders_survive_pickling(class_folder: Path) -> None:
    splits = open_splits(str(class_folder))
    splits.train.transform = train_transform(SIZE, policy="imagenet")
    again = pickle.loads(pickle.dumps(splits.train))
    torch.testing.assert_close(again[3][0], splits.train[3][0], rtol=0, atol=0)
    digits = open_splits(None).train
    assert pickle.loads(pickle.dumps(digits)).read(0)[0].size == (8, 8)


class Recorder(L.LightningModule):
    """Learns nothing and keeps what it was shown."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []
        self.stop_at = stop_at

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen.append(numbers(batch[0]))
        return self.weight * 0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def on_train_batch_end(self, *args: Any) -> None:
        if self.global_step == self.stop_at:
            self.trainer.save_checkpoint(Path(self.trainer.default_root_dir) / "stopped.ckpt")
            self.trainer.should_stop = True

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.parametrize("stop_at", [3, 5, 7])
def test_lightning_resumes_in_the_middle_of_an_epoch(tmp_path: Path, stop_at: int) -> None:
    def fit(recorder: Recorder, **options: Any) -> list[list[int]]:
        names = [str(i) for i in range(5)]
        splits = Splits(ImageDataset(numbered(20)), ImageDataset(numbered(5)), None, names, "n", Channels(1))
        data = DataModule(splits, plain(), plain(), batch_size=4, progress=False)
        trainer = L.Trainer(
            max_epochs=3,
            min_epochs=0,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            default_root_dir=tmp_path,
        )
        trainer.fit(recorder, datamodule=data, weights_only=True, **options)
        return recorder.seen

    whole = fit(Recorder())
    assert len(whole) == 15
    assert all(sorted(chain(*whole[i : i + 5])) == list(range(20)) for i in (0, 5, 10))
    assert whole[:5] != whole[5:10]
    begun = fit(Recorder(stop_at=stop_at))
    assert begun[:stop_at] == whole[:stop_at]
    assert fit(Recorder(), ckpt_path=tmp_path / "stopped.ckpt") == whole[stop_at:]


def test_stratified_split_keeps_every_class() -> None:
    labels = np.array([0] * 50 + [1] * 3 + [2] + [3] * 2)
    rest, dataset = split_stratified(labels, 0.1, 0)
    assert sorted([*rest, *dataset]) == list(range(len(labels)))
    assert np.bincount(labels[dataset], minlength=4).tolist() == [5, 1, 0, 1]
    assert set(labels[rest]) == {0, 1, 2, 3}


@pytest.mark.parametrize("count", [3_000, pytest.param(500_000, marks=pytest.mark.slow)])
def test_large_folders_take_little_memory(tmp_path: Path, count: int) -> None:
    for label in "ab":
        (tmp_path / label).mkdir()
        for i in range(count):
            os.close(os.open(tmp_path / label / f"{i:07}.jpg", os.O_CREAT))
    tracemalloc.start()
    began = time.process_time()
    source = open_source(str(tmp_path)).train
    seconds, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert source is not None
    assert peak < 2 * count * 200  # bytes a file, while the names of one folder are sorted
    assert seconds < allowed(2 * count * 200e-6)
    splits = open_splits(str(tmp_path))
    assert len(splits.train) + len(splits.val) == 2 * count
    assert len(pickle.dumps(splits.train.source)) < 2 * count * 40  # bytes a file
    assert splits.train.source.name_of(count + 1) == "b/0000001.jpg"
    shutil.rmtree(tmp_path / "a")
    refused(str(tmp_path), "one class only")
