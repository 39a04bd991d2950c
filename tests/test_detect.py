"""Detection: what is read, what is learnt and how it is scored, on shapes made up here."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from transcnn.checkpoints.loading import load, save_weights
from transcnn.commands.evaluate import evaluate
from transcnn.commands.predict import predict
from transcnn.commands.train import train
from transcnn.data.sets.detect import open_set, open_splits
from transcnn.data.transforms.detect import DetectTransform
from transcnn.dense.detectors import DETECTORS, build
from transcnn.errors import UserError
from transcnn.predictor.network import NetworkPredictor
from transcnn.report.answers import Detections, Segmentation
from transcnn.report.output_folder import OutputFolder, image_ids
from transcnn.settings import Augment, Detect, Ema, Optim
from transcnn.tasks.detect import Detect as DetectTask
from transcnn.tasks.detect import _f1

QUICK: dict[str, Any] = dict(
    task="detect",
    model="transcnn_test",
    batch_size=4,
    precision="32",
    accelerator="cpu",
    num_workers=0,
    quiet=True,
    augment=Augment(smoothing=0.0),
)
SMALL: dict[str, Any] = dict(fpn_channels=16, short_side=64, long_side=96)
NAMES = ["square", "disc"]


def picture(index: int, size: tuple[int, int] = (80, 64)) -> tuple[Image.Image, list[dict[str, Any]]]:
    """One or two bright shapes on dark noise, and COCO's annotations of them; squares are green, discs red."""
    rng = np.random.default_rng(index)
    pixels = rng.normal(40, 8, (size[1], size[0], 3)).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    found = []
    for k in range(int(rng.integers(1, 3))):
        side = int(rng.integers(18, 28))
        x = int(rng.integers(0, size[0] // 2 - side)) + k * size[0] // 2
        y = int(rng.integers(0, size[1] - side))
        label = int(rng.integers(0, 2))
        if label:
            draw.ellipse((x, y, x + side - 1, y + side - 1), fill=(220, 60, 60))
            angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
            outline = np.stack([x + side / 2 * (1 + np.cos(angles)), y + side / 2 * (1 + np.sin(angles))], 1)
        else:
            draw.rectangle((x, y, x + side - 1, y + side - 1), fill=(60, 220, 60))
            outline = np.array([[x, y], [x + side, y], [x + side, y + side], [x, y + side]])
        found.append(
            {
                "category_id": label + 1,
                "bbox": [x, y, side, side],
                "segmentation": [outline.astype(float).ravel().tolist()],
                "area": side * side,
                "iscrowd": 0,
            }
        )
    return image, found


def make_data(folder: Path, splits: dict[str, int]) -> Path:
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    number = 0
    for split, count in splits.items():
        images, annotations = [], []
        for _ in range(count):
            image, found = picture(number)
            image.save(folder / "images" / f"{number:03}.png")
            images.append({"id": number, "file_name": f"{number:03}.png", "width": 80, "height": 64})
            annotations += [{**entry, "image_id": number, "id": 10 * number + k} for k, entry in enumerate(found)]
            number += 1
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(NAMES)]
        sheet = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(sheet))
    return folder


def change(folder: Path, split: str, edit: Any) -> None:
    file = folder / "annotations" / f"{split}.json"
    sheet = json.loads(file.read_text())
    edit(sheet)
    file.write_text(json.dumps(sheet))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("shapes") / "shapes", {"train": 28, "val": 4, "test": 6})


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """Mask R-CNN, learnt for a few steps."""
    return learn(data, tmp_path_factory.mktemp("run") / "run", epochs=3, limit_batches=3, detect={"min_score": 0.0})


def learn(data: Path, out: Path, *, detect: dict[str, Any], **more: Any) -> Path:
    settings = dict(QUICK, lr=4e-3, optim=Optim(warmup_epochs=0.5), ema=Ema(ema_decay=0.9), **more)
    mask_rcnn = Detect(detector="maskrcnn", anchor_size=8, **SMALL, **detect)
    return train(str(data), **settings, detect=mask_rcnn, out=str(out)).run_dir


