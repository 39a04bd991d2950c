"""The benchmarks that train: what they compare is what they say, and a small run writes its tables and plots."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from timm.models import create_model
from torch import nn

from transcnn import HMHSA
from transcnn.attention import LocalStep
from transcnn.checkpoints.loading import data_config_of, save_weights
from transcnn.compare.engines import load_reference, randomise
from transcnn.data.images import read_image
from transcnn.data.sets.classify import open_set
from transcnn.plugging.build import build_model

VARIANTS = ("none", "local", "global", "swin", "full", "hmhsa2", "hmhsa3")
SMALL = dict(host="transcnn_test", side=64, num_classes=3)


@pytest.fixture(autouse=True)
def scripts(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``python benchmarks/NAME.py`` would find its neighbours."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def call(monkeypatch: pytest.MonkeyPatch, module: Any, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
    module.main()


# --- attention.py -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_attention_is_exchanged(variant: str) -> None:
    import attention_variants

    assert tuple(attention_variants.VARIANTS) == VARIANTS
    host, model = create_model("transcnn_test", num_classes=3), create_model("attention_host", variant=variant, **SMALL)
    mine, its = ({n: p.shape for n, p in m.named_parameters() if ".attn." not in n} for m in (model, host))
    assert mine == its
    for size in (64, 50):  # a size that no grid divides, too
        x = torch.randn(2, 3, size, size)
        model(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert model.eval()(x).shape == (2, 3)


def reach(variant: str) -> torch.Tensor:
    """What each position of stage 1's first block takes something from, (H, W), seen from the top left corner."""
    model = create_model("attention_host", variant=variant, **SMALL).eval()
    block: Any = model.stages[0].blocks[0]
    for parameter in block.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.5)
    x = torch.randn(1, 8, 16, 16, requires_grad=True)
    block.attn(x)[0, :, 0, 0].sum().backward()
    return x.grad.abs().sum((0, 1)) > 1e-9 if x.grad is not None else torch.zeros(16, 16, dtype=torch.bool)


def test_each_variant_reaches_what_its_name_says() -> None:
    seen = {variant: reach(variant) for variant in VARIANTS if variant != "none"}
    for variant in ("local", "swin"):  # grids of 4 and nothing beyond
        assert seen[variant].sum() == 16
        assert seen[variant][:4, :4].all()
    for variant in ("global", "full", "hmhsa2", "hmhsa3"):
        assert seen[variant].all()


def test_the_second_block_of_a_stage_has_shifted_windows() -> None:
    model: Any = create_model("attention_host", variant="swin", side=128, host="transcnn_micro")
    shifts = [[block.attn.swin.shift_size for block in stage.blocks] for stage in model.stages]
    assert shifts == [[(0, 0)], [(0, 0), (4, 4)], [(0, 0), (2, 2)] * 2, [(0, 0), (0, 0)]]


def test_levels_are_those_of_the_name() -> None:
    def levels(variant: str) -> list[int]:
        model = create_model("attention_host", variant=variant)
        return [1 + len(m.grid_sizes) for m in model.modules() if isinstance(m, HMHSA)]

    assert levels("full") == [1] * 6
    assert levels("hmhsa2") == [2] * 4 + [1] * 2
    assert levels("hmhsa3") == [3] * 4 + [1] * 2


