"""Segmentation: what is read, what is learnt and how it is scored, on label maps made up here."""

from __future__ import annotations

import csv
import json
import os
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from timm import create_model
from torchmetrics.classification import MulticlassJaccardIndex

from transcnn.checkpoints.loading import load, save_weights
from transcnn.commands.evaluate import evaluate
from transcnn.commands.predict import predict
from transcnn.commands.train import train
from transcnn.data.images import BrokenImage
from transcnn.data.sets.segment import class_shares, open_set, open_splits
from transcnn.data.transforms.segment import IGNORE, EvalTransform, TrainTransform
from transcnn.dense.pyramid import Pyramid
from transcnn.dense.segmenters import DECODERS, build
from transcnn.errors import UserError
from transcnn.plugging.plug import plug, plug_spec, plugged, plugged_parameters
from transcnn.report.answers import Box, Detections, Segmentation
from transcnn.report.dense import best_median_worst, class_iou, plot_predictions
from transcnn.report.overlay import run_lengths
from transcnn.settings import Augment, Ema, Optim, Segment
from transcnn.tasks.segment import Segment as SegmentTask
from transcnn.tasks.sliding import sliding_window_inference

QUICK: dict[str, Any] = dict(
    task="segment",
    model="transcnn_test",
    batch_size=4,
    precision="32",
    accelerator="cpu",
    num_workers=0,
    img_size=64,
    quiet=True,
    augment=Augment(smoothing=0.0),
)
SMALL = Segment(decoder_channels=64, scale_range=(0.8, 1.25))


def picture(index: int, size: tuple[int, int] = (72, 60)) -> tuple[Image.Image, np.ndarray]:
    """A dark ground (id 0) with a bright box (id 1) and a red one (id 2); the first rows don't count (255)."""
    width, height = size
    rng = np.random.default_rng(index)
    ids = np.zeros((height, width), np.uint8)
    pixels = np.full((height, width, 3), 40)
    for label, colour in ((1, (220, 220, 220)), (2, (220, 40, 40))):
        y, x = rng.integers(6, height - 30), rng.integers(0, width - 30)
        box = np.s_[y : y + 26, x : x + 26]
        ids[box], pixels[box] = label, colour
    ids[:4] = 255
    pixels = pixels + rng.normal(0, 8, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), ids


def make_data(folder: Path, splits: dict[str, int], *, names: str | None = "ground\nbright\nred\n") -> Path:
    start = 0
    for split, count in splits.items():
        for i in range(count):
            image, ids = picture(start + i)
            for kind, file, what in (("images", f"{i:02}.jpg", image), ("labels", f"{i:02}.png", Image.fromarray(ids))):
                (folder / kind / split).mkdir(parents=True, exist_ok=True)
                what.save(folder / kind / split / file)
        start += count
    if names:
        (folder / "classes.txt").write_text(names)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("shapes") / "shapes", {"train": 24, "val": 4, "test": 4})


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    optim = Optim(warmup_epochs=0.5)
    return train(str(data), **QUICK, segment=SMALL, optim=optim, epochs=14, lr=1e-2, out=str(out)).run_dir


def test_it_learns_and_leaves_a_whole_run(run):
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["miou"] > 60  # all ground would be 25
    assert metrics["split"] == "test"
    assert set(metrics["class_iou"]) == {"ground", "bright", "red"}
    assert metrics["images"] == 4
    names = ("index.html", "augmented.png", "curves.png", "classes.png", "confusion.png", "predictions.png")
    for name in (*names, "classes.csv"):
        assert (run / "report" / name).is_file()
    loaded = load(run)
    assert loaded.task == "segment"
    assert loaded.info["task_args"]["label_ids"] == [0, 1, 2]


def test_eval_gives_the_runs_score_again_and_windows_and_mirrors_another(run, data, tmp_path, capsys):
    metrics = json.loads((run / "metrics.json").read_text())
    again = evaluate(str(run), accelerator="cpu", out=str(tmp_path))
    assert again["miou"] == pytest.approx(metrics["miou"], abs=0.01)
    assert "bright" in capsys.readouterr().out
    other = evaluate(str(run), str(data), accelerator="cpu", window=48, flip=True, out=str(tmp_path), quiet=True)
    assert other["miou"] != again["miou"]
    assert other["miou"] > 50