@pytest.mark.slow
def test_mask_rcnn_learns_shapes(data, tmp_path):
    metrics = json.loads((learn(data, tmp_path / "run", epochs=30, detect={}) / "metrics.json").read_text())
    assert metrics["map50"] > 80
    assert metrics["mask_map50"] > 80


def test_a_run_is_whole_and_its_loss_falls(run):
    metrics = json.loads((run / "metrics.json").read_text())
    with (run / "metrics.csv").open() as file:
        losses = [float(row["train_loss"]) for row in csv.DictReader(file)]
    assert losses[-1] < 0.9 * losses[0]
    assert {"map", "map50", "mask_map", "mask_map50"} <= set(metrics)
    assert set(metrics["class_ap"]) == set(NAMES)
    assert metrics["images"] == 6
    names = ("index.html", "augmented.png", "curves.png", "classes.png", "predictions.png", "classes.csv")
    for name in (*names, "precision_recall.png"):
        assert (run / "report" / name).is_file()
    assert load(run).task == "detect"


def test_eval_gives_the_runs_score_again(run, data, tmp_path, capsys):
    metrics = json.loads((run / "metrics.json").read_text())
    again = evaluate(str(run), str(data), accelerator="cpu", split="test", out=str(tmp_path))
    assert again["map"] == pytest.approx(metrics["map"], abs=0.01)
    assert "square" in capsys.readouterr().out
    with pytest.raises(UserError, match="window is for segment alone"):
        evaluate(str(run), str(data), window=64, quiet=True)


def test_predict_draws_and_writes_cocos_format(run, data, tmp_path):
    from faster_coco_eval.core import mask as coco

    files = sorted(str(path) for path in (data / "images").iterdir())[-3:]
    rows = predict(str(run), files, quiet=True, out=str(tmp_path / "out"))
    for row in rows:
        with Image.open(row["overlay"]) as overlay:
            assert overlay.size == (80, 64)
        assert {"label", "score", "box"} == set(row["boxes"][0])
    told = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert sum(len(row["boxes"]) for row in rows) == len(told)
    best = max(told, key=lambda entry: entry["score"])
    assert best["category_id"] in (1, 2)
    assert best["image_id"] == int(Path(best["file_name"]).stem)
    lengths = best["segmentation"]
    assert sum(lengths["counts"]) == 80 * 64
    mask = coco.decode(coco.frPyObjects(lengths, *lengths["size"]))
    assert mask.shape == (64, 80)
    assert mask.sum() == sum(lengths["counts"][1::2])


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("backbone", ["transcnn_test", "transcnn_nano"])
def test_every_detector_trains_every_parameter_with_empty_images_too(detector, backbone):
    args = {"detector": detector, "min_score": 0.0, "max_found": 5, "side_range": (0.8, 1.2), **SMALL}
    network = build(backbone, args, num_classes=3, in_chans=1)
    boxes, masks = torch.tensor([[2.0, 3.0, 30.0, 40.0]]), torch.zeros(1, 50, 70, dtype=torch.uint8)
    empty = {"boxes": boxes[:0], "labels": torch.zeros(0, dtype=torch.long), "masks": masks[:0, :40, :40]}
    targets = [{"boxes": boxes, "labels": torch.tensor([2]), "masks": masks}, empty]
    losses = network([torch.rand(1, 50, 70), torch.rand(1, 40, 40)], targets)
    torch.stack(list(losses.values())).sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []
    network.eval()
    found = network([torch.rand(1, 33, 90)])[0]
    assert found["labels"].min() >= 0
    assert found["labels"].max() <= 2


