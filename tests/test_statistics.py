"""BatchNorm's statistics in the first updates of a run: those of the data, whatever network, however it is cut."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageDraw
from torch import nn

from transcnn.commands.train import train
from transcnn.fast import accelerate_training
from transcnn.settings import Ema, Optim
from transcnn.tasks.classify import Classify
from transcnn.tasks.statistics import StatisticsWarmup

COLOURS = {"red": (200, 50, 50), "green": (60, 170, 60), "blue": (60, 80, 200), "yellow": (210, 190, 50)}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    """Four classes of 40 discs or squares on a grey ground; the class is the colour."""
    folder = tmp_path_factory.mktemp("shapes")
    for label, (name, colour) in enumerate(COLOURS.items()):
        (folder / name).mkdir()
        for i in range(40):
            rng = np.random.default_rng([label, i])
            ground = rng.normal(rng.uniform(60, 190), 20, (32, 32, 3)).clip(0, 255).astype(np.uint8)
            image, side = Image.fromarray(ground), int(rng.integers(11, 22))
            x, y = rng.integers(0, 32 - side, 2).tolist()
            draw = ImageDraw.Draw(image)
            (draw.ellipse if i % 2 else draw.rectangle)((x, y, x + side, y + side), fill=colour)
            image.save(folder / name / f"{i:02}.png")
    return folder


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("ema", [True, False])
def test_a_short_run_from_scratch_is_far_from_chance_in_its_second_epoch(shapes, tmp_path, ema):
    settings: Any = dict(model="transcnn_test", img_size=32, batch_size=8, epochs=2, lr=3e-3, val_fraction=0.2)
    settings |= dict(precision="32", accelerator="cpu", num_workers=0, quiet=True)
    settings |= dict(ema=Ema(ema=ema), optim=Optim(warmup_epochs=0.5))
    run = train(str(shapes), **settings, out=str(tmp_path / "run")).run_dir
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[1]["val_top1"]) > 60  # 25 by chance


def statistics_of(model: nn.Module, batches: list[torch.Tensor], warm: bool = True) -> list[nn.Module]:
    """Train ``model`` on ``batches`` as a run would, and return its norms."""
    model.train().to(memory_format=torch.channels_last)  # pyright: ignore
    warmup = StatisticsWarmup(model)
    for batch in batches:
        if warm:
            warmup.step()
        model(batch.contiguous(memory_format=torch.channels_last))
    warmup.stop()
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm, timm.layers.BatchNormAct2d])
def test_the_first_batches_count_alike_and_later_ones_by_the_momentum(norm):
    batches = [torch.randn(4, 3, 5, 5) * 0.03 + i for i in range(12)]
    model = norm(3, momentum=0.2).eval()  # a SyncBatchNorm in training needs GPUs: momenta alone are compared below
    warmup, seen = StatisticsWarmup(model), []
    for i in range(8):
        warmup.step()
        seen.append(model.momentum)
        model.num_batches_tracked.fill_(i + 1)
    assert seen == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 0.2, 0.2, 0.2, 0.2])
    assert model.momentum == 0.2
    assert not warmup.running
    if norm is nn.SyncBatchNorm:
        return
    trained = norm(3, momentum=0.1)
    statistics_of(trained, batches[:10])
    means = torch.stack([batch.mean((0, 2, 3)) for batch in batches])
    variances = torch.stack([batch.var((0, 2, 3)) for batch in batches])
    torch.testing.assert_close(trained.running_mean, means[:10].mean(0))
    torch.testing.assert_close(trained.running_var, variances[:10].mean(0))
    statistics_of(trained, batches[10:])
    expected = variances[:10].mean(0)
    for variance in variances[10:]:
        expected = 0.9 * expected + 0.1 * variance
    torch.testing.assert_close(trained.running_var, expected)


def test_accelerated_layers_learn_the_same_statistics():
    torch.manual_seed(1)
    plain = timm.create_model("transcnn_test")
    fast = timm.create_model("transcnn_test")
    fast.load_state_dict(plain.state_dict())
    batches = [torch.randn(4, 3, 32, 32) for _ in range(4)]
    ours = statistics_of(accelerate_training(fast.to(memory_format=torch.channels_last)), batches)
    for a, b in zip(statistics_of(plain, batches), ours, strict=True):
        assert a.num_batches_tracked == b.num_batches_tracked == 4
        torch.testing.assert_close(b.running_mean, a.running_mean, atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(b.running_var, a.running_var, atol=1e-7, rtol=1e-3)


def test_statistics_of_loaded_weights_are_kept():
    known, fresh = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    with torch.no_grad():
        known.running_var.fill_(0.3)  # of a file that doesn't say how many batches it has seen
    counted = nn.BatchNorm2d(3)
    counted.num_batches_tracked.fill_(4)  # of a run that goes on
    cumulative = nn.BatchNorm2d(3, momentum=None)  # pyright: ignore
    StatisticsWarmup(nn.ModuleList([known, fresh, counted, cumulative])).step()
    assert [n.momentum for n in (known, fresh, counted, cumulative)] == [0.1, 1.0, 0.2, None]


def test_no_graph_is_captured_while_the_momentum_changes():
    task = Classify(timm.create_model("transcnn_test"), ["a", "b"], {}, cuda_graphs=True)
    task._recorded = calls = []  # pyright: ignore
    task._recorded = lambda x: calls.append(x) or torch.zeros(len(x), 2)
    task._trainer = SimpleNamespace(current_epoch=0, global_rank=0)  # pyright: ignore
    task._statistics = StatisticsWarmup(task.model)
    for i in range(12):
        task._statistics.step()
        task.train()(torch.randn(2, 3, 32, 32))
        assert len(calls) == max(0, i - 8)  # 1/(1 + 9) is the momentum itself
