"""Processes that are stopped, killed, and starved of disk: what is lost is what was not written yet, and no more."""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
from pathlib import Path

import pytest
import torch
from harness import BUSY, Command, assert_equal_weights, checkpoint

from transcnn.errors import UserError
from transcnn.training.checkpointing import newest_good


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_a_run_ends_with_the_same_weights(undisturbed, images, tmp_path, kills, account):
    run, draw, epochs = tmp_path / "run", random.Random(kills), 4 if kills == 3 else 40
    if kills > 3:
        with Command(
            "train", images, *BUSY, f"--epochs={epochs}", "--out", tmp_path / "whole", log=tmp_path / "log"
        ) as command:
            assert command.wait(600) == 0, command.text
    else:
        (tmp_path / "whole").symlink_to(undisturbed)
    lost = []
    for i in range(kills):
        arguments = ["--resume", run] if i else [images, *BUSY, f"--epochs={epochs}", "--out", run]
        with Command("train", *arguments, log=tmp_path / f"{i}.log") as command:
            command.until(lambda: (run / "last.ckpt").exists() and command.step)
            command.process.join(draw.uniform(0, 0.4))
            assert command.process.is_alive(), f"not killed in time:\n{command.text}"
            command.kill()
            path, _ = newest_good(run)
            lost.append(command.step - checkpoint(path)["global_step"])
    with Command("train", "--resume", run, log=tmp_path / "last.log") as command:
        assert command.wait(600) == 0, command.text
    assert max(lost) <= 1  # the update whose checkpoint was being written
    assert_equal_weights(tmp_path / "whole", run)
    assert not [path.name for path in run.iterdir() if path.name.endswith(".tmp")]
    account(f"kill -9, {kills} times in one run", kills, kills, max(lost), "equal", "--resume")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_polite_signal_ends_the_run_with_a_checkpoint(undisturbed, images, tmp_path, signum, code, account):
    run = tmp_path / "run"
    with Command("train", images, *BUSY, "--epochs=4", "--out", run, log=tmp_path / "log") as command:
        command.until(lambda: command.step >= 3)
        command.signal(signum)
        assert command.wait() == code, command.text
        assert "transcnn train --resume" in command.text
        assert "Traceback" not in command.text
        assert checkpoint(run / "last.ckpt")["global_step"] == command.step
    if signum == signal.SIGTERM:
        with Command("train", "--resume", run, log=tmp_path / "log2") as command:
            assert command.wait() == 0, command.text
        assert_equal_weights(undisturbed, run)
    weights = "equal" if signum == signal.SIGTERM else "not compared"
    account(signal.Signals(signum).name, 1, 1, 0, weights, f"a checkpoint after the step, exit code {code}; --resume")


def lose_output() -> None:
    """What is left of standard output and error after ``| head`` has ended."""
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.dup2(writer, 2)
    os.close(writer)
    os.close(reader)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)


def test_output_that_nobody_reads_ends_no_run(undisturbed, images, tmp_path, account):
    run = tmp_path / "run"
    with Command(
        "train", images, *BUSY, "--epochs=4", "--out", run, log=tmp_path / "log", prepare=lose_output
    ) as command:
        assert command.wait() == 0
    assert_equal_weights(undisturbed, run)
    account("nobody reads its output any more", 1, 1, 0, "equal", "goes on without")


def stall() -> None:
    """Make the third step wait for ever."""
    from transcnn.tasks.classify import Classify

    step = Classify.training_step

    def slow(self, batch, batch_idx):
        if batch_idx == 2:
            Path(f"/proc/{__import__('os').getpid()}/comm").write_text("stalled")
            while True:
                pass
        return step(self, batch, batch_idx)

    Classify.training_step = slow


def test_a_second_ctrl_c_stops_at_once(images, tmp_path):
    with Command("train", images, *BUSY, "--out", tmp_path / "run", log=tmp_path / "log", prepare=stall) as command:
        comm = Path(f"/proc/{command.process.pid}/comm")
        command.until(lambda: comm.read_text().strip() == "stalled")
        command.signal(signal.SIGINT)
        command.process.join(0.3)
        assert command.process.is_alive()  # it waits for the end of the step
        command.signal(signal.SIGINT)
        assert command.wait(10) == 130, command.text
        assert "stopped at once" in command.text
        assert "Traceback" not in command.text


