"""Images of any number of channels from training to every way of using what was trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models import adapt_input_conv

import transcnn
from transcnn.checkpoints.header import check_data_config
from transcnn.checkpoints.hub import save_pretrained
from transcnn.commands.data import data as data_command
from transcnn.commands.embed import embed
from transcnn.commands.evaluate import evaluate
from transcnn.commands.explain import explain
from transcnn.commands.export import export
from transcnn.commands.pack import pack
from transcnn.commands.predict import predict
from transcnn.commands.train import train
from transcnn.data.bands import Bands
from transcnn.data.images import read_image
from transcnn.data.sets.classify import open_splits
from transcnn.data.transforms.classify import eval_transform, train_transform
from transcnn.data.transforms.segment import TrainTransform
from transcnn.demo.server import find_examples
from transcnn.demo.viewer import Viewer
from transcnn.errors import UserError
from transcnn.explain.image import explain_image
from transcnn.export.check import comparisons
from transcnn.export.exporting import _describe
from transcnn.onnx.dense import class_map
from transcnn.onnx.predict import to_input
from transcnn.settings import Detect

tifffile = pytest.importorskip("tifffile")
TELLING = 5  # the channel that says the class
QUICK: dict[str, Any] = {
    "model": "transcnn_test",
    "img_size": 32,
    "accelerator": "cpu",
    "quiet": True,
    "num_workers": 0,
}


def scene(label: int, seed: int, size: tuple[int, int] = (20, 24), channels: int = 7) -> np.ndarray:
    """(H, W, 7) of uint16 on scales of their own; one channel is brighter above or below."""
    rng = np.random.default_rng(1000 * label + seed)
    pixels = rng.normal(1000, 100, (*size, channels)) * np.arange(1, channels + 1)
    half = slice(0, size[0] // 2) if label else slice(size[0] // 2, None)
    pixels[half, :, TELLING] *= 1.8
    return pixels.astype(np.uint16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two classes, as TIFF of seven bands, of seven pages, and as .npy."""
    root = tmp_path_factory.mktemp("bands")
    for split, count in (("train", 24), ("test", 6)):
        for label in range(2):
            (root / split / f"class_{label}").mkdir(parents=True)
            for i in range(count):
                pixels, path = scene(label, i + 100 * (split == "test")), root / split / f"class_{label}" / f"{i}"
                if i % 2:
                    tifffile.imwrite(f"{path}.tif", pixels, photometric="minisblack", planarconfig="contig")
                else:
                    pages = np.moveaxis(pixels, -1, 0)
                    tifffile.imwrite(f"{path}.tiff", pages, photometric="minisblack")
    return root


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    options = {"in_chans": 7, "epochs": 6, "batch_size": 8, "lr": 3e-3}
    train(data=folder, out=out, **QUICK, **options)
    return out


@pytest.fixture(scope="module")
def network(run):
    return transcnn.load(run)


def test_channels_are_counted_and_measured(folder):
    """Range, mean and deviation of each channel, on the training split alone."""
    splits = open_splits(str(folder), in_chans=7)
    pixels = np.stack([splits.train.read(i)[0].pixels for i in range(len(splits.train))]).reshape(-1, 7).astype(float)
    low, high = pixels.min(0), pixels.max(0)
    np.testing.assert_array_equal(splits.pixel_range, np.stack([low, high], 1))
    scaled = (pixels - low) / (high - low)
    np.testing.assert_allclose(splits.channels.mean, scaled.mean(0), atol=1e-9)
    np.testing.assert_allclose(splits.channels.std, scaled.std(0), atol=1e-9)
    assert {images.pixel_range == splits.pixel_range for images in (splits.train, splits.val, splits.test)} == {True}
    with pytest.raises(UserError, match=r"none of 44 images can be read with 6 channels; .* it has 7 channels, 6 are"):
        open_splits(str(folder), in_chans=6)


def test_what_was_measured_is_kept_with_the_weights(run, network):
    config = network.preprocessing
    assert config["input_size"] == [7, 32, 32]
    assert len(config["pixel_range"]) == len(config["mean"]) == len(config["std"]) == 7
    check_data_config(config)
    assert json.loads((run / "metrics.json").read_text())["top1"] >= 90  # twelve images, easily told apart
    found = evaluate(run, quiet=True, accelerator="cpu", num_workers=0)
    assert found["top1"] >= 90


