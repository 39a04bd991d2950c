"""``transcnn plug``, and the experiment's script in small."""

from __future__ import annotations

import csv
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.utils.benchmark import Timer

from transcnn.checkpoints.loading import load, read_info
from transcnn.commands.plug import cost, make_network
from transcnn.commands.plug import plug as plug_network
from transcnn.commands.predict import predict
from transcnn.commands.train import train
from transcnn.errors import UserError
from transcnn.plugging.plug import plug_like, plugged


@pytest.fixture(autouse=True)
def _short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """How fast networks are is measured as ever, but not for a second each."""
    measure = Timer.blocked_autorange
    monkeypatch.setattr(Timer, "blocked_autorange", lambda self, **_: measure(self, min_run_time=0.01))


@pytest.mark.parametrize("name", ["resnet18", "torchvision/resnet18"])
def test_lists_the_places(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    plug_network(name)
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert lines["layer3"] == ["layer3", "256", "16", "14x14", "+0.462", "M", "+0.080", "G", "auto"]
    assert lines["layer1"][-1] != "auto"


def test_compares_and_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plugged.safetensors"
    plug_network("test_resnet", at="layer3,layer4", img_size=64, num_classes=3, out=str(out))
    printed = capsys.readouterr().out
    assert "with H-MHSA at layer3, layer4" in printed
    assert "images/s" in printed
    info = read_info(out)
    assert info["class_names"] == ["0", "1", "2"]
    model = plug_like(timm.create_model(info["model"], num_classes=3), info["model_args"]["plug"])
    model.load_state_dict(load_file(out))
    with safe_open(out, "pt") as file:
        assert "layer4.hmhsa.scale" in file.keys()  # noqa: SIM118


@pytest.mark.usefixtures("no_report")
def test_trains_a_plugged_network(tmp_path: Path, class_folder: Path) -> None:
    quick: dict[str, Any] = dict(model="test_resnet", img_size=64, epochs=1, batch_size=8, precision="32", quiet=True)
    quick |= dict(accelerator="cpu", num_workers=0)
    run = train(str(class_folder), plug="layer3,layer4", out=str(tmp_path / "run"), **quick).run_dir
    loaded = load(run)
    assert [place for place, _ in plugged(loaded.model)] == ["layer3", "layer4"]
    assert all(float(branch.scale.detach().abs().max()) > 0 for _, branch in plugged(loaded.model))
    rows = predict(str(run), [str(class_folder)], accelerator="cpu", quiet=True)
    assert len(rows) == 24
    assert not any("error" in row for row in rows)
    # From the plugged file with its H-MHSA; from a host's file with H-MHSA that is new.
    again = train(str(class_folder), init_from=str(run), lr=1e-9, out=str(tmp_path / "again"), **quick).run_dir
    branch = dict(plugged(load(again).model))["layer4"]
    torch.testing.assert_close(branch.scale, dict(plugged(loaded.model))["layer4"].scale, rtol=0, atol=1e-5)
    host = train(str(class_folder), out=str(tmp_path / "host"), **quick).run_dir
    both = train(str(class_folder), init_from=str(host), plug="auto", lr=1e-9, out=str(tmp_path / "both"), **quick)
    torch.testing.assert_close(
        load(both.run_dir).model.conv1[0].weight, load(host).model.conv1[0].weight, rtol=0, atol=1e-5
    )
    with pytest.raises(UserError, match="no module is called 'layer9'"):
        train(str(class_folder), plug="layer9", out=str(tmp_path / "wrong"), **quick)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(name="resnet1"), "no model is named 'resnet1'"),
        (dict(name="resnet18", at="layer7"), "no module is called 'layer7'; near: layer"),
        (dict(name="torchvision/resnet18", out="x.safetensors"), "--out needs a network"),
        (dict(name="torchvision/resnet18", in_chans=1), "take 3 channels"),
        (dict(name="torchvision/raft_small"), "can't make torchvision/raft_small: .*num_classes"),
    ],
)
def test_errors(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plug_network(**arguments)


@pytest.mark.usefixtures("no_report")
def test_the_experiment_runs_in_small(
    root: Path, tmp_path: Path, make_class_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = make_class_folder(per_class=6, splits=("train", "val", "test")), tmp_path / "small.csv"
    arguments = [data, "--epochs", 1, "--seeds", 0, "--variants", "none", "hmhsa3", "--limit_batches", 1]
    arguments += ["--runs", tmp_path / "runs", "--out", out]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(root / "benchmarks")
    monkeypatch.setattr(sys, "argv", ["plug_cifar10.py", *map(str, arguments)])
    script = importlib.import_module("plug_cifar10")
    run = script.train_or_resume
    monkeypatch.setattr(script, "train_or_resume", lambda *args, **given: run(*args, **{**given, "batch_size": 16}))
    script.main()
    rows = {row["variant"]: row for row in csv.DictReader(out.read_text().splitlines())}
    assert list(rows) == ["none", "hmhsa3"]
    assert int(rows["none"]["params"]) < int(rows["hmhsa3"]["params"])
    assert all(0 <= float(row["top1_mean"]) <= 100 and row["seeds"] == "1" for row in rows.values())
    assert out.with_suffix(".png").is_file()


def test_reading_a_spec_needs_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = [dict(at="layer4", mode="add", dim=96, head_dim=48, grid_sizes=[], pool_ratios=[], norm_layer="groupnorm1",
                 stride=[1, 1], inside="", hooked=False)]  # fmt: skip
    model = timm.create_model("test_resnet", num_classes=3)
    monkeypatch.setattr(type(model), "forward", None)
    plug_like(model, [{**spec[0], "dim": model.feature_info[-1]["num_chs"], "head_dim": 1}])
    assert torch.equal(model.layer4.hmhsa.scale, torch.zeros(model.feature_info[-1]["num_chs"]))


def test_no_backbone_is_fetched_that_nobody_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's detectors and segmenters take a backbone's published weights unless told not to."""

    def fetch(*_: object, **__: object) -> None:
        raise AssertionError("fetched weights")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", fetch)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    with torch.device("meta"):
        made = make_network("torchvision/lraspp_mobilenet_v3_large", num_classes=3, in_chans=3, pretrained=False)
    assert sum(p.numel() for p in made.parameters()) > 1e6
    with pytest.raises(UserError, match="can't make torchvision/resnet18: fetched weights"):
        make_network("torchvision/resnet18", num_classes=1000, in_chans=3, pretrained=True)


def test_what_looks_at_numbers_is_counted_on_numbers() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) if float(x.sum()) == 0 else x

    assert cost(Looks(), (torch.zeros(1, 3, 8, 8),), 2)["macs"] == 3 * 4 * 64