def damage(path: Path, how: str) -> None:
    size = path.stat().st_size
    if how == "cut":
        with path.open("r+b") as file:
            file.truncate(size // 2)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "one bit":
        with path.open("r+b") as file:
            file.seek(size // 2)
            byte = file.read(1)[0]
            file.seek(size // 2)
            file.write(bytes([byte ^ 4]))
    else:
        path.unlink()


@pytest.fixture
def stopped(undisturbed, images, tmp_path) -> Path:
    """A run that was stopped in its second epoch."""
    run = tmp_path / "run"
    with Command("train", images, *BUSY, "--epochs=4", "--out", run, log=tmp_path / "log") as command:
        command.until(lambda: command.step >= 7)
        command.signal(signal.SIGTERM)
        assert command.wait() == 0, command.text
    return run


def test_of_two_checkpoints_the_whole_one_is_used(undisturbed, stopped, tmp_path, account):
    backup = {name: (stopped / name).read_bytes() for name in ("last.ckpt", "previous.ckpt")}
    for how in ("cut", "empty", "gone", "one bit"):
        for name, content in backup.items():
            (stopped / name).write_bytes(content)
        damage(stopped / "last.ckpt", how)
        path, remark = newest_good(stopped)
        assert path.name == "previous.ckpt"
        assert ("last.ckpt is damaged" in remark) == (how != "gone")
    (stopped / "last.ckpt").write_bytes(backup["last.ckpt"])
    damage(stopped / "last.ckpt", "one bit")
    with Command("train", "--resume", stopped, log=tmp_path / "log2") as command:
        assert command.wait() == 0, command.text
        assert "last.ckpt is damaged: its checksum is another; going on from previous.ckpt" in command.text
    assert_equal_weights(undisturbed, stopped)
    assert "is damaged" in (stopped / "faults.log").read_text()
    account("last.ckpt cut, empty, gone, a bit flipped", 4, 4, 1, "equal", "previous.ckpt is used, and said so")
    for name in ("last.ckpt", "previous.ckpt"):
        damage(stopped / name, "one bit")
    with pytest.raises(UserError, match=r"no checkpoint to go on from: .*last.ckpt is damaged.*previous.ckpt is dam"):
        newest_good(stopped)


def limit_files() -> None:
    """What a full disk is to a process: no file grows beyond 300 KiB."""
    from transcnn.training import callbacks

    after = callbacks.History.on_train_batch_end

    def limit(self, trainer, *args):
        after(self, trainer, *args)
        if trainer.global_step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (300 << 10, resource.RLIM_INFINITY))

    callbacks.History.on_train_batch_end = limit


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(undisturbed, images, tmp_path, account):
    run = tmp_path / "run"
    arguments = ["train", images, *BUSY, "--epochs=4", "--out", run]
    with Command(*arguments, log=tmp_path / "log", prepare=limit_files) as command:
        assert command.wait() == 2, command.text
        assert "last.ckpt: File too large" in command.text
        assert "Traceback" not in command.text
    assert checkpoint(run / "last.ckpt")["global_step"] == 2
    assert not [path.name for path in run.iterdir() if path.name.endswith(".tmp")]
    with Command("train", "--resume", run, log=tmp_path / "log2") as command:
        assert command.wait() == 0, command.text
    assert_equal_weights(undisturbed, run)
    account("full disk", 1, 1, 1, "equal", "ends with a line, the last checkpoint untouched; --resume")


def test_seconds_of_all_sessions_are_counted(stopped, tmp_path):
    before = checkpoint(stopped / "last.ckpt")["callbacks"]["KeepWeights"]["seconds"]
    assert before > 0
    state = checkpoint(stopped / "last.ckpt")
    state["callbacks"]["KeepWeights"]["seconds"] = 1000.0
    torch.save(state, stopped / "last.ckpt")
    (stopped / "checksums.sha256").unlink()
    with Command("train", "--resume", stopped, log=tmp_path / "log2") as command:
        assert command.wait() == 0, command.text
    import json

    assert json.loads((stopped / "metrics.json").read_text())["train_seconds"] > 1000