@pytest.mark.parametrize("detector", DETECTORS)
def test_detections_do_not_depend_on_the_other_images_of_a_batch(detector):
    """Images of unlike sizes, two of which are padded to one: each is found in as alone."""
    torch.manual_seed(0)
    args = {"detector": detector, "min_score": 0.0, "max_found": 5, "side_range": (1.0, 1.0), **SMALL}
    network = build("hatnet_tiny", args, num_classes=3, dims=(16, 16, 32, 32), head_dim=16, depths=(1, 1, 1, 1)).eval()
    images = [torch.rand(3, height, width) for height, width in [(64, 64), (80, 64), (64, 90), (64, 96), (30, 200)]]
    with torch.no_grad():
        for found, image in zip(network(images), images, strict=True):
            for name, value in network([image])[0].items():
                torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_used_is_left_out_counted_and_listed(tmp_path):
    folder = make_data(tmp_path / "d", {"train": 8, "val": 2})

    def spoil(sheet: dict[str, Any]) -> None:
        sheet["images"].append({"id": 99, "file_name": "gone.png"})
        box = {"image_id": 1, "category_id": 1, "iscrowd": 0}
        sheet["annotations"] += [
            {**box, "id": 901, "bbox": [5, 5, 0, 4]},
            {**box, "id": 902, "bbox": [5, 5, 9, 4], "category_id": 7},
            {**box, "id": 903, "bbox": [5, 5, 9, 4], "image_id": 1234},
            {**box, "id": 904},
            {**box, "id": 905, "bbox": [60, 50, 500, 500]},
            {**box, "id": 906, "bbox": [0, 0, 30, 30], "iscrowd": 1},
            {**box, "id": 907, "bbox": [90, 10, 5, 5]},
        ]
        sheet["annotations"] = [entry for entry in sheet["annotations"] if entry["image_id"] != 2]
        sheet["categories"].append({"id": 5, "name": "never"})

    change(folder, "train", spoil)
    change(folder, "val", lambda sheet: sheet["categories"].append({"id": 5, "name": "never"}))
    (folder / "images" / "003.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"gone\.png"):
        open_splits(str(folder), strict=True)
    splits = open_splits(str(folder))
    _, truth = splits.train.read(1)
    assert truth["boxes"].max() <= 80  # cut at the edge
    assert truth["boxes"][:, 3].max() <= 64
    assert truth["crowd"].sum() == 1
    detect = Detect(**SMALL)
    result = train(str(folder), **QUICK, detect=detect, epochs=1, out=str(tmp_path / "run"))
    with (tmp_path / "run" / "skipped.csv").open() as file:
        rows = [(Path(row["file"]).name, row["reason"]) for row in csv.DictReader(file)]
    assert result.metrics["skipped"] == len(rows) == 7
    text = "\n".join(f"{name}: {reason}" for name, reason in rows)
    for split in (
        "gone.png: an annotation",
        "0x4 pixels",
        "outside of the image",
        "category 7",
        "unknown image 1234",
        "annotation 904",
        "003.png",
    ):
        assert split in text
    assert result.metrics["class_ap"]["never"] is None


def test_pascal_voc_is_read_as_what_it_means(tmp_path):
    folder = tmp_path / "voc"
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    thing = (
        "<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax>"
        "<ymax>{}</ymax></bndbox></object>"
    )
    for i in range(4):
        picture(i)[0].save(folder / "JPEGImages" / f"{i}.jpg")
        things = thing.format("zebra", 0, 1, 1, 80, 64) + thing.format("ant", 1, 11, 11, 20, 20)
        (folder / "Annotations" / f"{i}.xml").write_text(f"<annotation>{things}</annotation>")
    (folder / "Annotations" / "3.xml").write_text("<annotation><object></annotation>")
    (folder / "ImageSets" / "Main" / "train.txt").write_text("0\n1\n3\n")
    (folder / "ImageSets" / "Main" / "val.txt").write_text("2\n")
    splits = open_splits(str(folder))
    assert splits.class_names == ["ant", "zebra"]
    assert (len(splits.train), len(splits.val)) == (2, 1)
    _, truth = splits.train.read(0)
    assert truth["boxes"].tolist() == [[0, 0, 80, 64], [10, 10, 20, 20]]
    assert truth["labels"].tolist() == [1, 0]
    assert truth["crowd"].tolist() == [False, True]
    assert [reason.split(":")[0] for _, reason in splits.broken] == ["no annotation of Pascal VOC"]


def test_mirrored_boxes_stay_on_their_things():
    image, found = picture(5)
    x, y, w, h = found[0]["bbox"]
    mask = np.zeros((64, 80), bool)
    mask[y : y + h, x : x + w] = True
    truth = {
        "boxes": np.array([[x, y, x + w, y + h]], np.float32),
        "labels": np.array([0]),
        "crowd": np.array([False]),
        "area": np.array([w * h], np.float32),
        "masks": [lambda: mask],
    }
    transform = DetectTransform(masks=True, training=True, hflip=1.0, vflip=1.0, color_jitter=0.2)
    pixels, target = transform(image, truth, 0)
    x1, y1, x2, y2 = target["boxes"][0].int().tolist()
    assert [x1, y1, x2, y2] == [80 - x - w, 64 - y - h, 80 - x, 64 - y]
    assert target["masks"][0, y1:y2, x1:x2].all()
    assert target["masks"].sum() == w * h
    assert pixels[:, y1 + 8 : y2 - 8, x1 + 8 : x2 - 8].mean() > 1.5 * pixels.mean()
    assert truth["boxes"][0, 0] == x  # the data's own is untouched


def test_small_things_get_small_anchors(data):
    assert open_splits(str(data), {"short_side": 64, "long_side": 96}).task_args["anchor_size"] == 16
    assert open_splits(str(data), {"short_side": 800, "long_side": 1333}).task_args["anchor_size"] == 32
    assert "anchor_size" not in open_splits(str(data), {"anchor_size": 12}).task_args


def test_wrong_settings_and_data_are_refused(data, tmp_path):
    good = {"detector": "retinanet", "min_score": 0.05, "max_found": 5, "side_range": (1, 1), **SMALL}
    for changed, text in (
        ({"detector": "yolo"}, "detector must be"),
        ({"fpn_channels": 20}, "multiple of 16"),
        ({"short_side": 8}, "short_side"),
    ):
        with pytest.raises(UserError, match=text):
            build("transcnn_test", {**good, **changed}, num_classes=2)
    with pytest.raises(UserError, match="cutmix is for classification"):
        DetectTask.loaders(None, {}, Augment(cutmix=1.0), {})
    with pytest.raises(UserError, match="no data of its own"):
        open_splits(None)
    with pytest.raises(UserError, match="does not know: 'disc'"):
        open_set(str(data), "test", ["square"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no annotated images"):
        open_splits(str(tmp_path / "empty"))


def test_an_images_own_score_counts_each_box_once():
    truth = {"boxes": torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]]), "labels": torch.tensor([0, 1])}
    truth["crowd"] = torch.zeros(2, dtype=torch.bool)
    found = {"boxes": torch.tensor([[0.0, 0, 10, 10], [1, 1, 10, 10]]), "labels": torch.tensor([0, 0])}
    found["scores"] = torch.tensor([0.9, 0.8])
    assert _f1(found, truth) == pytest.approx(2 * 1 / 4)
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0), "scores": torch.zeros(0)}
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0), "crowd": torch.zeros(0)}
    assert _f1(nothing, empty) == 1.0
    assert _f1(nothing, truth) == 0.0


