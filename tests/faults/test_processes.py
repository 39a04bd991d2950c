"""One run in several processes learns what it learns in one, scores what it scores in one, and writes once."""

from __future__ import annotations

import csv
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from harness import QUICK, Processes, checkpoint, child
from test_broken import explode
from test_survive import limit_files
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import transcnn
from transcnn.distributed import processes
from transcnn.errors import UserError
from transcnn.training.checkpointing import newest_good

# Norms of each image alone: what BatchNorm sees depends on how many images a process has.
ALIKE = [*QUICK, "--model_args={norm_layer: groupnorm1}", "--epochs=3", "--policy=small", "--reprob=0.5"]
ALIKE += ["--drop_rate=0", "--warmup_epochs=0.5", "--num_workers=0"]


def losses(run) -> list[dict[str, float]]:
    """The curve of a run: its losses and scores, without times."""
    with (run / "metrics.csv").open() as file:
        return [
            {name: float(value) for name, value in row.items() if not name.startswith(("images_per", "seconds"))}
            for row in csv.DictReader(file)
        ]


@pytest.fixture(scope="module")
def runs(images, tmp_path_factory):
    """The same run in one process and in two."""
    folder = tmp_path_factory.mktemp("runs")
    for world in (1, 2):
        with Processes(
            world, "train", images, *ALIKE, "--out", folder / f"{world}", log=folder / f"log{world}-"
        ) as group:
            assert group.wait() == [0] * world, group.text
    return folder


def test_two_processes_learn_what_one_does(runs):
    one, two = losses(runs / "1"), losses(runs / "2")
    assert len(one) == 3
    assert one[0]["train_loss"] != one[2]["train_loss"]
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=2e-5)
    a, b = (checkpoint(runs / world / "last.ckpt")["state_dict"] for world in "12")
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 2e-5
    one, two = (json.loads((runs / world / "metrics.json").read_text()) for world in "12")
    assert two["images"] == one["images"] == 2
    assert two["top1"] == one["top1"]


def test_two_processes_write_one_run(runs):
    one, two = (sorted(path.name for path in (runs / world).iterdir() if "tfevents" not in path.name) for world in "12")
    assert one == two
    assert len(list((runs / "2").glob("*tfevents*"))) == 1
    assert not (runs / "log2-1").read_text()
    assert (runs / "log2-0").read_text().count("epoch 1/3") == 1


def test_each_image_is_scored_once_whatever_the_number_of_processes(runs, images, tmp_path):
    for world in (1, 4):
        out = tmp_path / f"{world}"
        arguments = ["eval", runs / "1", images, "--split=train", "--batch_size=3", "--accelerator=cpu", "--out", out]
        with Processes(world, *arguments, log=tmp_path / f"log{world}-", slurm=world > 1) as group:
            assert group.wait() == [0] * world, group.text
            assert group.text.count("top-1") == 1  # one of them tells
    one, many = (json.loads((tmp_path / world / "metrics.json").read_text()) for world in "14")
    assert one["images"] == 22  # 6, 6, 5 and 5
    for name in ("images", "top1", "class_accuracy"):
        assert many[name] == one[name]
    assert many["loss"] == pytest.approx(one["loss"], abs=2e-4)  # four digits are written


def test_four_processes_are_stopped_and_two_go_on(runs, images, tmp_path, account):
    run = tmp_path / "run"
    with Processes(4, "train", images, *ALIKE, "--out", run, log=tmp_path / "log") as group:
        first = group.commands[0]
        first.until(lambda: first.step >= 7)
        group.commands[2].signal(signal.SIGTERM)  # one is enough
        assert group.wait() == [0] * 4, group.text
        assert first.text.count("transcnn train --resume") == 1
    assert 5 < checkpoint(run / "last.ckpt")["global_step"] < 15
    with Processes(3, "train", "--resume", run, log=tmp_path / "three") as group:
        assert group.wait() == [2] * 3, group.text
        assert group.text.count("batch_size counts the images of all processes: 4 can't be shared out to 3") == 3
    with Processes(2, "train", "--resume", run, log=tmp_path / "two") as group:
        assert group.wait() == [0] * 2, group.text
    last, undisturbed = checkpoint(run / "last.ckpt"), checkpoint(runs / "1" / "last.ckpt")
    assert last["global_step"] == undisturbed["global_step"] == 15
    for name, value in undisturbed["state_dict"].items():
        assert float((last["state_dict"][name] - value).abs().max()) < 5e-5, name
    account("SIGTERM to one of 4 processes, 2 go on", 1, 1, 0, "equal up to rounding", "all stop; --resume")