def test_predict_writes_label_maps_and_overlays(run, data, tmp_path, capsys):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    rows = predict(str(run), [str(data / "images" / "test"), str(bad)], json=True, out=str(tmp_path / "out"))
    assert json.loads(capsys.readouterr().out) == rows
    assert "error" in rows[-1]
    for row in rows[:-1]:
        with Image.open(row["mask"]) as mask, Image.open(row["overlay"]) as overlay:
            assert mask.mode == "P"
            assert mask.size == (72, 60)
            assert overlay.height > 60  # the legend
            share = (np.asarray(mask) == 0).mean()
        assert next(c["share"] for c in row["classes"] if c["label"] == "ground") == pytest.approx(share, abs=1e-5)
    truth = picture(28)[1]
    with Image.open(rows[0]["mask"]) as mask:
        predicted = np.asarray(mask)
    assert (predicted == truth)[truth < 255].mean() > 0.8


@pytest.mark.usefixtures("no_report")
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(data, tmp_path, monkeypatch):
    unet = Segment(decoder="unet", decoder_channels=16, loss="both", class_weights="log")
    settings: dict[str, Any] = dict(QUICK, segment=unet, limit_batches=3, epochs=2)
    whole = train(str(data), **settings, out=str(tmp_path / "whole")).run_dir
    original, calls = SegmentTask.loss, []

    def stop(self: Any, batch: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(SegmentTask, "loss", stop)
        with pytest.raises(KeyboardInterrupt, match="after update 2"):
            train(str(data), **settings, out=str(tmp_path / "cut"))
    with pytest.raises(UserError, match="keeps its settings"):
        train(resume=str(tmp_path / "cut"), segment=Segment(decoder="pspnet"))
    train(resume=str(tmp_path / "cut"), quiet=True)
    one, two = (load(path).model.state_dict() for path in (whole, tmp_path / "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_tar_holds_what_its_folder_holds(data, tmp_path):
    tar = tmp_path / "shapes.tar"
    with tarfile.open(tar, "w") as file:
        file.add(data, "shapes")
    one, two = open_splits(str(data)), open_splits(str(tar))
    assert one.class_names == two.class_names == ["ground", "bright", "red"]
    assert two.test is not None
    assert (len(two.train), len(two.val), len(two.test)) == (24, 4, 4)
    np.testing.assert_array_equal(one.train.read(5)[1], two.train.read(5)[1])
    (tmp_path / "x.tar.gz").write_bytes(b"x")
    with pytest.raises(UserError, match="unpack"):
        open_splits(str(tmp_path / "x.tar.gz"))


def test_ignored_classes_have_no_index(tmp_path):
    folder = make_data(tmp_path / "d", {"train": 4}, names="ground\nbright\nvoid\n")
    splits = open_splits(str(folder))  # nothing is split: a validation split is taken off
    assert splits.class_names == ["ground", "bright"]
    assert len(splits.train) + len(splits.val) == 4
    assert set(np.unique(splits.train.read(0)[1])) == {IGNORE, 0, 1}
    splits = open_splits(str(folder), {"ignore_index": 0})  # as ADE20K has it
    assert splits.class_names == ["bright", "void"]
    assert splits.task_args["label_ids"] == [1, 2]
    counted = make_data(tmp_path / "e", {"train": 4}, names=None)
    assert open_splits(str(counted)).class_names == ["0", "1", "2"]


def test_palette_label_maps_keep_their_ids_and_lend_their_colours(tmp_path):
    folder = make_data(tmp_path / "d", {"train": 3})
    colours = [[0, 0, 0], [10, 20, 30], [40, 50, 60]]
    for file in (folder / "labels" / "train").iterdir():
        with Image.open(file) as opened:
            image = opened.copy()
        image.putpalette([*(value for colour in colours for value in colour), *[255] * (768 - 9)])
        image.save(file)
    splits = open_splits(str(folder))
    assert splits.task_args["colours"] == colours
    assert set(np.unique(splits.train.read(0)[1])) == {IGNORE, 0, 1, 2}


def test_what_cannot_be_used_is_left_out_counted_and_listed(data, tmp_path, no_report):
    folder = make_data(tmp_path / "d", {"train": 10, "val": 3})
    images, labels = folder / "images" / "train", folder / "labels" / "train"
    (images / "00.jpg").write_bytes((images / "00.jpg").read_bytes()[:300])
    (labels / "01.png").write_bytes(b"")
    Image.fromarray(np.full((60, 72), 7, np.uint8)).save(labels / "02.png")
    Image.new("L", (10, 10)).save(labels / "03.png")
    Image.new("RGB", (72, 60)).save(labels / "04.png")
    (labels / "05.png").unlink()
    Image.new("L", (72, 60)).save(labels / "99.png")
    with pytest.raises(UserError, match=r"no label map|without an image"):
        open_splits(str(folder), strict=True)
    settings = dict(QUICK, batch_size=3)  # so that the epoch meets all nine
    result = train(str(folder), **settings, segment=SMALL, epochs=1, out=str(tmp_path / "run"))
    with (tmp_path / "run" / "skipped.csv").open() as file:
        reasons = {Path(row["file"]).name: row["reason"] for row in csv.DictReader(file)}
    assert result.metrics["skipped"] == 7
    assert "damaged" in reasons["00.jpg"]
    assert "empty" in reasons["01.jpg"]
    assert "label value '7'" in reasons["02.jpg"]
    assert "10x10" in reasons["03.jpg"]
    assert "RGB" in reasons["04.jpg"]
    assert reasons["05.jpg"] == "no label map of this name"
    assert reasons["99.png"] == "a label map without an image"


def test_masks_with_soft_edges_are_told(tmp_path, caplog):
    folder = make_data(tmp_path / "d", {"train": 3}, names=None)
    open_splits(str(folder))
    assert "soft edges" not in caplog.text
    soft = Image.fromarray(np.repeat(np.linspace(0, 255, 72).round().astype(np.uint8)[None], 60, 0))
    soft.save(folder / "labels" / "train" / "00.png")
    assert len(open_splits(str(folder)).class_names) > 200
    assert "as masks of 0 and 255 with soft edges do" in caplog.text


def test_images_in_no_split_beside_splits_are_told(tmp_path, caplog):
    folder = make_data(tmp_path / "d", {"train": 3, "extra": 2})
    splits = open_splits(str(folder))
    assert len(splits.train) + len(splits.val) == 3
    assert "2 images lie in none of the splits that there are, and are left out" in caplog.text


def test_of_files_of_one_stem_the_one_left_out_is_listed(tmp_path):
    folder = make_data(tmp_path / "d", {"train": 3, "val": 1})
    Image.open(folder / "images" / "train" / "00.jpg").save(folder / "images" / "train" / "00.png")
    train = open_splits(str(folder)).train
    assert len(train) == 3
    name = Path("images", "train", "00.png").as_posix()
    assert train.broken == [(name.replace("png", "jpg"), f"{name} is taken, which has the same stem")]


def test_data_of_other_classes_is_refused_or_matched_by_name(data, tmp_path):
    folder = make_data(tmp_path / "d", {"test": 2}, names="red\nground\nbright\n")
    split = open_set(str(folder), "auto", ["ground", "bright", "red"], [0, 1, 2])
    own = open_set(str(folder), "test", ["red", "ground", "bright"], [0, 1, 2])
    np.testing.assert_array_equal(split.read(0)[1] == 2, own.read(0)[1] == 0)
    with pytest.raises(UserError, match="does not know: 'red'"):
        open_set(str(folder), "auto", ["ground", "bright"], [0, 1])


def rewrite_labels(folder: Path, edit: Callable[[np.ndarray], Image.Image], split: str = "train") -> Path:
    for file in (folder / "labels" / split).iterdir():
        with Image.open(file) as opened:
            ids = np.asarray(opened).copy()
        edit(ids).save(file)
    return folder


def test_two_classes_of_one_name_stay_two(tmp_path):
    folder = make_data(tmp_path / "d", {"train": 4, "val": 1}, names="bg\nthing\nthing\n")
    splits = open_splits(str(folder))
    assert splits.class_names == ["bg", "thing (1)", "thing (2)"]
    for names in (splits.class_names, ["bg", "thing", "thing"]):
        again = open_set(str(folder), "val", names, [0, 1, 2])
        np.testing.assert_array_equal(again.read(0)[1], splits.val.read(0)[1])


@pytest.mark.parametrize(
    ("lines", "names"),
    [
        ("0: bg, sky\n1: red, or so\n2: c\n", ["bg, sky", "red, or so", "c"]),
        ("0 a\n2 c d\n1 b\n", ["a", "b", "c d"]),
        ("0,a\n1,b\n2,c\n", ["a", "b", "c"]),
        ("1st\n2nd\n3rd\n", ["1st", "2nd", "3rd"]),
        ("0: a\n0: b\n1: c\n", ["0: a", "0: b", "1: c"]),
        ("e\u0301\nb\nc\n", ["\xe9", "b", "c"]),
    ],
)
def test_lines_of_classes_txt(tmp_path, lines, names):
    folder = make_data(tmp_path / "d", {"train": 4}, names=None)
    (folder / "classes.txt").write_text(lines, encoding="utf-8")
    assert open_splits(str(folder)).class_names == names


def test_ids_that_no_label_map_can_hold_are_refused(tmp_path):
    folder = make_data(tmp_path / "d", {"train": 4}, names="0 a\n70000 b\n")
    with pytest.raises(UserError, match="has the id 70000; class ids are from 0 to 65535"):
        open_splits(str(folder))


@pytest.mark.parametrize("value", [5000, 40000, 65536, 70000, 2**31 - 1])
def test_a_stray_value_is_not_taken_for_thousands_of_classes(value, tmp_path):
    folder = make_data(tmp_path / "d", {"train": 4}, names=None)
    path = next((folder / "labels").rglob("*.png"))
    ids = np.asarray(Image.open(path)).astype(np.int32)
    ids[0, 0] = value
    path.unlink()
    Image.fromarray(ids).save(path.with_suffix(".tif"))
    with pytest.raises(UserError, match=rf"hold the value {value}, .* at most 4096 are possible"):
        open_splits(str(folder))


def test_label_maps_of_0_and_255_say_what_to_do(tmp_path, caplog):
    def binary(ids: np.ndarray) -> Image.Image:
        return Image.fromarray(np.where(ids == 1, 255, 0).astype(np.uint8))

    folder = rewrite_labels(make_data(tmp_path / "d", {"train": 6}, names="ground\nbright\n"), binary)
    with pytest.raises(UserError, match=r"of its 2 classes 'ground' occurs in the training split alone; \d+% of the "):
        open_splits(str(folder))
    (folder / "classes.txt").unlink()
    with pytest.raises(
        UserError, match=r"has 1 class \('0'\).*values '0', '255'. 255 is ignored unless classes.txt names"
    ):
        open_splits(str(folder))
    (folder / "classes.txt").write_text("0 ground\n255 bright\n")  # as the message says
    splits = open_splits(str(folder))
    assert splits.class_names == ["ground", "bright"]
    assert set(np.unique(splits.train.read(0)[1])) == {0, 1}
    (folder / "classes.txt").write_text("0 ground\n255 bright\n7 never\n")
    splits = open_splits(str(folder))
    assert "no training image shows 'never'" in caplog.text


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_label_maps_of_colours_say_so(tmp_path, mode):
    folder = make_data(tmp_path / "d", {"train": 4}, names=None)
    rewrite_labels(folder, lambda ids: Image.fromarray(ids).convert(mode))
    with pytest.raises(UserError, match=f"none of the label maps.*must hold class ids .*not {mode} colours"):
        open_splits(str(folder))


def test_a_split_without_a_pixel_that_counts_is_refused(tmp_path):
    folder = make_data(tmp_path / "d", {"train": 4, "val": 2, "test": 2})
    rewrite_labels(folder, lambda ids: Image.fromarray(np.full_like(ids, 255)), "val")
    with pytest.raises(UserError, match="every pixel of the val split is ignored"):
        open_splits(str(folder))
    with pytest.raises(UserError, match="every pixel of the val split is ignored"):
        open_set(str(folder), "val", ["ground", "bright", "red"], [0, 1, 2])
    assert len(open_set(str(folder), "test", ["ground", "bright", "red"], [0, 1, 2])) == 2


def test_a_label_map_of_stored_pixels_follows_the_exif_orientation(tmp_path):
    folder = make_data(tmp_path / "d", {"train": 3, "val": 1})
    upright = open_splits(str(folder)).train
    want = [upright.read(i)[1] for i in range(3)]
    exif = Image.Exif()
    exif[0x0112] = 6
    for file in (folder / "images" / "train").iterdir():
        with Image.open(file) as opened:
            image = opened.copy()
        image.transpose(Image.Transpose.ROTATE_90).save(file, exif=exif)
    rewrite_labels(folder, lambda ids: Image.fromarray(np.rot90(ids).copy()))
    turned = open_splits(str(folder)).train
    for i in range(3):
        image, ids = turned.read(i)
        assert image.size == ids.shape[::-1]
        np.testing.assert_array_equal(ids, want[i])


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("backbone", ["transcnn_test", "transcnn_nano", "resnet10t"])
def test_every_decoder_takes_any_size_and_trains_every_parameter(decoder, backbone):
    network = build(backbone, {"decoder": decoder, "decoder_channels": 64}, num_classes=5, in_chans=1)
    logits = network(torch.randn(2, 1, 45, 70))
    assert logits.shape == (2, 5, 45, 70)
    logits.square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None] == []


def test_wrong_settings_are_refused():
    with pytest.raises(UserError, match="decoder must be"):
        build("transcnn_test", {"decoder": "deeplab"}, num_classes=2)
    with pytest.raises(UserError, match="multiple of 64"):
        build("transcnn_test", {"decoder": "fpn", "decoder_channels": 100}, num_classes=2)
    with pytest.raises(UserError, match="strides 4, 8, 16"):
        build("vit_tiny_patch16_224", {"decoder": "fpn"}, num_classes=2, img_size=64)
    with pytest.raises(UserError, match="mixup is for classification"):
        SegmentTask.loaders(None, {}, Augment(mixup=0.2), {})
    with pytest.raises(UserError, match="no data of its own"):
        open_splits(None)


def test_training_parts_keep_image_and_label_together():
    image, ids = picture(3)
    transform = TrainTransform((48, 40), scale_range=(0.5, 2), mean=(0, 0, 0), std=(1, 1, 1), color_jitter=0.1)
    truth = np.where(ids == 255, IGNORE, ids).astype(np.int16)
    for seed in range(12):
        pixels, label = transform(image, truth, seed)
        assert pixels.shape == (3, 48, 40)
        assert label.shape == (48, 40)
        red = (pixels[0] > 0.5) & (pixels[1] < 0.4)
        known = label != IGNORE
        assert (red == (label == 2))[known].float().mean() > 0.93
        assert torch.equal(transform(image, truth, seed)[0], pixels)
    far, away = TrainTransform((64, 64), scale_range=(0.5, 0.5))(image, truth, 0)
    assert (away == IGNORE).float().mean() > 0.5  # outside of the image nothing counts
    assert far.shape == (3, 64, 64)


def test_evaluated_images_keep_their_size_and_label_maps_always_do():
    image, ids = picture(1)
    truth = ids.astype(np.int16)
    assert EvalTransform()(image, truth, 0)[0].shape == (3, 60, 72)
    pixels, label = EvalTransform(resize=30)(image, truth, 0)
    assert pixels.shape == (3, 30, 36)
    assert label.shape == (60, 72)


def test_iou_is_that_of_torchmetrics():
    truth, predicted = torch.randint(0, 4, (2, 3, 20, 20))
    predicted[truth == 3] = 2
    truth[:, :3] = IGNORE
    known = truth != IGNORE
    table = torch.bincount(truth[known] * 5 + predicted[known], minlength=25).view(5, 5).double().numpy()
    theirs = MulticlassJaccardIndex(5, ignore_index=IGNORE, average="macro")(predicted, truth)
    ours = class_iou(table)
    assert np.isnan(ours[4])
    assert np.nanmean(ours) == pytest.approx(theirs.item(), abs=1e-6)


def test_windows_cover_everything_once_and_mirrors_are_turned_back():
    def network(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, -x], 1) * 3  # each pixel for itself: windows can't matter

    images = torch.randn(1, 1, 70, 101)
    whole = sliding_window_inference(network, images, 2).softmax(1)
    for kwargs in ({"window": 32}, {"flip": True}, {"window": 48, "flip": True}):
        assert torch.allclose(sliding_window_inference(network, images, 2, **kwargs).softmax(1), whole, atol=1e-5)
    with pytest.raises(UserError, match="window"):
        sliding_window_inference(network, images, 2, window=8)


def test_a_batch_where_nothing_counts_costs_nothing():
    network = build("transcnn_test", {"decoder": "fpn", "decoder_channels": 64}, num_classes=3)
    task = SegmentTask(
        network, ["a", "b", "c"], {}, task_args={"loss": "both", "class_weights": "median", "shares": [0.7, 0.3, 0.0]}
    )
    assert task.class_weights.tolist() == pytest.approx([3 / 7, 1.0, 0.0])
    loss = task.loss((torch.randn(2, 3, 32, 32), torch.full((2, 32, 32), IGNORE)))
    assert loss.item() == 0
    labels = torch.randint(0, 2, (2, 32, 32))
    assert task.loss((torch.randn(2, 3, 32, 32), labels)).item() > 0


def test_shares_and_ranks(data):
    splits = open_splits(str(data), {"class_weights": "log"})
    assert sum(splits.task_args["shares"]) == pytest.approx(1)
    assert np.allclose(class_shares(splits.train, 3), splits.task_args["shares"])
    assert [place for _, place, _ in best_median_worst([(0, 0.5), (1, 0.9)])] == [1, 0]
    assert len(best_median_worst([(i, i / 20) for i in range(20)])) == 9


def test_camvid_opens_from_its_tar(shared):
    tar = shared / "data" / "camvid" / "camvid.tar"
    if not tar.is_file():
        pytest.skip("needs the CamVid pack")
    splits = open_splits(str(tar))
    assert len(splits.class_names) == 11  # void doesn't count
    assert splits.test is not None
    assert (len(splits.train), len(splits.val), len(splits.test)) == (367, 101, 233)
    image, label = splits.test.read(0)
    assert image.size == (480, 360)
    assert label.shape == (360, 480)
    assert label.min() >= IGNORE
    assert label.max() <= 10


def test_broken_label_maps_say_why():
    from transcnn.data.images import read_ids

    with pytest.raises(BrokenImage, match="empty"):
        read_ids(b"")


@pytest.mark.usefixtures("no_report")
def test_a_run_starts_from_a_classifier_or_from_one_of_its_kind(data, tmp_path, capsys):
    classifier = create_model("transcnn_test", num_classes=7)
    with torch.no_grad():
        for p in classifier.parameters():
            p.fill_(0.25)
    save_file(classifier.state_dict(), tmp_path / "classifier.safetensors")
    still: dict[str, Any] = dict(QUICK, quiet=False, epochs=1, limit_batches=1, lr=1e-9, ema=Ema(ema=False))
    first = train(
        str(data), **still, segment=SMALL, init_from=str(tmp_path / "classifier.safetensors"), out=str(tmp_path / "a")
    )
    told = [row for row in capsys.readouterr().err.splitlines() if row.startswith("backbone:")]
    assert len(told) == 1
    assert told[0].endswith("classifier.safetensors; all else starts anew")
    network = load(first.run_dir).model
    assert all((p - 0.25).abs().max() < 1e-6 for p in network.body.parameters())
    assert network.head[0].weight.std() > 1e-3
    # the same decoder: all of it is taken; another one: the backbone
    again = train(str(data), **still, segment=SMALL, init_from=str(first.run_dir), out=str(tmp_path / "b"))
    assert "backbone:" not in capsys.readouterr().err
    assert torch.allclose(load(again.run_dir).model.head[0].weight, network.head[0].weight, atol=1e-6)
    unet = Segment(decoder="unet", decoder_channels=16)
    train(str(data), **still, segment=unet, init_from=str(first.run_dir), out=str(tmp_path / "c"))
    assert "'decoder." in capsys.readouterr().err
    other = create_model("transcnn_nano")
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"other.safetensors is of another network: \d+ of the backbone's \d+ tensors"):
        train(str(data), **still, segment=SMALL, init_from=str(tmp_path / "other.safetensors"), out=str(tmp_path / "d"))