def test_predictions_are_the_same_however_an_image_comes(run, network, folder, tmp_path):
    pixels = scene(1, 777)
    tifffile.imwrite(tmp_path / "x.tif", pixels, photometric="minisblack", planarconfig="contig", compression=None)
    np.save(tmp_path / "x.npy", pixels)
    inputs = [
        pixels,
        pixels.astype(np.float64),
        torch.from_numpy(np.moveaxis(pixels.astype(np.float32), -1, 0)),
        tmp_path / "x.tif",
        (tmp_path / "x.npy").read_bytes(),
    ]
    found = network.predict(inputs)
    assert {answer.label for answer in found} == {"class_1"}
    assert max(answer.score for answer in found) - min(answer.score for answer in found) < 1e-5
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    wrong = network.predict([pixels[..., :5], tmp_path / "x.png"])
    assert "it has 5 channels, 7 are wanted" in wrong[0].error
    assert "it has 3 channels, 7 are wanted" in wrong[1].error
    rows = predict(run, [tmp_path / "x.tif", tmp_path / "x.npy"], quiet=True, accelerator="cpu")
    assert [row["top"][0]["label"] for row in rows] == ["class_1"] * 2
    alone = embed(run, tmp_path / "x.npy", out=tmp_path / "x.parquet", quiet=True, accelerator="cpu")
    assert (alone["images"], alone["errors"]) == (1, {})  # an array without names beside it is an image
    vectors = embed(run, folder, knn=1, quiet=True, accelerator="cpu")
    assert vectors["knn"]["top1"] >= 90
    assert not vectors["errors"]


def test_numpy_makes_the_input_that_torch_makes():
    """Also of long images, and of smaller ones than the network's."""
    config = {"input_size": [7, 32, 24], "mean": [0.4] * 7, "std": [0.1] * 7, "crop_pct": 0.9}
    ends = [[0.0, 9000.0]] * 7
    for mode in ("center", "squash"):
        for method in ("bicubic", "bilinear"):
            chosen = {**config, "interpolation": method, "crop_mode": mode}
            options = {name: chosen[name] for name in ("mean", "std", "crop_pct", "crop_mode", "interpolation")}
            transform = eval_transform((32, 24), in_chans=7, bands=True, **options)
            for size in ((20, 24), (90, 64), (10, 200)):
                image = Bands(scene(0, 1, size), ends)
                ours, theirs = transform(image).numpy(), to_input(image, chosen)
                assert np.abs(ours - theirs).max() < 1e-3 * np.abs(ours).max()


@pytest.mark.slow
def test_an_exported_file_takes_the_same_images(run, network, folder, tmp_path):
    image = next((folder / "test" / "class_1").glob("*.tif"))
    wanted = network.predict(image)
    exported = export(run, out=tmp_path / "m.onnx", quiet=True)
    assert exported.info["data_config"]["pixel_range"] == network.preprocessing["pixel_range"]
    by_file = transcnn.load(tmp_path / "m.onnx").predict(image)
    assert (by_file.label, pytest.approx(by_file.score, abs=1e-4)) == (wanted.label, wanted.score)
    assert embed(tmp_path / "m.onnx", [image], out=tmp_path / "v.parquet", quiet=True)["images"] == 1


def test_what_an_export_says_and_compares(network):
    described = _describe(network, None)
    assert described["data_config"]["pixel_range"] == network.preprocessing["pixel_range"]
    assert "numbers of 7 channels" in described["steps"][0]
    batches = list(comparisons(network.preprocessing, None, None))
    assert {batch.shape[1] for batch in batches} == {7}
    assert all(0.1 < batch.std() < 10 for batch in batches[:3])


def test_other_ways_of_using_it(run, network, folder, tmp_path):
    """Explained, shared, looked at, and packed."""
    image = next((folder / "test" / "class_1").glob("*.tif"))
    wanted = network.predict(image)
    assert Path(explain(run, image, out=tmp_path / "e.png", quiet=True)).stat().st_size > 10_000
    found = explain_image(network, read_image(image, network.preprocessing["pixel_range"]))
    assert (found.image.shape[2], found.image.dtype) == (3, np.uint8)
    assert found.note.startswith("Of 7 channels the first three as red, green and blue, each stretched.")

    save_pretrained(run, tmp_path / "hub")
    with pytest.raises(UserError, match=r"images of 9 channels need data_config=\{'pixel_range'"):
        save_pretrained(transcnn.create_model("transcnn_test", in_chans=9), tmp_path / "hub2")
    assert transcnn.load(tmp_path / "hub").predict(image).score == pytest.approx(wanted.score, abs=1e-6)

    looked = data_command(folder, out=tmp_path / "page", quiet=True)
    assert (looked["broken"], looked["odd"]) == (
        [],
        [[name, reason] for name, reason in looked["odd"] if "frames" in reason],
    )
    assert looked["modes"]["7 x uint16"] == 30
    assert (tmp_path / "page" / "examples.png").is_file()
    packed = pack(folder, out=tmp_path / "packed", quiet=True)
    assert packed["left_out"] == 0
    assert evaluate(run, data=tmp_path / "packed", quiet=True, accelerator="cpu", num_workers=0)["top1"] >= 90