@pytest.mark.slow
def test_sharded_weights_learn_the_same_and_their_checkpoints_are_like_all_others(runs, images, tmp_path):
    run = tmp_path / "run"
    # Two that share weights begin, one alone goes on, then two that share again.
    starts = [(2, [images, *ALIKE, "--strategy=fsdp", "--out", run], 5), (1, ["--resume", run], 9)]
    for world, arguments, stop in starts:
        with Processes(world, "train", *arguments, log=tmp_path / f"log{world}-") as group:
            first = group.commands[0]
            first.until(lambda first=first, stop=stop: first.step >= stop)
            first.signal(signal.SIGTERM)
            assert group.wait() == [0] * world, group.text
    with Processes(2, "train", "--resume", run, "--strategy=fsdp", log=tmp_path / "two") as group:
        assert group.wait() == [0] * 2, group.text
    last, undisturbed = checkpoint(run / "last.ckpt"), checkpoint(runs / "1" / "last.ckpt")
    assert last.keys() == undisturbed.keys()
    assert (
        last["optimizer_states"][0]["param_groups"][0].keys()
        == undisturbed["optimizer_states"][0]["param_groups"][0].keys()
    )
    for part in ("state_dict", "current_model_state"):
        assert last[part].keys() == undisturbed[part].keys()
        for name, value in undisturbed[part].items():
            assert float((last[part][name] - value).abs().max()) < 5e-5, name


@pytest.mark.slow
def test_a_ctrl_c_that_torchrun_hands_on_is_one_ctrl_c(images, tmp_path):
    run = tmp_path / "run"
    with Processes(2, "train", images, *ALIKE, "--epochs=50", "--out", run, log=tmp_path / "log") as group:
        first = group.commands[0]
        first.until(lambda: first.step >= 3)
        for command in [*group.commands, *group.commands]:  # from the terminal, and from torchrun
            command.signal(signal.SIGINT)
        assert group.wait() == [130, 130], group.text
        assert group.text.count("go on with: transcnn train --resume") == 1
    assert checkpoint(run / "last.ckpt")["global_step"] >= 3


@pytest.mark.slow
def test_two_processes_go_back_together_with_half_the_learning_rate(images, tmp_path):
    run = tmp_path / "run"
    settings = ["--sched=constant", "--warmup_epochs=0", "--max_nonfinite=3", "--save_every=1"]
    with Processes(2, "train", images, *ALIKE, *settings, "--out", run, log=tmp_path / "log", prepare=explode) as group:
        assert group.wait() == [0, 0], group.text
    last = checkpoint(run / "last.ckpt")
    assert last["global_step"] == 15
    assert last["callbacks"]["SkipNonFinite"]["lr_factor"] == 0.5
    report = json.loads((run / "nonfinite.json").read_text())
    assert len(report["files"]) == 4  # two of each process


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_process_ends_all(images, tmp_path):
    run = tmp_path / "run"
    arguments = ["train", images, *ALIKE, "--save_every=1", "--out", run]
    with Processes(2, *arguments, log=tmp_path / "log", prepare=limit_files) as group:
        assert group.wait() == [2, 2], group.text
        assert "last.ckpt: File too large" in group.text
        assert "process 1 of 2 has lost another one" in group.text
        assert "Traceback" not in group.text
    assert checkpoint(run / "last.ckpt")["global_step"] == 2


def test_processes_do_not_mix_with_an_older_run(runs, images, tmp_path):
    with Processes(2, "train", images, *ALIKE, "--out", runs / "2", log=tmp_path / "log") as group:
        assert group.wait() == [2, 2], group.text
        assert group.text.count("is not empty") == 1  # told once


