"""Each recipe fits the function it is for, builds its network, and takes two steps on made-up data."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from transcnn import cli
from transcnn.commands.train import train
from transcnn.dense.build import build_network
from transcnn.plugging.build import build_model

pytestmark = pytest.mark.usefixtures("no_report")
RECIPES = sorted((Path(__file__).resolve().parent.parent / "recipes").glob("*.yaml"))
CLASSIFY = [path for path in RECIPES if "task: " not in path.read_text() or "task: classify" in path.read_text()]
DETECT = [path for path in RECIPES if "task: detect" in path.read_text()]
TABLES = [path for path in RECIPES if re.search("task: (multilabel|regress)", path.read_text())]
SEGMENT = [path for path in RECIPES if "task: segment" in path.read_text()]


def test_the_recipes_are_there():
    assert {"cifar10.yaml", "digits.yaml", "folder_finetune.yaml", "imagenet1k.yaml"} <= {p.name for p in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_header_says_command_hardware_time_and_result(path):
    header = path.read_text().split("\nmodel:")[0]
    for word in ("command", "hardware", "time", "result"):
        assert re.search(rf"^# {word} +\S", header, re.MULTILINE), f"{path.name} has no line for {word}"
    assert "transcnn train" in header
    assert f"--config recipes/{path.name}" in header


@pytest.mark.parametrize("path", CLASSIFY, ids=lambda path: path.stem)
def test_a_recipe_takes_two_steps(path, make_class_folder, tmp_path):
    small = [
        "--model",
        "transcnn_test",
        "--img_size",
        "32",
        "--batch_size",
        "4",
        "--epochs",
        "1",
        "--limit_batches",
        "2",
        "--pretrained",
        "false",
    ]
    machine = ["--accelerator", "cpu", "--precision", "32", "--num_workers", "0", "--quiet", "--accumulate", "1"]
    data = str(make_class_folder(classes=2, per_class=6))
    flags = ["--config", str(path), *small, *machine, "--warmup_epochs", "0", "--out", str(tmp_path / "run")]
    arguments = cli.parse("train", train, [data, *flags])
    result = train(**arguments)
    assert result.metrics["images"] > 0
    assert (tmp_path / "run" / "best.safetensors").is_file()


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_a_recipe_for_tables_takes_two_steps(path, tmp_path):
    target = yaml.safe_load(path.read_text())["table"]["target"]
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(tmp_path / f"{i}.png")
    lines = [",".join([f"{i}.png", str(i), *(str((i + k) % 2) for k in range(len(target)))]) for i in range(12)]
    (tmp_path / "labels.csv").write_text("\n".join([",".join(["file", "group", *target]), *lines]))
    flags = ["--config", str(path), "--img_size", "32", "--epochs", "1"]
    flags += ["--batch_size", "4", "--limit_batches", "2", "--accelerator", "cpu", "--precision", "32", "--quiet"]
    flags += ["--num_workers", "0", "--warmup_epochs", "0", "--out", str(tmp_path / "run")]
    assert train(**cli.parse("train", train, [str(tmp_path / "labels.csv"), *flags])).metrics["images"] > 0


@pytest.mark.parametrize("path", SEGMENT, ids=lambda path: path.stem)
def test_a_segmentation_recipe_takes_two_steps(path, tmp_path):
    labels = np.random.default_rng(0).integers(0, 3, (6, 40, 50), np.uint8)
    for part, numbers in (("train", range(4)), ("val", range(4, 6))):
        for kind in ("images", "labels"):
            (tmp_path / "data" / kind / part).mkdir(parents=True)
        for i in numbers:
            Image.fromarray(labels[i] * 80).save(tmp_path / "data" / "images" / part / f"{i}.png")
            Image.fromarray(labels[i]).save(tmp_path / "data" / "labels" / part / f"{i}.png")
    flags = ["--config", str(path), "--img_size", "32", "--batch_size", "2", "--epochs", "1", "--limit_batches", "2"]
    flags += ["--model", "transcnn_test", "--model_args", "{}", "--resize", "40", "--decoder_channels", "64"]
    flags += ["--accelerator", "cpu", "--precision", "32", "--num_workers", "0", "--quiet", "--warmup_epochs", "0"]
    arguments = cli.parse("train", train, [str(tmp_path / "data"), *flags, "--out", str(tmp_path / "run")])
    assert train(**arguments).metrics["images"] == 2
    assert (tmp_path / "run" / "best.safetensors").is_file()


@pytest.mark.parametrize("path", DETECT, ids=lambda path: path.stem)
def test_a_detection_recipe_takes_two_steps(path, tmp_path):
    (tmp_path / "data" / "images").mkdir(parents=True)
    (tmp_path / "data" / "annotations").mkdir()
    for part, numbers in (("train", range(4)), ("val", range(4, 6))):
        for i in numbers:
            Image.new("RGB", (60, 50), (40 * i, 90, 90)).save(tmp_path / "data" / "images" / f"{i}.png")
        sheet = {
            "images": [{"id": i, "file_name": f"{i}.png"} for i in numbers],
            "annotations": [{"image_id": i, "category_id": 1, "bbox": [3, 4, 20, 30]} for i in numbers],
            "categories": [{"id": 1, "name": "thing"}],
        }
        (tmp_path / "data" / "annotations" / f"{part}.json").write_text(json.dumps(sheet))
    flags = ["--config", str(path), "--batch_size", "2", "--epochs", "1", "--limit_batches", "2", "--model_args", "{}"]
    flags += ["--model", "transcnn_test", "--short_side", "48", "--fpn_channels", "16", "--warmup_epochs", "0"]
    flags += ["--accelerator", "cpu", "--precision", "32", "--num_workers", "0", "--quiet"]
    arguments = cli.parse("train", train, [str(tmp_path / "data"), *flags, "--out", str(tmp_path / "run")])
    assert train(**arguments).metrics["images"] == 2
    assert (tmp_path / "run" / "best.safetensors").is_file()


@pytest.mark.parametrize("path", [*SEGMENT, *DETECT], ids=lambda path: path.stem)
def test_a_dense_recipes_own_network_can_be_built(path):
    a = cli.parse("train", train, ["--config", str(path)])
    network = build_network(a["task"], a["model"], asdict(a[a["task"]]), num_classes=2, **(a["model_args"] or {}))
    assert sum(p.numel() for p in network.parameters()) > 100_000


@pytest.mark.parametrize("path", CLASSIFY, ids=lambda path: path.stem)
def test_a_recipes_own_network_can_be_built(path):
    arguments = cli.parse("train", train, ["--config", str(path)])
    network = build_model(arguments["model"], num_classes=2, **(arguments["model_args"] or {}))
    assert sum(p.numel() for p in network.parameters()) > 100_000
