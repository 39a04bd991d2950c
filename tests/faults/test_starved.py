"""Every command that writes, on full and read-only disks and with little memory: one line, and no file cut short."""

from __future__ import annotations

import csv
import json
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import QUICK, Command
from PIL import Image
from safetensors.torch import load_file

ONCE = [*QUICK, "--epochs=1", "--num_workers=0"]
# {data}: two classes, {run}: a network trained on them, {out}: where a command may write.
COMMANDS = {
    "train": ["train", "{data}", *ONCE, "--out={out}/run"],
    "eval": ["eval", "{run}", "{data}", "--out={out}/eval", "--report"],
    "data": ["data", "{data}", "--out={out}/data"],
    "embed": ["embed", "{run}", "{data}", "--out={out}/x.parquet"],
    "predict": ["predict", "{run}", "{data}", "--csv={out}/x.csv"],
    "explain": ["explain", "{run}", "{data}/class_0/000.png", "--out={out}/x.pdf"],
    "export": ["export", "{run}", "--format=torch", "--out={out}/x.pt2"],
    "pack": ["pack", "{data}", "--out={out}/shards"],
    "plug": ["plug", "test_resnet", "--img_size=64", "--num_classes=2", "--out={out}/x.safetensors"],
    "compare": ["compare", "transcnn_test", "--sizes=32", "--batch=1", "--engine=eager", "--rounds=1",
                "--seconds=0.01", "--no-memory", "--out={out}/compare"],
    "models": ["models", "transcnn_test", "--csv={out}/x.csv"],
}  # fmt: skip
NAMES = [name if name == "models" else pytest.param(name, marks=pytest.mark.slow) for name in COMMANDS]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """A trained network."""
    folder = tmp_path_factory.mktemp("starved")
    with Command("train", images, *ONCE, "--out", folder / "run", log=folder / "log") as command:
        assert command.wait() == 0, command.text
    return folder / "run"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a disk of a size in KiB, in memory; for root alone."""
    mounted = []

    def mount(kilobytes: int, *options: str) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={kilobytes}k", *options]), "tmpfs", str(folder)]
        if os.geteuid() or subprocess.run(words, capture_output=True).returncode:
            pytest.skip("only root can mount a disk, and not in every container")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def ended_well(command: Command, out: Path) -> bool:
    """See that a command ended as it may; whether it did its work."""
    code = command.wait()
    assert code in (0, 2), command.text
    assert "Traceback" not in command.text
    if code:
        assert command.text.splitlines()[-1].startswith("transcnn: "), command.text
    for path in out.rglob("*"):
        assert not path.name.endswith(".tmp"), path
        if path.is_file() and not path.name.startswith("events."):  # TensorBoard's are appended to
            read_whole(path)
    return not code


def read_whole(path: Path) -> None:
    """Raise an error for a file that isn't whole."""
    text = path.read_bytes()
    assert text, path
    if path.suffix == ".json":
        json.loads(text)
    elif path.suffix == ".png":
        Image.open(path).load()
    elif path.suffix == ".csv":
        rows = list(csv.reader(text.decode().splitlines()))
        assert text.endswith(b"\n"), path
        assert len({len(row) for row in rows}) == 1, path
    elif path.suffix == ".safetensors":
        load_file(path)
    elif path.suffix == ".ckpt":
        torch.load(path, weights_only=True)
    elif path.suffix == ".pt2":
        torch.export.load(path)
    elif path.suffix in (".pdf", ".html"):
        assert text.rstrip().endswith((b"%%EOF", b"</html>")), path
    elif path.suffix in (".yaml", ".sha256"):
        assert text.endswith(b"\n"), path


def command(name: str, data: Path, run: Path, out: Path, log: Path, prepare: Any = None) -> Command:
    return Command(*(word.format(data=data, run=run, out=out) for word in COMMANDS[name]), log=log, prepare=prepare)


@pytest.mark.parametrize("name", NAMES)
def test_a_disk_that_is_read_only_or_full(name, images, run, disk, tmp_path):
    with command(name, images, run, disk(64, "ro"), tmp_path / "log") as running:
        assert running.wait() == 2, running.text
        assert "Read-only file system" in running.text.splitlines()[-1]
    for kilobytes in (4, 64, 500):
        out = disk(kilobytes)
        if kilobytes == 4:
            (out / "other").write_bytes(bytes(4096))
        with command(name, images, run, out, tmp_path / f"log{kilobytes}") as running:
            worked = ended_well(running, out)
        assert worked or "o space left" in running.text, running.text
        assert not worked or kilobytes > 4


def limit(megabytes: int) -> None:
    """Leave so much address space beyond what is taken, as ulimit -v does."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20),) * 2)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "models"])  # which needs none
def test_little_memory(name, images, run, tmp_path):
    """oneDNN itself reads from address 0 where it finds none (PyTorch's SIGSEGV); everything else is told."""
    refused = 0
    for megabytes in (4, 16, 28, 40, 52, 64):
        out = tmp_path / str(megabytes)
        out.mkdir()
        with command(name, images, run, out, tmp_path / f"log{megabytes}", partial(limit, megabytes)) as running:
            running.process.join(240)
            if running.process.exitcode == -signal.SIGSEGV:
                continue
            refused += not ended_well(running, out)
    assert refused