def test_an_images_own_score_needs_no_crowds():
    """As in COCO's mAP: they needn't be found, and what lies in one of its class doesn't count."""
    boxes = torch.tensor([[0.0, 0, 100, 100], [200, 0, 210, 10]])
    truth = {"boxes": boxes, "labels": torch.tensor([0, 0]), "crowd": torch.tensor([True, False])}
    found = {"boxes": torch.tensor([[200.0, 0, 210, 10], [5, 5, 15, 15], [95, 5, 115, 15], [5, 5, 15, 15]])}
    found |= {"labels": torch.tensor([0, 0, 0, 1]), "scores": torch.full((4,), 0.9)}
    # One is found; one lies in the crowd; one does by a quarter; one is of another class.
    assert _f1(found, truth) == pytest.approx(2 * 1 / (1 + 2 + 1))
    first = {name: value[:2] for name, value in found.items()}
    assert _f1(first, truth) == 1.0
    crowd = {name: value[:1] for name, value in truth.items()}
    assert _f1({name: value[1:2] for name, value in found.items()}, crowd) == 1.0


def test_bccd_opens_from_its_tar(shared):
    tar = shared / "data" / "bccd" / "bccd.tar"
    if not tar.is_file():
        pytest.skip("needs the BCCD pack")
    splits = open_splits(str(tar))
    assert splits.class_names == ["RBC", "WBC", "Platelets"]
    assert splits.test is not None
    assert (len(splits.train), len(splits.val), len(splits.test)) == (205, 87, 72)
    assert splits.train.read(0)[0].size == (640, 480)


