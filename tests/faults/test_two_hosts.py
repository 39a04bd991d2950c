"""One run on two hosts, as torchrun starts it: two network namespaces that a virtual cable joins, made here.

Each host has its own interface (not lo), address and, where a test says so, clock and disk. Needs root and iproute2.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from harness import checkpoint
from test_processes import ALIKE, losses

pytestmark = pytest.mark.slow

UPDATES = 15  # three epochs of five batches


class Host:
    """A network namespace with one interface; ``run`` starts torchrun in it."""

    def __init__(self, number: int) -> None:
        self.number, self.name, self.link = (
            number,
            f"transcnn-{os.getpid()}-{number}",
            f"tc{os.getpid() % 100000}-{number}",
        )
        self.address = f"10.77.0.{number + 1}"
        self.started: list[subprocess.Popen[bytes]] = []

    def ip(self, *words: str) -> None:
        """An ip command inside the namespace."""
        subprocess.run(["ip", "-n", self.name, *words], check=True, capture_output=True)

    def run(self, log: Path, *arguments: object, cwd: Path | None = None, **env: str) -> subprocess.Popen[bytes]:
        """torchrun with one process here; both hosts run this very command."""
        command = ["ip", "netns", "exec", self.name, sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
        command += ["--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-endpoint=10.77.0.1:29500", "--rdzv-id=test"]
        command += [f"--rdzv-conf=is_host={self.number == 0}"]  # their names aren't in any DNS
        command += ["--max-restarts=1", f"--local-addr={self.address}", "-m", "transcnn", *map(str, arguments)]
        here = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": self.link, **env}
        with log.open("ab") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True, env=here, cwd=cwd)
        self.started.append(process)
        return process

    def kill(self) -> None:
        """kill -9 for every process that runs here, as a power cut would."""
        pids = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True).stdout.split()
        for pid in map(int, pids):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.started:
            process.wait()


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Two hosts and the cable between them."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("two hosts are made by root with iproute2")
    pair = [Host(0), Host(1)]
    try:
        for host in pair:
            made = subprocess.run(["ip", "netns", "add", host.name], capture_output=True, text=True)
            if made.returncode:
                pytest.skip(f"network namespaces can't be made here: {made.stderr.strip()}")
        ends = [["name", host.link, "netns", host.name] for host in pair]
        subprocess.run(["ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1]], check=True)
        for host in pair:
            host.ip("addr", "add", f"{host.address}/24", "dev", host.link)
            host.ip("link", "set", host.link, "up")
            host.ip("link", "set", "lo", "up")
        yield pair
    finally:
        for host in pair:
            host.kill()
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True)


@pytest.fixture(scope="module")
def alone(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in one process."""
    from harness import Command

    folder = tmp_path_factory.mktemp("alone")
    with Command("train", images, *ALIKE, "--out", folder / "run", log=folder / "log") as command:
        assert command.wait() == 0, command.text
    return folder / "run"


def text(*logs: Path) -> str:
    return "\n".join(log.read_text() for log in logs if log.exists())


def until(what: Callable[[], Any], logs: tuple[Path, Path], seconds: float = 400) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, text(*logs)[-4000:]
        time.sleep(0.02)


def steps(run: Path) -> int:
    """Updates in the newest checkpoint."""
    try:
        return checkpoint(run / "last.ckpt")["global_step"]
    except (OSError, RuntimeError):
        return 0


def assert_as_alone(run: Path, alone: Path, whole: bool = True) -> None:
    """The curve and the weights are those of one process, up to rounding."""
    assert steps(run) == UPDATES
    for a, b in zip(losses(alone), losses(run), strict=True):
        known = {name for name in a if whole or name != "train_loss"}  # a mean over the updates since the restart
        assert {name: b[name] for name in known} == pytest.approx({name: a[name] for name in known}, rel=2e-5)
    one, two = (checkpoint(folder / "last.ckpt")["state_dict"] for folder in (alone, run))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 5e-5