@pytest.mark.usefixtures("no_report")
def test_h_mhsa_is_plugged_into_the_backbone_and_taken_from_a_plugged_classifier(data, tmp_path):
    quick: dict[str, Any] = dict(
        QUICK, model="resnet10t", epochs=1, limit_batches=1, segment=SMALL, lr=1e-9, ema=Ema(ema=False)
    )
    run = train(str(data), **quick, plug="layer3,layer4", out=str(tmp_path / "a")).run_dir
    loaded = load(run)
    places = [name for name, _ in plugged(loaded.model)]
    assert len(places) == 2
    assert all(name.startswith("backbone.body.layer") for name in places)
    assert [line["at"] for line in loaded.info["model_args"]["plug"]] == ["layer3", "layer4"]

    classifier = plug(create_model("resnet10t", num_classes=2), "layer3", example=torch.zeros(1, 3, 64, 64))
    with torch.no_grad():
        for p in plugged_parameters(classifier):
            p.fill_(0.125)
    info = {"model": "resnet10t", "model_args": {"plug": plug_spec(classifier)}}
    save_weights(tmp_path / "plugged.safetensors", classifier, info)
    run = train(str(data), **quick, init_from=str(tmp_path / "plugged.safetensors"), out=str(tmp_path / "b")).run_dir
    found = list(plugged_parameters(load(run).model))
    assert found
    assert all((p - 0.125).abs().max() < 1e-6 for p in found)


