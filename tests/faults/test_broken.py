"""Arithmetic that fails, and loader processes that die or hang: a step left out, a way back, or a clear end."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from harness import QUICK, Command, checkpoint

from transcnn.data.loading.loader import Loader, make_loader
from transcnn.data.sets.fault_tolerant import FaultTolerantDataset
from transcnn.errors import UserError

PLAIN = [*QUICK, "--save_every=1", "--epochs=2", "--no-ema", "--smoothing=0", "--num_workers=0"]


def poison_one() -> None:
    """NaN in the images of one batch."""
    from transcnn.tasks.classify import Classify

    loss = Classify.loss

    def poisoned(self, batch):
        images, labels = batch
        return loss(self, (images * float("nan") if self.trainer.global_step == 3 else images, labels))

    Classify.loss = poisoned


def test_an_update_that_is_not_finite_is_left_out(images, tmp_path, account):
    run = tmp_path / "run"
    with Command("train", images, *PLAIN, "--out", run, log=tmp_path / "log", prepare=poison_one) as command:
        assert command.wait() == 0, command.text
    last = checkpoint(run / "last.ckpt")
    assert all(value.isfinite().all() for value in last["state_dict"].values())
    assert last["callbacks"]["SkipNonFinite"] == {"skipped": 1, "lr_factor": 1.0}
    assert "update 4 was left out" in (run / "faults.log").read_text()
    with (run / "metrics.csv").open() as file:
        assert all(math.isfinite(float(row["train_loss"])) for row in csv.DictReader(file))
    account("one update that is not finite", 1, 1, 1, "differ by that update", "left out and counted")


def poison_all() -> None:
    """From the fourth update on, a layer in the middle gives infinity."""
    import torch

    from transcnn.blocks import Stage

    forward, calls = Stage.forward, [0]

    def poisoned(self, x):
        out = forward(self, x)
        calls[0] += self.training
        return out / 0 if self.training and calls[0] > 12 and torch.is_tensor(out) else out

    Stage.forward = poisoned


@pytest.mark.parametrize("nonfinite", ["stop", "halve"])
def test_a_run_that_is_beyond_help_ends_with_a_report(images, tmp_path, nonfinite):
    run = tmp_path / "run"
    arguments = [*PLAIN, "--epochs=9", "--max_nonfinite=4", f"--nonfinite={nonfinite}", "--out", run]
    with Command("train", images, *arguments, log=tmp_path / "log", prepare=poison_all) as command:
        assert command.wait() == 2, command.text
        assert "4 updates in a row" in command.text
        assert "Traceback" not in command.text
    report = json.loads((run / "nonfinite.json").read_text())
    assert report["module"].startswith("stages.")
    assert len(report["files"]) == 4
    assert all((images / name).is_file() for name in report["files"])
    assert (run / "faults.log").read_text().count("back to the last checkpoint") == (3 if nonfinite == "halve" else 0)
    last = checkpoint(run / "last.ckpt")
    assert last["global_step"] < report["update"] - 3  # none was written in trouble
    assert all(value.isfinite().all() for value in last["state_dict"].values())


def explode() -> None:
    """Infinity wherever the learning rate is as large as the run began with."""
    from transcnn.tasks.classify import Classify

    loss = Classify.loss

    def exploding(self, batch):
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        return loss(self, batch) / (0 if self.trainer.global_step > 6 and rate > 2e-3 else 1)

    Classify.loss = exploding


@pytest.mark.parametrize("schedule", [["--sched=constant"], pytest.param(["--sched=none"], marks=pytest.mark.slow)])
def test_half_the_learning_rate_saves_a_run(images, tmp_path, schedule, account):
    run = tmp_path / "run"
    arguments = [*PLAIN, *schedule, "--warmup_epochs=0", "--epochs=3", "--max_nonfinite=3", "--out", run]
    with Command("train", images, *arguments, log=tmp_path / "log", prepare=explode) as command:
        assert command.wait() == 0, command.text
        assert "back to the last checkpoint with 0.5 of the learning rate" in command.text
    last = checkpoint(run / "last.ckpt")
    assert last["global_step"] == 15
    assert last["callbacks"]["SkipNonFinite"]["lr_factor"] == 0.5
    with (run / "metrics.csv").open() as file:
        assert [float(row["lr"]) for row in csv.DictReader(file)] == [3e-3, 1.5e-3, 1.5e-3]
    # What was halved stays so when the run is stopped and goes on.
    with Command("train", "--resume", run, "--epochs=4", log=tmp_path / "log2", prepare=explode) as command:
        assert command.wait() == 0, command.text
    assert checkpoint(run / "last.ckpt")["optimizer_states"][0]["param_groups"][0]["lr"] == 1.5e-3
    fault = f"updates that are not finite, three in a row (schedule {schedule[0].partition('=')[2]})"
    account(fault, 1, 1, 3, "differ: half the rate", "back to the last checkpoint with half the learning rate")


class Trap(FaultTolerantDataset):
    """Numbers; a loader process that asks for the sixth dies, or waits for ever."""

    def __init__(self, how: str) -> None:
        super().__init__(8)
        self.how = how

    def __getitem__(self, sample):
        if sample.i == 5:
            if self.how == "dies":
                time.sleep(1)  # what was read before is on its way
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(1000)
        return torch.tensor(sample.i)

    def name(self, i: int) -> str:
        return f"{i}.jpg"


@pytest.mark.parametrize(("how", "said"), [("dies", "DataLoader worker"), ("hangs", "no images came for 2 s")])
def test_a_loader_process_that_dies_or_hangs_is_an_error_with_the_file(monkeypatch, how, said, account):
    monkeypatch.setattr(Loader, "read_timeout", 2.0)
    loader = make_loader(Trap(how), 2, num_workers=1)
    with pytest.raises(UserError, match=rf"{said}.*begins with '4.jpg', '5.jpg'"):
        list(loader)
    assert loader.yielded == 2  # the batches before were fine
    account(
        f"a loader process that {how}", 1, 0, "since the checkpoint", "not compared", "ends with the file; --resume"
    )


DYING = """
import os, signal, sys
from transcnn.data.sets.image_dataset import ImageDataset
from transcnn.cli import main
read = ImageDataset.read
ImageDataset.fill_cache = lambda self, *args, **kwargs: False
items = ImageDataset.__getitems__
def dying(self, wanted):
    if wanted[0].epoch == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return items(self, wanted)
ImageDataset.__getitems__ = dying
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_loader_process_that_dies_ends_a_whole_run_with_a_line(images, tmp_path):
    arguments = ["train", str(images), *PLAIN, "--num_workers=1", "--epochs=3", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-c", DYING, *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "DataLoader worker" in done.stderr
    assert "the batch that was waited for begins with" in done.stderr
    assert "Traceback" not in done.stderr
    assert checkpoint(tmp_path / "run" / "last.ckpt")["global_step"] == 5  # the first epoch's
