"""Real ``transcnn`` processes to kill, and what to look at afterwards.

A server process imports everything once and forks; a command then starts in a tenth of a second instead of ten.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from transcnn.checkpoints.loading import load

FORKS = multiprocessing.get_context("forkserver")

# A network of which each update takes some hundredths of a second, and all that draws random numbers.
QUICK = ["--model=transcnn_test", "--img_size=32", "--batch_size=4", "--precision=32", "--accelerator=cpu", "--lr=3e-3"]
BUSY = [*QUICK, "--drop_rate=0.2", "--drop_path_rate=0.2", "--mixup=0.4", "--cutmix=1.0", "--reprob=0.5"]
BUSY += ["--policy=small", "--warmup_epochs=0.5", "--save_every=1"]


def child(argv: list[str], log: str, env: dict[str, str], prepare: Callable[[], None] | None) -> None:
    """One command, in a session of its own, with its output in a file."""
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests under nohup would lend that it is ignored
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(env)
    torch.set_num_threads(1)
    os.fsync = lambda fd: None  # pyright: ignore  (as in the test's own process)
    gc.freeze()  # what the server imported is searched for garbage in no process
    from transcnn import cli
    from transcnn.tasks.classify import Classify
    from transcnn.training import callbacks, run

    Classify.write_report = run.write_samples = lambda *_: None  # half of what a small run takes; no test here looks
    after = callbacks.History.on_train_batch_end

    def trace(self: Any, trainer: Any, *args: Any) -> None:
        after(self, trainer, *args)
        Path(log).with_suffix(".step").write_text(str(trainer.global_step))

    callbacks.History.on_train_batch_end = trace
    if prepare is not None:
        prepare()
    sys.exit(cli.main(argv))


class Command:
    """A running ``transcnn`` command; use as a context manager, which kills what is left of it."""

    def __init__(self, *argv: object, log: Path, prepare: Callable[[], None] | None = None, **env: object) -> None:
        self.log = log
        words = [str(word) for word in argv]
        variables = {name: str(value) for name, value in env.items()}
        self.process = FORKS.Process(target=child, args=(words, str(log), variables, prepare))
        self.process.start()

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    @property
    def text(self) -> str:
        """What it printed so far."""
        return self.log.read_text() if self.log.exists() else ""

    @property
    def step(self) -> int:
        """Updates made so far."""
        file = self.log.with_suffix(".step")
        return int((file.read_text() if file.exists() else "") or 0)

    def signal(self, signum: int) -> None:
        """Send a signal to the command alone."""
        os.kill(self.process.pid, signum)

    def kill(self) -> None:
        """kill -9 for it and all that it started."""
        if self.process.is_alive():
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:  # before its setsid
                self.process.kill()
        self.process.join()

    def wait(self, seconds: float = 240) -> int:
        """Its exit code; negative for the signal that ended it."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running after {seconds} s:\n{self.text[-2000:]}"
        return self.process.exitcode

    def until(self, what: Callable[[], Any], seconds: float = 240) -> None:
        """Wait for something to become true while it runs."""
        end = time.monotonic() + seconds
        while not what():
            assert self.process.is_alive(), f"ended with {self.process.exitcode}:\n{self.text[-2000:]}"
            assert time.monotonic() < end, f"waited {seconds} s in vain:\n{self.text[-2000:]}"
            time.sleep(0.005)


class Processes:
    """A command in several processes, with what torchrun or srun tells each of them; use as a context manager."""

    def __init__(
        self, world: int, *argv: object, log: Path, slurm: bool = False, prepare: Callable[[], None] | None = None
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        told: dict[str, object] = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
        if slurm:
            told |= {"SLURM_NTASKS": world, "SLURM_NTASKS_PER_NODE": world, "SLURM_NNODES": 1, "SLURM_NODEID": 0}
            told |= {"SLURM_JOB_ID": port, "SLURM_JOB_NAME": "test", "SLURM_NODELIST": "localhost"}
        else:
            told |= {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "TORCHELASTIC_RUN_ID": f"test-{port}"}
        ranks = ("SLURM_PROCID", "SLURM_LOCALID") if slurm else ("RANK", "LOCAL_RANK")
        self.commands = [
            Command(*argv, log=log.with_name(f"{log.name}{r}"), prepare=prepare, **{**told, **dict.fromkeys(ranks, r)})
            for r in range(world)
        ]

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *exception: object) -> None:
        for command in self.commands:
            command.kill()

    @property
    def text(self) -> str:
        """What they printed so far, one after the other."""
        return "\n".join(command.text for command in self.commands)

    def wait(self, seconds: float = 240) -> list[int]:
        """Their exit codes."""
        return [command.wait(seconds) for command in self.commands]


def checkpoint(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def assert_equal_weights(one: Path, two: Path) -> None:
    """The last and the best weights of two runs are the same, bit for bit."""
    states = [checkpoint(run / "last.ckpt")["current_model_state"] for run in (one, two)]
    states += [load(run).model.state_dict() for run in (one, two)]
    for a, b in (states[:2], states[2:]):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