@pytest.mark.parametrize(("power", "given"), [(0.9, None), (2.0, 2.0)])
def test_poly_falls_with_its_power(power, given):
    network = build("transcnn_test", {"decoder": "fpn", "decoder_channels": 64}, num_classes=2)
    optim = Optim(opt="sgd", sched="poly", warmup_epochs=0, min_lr=0.0, decay_rate=given)
    task = SegmentTask(network, ["a", "b"], {}, lr=0.5, epochs=10, optim=optim)
    task.updates_per_epoch = 4
    made = task.configure_optimizers()
    rates = []
    for update in (0, 10, 30):
        made["lr_scheduler"]["scheduler"].step_update(update)
        rates.append(made["optimizer"].param_groups[0]["lr"])
    assert rates == pytest.approx([0.5 * (1 - done / 40) ** power for done in (0, 10, 30)])


def named_layout(folder: Path, kind: str) -> tuple[str, list[tuple[Path, Path]]]:
    """Three images for training and two to validate on, as torchvision's class of that name wants them."""
    pairs = []
    for split, numbers in (("train", (1, 2, 3)), ("val", (4, 5))):
        if kind == "voc":
            base = folder / "VOCdevkit" / "VOC2012"
            lists = base / "ImageSets" / "Segmentation"
            lists.mkdir(parents=True, exist_ok=True)
            (lists / f"{split}.txt").write_text("".join(f"2007_{i}\n" for i in numbers))
            pairs += [
                (base / "JPEGImages" / f"2007_{i}.jpg", base / "SegmentationClass" / f"2007_{i}.png") for i in numbers
            ]
        else:
            for i in numbers:
                stem = f"bonn_00000{i}_000019"
                image = folder / "leftImg8bit" / split / "bonn" / f"{stem}_leftImg8bit.png"
                pairs.append((image, folder / "gtFine" / split / "bonn" / f"{stem}_gtFine_labelIds.png"))
    return f"torch/{kind}:{folder}", pairs


