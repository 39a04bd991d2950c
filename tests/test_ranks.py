"""What one process decides or does before the others, and that an error of one leaves none waiting."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from transcnn.distributed import processes
from transcnn.errors import UserError


def outcome(call: Callable[[], Any]) -> str:
    """What a call returns, or the error that it ends with, and whether another process tells it."""
    try:
        return str(call())
    except Exception as error:
        return f"{type(error).__name__} {error} {getattr(error, 'reported', False)}"


def work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", datetime.timedelta(seconds=60), rank=rank, world_size=2)
    processes._launched.append((2, 1))
    there = Path(folder) / "downloaded"

    def download() -> str:
        if there.exists():
            return "found"
        time.sleep(0.3)
        there.touch(exist_ok=False)
        return "downloaded"

    def fail(which: int, error: Exception) -> Callable[[], str]:
        def call() -> str:
            if processes.rank() == which:
                raise error
            return "fine"

        return call

    results = [
        outcome(lambda: processes.first_here(download)),
        outcome(lambda: processes.first_here(fail(0, OSError("no network")))),
        outcome(lambda: processes.first_here(fail(1, UserError("a wrong name")))),
        outcome(lambda: processes.all_or_none(processes.rank)),
        outcome(lambda: processes.all_or_none(fail(1, MemoryError()))),
        outcome(lambda: processes.first_decides(lambda: processes.rank())),
        outcome(lambda: processes.first_decides(fail(0, OSError("no space")))),
        outcome(lambda: processes.first_decides(fail(0, UserError("not empty")))),
    ]
    (Path(folder) / f"{rank}.txt").write_text("\n".join(results))
    dist.destroy_process_group()


@pytest.mark.usefixtures("forks")
def test_one_process_goes_first_and_its_error_is_everybodys(tmp_path):
    mp.start_processes(work, args=(str(tmp_path),), nprocs=2, start_method="forkserver")  # pyright: ignore
    first, second = ((tmp_path / f"{rank}.txt").read_text().splitlines() for rank in (0, 1))
    assert first == [
        "downloaded",
        "OSError no network False",
        "UserError a wrong name False",
        "0",
        "UserError MemoryError False",
        "0",
        "OSError no space False",
        "UserError not empty False",
    ]
    assert second == [
        "found",
        "UserError no network True",
        "UserError a wrong name True",
        "1",
        "UserError MemoryError True",
        "0",
        "UserError no space True",
        "UserError not empty True",
    ]


def test_other_numbers_than_the_launcher_has_started_are_one_clear_line(monkeypatch):
    monkeypatch.setattr(processes, "_shape", lambda devices, num_nodes: (1, 1))
    with pytest.raises(UserError, match="devices is 4, but torchrun or Slurm has started 1"):
        processes.launch("cpu", 4)
    with pytest.raises(UserError, match="num_nodes is 2, but torchrun or Slurm has started 1"):
        processes.launch("cpu", 1, 2)


def test_alone_a_process_does_it_at_once():
    assert (
        processes.first_here(lambda: 3) == processes.first_decides(lambda: 3) == processes.all_or_none(lambda: 3) == 3
    )


def test_auto_is_a_gpu_of_nvidias_or_the_cpu(monkeypatch):
    """On a Mac Lightning's auto is Apple's GPU, where scores, which are float64, end with a TypeError."""
    for there, wanted in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr("torch.cuda.is_available", lambda there=there: there)
        assert processes.placement("auto") == {"accelerator": wanted, "devices": 1}
        assert [processes.placement(name)["accelerator"] for name in ("cpu", "gpu")] == ["cpu", "cuda"]
