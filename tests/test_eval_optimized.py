"""Scores are computed by the optimized network, in evaluation and in training's validation, and they are the same."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from transcnn.checkpoints.loading import load
from transcnn.commands.evaluate import evaluate
from transcnn.commands.train import train
from transcnn.data.sets.classify import open_set
from transcnn.fast.inference.attention import FastHMHSA
from transcnn.fast.inference.optimize import try_optimize
from transcnn.settings import Detect, Segment
from transcnn.tasks import base
from transcnn.tasks.classify import Classify
from transcnn.training.evaluation import measure

PACKAGED = "transcnn_nano.cifar10"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 images of blobs, eight in each of ten class folders."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name in load(PACKAGED).class_names:
        (folder / name).mkdir()
        for i in range(8):
            small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8))
            small.resize((40, 33), Image.Resampling.BICUBIC).save(folder / name / f"{i}.png")
    return folder


def test_an_optimized_network_scores_alike(photos, monkeypatch):
    scores, paths, fast_calls = {}, {}, {True: 0, False: 0}
    forward = FastHMHSA.forward_nhwc

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        fast_calls[optimize] += 1
        return forward(*args, **kwargs)

    monkeypatch.setattr(FastHMHSA, "forward_nhwc", counted)
    for optimize in (True, False):
        loaded = load(PACKAGED)
        part = open_set(str(photos), "all", class_names=loaded.class_names, val_fraction=0.1, seed=0, strict=True)
        learner, found, _ = measure(loaded, part, batch_size=32, accelerator="cpu", optimize=optimize)
        scores[optimize], paths[optimize] = found, found["path"]
        assert not learner._fast  # the copy is gone
    assert paths == {True: "optimized", False: "plain"}
    assert len(scores[True]["confusion"].nonzero()) > 15
    assert torch.equal(scores[True]["confusion"], scores[False]["confusion"])
    assert scores[True]["loss"] == pytest.approx(scores[False]["loss"], rel=1e-5)
    assert fast_calls[True] > 0 == fast_calls[False]  # two ways of computing


@pytest.mark.falls_back
def test_eval_says_how_it_was_computed(photos, tmp_path, caplog, monkeypatch):
    settings: dict[str, Any] = dict(split="all", accelerator="cpu", quiet=True, out=tmp_path)
    metrics = evaluate(PACKAGED, photos, **settings)
    assert (metrics["path"], metrics["precision"], metrics["device"]) == ("optimized", "32-true", "cpu")
    assert evaluate(PACKAGED, photos, optimize=False, **settings)["path"] == "plain"
    with monkeypatch.context() as patch:  # a warning, which nobody has to ask for
        patch.setattr("transcnn.fast.inference.optimize._replace", lambda model: 1 / 0)
        assert evaluate(PACKAGED, photos, **settings)["path"] == "plain"
    assert "TransCNN runs as it is, for it can't be optimized: division by zero" in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr("transcnn.fast.inference.blocks.FastBlock.forward", lambda *_: 1 / 0)
        failing = evaluate(PACKAGED, photos, **settings)
    assert (failing["path"], failing["loss"]) == (
        "plain",
        evaluate(PACKAGED, photos, optimize=False, **settings)["loss"],
    )
    assert "TransCNN runs as it is, for optimized it fails: division by zero" in caplog.text


def test_a_test_fails_where_an_optimized_network_falls_back(fallbacks):
    class Alone(nn.Module):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("no copies")

    assert try_optimize(nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 1))) is not None
    fallbacks.check()
    assert try_optimize(nn.Sequential(Alone())) is None
    with pytest.raises(pytest.fail.Exception, match=r"can't be optimized: no copies\n.*falls_back"):
        fallbacks.check()
    fallbacks.check()  # each once


@pytest.mark.falls_back
def test_a_run_says_once_that_its_network_falls_back(fallbacks, monkeypatch):
    monkeypatch.setattr("transcnn.fast.inference.optimize.make_fast", lambda model: 1 / 0)
    task = Classify(nn.Conv2d(3, 4, 1), ["a"], {}, optimize=True)
    task._trainer = SimpleNamespace(precision="32", strategy=None)  # pyright: ignore
    for _ in range(3):  # epochs
        task._optimize(SimpleNamespace(dataset=range(base.ENOUGH)))
        assert (task._fast, task.path) == ((), "plain")
    assert len(fallbacks.lines) == 1


def shapes(folder: Path, count: int = 6) -> Path:
    """Images of squares with label maps and boxes: ``images/{train,val}``, ``labels/``, ``annotations/``."""
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        sheet: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "square"}]}
        for kind in ("images", "labels"):
            (folder / kind / part).mkdir(parents=True)
        for i in range(count):
            x, y, side = rng.integers(0, 24), rng.integers(0, 24), rng.integers(14, 30)
            pixels = rng.integers(0, 90, (64, 64, 3)).astype(np.uint8)
            pixels[y : y + side, x : x + side] += 150
            labels = np.zeros((64, 64), np.uint8)
            labels[y : y + side, x : x + side] = 1
            Image.fromarray(pixels).save(folder / "images" / part / f"{i}.png")
            Image.fromarray(labels).save(folder / "labels" / part / f"{i}.png")
            sheet["images"].append({"id": i, "file_name": f"{i}.png", "width": 64, "height": 64})
            box = [int(x), int(y), int(side), int(side)]
            sheet["annotations"].append(
                {"id": i, "image_id": i, "category_id": 1, "bbox": box, "area": int(side) ** 2, "iscrowd": 0}
            )
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / f"{part}.json").write_text(json.dumps(sheet))
    return folder


@pytest.mark.parametrize("task", ["classify", "segment", "detect"])
@pytest.mark.usefixtures("no_report")
def test_validation_in_training_scores_alike(
    task: str, tmp_path: Path, make_class_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "ENOUGH", 1)
    data = make_class_folder(splits=("train", "val"), classes=2) if task == "classify" else shapes(tmp_path / "data")
    extra: dict[str, Any] = {
        "segment": {"segment": Segment(decoder_channels=64)},
        "detect": {"detect": Detect(fpn_channels=16, short_side=64, long_side=64, min_score=0.01)},
    }.get(task, {})
    settings = {
        **dict(task=task, model="transcnn_test", img_size=None if task == "detect" else 32, epochs=1, batch_size=4),
        **dict(lr=5e-3, precision="32", accelerator="cpu", num_workers=0, quiet=True, **extra),
    }
    made, rows = {}, {}
    for optimize in (True, False):
        made[optimize] = train(str(data), **settings, optimize=optimize, out=str(tmp_path / f"run-{optimize}"))
        with (made[optimize].run_dir / "metrics.csv").open() as file:
            rows[optimize] = next(csv.DictReader(file))
    assert [made[optimize].metrics["path"] for optimize in (True, False)] == ["optimized", "plain"]
    weights = [(result.run_dir / "best.safetensors").read_bytes()[-10_000:] for result in made.values()]
    assert weights[0] == weights[1]  # what is learnt is the same bit for bit
    for name in [name for name in rows[True] if name.startswith("val_")]:
        assert float(rows[True][name]) == pytest.approx(float(rows[False][name]), rel=1e-3, abs=1e-3), name
