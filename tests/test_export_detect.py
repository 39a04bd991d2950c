"""Detectors and segmenters as files: one graph finds what the checkpoint finds, and ONNX Runtime alone tells it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.ops import nms

from transcnn.checkpoints.loading import Loaded, load, save_weights
from transcnn.commands.predict import predict
from transcnn.dense.detectors import DETECTORS, build
from transcnn.errors import UserError
from transcnn.export import export_model
from transcnn.export.check import _of_detections, check, check_detections
from transcnn.export.detect import DetectorGraph, _suppress
from transcnn.onnx.dense import bilinear, class_map, detections, window_starts
from transcnn.onnx.predict import OnnxModel
from transcnn.report.overlay import largest
from transcnn.tasks.sliding import sliding_window_inference

NAMES = ["square", "disc", "cross"]
CONFIG = dict(input_size=[3, 64, 64], mean=[0.5, 0.4, 0.3], std=[0.2, 0.25, 0.3], interpolation="bicubic", crop_pct=1.0)


def settings(detector: str, **more: Any) -> dict[str, Any]:
    args = dict(detector=detector, min_score=0.02, max_found=40, side_range=(1, 1), anchor_size=16)
    return {**args, "fpn_channels": 16, "short_side": 64, "long_side": 96, **more}


def lively(detector: str, backbone: str = "test_resnet", sharpness: float = 4.0, **more: Any) -> Any:
    """A detector whose answers differ from place to place, with scores of all heights.

    Too sharp for a backbone, all scores are 1, and which of them are kept is a matter of rounding.
    """
    torch.manual_seed(0)
    network = build(backbone, settings(detector, **more), num_classes=3)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=1.1 / parameter[0].numel() ** 0.5)
        if "bbox" in name:
            parameter.data.mul_(0.1)
        if "cls_score" in name or "cls_logits" in name:
            parameter.data.mul_(sharpness if parameter.ndim > 1 else 0.0)
    return network.eval()


def photo(seed: int, size: tuple[int, int] = (83, 64)) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)


def normalised(images: list[torch.Tensor], network: Any) -> torch.Tensor:
    mean, std = (torch.tensor(getattr(network.net.transform, f"image_{name}")) for name in ("mean", "std"))
    return (torch.stack(images) - mean[:, None, None]) / std[:, None, None]


@pytest.mark.parametrize("detector", DETECTORS)
def test_the_graph_finds_what_torchvision_finds(detector):
    network = lively(detector)
    graph = DetectorGraph(network)
    images = [torch.from_numpy(np.asarray(photo(seed), np.float32)).permute(2, 0, 1) / 255 for seed in range(2)]
    with torch.inference_mode():
        boxes, scores, labels, image, *masks = graph(normalised(images, network))
        for i, wanted in enumerate(network([picture]) for picture in images):
            own = image == i
            assert 2 < len(wanted[0]["boxes"]) <= 40
            torch.testing.assert_close(boxes[own], wanted[0]["boxes"], atol=1e-3, rtol=0)
            torch.testing.assert_close(scores[own], wanted[0]["scores"], atol=1e-5, rtol=0)
            assert labels[own].tolist() == wanted[0]["labels"].tolist()
            if masks:
                small = masks[0][own]
                assert small.shape[1:] == (28, 28)
                assert small.std() > 0.01


SIZES = [
    (83, 64),
    (64, 83),
    (200, 150),
    (31, 33),
    (1, 1),
    (3, 300),
    (3000, 10),
    (10, 3000),
    (96, 64),
    (500, 7),
    (65, 64),
]


@pytest.mark.parametrize("detector", DETECTORS)
def test_predict_finds_the_same_by_the_checkpoint_and_by_the_graph(detector, monkeypatch):
    """The way of an exported file, with the graph itself in the file's place, on odd images."""
    monkeypatch.setattr("transcnn.export.check._median_seconds", lambda *_: [0.0, 0.0])  # nobody asks how fast
    network = lively(detector)
    graph = DetectorGraph(network)
    names = ("boxes", "scores", "labels", "image", "masks")

    def outputs(images: np.ndarray) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            found = graph(torch.from_numpy(images))
        return {name: value.numpy() for name, value in zip(names, found, strict=False)}

    transform = network.net.transform
    config = {**CONFIG, "mean": list(transform.image_mean), "std": list(transform.image_std)}
    info = {"data_config": config, "task_args": settings(detector)}
    images = [photo(i, size) for i, size in enumerate(SIZES)] + [photo(99).convert("L"), photo(98).convert("RGBA")]
    rows = check_detections(network, outputs, images, info)
    assert max(row.relative for row in rows) <= 1e-4
    assert sum(row.detections or 0 for row in rows) > 100
    for image in images[:7]:
        boxes = detections(outputs, image, info)["boxes"]
        assert (boxes[:, 2:] > boxes[:, :2]).all()  # none without an area
        assert (boxes >= 0).all()
        assert (boxes <= [image.width, image.height] * 2).all()


