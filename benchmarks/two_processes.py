"""The same run in one process and in two: curve and speed, to results/two_processes.csv.

    python benchmarks/two_processes.py [--epochs 5]

Both train on the embedded digits with the same global batch, each process with one thread, in fp32. Norms are of each
image alone (groupnorm1): what BatchNorm sees depends on how many images a process has.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TARGET = Path(__file__).resolve().parent.parent / "results" / "two_processes.csv"
SETTINGS = ["--model=transcnn_nano", "--model_args={norm_layer: groupnorm1}", "--img_size=16", "--batch_size=64"]
SETTINGS += ["--precision=32", "--accelerator=cpu", "--policy=small", "--hflip=0", "--num_workers=0"]


def run(devices: int, epochs: int, out: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv."""
    command = [sys.executable, "-m", "transcnn", "train", *SETTINGS, f"--epochs={epochs}", f"--devices={devices}"]
    subprocess.run([*command, f"--out={out}"], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    with (out / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def main() -> None:
    """Run both, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    epochs = parser.parse_args().epochs
    with tempfile.TemporaryDirectory() as folder:
        one, two = (run(devices, epochs, Path(folder) / str(devices)) for devices in (1, 2))
    names = ("train_loss", "val_loss", "val_top1", "images_per_second")
    with TARGET.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", *(f"{name}_{word}" for name in names for word in ("one", "two"))])
        for a, b in zip(one, two, strict=True):
            writer.writerow([a["epoch"], *(row[name] for name in names for row in (a, b))])
    print(TARGET.read_text())


if __name__ == "__main__":
    main()