@pytest.mark.usefixtures("no_report")
def test_a_small_run_of_attention_writes_its_tables(
    make_class_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import attention

    data, out = make_class_folder(classes=2, per_class=30, splits=("train", "test")), tmp_path / "small.csv"
    quick = [data, "--limit_batches", 1, "--epochs", 1, "--host", "transcnn_test", "--batch", 2, "--seconds", 0]
    quick += ["--runs", tmp_path / "runs", "--out", out]
    call(monkeypatch, attention, *quick, "--variants", "swin", "--seeds", 0)
    (run,) = rows_of(tmp_path / "small_runs.csv")
    assert (run["variant"], run["seed"], run["epochs"]) == ("swin", "0", "1")
    metrics = json.loads((tmp_path / "runs" / "swin-transcnn_test-32-1-0.01-0" / "metrics.json").read_text())
    assert float(run["top1"]) == metrics["top1"]

    trained = []

    def fake(folder: Path, data: str, **settings: Any) -> dict[str, Any]:
        trained.append((settings["model_args"]["variant"], settings["seed"]))
        return {"top1": 50.0 + settings["seed"], "loss": 1.25, "val_top1": 0.5, "train_seconds": 1.5}

    monkeypatch.setattr(attention, "train_or_resume", fake)
    call(monkeypatch, attention, *quick, "--variants", "none", "swin", "--seeds", 0, 1, 2)
    assert trained == [("none", 0), ("none", 1), ("swin", 1), ("none", 2), ("swin", 2)]  # none again that is there
    rows = {row["variant"]: row for row in rows_of(out)}
    assert list(rows) == ["none", "swin"]
    assert (rows["none"]["top1_mean"], rows["none"]["top1_spread"], rows["none"]["seeds"]) == ("51.0", "1.0", "3")
    assert float(rows["none"]["loss_mean"]) == 1.25
    assert int(rows["none"]["params"]) < int(rows["swin"]["params"])
    assert all(float(row["training_images_per_s"]) > 0 for row in rows.values())
    assert out.with_suffix(".png").stat().st_size > 1000


def test_tuning_goes_by_held_back_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import attention

    scores = {5e-3: 50.0, 1e-2: 60.0}

    def fake(folder: Path, data: str, **settings: Any) -> dict[str, Any]:
        return {"top1": 0.0, "loss": 2.5, "val_top1": scores[settings["lr"]], "train_seconds": 1.0}

    monkeypatch.setattr(attention, "train_or_resume", fake)
    call(monkeypatch, attention, "data", "--tune", "--lrs", 5e-3, 1e-2, "--out", tmp_path / "a.csv")
    assert "rate 0.01: 60.00 % of held-back images" in capsys.readouterr().out
    rows = rows_of(tmp_path / "a_tuning.csv")
    assert [row["variant"] for row in rows] == ["none", "hmhsa2"] * 2
    assert "top1" not in rows[0]


def test_one_large_image_is_measured_unless_it_would_take_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import attention

    asked = []

    def fake(models: list[str], **options: Any) -> list[dict[str, Any]]:
        asked.append((options["reference"], options["sizes"]))
        return [{"images_per_s": 4.0, "above_mb": 12.3}]

    monkeypatch.setattr(attention, "compare", fake)
    monkeypatch.setattr(attention, "speed", lambda options, variant: {"params": 1, "macs": 1})
    quick = ["data", "--cost", "--sizes", 64, "--out", tmp_path / "a.csv", "--variants"]
    call(monkeypatch, attention, *quick, "local")
    call(monkeypatch, attention, *quick, "full", "--most_macs", 1)
    local, full = rows_of(tmp_path / "a_cost.csv")
    assert (local["seconds_64"], local["above_mb_64"]) == ("0.25", "12")
    assert (full["seconds_64"], full["above_mb_64"]) == ("", "")
    ((reference, sizes),) = asked
    assert sizes == [64]
    steps = [m for m in load_reference(reference).modules() if isinstance(m, LocalStep)]
    assert len(steps) == 6  # transcnn_nano with the local step alone


# --- transfer.py --------------------------------------------------------------------------------------------------


@pytest.fixture
def cifar10(tmp_path: Path, class_image: Any) -> Path:
    """A folder as transfer.py wants it: two classes, 30 and 10 images each."""
    folder = tmp_path / "cifar10"
    folder.mkdir()
    for part, count in (("train", 30), ("test", 10)):
        rows = [
            {"image": {"bytes": png(class_image(i % 2, i)), "path": f"{i}"}, "label": i % 2} for i in range(2 * count)
        ]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{part}.parquet")
    (folder / "classes.txt").write_text("rising\nfalling\n")
    return folder


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """Weights of a small network for other classes, in a run's directory."""
    model = build_model("transcnn_test", num_classes=4)
    randomise(model)
    info: dict[str, Any] = {"model": "transcnn_test", "model_args": {"act_layer": "relu"}, "task": "classify"}
    info |= {"class_names": list("abcd"), "data_config": data_config_of(model, 3, 32)}
    (tmp_path / "weights").mkdir()
    save_weights(tmp_path / "weights" / "best.safetensors", model, info)
    return tmp_path / "weights"


def test_few_images_are_drawn_by_the_seed(cifar10: Path, tmp_path: Path) -> None:
    import transfer

    options = SimpleNamespace(cifar10=cifar10, runs=tmp_path / "runs")
    drawn = [pyarrow.parquet.read_table(transfer.few_images(options, 5, seed) / "train.parquet") for seed in (0, 1)]
    for table in drawn:
        assert sorted(table["label"].to_pylist()) == [0] * 5 + [1] * 5
    assert drawn[0] != drawn[1]
    again = transfer.few_images(SimpleNamespace(cifar10=cifar10, runs=tmp_path / "more"), 5, 1)
    assert pyarrow.parquet.read_table(again / "train.parquet") == drawn[1]
    assert len(open_set(str(again), "test")) == 20


def test_a_probe_leaves_the_weights_alone_and_tells_classes_apart(cifar10: Path, start: Path, tmp_path: Path) -> None:
    import transfer

    options = SimpleNamespace(cifar10=cifar10, runs=tmp_path / "runs", weights=str(start), img_size=32)
    before = (start / "best.safetensors").read_bytes()
    scores = transfer.probe(options, transfer.few_images(options, 20, 0), 0)
    assert scores["score"] > 80  # two classes that differ much
    assert (start / "best.safetensors").read_bytes() == before


@pytest.mark.usefixtures("no_report")
def test_transfer_trains_from_scratch_and_from_weights_and_writes_its_tables(
    cifar10: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transfer

    asked: list[tuple[str, dict[str, Any]]] = []

    def fake(folder: Path, data: str, **settings: Any) -> dict[str, Any]:
        asked.append((folder.name, settings))
        score = 60.0 + settings["seed"] if settings["init_from"] else 50.0
        return {"top1": score, "val_top1": score, "miou": score, "val_miou": score, "map50": score, "val_map": score}

    monkeypatch.setattr(transfer, "train_or_resume", fake)
    out = tmp_path / "results" / "transfer.csv"
    quick = ["--weights", start, "--cifar10", cifar10, "--per_class", 10, 20, "--img_size", 32, "--updates", 10]
    quick += ["--runs", tmp_path / "runs", "--out", out, "--camvid", "camvid.tar", "--bccd", "bccd.tar"]
    call(monkeypatch, transfer, *quick, "--seeds", 0, 1)
    rows = {(row["data"], row["per_class"], row["start"]): row for row in rows_of(out)}
    assert len(rows) == 2 * 3 + 2 * 2
    assert rows["cifar10", "10", "finetune"]["score_mean"] == "60.5"
    assert rows["cifar10", "10", "scratch"]["score_spread"] == "0.0"
    assert rows["camvid", "0", "finetune"]["seeds"] == "2"
    assert len(rows_of(out.with_stem("transfer_runs"))) == 20
    assert out.with_suffix(".png").stat().st_size > 1000
    assert len(asked) == len({folder for folder, _ in asked}) == 16
    for folder, settings in asked:
        assert settings["model"] == "transcnn_test"
        assert settings["model_args"] == {"act_layer": "relu"}
        assert settings["init_from"] == (str(start) if "finetune" in folder else None)
    recipe = dict(asked)["camvid-0-weights-scratch-0.0-0"]
    assert (recipe["task"], recipe["epochs"], recipe["segment"].decoder) == ("segment", 22, "fpn")  # as it stands
    asked.clear()
    call(monkeypatch, transfer, *quick, "--seeds", 0, 1)
    assert not asked  # what the file of runs holds is not done again


def test_the_rate_of_transfer_goes_by_held_back_images(
    cifar10: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transfer

    monkeypatch.setattr(transfer, "train_or_resume", lambda *_, **s: {"top1": 0.0, "val_top1": 1000 * s["lr"]})
    out = tmp_path / "transfer.csv"
    quick = ["--weights", start, "--cifar10", cifar10, "--lrs", 0.01, 0.02, "--runs", tmp_path / "runs", "--out", out]
    call(monkeypatch, transfer, "--tune", *quick)
    rows = rows_of(out.with_stem("transfer_tuning"))
    assert [(row["start"], row["lr"], row["val_score"]) for row in rows] == [
        ("scratch", "0.01", "10.0"),
        ("scratch", "0.02", "20.0"),
        ("finetune", "0.01", "10.0"),
        ("finetune", "0.02", "20.0"),
    ]


def test_weights_that_have_seen_the_images_are_no_start(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import transfer

    with pytest.raises(SystemExit):
        call(monkeypatch, transfer, "--weights", "transcnn_nano.cifar10", "--cifar10", "cifar10")
    assert "has seen CIFAR-10's images" in capsys.readouterr().err
    assert transfer.weights_file("transcnn_nano.cifar10").endswith("weights/transcnn_nano.cifar10.safetensors")


# --- weights_peers.py ---------------------------------------------------------------------------------------------


def test_peers_get_one_recipe_and_maps_of_one_resolution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import weights_peers

    asked: dict[str, dict[str, Any]] = {}

    def fake(folder: Path, data: str, **settings: Any) -> dict[str, Any]:
        asked[settings["model"]] = settings
        return {"top1": 50.0, "val_top1": 51.0, "train_seconds": 10.0}

    monkeypatch.setattr(weights_peers, "train_or_resume", fake)
    out = tmp_path / "peers.csv"
    call(monkeypatch, weights_peers, "data", "--epochs", 3, "--runs", tmp_path, "--out", out)
    ours, theirs = asked["transcnn_micro"], asked["resnet18"]
    assert (ours["img_size"], ours["augment"].sizes) == (64, [32, 48])
    assert (theirs["img_size"], theirs["augment"].sizes, theirs["epochs"]) == (128, [64, 96], 3)
    assert all(settings["optim"] == ours["optim"] for settings in asked.values())
    rows = {row["network"]: row for row in rows_of(out)}
    assert list(rows) == list(weights_peers.NETWORKS)
    assert all(3.2e6 < float(row["params"]) < 4e6 for row in rows.values())
    assert all(1.3e8 < float(row["macs"]) < 2.6e8 for row in rows.values())


# --- answers.py ---------------------------------------------------------------------------------------------------


def test_odd_photos_are_all_read_and_answered(tmp_path: Path) -> None:
    import answers

    files = answers.odd_photos(tmp_path, 26)
    images = [answers.read_image(file) for file in files]
    assert {(1, 1), (3000, 10), (10, 3000), (127, 255)} <= {image.size for image in images}
    modes = set()
    for file in files:
        with Image.open(file) as opened:
            modes.add(opened.mode)
    assert modes >= {"L", "P", "RGBA", "I;16", "CMYK", "LA", "1", "RGB"}
    loaded = answers.load("transcnn_nano.cifar10")
    plain, fast = (answers.by_torch(loaded, model) for model in (loaded.model, answers.optimize(loaded.model)))
    found = [answers.compare("classify", plain(image), fast(image), {}) for image in images[:6]]
    assert not any(row["differs"] or row["unexplained"] for row in found)
    assert 0 < max(row["difference"] for row in found) < 1e-4


def test_answers_that_differ_are_told_from_rounding() -> None:
    import answers

    def pixels(*logits: float) -> Any:
        numbers = np.array([[[0.0, 0.0]], [logits]])  # two classes of two pixels
        return answers.Answer(numbers, numbers.argmax(0))

    row = answers.compare("segment", pixels(1e-6, 1.0), pixels(-1e-6, 1.0), {})
    assert (row["differs"], row["places"], row["unexplained"]) == (True, 1, False)
    row = answers.compare("segment", pixels(0.1, 1.0), pixels(0.1, -1e-3), {})
    assert (row["differs"], row["places"], row["unexplained"]) == (True, 1, False)
    wrong = pixels(0.1, 1.0)
    wrong.told = 1 - wrong.told
    assert answers.compare("segment", pixels(0.1, 1.0), wrong, {})["unexplained"]

    def boxes(*rows: tuple[float, ...]) -> Any:
        return np.array(rows).reshape(-1, 6)

    sure, faint, args = (0, 0, 9, 9, 1, 0.9), (20, 20, 30, 30, 0, 0.0502), {"min_score": 0.05, "max_found": 100}
    same = answers.compare_boxes(boxes(sure, faint), boxes(sure, faint), args)
    assert (same["differs"], same["difference"]) == (False, 0)
    lost = answers.compare_boxes(boxes(sure, faint), boxes(sure), args)
    assert (lost["differs"], lost["unexplained"]) == (True, False)
    assert answers.compare_boxes(boxes(sure, faint), boxes(faint), args)["unexplained"]
    assert answers.compare_boxes(boxes(sure), boxes((0, 0, 9, 9, 2, 0.9)), args)["unexplained"]


# --- tables and rare classes ----------------------------------------------------------------------------------------


def test_tables_are_made_of_masks_and_boxes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import make_tables

    for split in ("train", "val", "test"):
        for kind in ("images", "labels"):
            (tmp_path / "streets" / kind / split).mkdir(parents=True)
        Image.new("L", (8, 8), 0).save(tmp_path / "streets" / "images" / split / f"{split}.png")
        Image.new("L", (8, 8), 2 if split == "test" else 0).save(tmp_path / "streets/labels" / split / f"{split}.png")
    (tmp_path / "streets" / "classes.txt").write_text("sky\nvoid\ncar\n")
    call(monkeypatch, make_tables, tmp_path / "streets", tmp_path / "a")
    assert [tuple(row.values())[1:] for row in rows_of(tmp_path / "a" / "labels.csv")] == [
        ("train", "train-0", "1", "0"),
        ("train", "val-0", "1", "0"),
        ("test", "test-0", "0", "1"),
    ]
    (tmp_path / "cells" / "images").mkdir(parents=True)
    (tmp_path / "cells" / "annotations").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "cells" / "images" / "1.png")
    sheet = {"images": [{"id": 1, "file_name": "1.png"}], "categories": [{"id": 1, "name": "RBC"}]}
    sheet["annotations"] = [{"image_id": 1, "category_id": 1}] * 3
    for split in ("train", "val", "test"):
        (tmp_path / "cells" / "annotations" / f"{split}.json").write_text(json.dumps(sheet))
    call(monkeypatch, make_tables, tmp_path / "cells", tmp_path / "b")
    assert [row["RBC"] for row in rows_of(tmp_path / "b" / "labels.csv")] == ["3", "3", "3"]
    assert (tmp_path / "b" / rows_of(tmp_path / "b" / "labels.csv")[0]["file"]).is_file()


def test_the_long_tail_is_that_of_the_literature() -> None:
    import long_tail

    labels = np.repeat(np.arange(10), 5000)
    kept = labels[long_tail.thin(labels, 5000, 100)]
    assert np.bincount(kept).tolist() == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]


# --- start.py, pipeline.py ----------------------------------------------------------------------------------------


def test_what_a_command_takes_to_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import start

    call(monkeypatch, start, "--rounds", 1, "--commands", "transcnn --help", "--out", tmp_path / "start.csv")
    (row,) = rows_of(tmp_path / "start.csv")
    assert row["command"] == "transcnn --help"
    assert 0 < float(row["cpu_seconds"]) < 1
    assert float(row["wanted"]) == 1


def test_images_a_second_from_file_to_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", dict(os.environ))  # which importing it adds to
    import pipeline

    def work(many: Any, batch_size: int = 0) -> list[int]:  # some hundredths of a second
        return [sum(range(1_000_000)) for _ in many]

    graph = SimpleNamespace(_steps=lambda _: (np.asarray, work), predict_iter=work)
    monkeypatch.setattr(pipeline, "export_model", lambda *_: None)  # writing a file takes ten seconds
    monkeypatch.setattr(pipeline, "load", lambda _: graph)
    options = ["--count", 3, "--rounds", 1, "--networks", "nano, 64 px", "--out", tmp_path / "pipeline.csv"]
    call(monkeypatch, pipeline, *options)
    rows = rows_of(tmp_path / "pipeline.csv")
    assert [row["way"] for row in rows][:3] == ["predict --optimize false", "predict", "predict model.onnx"]
    assert all(float(row["images_per_s"]) > 0 and row["images"] == "3" for row in rows)


def test_predict_is_compared_with_reading_and_computing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("os.environ", dict(os.environ))  # which importing it adds to
    import pipeline

    times = {"read": [(1.0, 2.0), (9.0, 9.0), (1.0, 2.0)], "compute": [(2.0, 4.0)], "predict": [(2.5, 6.3)]}
    row = dict(zip(pipeline.HEAD, pipeline.row_of("net", "predict", pipeline.Way(100, {}, times)), strict=True))
    assert (row["over_larger"], row["bound"], row["over_work"]) == ("1.25", "1.50", "1.05")
    assert (row["images_per_s"], row["images_per_cpu_s"]) == ("40.0", "15.9")
    assert pipeline.markdown(row) == "| net: `predict` | 50.0 | 25.0 | 15.9 | 1.05 | 1.25 (1.50) |"

    files = pipeline.make_photos(tmp_path, 2)
    assert [read_image(file).size for file in files] == [(500, 375)] * 2
    ran: list[str] = []
    way = pipeline.Way(1, {step: lambda step=step: ran.append(step) for step in ("read", "compute", "predict")}, {})
    pipeline.measure({"one": way}, 2)
    assert ran == ["compute", *("read", "compute", "predict") * 2]
    assert {step: len(spent) for step, spent in way.times.items()} == {"read": 2, "compute": 2, "predict": 2}


# --- ratios.py and accuracy_speed.py ----------------------------------------------------------------------------


def test_engines_are_timed_once_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import accuracy_speed
    import ratios

    table = tmp_path / "ratios.csv"
    options = ["--dtypes", "fp32", "--batches", "1", "--size", "32", "--rounds", "2", "--out", table]
    call(monkeypatch, ratios, *options, "--networks", "transcnn_test", "--engines", "optimize,eager")
    first = rows_of(table)
    assert [(row["network"], row["engine"]) for row in first] == [
        ("transcnn_test", "optimize"),
        ("transcnn_test", "eager"),
    ]
    assert float(first[0]["ratio"]) == 1
    assert float(first[1]["least"]) <= float(first[1]["ratio"]) <= float(first[1]["most"])
    call(monkeypatch, ratios, *options, "--networks", "transcnn_test,resnet10t+hmhsa", "--engines", "optimize,eager")
    assert rows_of(table)[:2] == first  # a case that is there isn't timed again
    assert len(rows_of(table)) == 4
    common = {"dtype": "fp32", "batch": "8", "machine": ""}
    lines = [
        {"network": "hatnet_tiny", "size": "224", "engine": "optimize", "images_per_s": "30", **common},
        {"network": "hatnet_tiny", "size": "224", "engine": "openvino", "images_per_s": "20", **common},
        {"network": "fastvit_t8", "size": "224", "engine": "openvino", "images_per_s": "90", **common},
        {"network": "resnet50", "size": "224", "engine": "openvino", "images_per_s": "", **common},
    ]
    assert accuracy_speed.fastest(lines, "fp32", 8) == {"hatnet_tiny": (30.0, 79.8, "optimize")}
    accuracy_speed.draw(lines, 8, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


# --- cifar10_peers.py ---------------------------------------------------------------------------------------------


def test_peers_are_of_our_size(tmp_path: Path) -> None:
    import cifar10_peers

    for network in cifar10_peers.NETWORKS:
        model = create_model("cifar10_peer", network=network, num_classes=7).eval()
        assert sum(p.numel() for p in model.parameters()) <= 1_500_000
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    rows = [
        {"network": "swin", "epochs": 1, "lr": lr, "seed": 0, "top1": 0.0, "train_seconds": 1.0} for lr in (0.1, 0.2)
    ]
    tuning = tmp_path / "tuning.csv"
    cifar10_peers.write_rows(tuning, [{**rows[0], "val_top1": 30.5}, {**rows[1], "val_top1": 40.5}])
    assert cifar10_peers.best_rate(tuning, "swin", "lr", "val_top1") == 0.2
    with pytest.raises(SystemExit, match="run --tune first"):
        cifar10_peers.best_rate(tuning, "resnet", "lr", "val_top1")


def test_two_processes_fill_one_file_of_runs(tmp_path: Path) -> None:
    import seeds

    path = tmp_path / "runs.csv"
    keys = [{"network": "a", "lr": 0.5, "seed": seed} for seed in (0, 1)]
    asked, told = [], []

    def run(key: dict[str, Any]) -> dict[str, Any]:
        asked.append(key["seed"])
        if key["seed"] == 0:  # meanwhile the other process ends a run
            seeds.write_rows(path, [{"network": "a", "lr": 0.5, "seed": 2, "top1": 7.0}])
        return {"top1": 50.0 + key["seed"]}

    def fill() -> list[tuple[int, float]]:
        rows = seeds.run_missing(path, ("lr", "seed", "top1"), keys, run, lambda rows: told.append(len(rows)))
        return [(row["seed"], row["top1"]) for row in rows]

    assert fill() == [(2, 7.0), (0, 50.0), (1, 51.0)]
    assert fill() == [(2, 7.0), (0, 50.0), (1, 51.0)]
    assert (asked, told) == ([0, 1], [2, 3])  # nothing is run twice


@pytest.mark.parametrize(("has_bf16", "dtype"), [(True, "bf16"), (False, "fp32")])
def test_speed_of_peers_is_measured_in_the_type_that_training_takes(
    has_bf16: bool, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cifar10_peers

    asked: list[str] = []
    monkeypatch.setattr("transcnn.distributed.runtime._cpu_has_bf16", lambda: has_bf16)
    monkeypatch.setattr(cifar10_peers, "prepare_training", lambda model, kind: lambda images: asked.append(kind))
    cifar10_peers.measure(argparse.Namespace(networks=["resnet"], out=tmp_path / "peers.csv"))
    assert set(asked) == {dtype}
    assert [row["dtype"] for row in rows_of(tmp_path / "peers_speed.csv")] == [dtype]


def test_tuning_of_peers_gives_each_its_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import cifar10_peers

    monkeypatch.setattr(cifar10_peers, "measure", lambda options: dict.fromkeys(options.networks, 400.0))
    monkeypatch.setattr(
        cifar10_peers,
        "train_or_resume",
        lambda folder, data, **settings: {"top1": 10.0, "val_top1": 100 * settings["lr"], "train_seconds": 1.5},
    )
    arguments = ["data", "--networks", "resnet", "swin", "--out", tmp_path / "peers.csv", "--runs", tmp_path]
    call(monkeypatch, cifar10_peers, *arguments, "--tune", "--lrs", 0.01, 0.02)
    tuned = [(row["network"], row["lr"], row["epochs"]) for row in rows_of(tmp_path / "peers_tuning.csv")]
    assert tuned == [("resnet", "0.01", "4"), ("resnet", "0.02", "4"), ("swin", "0.01", "4"), ("swin", "0.02", "4")]
    call(monkeypatch, cifar10_peers, *arguments, "--seeds", 0, 1)
    runs = [(row["network"], row["lr"], row["epochs"], row["seed"]) for row in rows_of(tmp_path / "peers_runs.csv")]
    assert runs == [(name, "0.02", "20", seed) for seed in "01" for name in ("resnet", "swin")]
    assert [row["seeds"] for row in rows_of(tmp_path / "peers.csv")] == ["2", "2"]


def test_peers_of_the_weights_get_the_recipe_at_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import weights_peers

    asked = {}

    def fake(folder: Path, data: str, **settings: Any) -> dict[str, Any]:
        asked[settings["model"]] = settings["img_size"], max(settings["augment"].sizes), settings["epochs"]
        return {"top1": 50.0, "val_top1": 51.0, "train_seconds": 1.5}

    monkeypatch.setattr(weights_peers, "train_or_resume", fake)
    arguments = ["data", "--networks", "transcnn_micro", "convnext_atto", "--epochs", 3, "--seeds", 0, 1]
    call(monkeypatch, weights_peers, *arguments, "--out", tmp_path / "peers.csv", "--runs", tmp_path)
    assert asked == {"transcnn_micro": (64, 48, 3), "convnext_atto": (128, 96, 3)}
    assert [(row["network"], row["seeds"]) for row in rows_of(tmp_path / "peers.csv")] == [
        ("transcnn_micro", "2"),
        ("convnext_atto", "2"),
    ]