def test_the_page_says_what_it_takes(run, network, folder, tmp_path):
    image = next((folder / "test" / "class_1").glob("*.tif"))
    viewer = Viewer(network, optimize=False)
    bands = read_image(image, viewer.pixel_range)
    seen = viewer.visit(bands)
    assert (seen.image.mode, seen.input.shape[1]) == ("RGB", 7)
    assert viewer.answer(bands)["top"][0]["label"] == network.predict(image).label
    assert viewer.look(seen, viewer.stages[0].number)
    assert find_examples(network, None, tmp_path / "examples", run) == []  # no photographs to click
    assert viewer.takes.startswith("This network takes images of 7 channels: a TIFF of so many bands")


def test_a_run_goes_on_with_what_was_measured_at_its_beginning(run, folder, tmp_path, no_report):
    """Though the data has changed since."""
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(folder, tmp_path / "data")
    for path in (tmp_path / "data" / "train").glob("*/1*.tif"):
        tifffile.imwrite(path, tifffile.imread(path) * 3, photometric="minisblack", planarconfig="contig")
    kept = transcnn.load(run).preprocessing
    assert open_splits(str(tmp_path / "data"), in_chans=7).channels.mean != kept["mean"]
    options = {"accept_changed_data": True, "accelerator": "cpu", "quiet": True, "num_workers": 0}
    train(resume=tmp_path / "run", data=tmp_path / "data", epochs=7, **options)
    assert transcnn.load(tmp_path / "run").preprocessing == kept


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory) -> Path:
    """Seven-band images with a bright rectangle: label maps, and boxes in COCO's format."""
    root, rng = tmp_path_factory.mktemp("dense"), np.random.default_rng(0)
    for folder in ("images", "labels", "boxes/images", "boxes/annotations"):
        (root / folder).mkdir(parents=True)
    sheet: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "field"}]}
    for i in range(12):
        pixels = scene(0, i, (48, 64))
        top, left = int(rng.integers(4, 20)), int(rng.integers(4, 30))
        pixels[top : top + 20, left : left + 24, 2] *= 3
        labels = np.zeros((48, 64), np.uint8)
        labels[top : top + 20, left : left + 24] = 1
        np.save(root / "images" / f"{i}.npy", pixels)
        np.save(root / "boxes" / "images" / f"{i}.npy", pixels)
        np.save(root / "labels" / f"{i}.npy", labels)
        sheet["images"].append({"id": i, "file_name": f"{i}.npy", "width": 64, "height": 48})
        box = {"id": i, "image_id": i, "category_id": 1, "bbox": [left, top, 24, 20], "area": 480, "iscrowd": 0}
        sheet["annotations"].append(box)
    (root / "boxes" / "annotations" / "train.json").write_text(json.dumps(sheet))
    (root / "classes.txt").write_text("0 ground\n1 field\n")
    return root


def test_segmentation(dense_folder, tmp_path, no_report):
    """Channels are found without being told; the exported file gives the checkpoint's classes."""
    shutil.copytree(dense_folder, tmp_path / "data", ignore=shutil.ignore_patterns("boxes"))
    options = {"epochs": 1, "batch_size": 4, "out": tmp_path / "run"}
    train(data=tmp_path / "data", task="segment", **QUICK, **options)
    network = transcnn.load(tmp_path / "run")
    assert network.preprocessing["input_size"][0] == 7
    file = tmp_path / "data" / "images" / "0.npy"
    found = network.predict(file)
    assert found.mask.shape == (48, 64)
    rows = predict(tmp_path / "run", [file], out=tmp_path / "out", quiet=True, accelerator="cpu")
    assert Path(rows[0]["overlay"]).is_file()
    looked = data_command(tmp_path / "data", task="segment", quiet=True)
    assert looked["broken"] == []
    bands = read_image(file, network.preprocessing["pixel_range"])
    config, args = network.preprocessing, network.info["task_args"]

    def by_torch(pixels: np.ndarray) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            return {"logits": network.model(torch.from_numpy(pixels)).numpy()}

    by_numpy = class_map(by_torch, bands, {"task_args": args, "data_config": config})
    assert (by_numpy == found.mask).mean() > 0.999