def test_suppression_is_as_exact_in_a_large_batch_as_in_a_single_image():
    rng = np.random.default_rng(0)
    count, images, classes = 4000, 32, 80
    corners = rng.integers(0, 1300 * 64, (count // 8, 1, 2)) + rng.integers(0, 300, (count // 8, 8, 2))
    sides = rng.integers(6 * 64, 12 * 64, (count // 8, 8, 2))
    boxes = torch.from_numpy(np.concatenate([corners, corners + sides], -1).reshape(-1, 4) / 64).float()
    scores = torch.from_numpy(rng.permutation(count) / count).float()
    image, label = (torch.from_numpy(rng.integers(0, n, count // 8).repeat(8)) for n in (images, classes))
    kept = _suppress(boxes, scores, label, image, 0.5)
    alone = [nms(boxes[i : i + 8], scores[i : i + 8], 0.5) + i for i in range(0, count, 8)]  # of one class each
    assert sorted(kept.tolist()) == sorted(torch.cat(alone).tolist())


def test_nothing_found_is_an_answer():
    for detector in DETECTORS:
        network = lively(detector, min_score=1.1)
        with torch.inference_mode():
            boxes, scores, *_ = DetectorGraph(network)(torch.zeros(1, 3, 40, 40))
        assert (tuple(boxes.shape), tuple(scores.shape)) == ((0, 4), (0,))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The directory of a Mask R-CNN."""
    folder = tmp_path_factory.mktemp("run")
    args = settings("maskrcnn", label_ids=[7, 8, 9])
    info = {"model": "test_resnet", "class_names": NAMES, "data_config": CONFIG, "task": "detect", "task_args": args}
    save_weights(folder / "best.safetensors", lively("maskrcnn"), info)
    return folder


@pytest.fixture(scope="module")
def exported(run) -> Any:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    return export_model(load(run), run / "model.onnx")


@pytest.mark.slow
def test_onnx_finds_the_same_at_any_size(run, exported):
    assert all(row.relative <= 1e-5 for row in exported.rows)
    assert sum(row.detections for row in exported.rows) > 10
    graph, model = DetectorGraph(load(run).model), OnnxModel(exported.file, accelerator="cpu", threads=1)
    shapes = ((1, 3, 64, 64), (2, 3, 33, 90), (3, 3, 128, 70))
    batches = [np.random.default_rng(0).normal(size=shape).astype(np.float32) for shape in shapes]
    rows = check(graph, lambda images: list(model.outputs(images).values()), iter(batches))
    assert all(row.relative <= 1e-5 and row.detections for row in rows)


@pytest.mark.slow
def test_the_file_says_what_it_answers(exported):
    info = json.loads(exported.file.with_suffix(".json").read_text())
    assert [output["name"] for output in info["outputs"]] == ["boxes", "scores", "labels", "image", "masks"]
    assert info["data_config"]["mean"] != CONFIG["mean"]  # the detector's own counts
    assert any("min(64 / shorter side, 96 / longer side)" in step for step in info["steps"])
    assert any("without area" in step for step in info["steps"])


@pytest.mark.slow
def test_predict_tells_the_same_from_the_file(run, exported, tmp_path):
    files = []
    for i, size in enumerate(((83, 64), (50, 70), (200, 150))):
        files.append(str(tmp_path / f"{i}.png"))
        photo(i, size).save(files[-1])
    wanted = predict(str(run), files, accelerator="cpu", quiet=True, out=str(tmp_path / "a"))
    found = predict(str(exported.file), files, accelerator="cpu", quiet=True, out=str(tmp_path / "b"))
    for ours, theirs in zip(found, wanted, strict=True):
        assert len(ours["boxes"]) == len(theirs["boxes"]) > 2
        assert [box["label"] for box in ours["boxes"]] == [box["label"] for box in theirs["boxes"]]
        for a, b in zip(ours["boxes"], theirs["boxes"], strict=True):
            assert a["score"] == pytest.approx(b["score"], abs=1e-5)
            assert a["box"] == pytest.approx(b["box"], abs=0.02)
        with Image.open(ours["overlay"]) as one, Image.open(theirs["overlay"]) as other:
            assert (np.asarray(one) != np.asarray(other)).mean() < 0.01
    masks = [json.loads((tmp_path / part / "predictions.json").read_text()) for part in "ab"]
    assert {entry["category_id"] for entry in masks[0]} <= {7, 8, 9}
    differing = 0
    for a, b in zip(*masks, strict=True):
        ends = [np.cumsum(entry["segmentation"]["counts"]) for entry in (a, b)]
        assert ends[0][-1] == ends[1][-1]
        inside = [np.searchsorted(end, np.arange(end[-1]), side="right") % 2 for end in ends]
        differing += int((inside[0] != inside[1]).sum())
    assert differing <= 20  # pixels on the very border of a mask


def test_detections_are_compared_in_any_order():
    rng = np.random.default_rng(0)
    found = [rng.uniform(0, 50, (6, 4)), rng.uniform(size=6), rng.integers(0, 2, 6), np.zeros(6, int)]
    order = rng.permutation(6)
    assert _of_detections(found, [part[order] for part in found], 64) == (0.0, 0.0)
    moved = [found[0] + 0.64, *found[1:]]
    assert _of_detections(found, moved, 64)[0] == pytest.approx(0.01)
    assert _of_detections(found, [part[:5] for part in found], 64)[0] == float("inf")
    assert _of_detections(found, [part[:5] for part in found], 64, floor=0.0)[0] > 1e-3
    order = np.argsort(-found[1])
    best = [part[order] for part in found]  # rounding may decide about the least sure alone
    assert _of_detections(best, [part[:5] for part in best], 64, floor=float(best[1][5]))[0] == 0
    assert _of_detections(best, [part[1:] for part in best], 64, floor=float(best[1][5]))[0] > 1e-3
    assert _of_detections(found, [found[0], found[1], 1 - found[2], found[3]], 64)[0] > 1e-3


@pytest.mark.parametrize("size", [(64, 96), (31, 47), (200, 10), (1, 1)])
def test_bilinear_is_torchs(size):
    maps = np.random.default_rng(0).normal(size=(2, 50, 60)).astype(np.float32)
    wanted = F.interpolate(torch.from_numpy(maps)[None], size, mode="bilinear", align_corners=False)[0]
    np.testing.assert_allclose(bilinear(maps, size), wanted.numpy(), atol=2e-5)


@pytest.mark.parametrize("args", [{}, {"resize": 48}, {"window": 40}, {"flip": True}, {"window": 33, "flip": True}])
def test_segmentation_by_numpy_is_torchs(args):
    """The way there and back with a network that gives a little of its surroundings to each pixel."""
    torch.manual_seed(1)
    network = nn.Conv2d(3, 3, 5, padding=2).eval()
    nn.init.normal_(network.weight, std=0.5)

    def by_numpy(images: np.ndarray) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            return {"logits": network(torch.from_numpy(images)).numpy()}

    image = photo(3, (97, 71))
    labels = class_map(by_numpy, image, {"data_config": CONFIG, "task_args": args})
    from transcnn.data.transforms.segment import EvalTransform

    pixels = EvalTransform(mean=CONFIG["mean"], std=CONFIG["std"], resize=args.get("resize"))(image)[0][None]
    with torch.inference_mode():
        logits = sliding_window_inference(network, pixels, 3, window=args.get("window"), flip=args.get("flip", False))
        wanted = F.interpolate(logits, (71, 97), mode="bilinear", align_corners=False)[0].argmax(0).numpy()
    assert len(np.unique(wanted)) == 3
    # Pillow and torch round pixels of a resized image differently, by one of 255 at most.
    assert (labels != wanted).mean() <= (0.01 if "resize" in args else 0.0005)


def test_windows_cover_all():
    for full, window in ((100, 40), (41, 40), (40, 40), (39, 40)):
        starts = window_starts(full, window)
        assert starts[0] == 0
        assert starts[-1] + window >= full
        assert all(b - a <= window for a, b in itertools.pairwise(starts))


def test_a_file_of_one_size_is_refused_for_whole_images(monkeypatch, tmp_path):
    photo(0).save(tmp_path / "a.png")
    fake: Any = {"task": "segment", "fixed": [64, 64], "class_names": NAMES, "info": {"task_args": {}}}
    fake = type("Fake", (), {**fake, "data_config": CONFIG})
    monkeypatch.setattr("transcnn.predictor.onnx.OnnxModel", lambda *_, **__: fake)
    with pytest.raises(UserError, match="images to segment have many sizes, the file takes one alone"):
        predict("model.onnx", [str(tmp_path / "a.png")], quiet=True)


def test_shares_of_classes():
    labels = np.array([[0, 0, 2], [2, 2, 2]])
    assert largest(labels, NAMES, 2) == [{"label": "cross", "share": 0.666667}, {"label": "square", "share": 0.333333}]


def test_detections_of_an_image_are_in_its_pixels():
    def network(images: np.ndarray) -> dict[str, np.ndarray]:
        assert images.shape == (1, 3, 64, 83)
        box = np.array([[0, 0, 83, 32]], np.float32)
        one = np.ones(1, np.float32)
        return {"boxes": box, "scores": one, "labels": one.astype(int), "image": one, "masks": np.ones((1, 28, 28))}

    info = {"data_config": CONFIG, "task_args": {"short_side": 64, "long_side": 96}}
    found = detections(network, photo(0, (166, 128)), info)
    np.testing.assert_allclose(found["boxes"], [[0, 0, 166, 64]], atol=1e-3)
    assert found["masks"].shape == (1, 1, 128, 166)
    assert found["masks"][0, 0, 3:60, 8:-8].min() > 0.5
    assert found["masks"][0, 0, 70:].max() == 0


@pytest.mark.slow
@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("format", ["onnx", "torch", "openvino"])
def test_every_detector_goes_into_every_format(detector, format, tmp_path):
    if format == "openvino":
        pytest.importorskip("openvino")
    network = lively(detector, "transcnn_test", sharpness=0.04)
    config = {**CONFIG, "input_size": [3, 64, 64]}
    loaded = Loaded(network, "detect", NAMES, config, "", {"model": "transcnn_test", "task_args": settings(detector)})
    suffix = {"onnx": ".onnx", "torch": ".pt2", "openvino": ".xml"}[format]
    result = export_model(loaded, tmp_path / f"model{suffix}", format=format, tolerance=1e-4)
    assert sum(row.detections or 0 for row in result.rows) > 5


@pytest.mark.slow
def test_a_segmenter_answers_and_predicts_the_same_from_its_file(tmp_path):
    pytest.importorskip("segmentation_models_pytorch")
    from transcnn.compare.engines import randomise
    from transcnn.dense.segmenters import build as build_segmenter

    torch.manual_seed(0)
    args = {"decoder": "fpn", "decoder_channels": 64, "label_ids": [3, 4, 5], "resize": None}
    network = build_segmenter("test_resnet", args, num_classes=3)
    randomise(network)
    info = {"model": "test_resnet", "class_names": NAMES, "data_config": CONFIG, "task": "segment", "task_args": args}
    (tmp_path / "run").mkdir()
    save_weights(tmp_path / "run" / "best.safetensors", network, info)
    result = export_model(load(tmp_path / "run"), tmp_path / "run" / "model.onnx")
    assert [(row.batch, row.height, row.width) for row in result.rows][:4] == [
        (1, 64, 64),
        (3, 49, 73),
        (2, 96, 96),
        (1, 1, 1),
    ]
    model = OnnxModel(result.file, accelerator="cpu", threads=1)
    for height, width in (
        (1, 1),
        (7, 5),
        (32, 32),
        (31, 9),
        (33, 1),
        (65, 33),
    ):  # one tile is a case apart
        images = np.random.default_rng(0).normal(size=(2, 3, height, width)).astype(np.float32)
        with torch.inference_mode():
            wanted = load(tmp_path / "run").model(torch.from_numpy(images)).numpy()
        assert np.abs(model(images) - wanted).max() <= 1e-4 * np.abs(wanted).max()
    assert all(row.relative <= 1e-5 for row in result.rows)
    photo(2, (97, 71)).save(tmp_path / "a.png")
    wanted, found = (
        predict(str(path), [str(tmp_path / "a.png")], accelerator="cpu", quiet=True, out=str(tmp_path / name))[0]
        for path, name in ((tmp_path / "run", "x"), (result.file, "y"))
    )
    assert found["classes"] == wanted["classes"]
    with Image.open(wanted["mask"]) as one, Image.open(found["mask"]) as other:
        assert (np.asarray(one) != np.asarray(other)).mean() < 1e-3
        assert set(np.unique(np.asarray(other))) <= {3, 4, 5}