def test_two_hosts_learn_what_one_process_does(hosts, images, alone, tmp_path, account):
    """Over a slow link, with clocks an hour apart."""
    for host in hosts:
        command = ["tc", "qdisc", "add", "dev", host.link, "root", "tbf", "rate", "20mbit", "burst", "64kb"]
        subprocess.run(["ip", "netns", "exec", host.name, *command, "latency", "400ms"], check=True)
    (tmp_path / "late").mkdir()
    late = "import time\nreal = time.time\ntime.time = lambda: real() + 3600\n"
    (tmp_path / "late" / "sitecustomize.py").write_text(late)
    path = os.pathsep.join([str(tmp_path / "late"), os.environ.get("PYTHONPATH", "")])
    logs, run = (tmp_path / "log0", tmp_path / "log1"), tmp_path / "run"
    arguments = ["train", images, *ALIKE, "--out", run]
    started = [hosts[0].run(logs[0], *arguments), hosts[1].run(logs[1], *arguments, PYTHONPATH=path)]
    assert [process.wait(400) for process in started] == [0, 0], text(*logs)
    assert_as_alone(run, alone)
    assert json.loads((run / "metrics.json").read_text())["images"] == 2
    assert text(logs[0]).count("epoch 1/3") == 1
    assert "epoch 1/3" not in text(logs[1])
    account("two hosts, a slow link, clocks an hour apart", 1, 1, 0, "equal up to rounding", "goes on by itself")


def test_a_host_that_is_killed_and_started_again_joins_its_run(hosts, images, alone, tmp_path, account):
    logs, run = (tmp_path / "log0", tmp_path / "log1"), tmp_path / "run"
    arguments = ["train", images, *ALIKE, "--save_every=1", "--out", run]
    first, _ = (host.run(log, *arguments) for host, log in zip(hosts, logs, strict=True))
    until(lambda: steps(run) >= 3, logs)
    hosts[1].kill()
    second = hosts[1].run(logs[1], *arguments)
    codes = [first.wait(600), second.wait(600)]
    assert "process 0 of 2 has lost another one" in text(logs[0])
    if codes != [0, 0]:  # torchrun's agents may miss each other where one is back before the other noticed
        again = [host.run(log, "train", "--resume", run) for host, log in zip(hosts, logs, strict=True)]
        assert [process.wait(600) for process in again] == [0, 0], text(*logs)
    assert_as_alone(run, alone, whole=False)
    how = "goes on by itself" if codes == [0, 0] else "--resume"
    account("kill -9 of one of two hosts, which is started again", 1, 1, 1, "equal up to rounding", how)


def test_a_link_that_is_cut_for_a_while(hosts, images, alone, tmp_path, account):
    logs, run = (tmp_path / "log0", tmp_path / "log1"), tmp_path / "run"
    arguments = ["train", images, *ALIKE, "--save_every=1", "--out", run]
    started = [host.run(log, *arguments) for host, log in zip(hosts, logs, strict=True)]
    until(lambda: steps(run) >= 3, logs)
    hosts[1].ip("link", "set", hosts[1].link, "down")
    time.sleep(3)
    before = steps(run)
    time.sleep(1)
    assert steps(run) == before < UPDATES  # nobody learns without the other
    hosts[1].ip("link", "set", hosts[1].link, "up")
    assert [process.wait(400) for process in started] == [0, 0], text(*logs)
    assert_as_alone(run, alone)
    account("the link between two hosts cut for 4 s", 1, 1, 0, "equal up to rounding", "goes on by itself")


def test_a_run_directory_that_one_host_has(hosts, images, alone, tmp_path, account):
    """Each host has a disk of its own; the first one's holds the run, and one line says so where it is resumed."""
    disks = [tmp_path / "disk0", tmp_path / "disk1"]
    for disk in disks:
        disk.mkdir()
    logs = (tmp_path / "log0", tmp_path / "log1")
    arguments = ["train", images, *ALIKE, "--out", "run"]
    started = [host.run(log, *arguments, cwd=disk) for host, log, disk in zip(hosts, logs, disks, strict=True)]
    assert [process.wait(400) for process in started] == [0, 0], text(*logs)
    assert_as_alone(disks[0] / "run", alone)
    assert not (disks[1] / "run" / "best.safetensors").exists()
    again = [
        host.run(log, "train", "--resume", "run", "--epochs=4", cwd=disk)
        for host, log, disk in zip(hosts, logs, disks, strict=True)
    ]
    assert [process.wait(400) for process in again] == [1, 1], text(*logs)  # torchrun's own code for it
    assert "process 1 of 2 can't find run/last.ckpt: to go on, every machine must see the run directory" in text(*logs)
    shutil.copytree(disks[0] / "run", disks[1] / "run")
    for host in hosts:
        host.kill()
    last = [
        host.run(log, "train", "--resume", "run", "--epochs=4", cwd=disk)
        for host, log, disk in zip(hosts, logs, disks, strict=True)
    ]
    assert [process.wait(400) for process in last] == [0, 0], text(*logs)
    assert steps(disks[0] / "run") == 20
    account(
        "a run directory that one of two hosts has, resumed", 1, 1, 0, "not compared", "stops with a line; --resume"
    )
