"""How long commands take to begin: CPU seconds of each, in a process of its own, and of the page until it is up.

    python benchmarks/start.py [--rounds 3] [--out results/start.csv]

CPU seconds are those of the process and its threads, user and system, the least of the rounds: other work on the
machine makes them longer, but far less so than the time on the clock.
"""

from __future__ import annotations

import argparse
import csv
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

COMMANDS = {
    "transcnn --help": 1.0,
    "transcnn train --help": 1.0,
    "transcnn models": 1.0,
    "transcnn trian": 1.0,  # a typo
    "transcnn train nowhere": 1.0,  # a missing folder
    "transcnn train --lr x": 1.0,  # a bad value
    "transcnn predict run --top_k a": 1.0,
    "transcnn predict PHOTO": 3.5,
    "transcnn explain transcnn_nano.cifar10 PHOTO": None,
    "transcnn demo": 8.0,  # until the page is up
}  # with the seconds that are wanted


def cpu_seconds(arguments: list[str], folder: Path) -> float:
    """CPU seconds of one command in ``folder``; of the page until it answers."""
    port = free_port()
    page = arguments[0] == "demo"
    command = [sys.executable, "-m", "transcnn", *arguments, *(["--port", str(port)] if page else [])]
    with open(os.devnull, "w") as nowhere:
        process = subprocess.Popen(command, cwd=folder, stdout=nowhere, stderr=nowhere)
        if page:
            wait_for(f"http://127.0.0.1:{port}/", process)
            process.send_signal(signal.SIGINT)
        _, _, used = os.wait4(process.pid, 0)
        process.returncode = 0  # it is waited for
    return used.ru_utime + used.ru_stime


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    """Return when the page answers; asking costs the page next to nothing."""
    while process.poll() is None:
        with suppress(OSError), urllib.request.urlopen(address, timeout=30):
            return
        time.sleep(0.5)
    raise SystemExit("the page ended")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--commands", nargs="+", choices=list(COMMANDS), default=list(COMMANDS))
    parser.add_argument("--out", type=Path, default=Path("results/start.csv"))
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
        Image.fromarray(noise).resize((500, 375)).save(folder / "photo.jpg")
        for command in options.commands:
            arguments = command.replace("PHOTO", "photo.jpg").split()[1:]
            times = [cpu_seconds(arguments, folder) for _ in range(options.rounds)]
            wanted = COMMANDS[command]
            rows.append([command, f"{min(times):.2f}", "" if wanted is None else f"{wanted:g}"])
            print(*rows[-1], sep="\t", flush=True)
    with options.out.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["command", "cpu_seconds", "wanted"], *rows])


if __name__ == "__main__":
    main()