@pytest.mark.parametrize(("kind", "classes", "used"), [("voc", 21, (0, 12, 15)), ("cityscapes", 19, (7, 23, 26))])
def test_torchvisions_sets_are_taken_by_name(kind, classes, used, tmp_path, no_report):
    name, pairs = named_layout(tmp_path / "data", kind)
    for i, (image_file, label_file) in enumerate(pairs):
        image, ids = picture(i)
        table = np.zeros(256, np.uint8)
        table[[0, 1, 2]] = used
        table[255] = 255 if kind == "voc" else 0  # there 0 is "unlabeled"
        for file, what in ((image_file, image), (label_file, Image.fromarray(table[ids]))):
            file.parent.mkdir(parents=True, exist_ok=True)
            what.save(file)
    if kind == "voc":
        with Image.open(pairs[0][1]) as opened:
            label = opened.copy()
        label.putpalette([value for i in range(256) for value in (i, 0, 255 - i)])
        label.save(pairs[0][1])
    run = train(name, **{**QUICK, "batch_size": 2}, segment=SMALL, epochs=1, limit_batches=2, out=str(tmp_path / "run"))
    loaded = load(run.run_dir)
    assert len(loaded.class_names) == classes
    assert run.metrics["images"] == 2
    again = evaluate(str(run.run_dir), name, split="val", accelerator="cpu", quiet=True)
    assert again["miou"] == pytest.approx(run.metrics["miou"], abs=0.01)
    assert sum(value is not None for value in again["class_iou"].values()) >= 3
    if kind == "voc":
        assert loaded.info["task_args"]["colours"][15] == [15, 0, 240]
    else:
        assert loaded.class_names[0] == "road"
        assert loaded.info["task_args"]["label_ids"][0] == 7
    with pytest.raises(UserError, match="torchvision can't open"):
        open_splits(f"torch/{kind}:{tmp_path / 'nowhere'}")