def die_once() -> None:
    """The second process is killed at the eighth update, before any restart."""
    from transcnn.training.callbacks import History

    after = History.on_train_batch_end

    def dying(self, trainer, *args):
        after(self, trainer, *args)
        if trainer.global_step == 8 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)

    History.on_train_batch_end = dying


def agent(name: str, argv: list[str], log: str) -> None:
    """torchrun's agent with two processes; those are forked from the server that has imported everything."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=name,
        max_restarts=1,
        monitor_interval=0.2,
        start_method="forkserver",
    )
    elastic_launch(config, child)(argv, log, {"GLOO_SOCKET_IFNAME": "lo"}, die_once)


def test_torchrun_restarts_what_was_killed_and_the_run_goes_on(runs, images, tmp_path, account):
    run = tmp_path / "run"
    arguments = ["train", str(images), *ALIKE, "--save_every=1", "--out", str(run)]
    agent("first", arguments, str(tmp_path / "log"))
    last, undisturbed = checkpoint(run / "last.ckpt"), checkpoint(runs / "2" / "last.ckpt")
    assert last["global_step"] == 15
    for name, value in undisturbed["state_dict"].items():
        assert last["state_dict"][name].equal(value), name
    account(
        "kill -9 of one of 2 processes under torchrun", 1, 1, 1, "equal", "torchrun --max-restarts: goes on by itself"
    )


@pytest.mark.slow
def test_restarted_processes_do_not_go_on_with_an_older_run(runs, images, tmp_path):
    with pytest.raises(ChildFailedError):
        agent("second", ["train", str(images), *ALIKE, "--out", str(runs / "1")], str(tmp_path / "log"))
    assert (tmp_path / "log").read_text().count("is not empty") == 2


def torchrun(world: int, *arguments: object, log: Path) -> subprocess.Popen[bytes]:
    """The real thing, in a session of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world}", "--standalone"]
    with log.open("wb") as out:
        return subprocess.Popen(
            [*command, "-m", "transcnn", "train", *map(str, arguments)],
            stdout=out,
            stderr=out,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        )


@pytest.mark.slow
def test_four_processes_of_torchrun_are_killed_and_two_go_on(tmp_path, account):
    run = tmp_path / "run"
    settings = ["--model=transcnn_test", "--img_size=16", "--batch_size=64", "--epochs=4", "--precision=32"]
    settings += ["--accelerator=cpu", "--num_workers=0", "--save_every=3"]
    four = torchrun(4, *settings, "--out", run, log=tmp_path / "four")
    try:
        end = time.monotonic() + 900
        while not (run / "last.ckpt").exists() or checkpoint(run / "last.ckpt")["global_step"] < 24:
            assert four.poll() is None, (tmp_path / "four").read_text()
            assert time.monotonic() < end, (tmp_path / "four").read_text()
            time.sleep(0.05)
    finally:
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(four.pid)], capture_output=True, text=True).stdout
        for pid in [four.pid, *map(int, children.split())]:  # torchrun puts its workers into sessions of their own
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        four.wait()
    before = checkpoint(newest_good(run)[0])["global_step"]
    assert 24 <= before < 80
    two = torchrun(2, "--resume", run, log=tmp_path / "two")
    assert two.wait(900) == 0, (tmp_path / "two").read_text()
    assert checkpoint(run / "last.ckpt")["global_step"] == 4 * 20  # 1,295 images make 20 batches of 64
    assert len(losses(run)) == 4
    account("kill -9 of torchrun and its 4 processes, 2 go on", 1, 1, 3, "not compared", "--resume")


def test_python_can_run_the_package(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["transcnn", "--version"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("transcnn", run_name="__main__")
    assert end.value.code == 0
    assert capsys.readouterr().out.strip() == transcnn.__version__


def test_too_few_devices_are_one_clear_line():
    with pytest.raises(UserError, match="devices and num_nodes must be 1 or more, got 0 and 1"):
        processes.launch("cpu", 0)