def test_sizes_of_things_are_those_that_the_data_says(data, tmp_path):
    folder = make_data(tmp_path / "d", {"train": 2, "val": 1})
    change(folder, "val", lambda sheet: [entry.update(area=50) for entry in sheet["annotations"]])
    splits = open_splits(str(folder))
    _, truth = splits.val.read(0)
    assert set(truth["area"].tolist()) == {50.0}
    change(folder, "val", lambda sheet: [entry.pop("area") for entry in sheet["annotations"]])
    _, truth = open_splits(str(folder)).val.read(0)
    sides = truth["boxes"][:, 2:] - truth["boxes"][:, :2]
    np.testing.assert_allclose(truth["area"], sides.prod(1))


def test_images_like_dots_and_ribbons_are_looked_at(run, tmp_path, capsys):
    Image.new("L", (1, 1)).save(tmp_path / "dot.png")
    Image.new("RGBA", (3000, 9), "red").save(tmp_path / "narrow.png")
    loaded = load(run)
    files = [str(tmp_path / name) for name in ("dot.png", "narrow.png")]
    rows = predict(str(run), files, out=str(tmp_path / "out"))
    for row, size in zip(rows, [(1, 1), (3000, 9)], strict=True):
        with Image.open(row["overlay"]) as overlay:
            assert overlay.size == size
    capsys.readouterr()
    strict = {**loaded.info, "task_args": {**loaded.info["task_args"], "min_score": 1.1}}
    save_weights(tmp_path / "blind.safetensors", loaded.model, strict)
    assert predict(str(tmp_path / "blind.safetensors"), files, out=str(tmp_path / "none"))[0]["boxes"] == []
    assert "nothing found" in capsys.readouterr().out


# --- what predict writes --------------------------------------------------------------------------------------------


def test_image_ids_are_each_files_own():
    assert image_ids(["a/0001.jpg", "b/7.png"]) == {"a/0001.jpg": 1, "b/7.png": 7}
    assert image_ids(["a/x.jpg", "a/y.jpg"]) == {"a/x.jpg": "x", "a/y.jpg": "y"}
    for files in (["a/001.jpg", "b/001.jpg", "b/1.png"], ["a/x.jpg", "b/x.jpg"], ["1.jpg", "01.jpg"], ["²", "2"]):
        assert len(set(image_ids(files).values())) == len(files)


def one_box(count: int = 1) -> dict[str, np.ndarray]:
    boxes = np.array([[1.0, 1, 9, 9]] * count).reshape(-1, 4)
    return {"boxes": boxes, "labels": np.zeros(count, int), "scores": np.linspace(0.9, 0.3, count)}


def detections(file: str, count: int = 1) -> Detections:
    image = Image.new("RGB", (20, 20))
    return dataclasses.replace(Detections.of(one_box(count), ["a"], {}), file=file, image=image)


def test_a_call_that_finds_nothing_leaves_no_old_predictions(tmp_path):
    for count in (2, 0):
        out = OutputFolder(tmp_path / "out", ["x.png"], coco=True)
        out.add(detections("x.png", count))
        out.finish()
        assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())) == count
    OutputFolder(tmp_path / "none").finish()  # a segmenter's
    assert not (tmp_path / "none").exists()


def test_an_image_that_a_table_names_twice_has_its_boxes_once(tmp_path):
    out = OutputFolder(tmp_path, ["x.png", "x.png"], coco=True)
    written = [out.add(detections("x.png", 2))["overlay"] for _ in range(2)]
    out.finish()
    assert len(set(written)) == 2  # each row has its own
    assert len(json.loads((tmp_path / "predictions.json").read_text())) == 2