def test_images_like_dots_and_ribbons_are_looked_at(run, tmp_path):
    assert EvalTransform(resize=240)(Image.new("RGB", (5000, 20)))[0].shape == (3, 8, 1920)
    assert EvalTransform(resize=24)(Image.new("RGB", (1, 1)))[0].shape == (3, 24, 24)
    narrow = np.zeros((20, 3000), np.int16)
    assert TrainTransform((32, 32), resize=24)(Image.new("RGB", (3000, 20)), narrow, 1)[1].shape == (32, 32)
    for name, size in (("dot", (1, 1)), ("narrow", (3000, 20))):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    rows = predict(
        str(run), [str(tmp_path / f"{name}.png") for name in ("dot", "narrow")], quiet=True, out=str(tmp_path / "out")
    )
    for row, size in zip(rows, [(1, 1), (3000, 20)], strict=True):
        with Image.open(row["mask"]) as mask:
            assert mask.size == size


def test_logits_are_adjusted_in_evaluation():
    args = {"decoder": "fpn", "decoder_channels": 64, "class_weights": "median", "shares": [0.7, 0.25, 0.05, 0.0]}
    torch.manual_seed(0)
    plain = build("transcnn_test", args, num_classes=4)
    torch.manual_seed(0)
    back = build("transcnn_test", {**args, "logit_adjustment": 0.5}, num_classes=4)
    assert plain.state_dict().keys() == back.state_dict().keys()
    x = torch.randn(2, 3, 40, 50)
    trained = []
    for network in (plain, back):
        torch.manual_seed(1)  # dropout
        trained.append(network.train()(x))
    assert torch.equal(*trained)
    plain.load_state_dict(back.state_dict())
    taken = (plain.eval()(x) - back.eval()(x)).mean((0, 2, 3))
    assert taken.tolist() == pytest.approx(
        [0.5 * np.log(0.25 / share) for share in (0.7, 0.25, 0.05)] + [0.0], abs=1e-4
    )
    with pytest.raises(UserError, match="logit_adjustment"):
        build("transcnn_test", {**args, "logit_adjustment": 2}, num_classes=4)
    former = build("transcnn_test", {**args, "weights_back": 0.5}, num_classes=4)  # the name in older files
    assert torch.equal(former.logit_adjustment, back.logit_adjustment)