def test_detection(dense_folder, tmp_path, no_report):
    """The detector normalises by what was measured, and is made again so."""
    small = Detect(short_side=64, long_side=64, fpn_channels=16)
    options = {"epochs": 1, "batch_size": 4, "out": tmp_path / "run"}
    train(data=dense_folder / "boxes", task="detect", detect=small, **{**QUICK, "img_size": None}, **options)
    network = transcnn.load(tmp_path / "run")
    transform = network.model.net.transform
    assert (transform.image_mean, transform.image_std) == (network.preprocessing["mean"], network.preprocessing["std"])
    assert len(transform.image_mean) == 7
    answer = network.predict(dense_folder / "images" / "0.npy")
    assert not getattr(answer, "error", None)


def test_what_changes_colours_is_refused(folder):
    for options, name in (({"aa": "rand-m9"}, "aa"), ({"color_jitter": 0.4, "policy": "imagenet"}, "color_jitter")):
        with pytest.raises(
            UserError, match=f"{name} changes the colours of 8-bit photographs, and these .* 7 channels"
        ):
            train_transform(16, in_chans=7, bands=True, mean=(0.5,), std=(0.2,), **options)
    with pytest.raises(UserError, match=r"leave color_jitter=0\.4 out"):
        TrainTransform((16, 16), in_chans=3, bands=True, color_jitter=0.4)


@pytest.mark.parametrize("policy", ["small", "imagenet", "none"])
def test_geometry_works_on_any_numbers(policy):
    """Flips, shifts, crops and erasing; random draws are those of the same seed."""
    image = Bands(scene(0, 3), [(0, 10000)] * 7)
    transform = train_transform(
        16, in_chans=7, bands=True, policy=policy, mean=(0.3,), std=(0.2,), vflip=0.5, degrees=9, re_prob=0.5
    )
    first, again, other = (transform(image, seed) for seed in (1, 1, 2))
    assert first.shape == (7, 16, 16)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert policy == "none" or not torch.equal(first, other)
    plain = train_transform(16, in_chans=7, bands=True, policy="none", mean=(0.0,), std=(1.0,))(image, 0)
    assert -0.2 < plain.min() < plain.max() < 1.5


def test_the_first_convolution_is_adapted_from_three_channels(folder, tmp_path):
    """As timm does it: weights for red, green and blue are gone through again and again, and scaled."""
    source = transcnn.create_model("transcnn_test", num_classes=2)
    torch.save(source.state_dict(), tmp_path / "rgb.pth")
    made = transcnn.load_checkpoint(
        transcnn.create_model("transcnn_test", num_classes=2, in_chans=7), tmp_path / "rgb.pth"
    )
    wanted = adapt_input_conv(7, source.state_dict()["stem.0.weight"])
    torch.testing.assert_close(made.state_dict()["stem.0.weight"], wanted)


def test_a_data_config_of_a_stranger():
    config = {"input_size": [7, 32, 32], "mean": [0.5] * 7, "std": [0.1] * 7, "interpolation": "bicubic", "crop_pct": 1}
    ends = [[0, 1.5]] * 7
    check_data_config({**config, "pixel_range": ends})
    for changes, reason in (
        ({}, "7 channels need a pixel_range for each"),
        ({"pixel_range": ends[:6]}, "got 6 pairs"),
        ({"pixel_range": [[1, 1]] * 7}, "the smaller first"),
        ({"pixel_range": [[0, float("inf")]] * 7}, "two numbers"),
        ({"pixel_range": [[0, 1e31]] * 7}, "two numbers"),
        ({"pixel_range": [[0, 1], 2]}, "two numbers"),
        ({"pixel_range": ends, "interpolation": "lanczos"}, "resized by nearest"),
        ({"pixel_range": ends, "crop_mode": "border"}, "without a border"),
        ({"input_size": [5000, 32, 32]}, "1 to 1024 channels"),
    ):
        with pytest.raises(ValueError, match=reason):
            check_data_config({**config, **changes})