def test_a_least_score_for_predictions(tmp_path, monkeypatch):
    out = OutputFolder(tmp_path, ["x.png"], coco=True)
    found = detections("x.png", 3).from_score(0.6)
    assert [box.score for box in found.boxes] == [0.9, 0.6]
    out.add(found)
    out.finish()
    assert len(json.loads((tmp_path / "predictions.json").read_text())) == 2
    model = torch.nn.Linear(1, 1)
    predictor = NetworkPredictor(model, "detect", ["a"], {}, "", {"task_args": {"min_score": 0.05}})
    for wrong in (0.01, 1.5, float("nan")):
        with pytest.raises(UserError, match=r"min_score must be from 0\.05"):
            predictor.check_min_score(wrong)
    with pytest.raises(UserError, match=r"img_size has no effect on .*, which is for the task detect"):
        predictor.resize_input(64)
    monkeypatch.setattr("transcnn.commands.evaluate.load", lambda *_: predictor)
    with pytest.raises(UserError, match="img_size has no effect"):
        evaluate("x", img_size=64)
    with pytest.raises(UserError, match="min_score is for detectors"):
        NetworkPredictor(model, "classify", ["a"], {}, "").check_min_score(0.5)


def test_no_input_and_no_other_output_is_written_over(tmp_path):
    """Originals in the folder of the outputs, and names whose outputs would be one file."""
    names = ["a.png", "b.jpg", "b_overlay.jpg", "B.jpeg", "c.tif", "c_overlay.png", "predictions.json"]
    for name in names:
        (tmp_path / name).write_bytes(b"original")
    files = [str(tmp_path / name) for name in names[:5]]
    out = OutputFolder(tmp_path, files, coco=True)
    written = []
    for file in files:
        found = detections(file)
        areas = Segmentation.of(np.zeros((20, 20), int), ["a"], {"label_ids": [0]}, 1)
        written += [*out.add(found).values()]
        written += [*out.add(dataclasses.replace(areas, file=file, image=found.image)).values()]
    out.finish()
    assert len(set(written)) == len(written) == 15
    assert all((tmp_path / name).read_bytes() == b"original" for name in names)
    assert (tmp_path / "predictions-2.json").is_file()


def test_of_thousands_of_one_name_none_is_tried_twice(tmp_path, monkeypatch):
    """Frames of videos, each video's in a folder of its own."""
    tried = []
    is_free = OutputFolder._is_free
    monkeypatch.setattr(OutputFolder, "_is_free", lambda self, *args: tried.append(1) or is_free(self, *args))
    out = OutputFolder(tmp_path, coco=True)
    names = [out.stem_for(f"{i}/x.png").name for i in range(200)]
    assert names == ["x", *(f"x-{i}" for i in range(2, 201))]
    assert len(tried) < 500
    assert [out.stem_for(f"{i}/predictions.png").name for i in range(2)] == ["predictions", "predictions-2"]
    out.finish()
    assert (tmp_path / "predictions.json").is_file()


def test_outputs_of_an_earlier_call_are_replaced_elsewhere(tmp_path):
    for _ in range(2):
        out = OutputFolder(tmp_path / "out", [str(tmp_path / "x.png")])
        assert Path(out.add(detections(str(tmp_path / "x.png")))["overlay"]).name == "x_overlay.png"
    assert len(list((tmp_path / "out").iterdir())) == 1


@pytest.mark.parametrize(("max_found", "wanted"), [(300, 100.0), (100, 100 * 67 / 101)])
def test_map_counts_as_many_boxes_as_the_detector_may_find(max_found, wanted):
    """150 boxes found exactly; COCO's own limit is 100 an image."""
    task = DetectTask(torch.nn.Identity(), ["a"], {}, task_args={"detector": "retinanet", "max_found": max_found})
    corner = torch.stack(torch.meshgrid(torch.arange(15), torch.arange(10), indexing="ij"), -1).reshape(-1, 2) * 20.0
    boxes = torch.cat([corner, corner + 10], 1)[: max(max_found, 150)]
    labels = torch.zeros(150, dtype=torch.long)
    found = {
        "boxes": boxes[:max_found],
        "labels": labels[:max_found],
        "scores": torch.linspace(0.9, 0.5, 150)[:max_found],
    }
    truth = {"boxes": boxes, "labels": labels}
    task._metric[0].update([found], [truth])
    assert 100 * float(task._metric[0].compute()["map"]) == pytest.approx(wanted, abs=0.1)