@pytest.mark.parametrize("flag", ["--weights_back", "--weights-back", "--segment.weights_back"])
def test_the_former_name_of_a_flag_is_read(flag):
    from transcnn.cli import load_command, parse

    arguments = parse("train", load_command("train"), ["data", "--task", "segment", flag, "0.25"])
    assert arguments["segment"].logit_adjustment == 0.25


def test_the_former_name_of_a_setting_in_a_recipe_is_read(tmp_path):
    from transcnn.cli import load_command, parse

    (tmp_path / "old.yaml").write_text("segment: {weights_back: 0.5}\n")
    arguments = parse("train", load_command("train"), ["data", "--config", str(tmp_path / "old.yaml")])
    assert arguments["segment"].logit_adjustment == 0.5


def test_a_pyramid_of_maps_with_channels_last() -> None:
    """timm's Swin and MambaOut give (B, H, W, C), and say so."""

    class Last(torch.nn.Module):
        output_fmt = "NHWC"

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [x.new_zeros(len(x), x.shape[2] // s, x.shape[3] // s, s) for s in (4, 8, 16, 32)]

    maps = Pyramid(Last(), [4, 8, 16, 32], [4, 8, 16, 32])(torch.zeros(2, 3, 64, 96))
    assert {s: tuple(m.shape) for s, m in maps.items()} == {s: (2, s, 64 // s, 96 // s) for s in (4, 8, 16, 32)}


@pytest.mark.parametrize("size", [(3, 3000), (3000, 3)])
def test_very_long_images_fit_on_a_report(size: tuple[int, int]) -> None:
    examples = [("best", f"{i}.png", [Image.new("RGB", size)] * 3) for i in range(9)]
    width, height = plot_predictions(examples, [("sky", (0, 0, 0))]).get_size_inches()
    assert width < 12
    assert 3 < height < 90  # at 150 dots an inch, and matplotlib takes 65,536


def test_a_mask_is_drawn_on_images_of_its_size_alone() -> None:
    mask = np.zeros((4, 6), np.int64)
    areas = Segmentation.of(mask, ["sky"], {"label_ids": [0]}, 1)
    box = Box("sky", 0.9, (0.0, 0.0, 3.0, 3.0), run_lengths(mask > 0))
    found = Detections(boxes=(box,), class_names=["sky"], label_ids=[1])
    for prediction in (areas, found):
        assert prediction.plot(Image.new("RGB", (6, 4))).width == 6
        with pytest.raises(UserError, match="of an image of 4x6, plot got one of 6x4"):
            prediction.plot(Image.new("RGB", (4, 6)))
