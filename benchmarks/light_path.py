"""What one prediction costs a fresh process, from a checkpoint and from its exported ONNX file.

    python benchmarks/light_path.py RUN RUN/model.onnx PHOTO [--times 5] [--out results/light_path.csv]

Seconds of CPU (which other programs hardly change) and of wall clock are the smallest of all times, memory is the
peak of the process.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import time
from pathlib import Path


def measure(source: str, photo: str, times: int) -> dict[str, object]:
    """Run ``transcnn predict`` anew ``times`` times."""
    program = Path(sys.executable).with_name("transcnn")
    rows = []
    for _ in range(times):
        began = time.perf_counter()
        process = subprocess.Popen([program, "predict", source, photo, "--json"], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(process.returncode)
        rows.append((time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024))
    wall, cpu, memory = (min(column) for column in zip(*rows, strict=True))
    return {
        "source": "onnx" if source.endswith(".onnx") else "checkpoint",
        "processor_seconds": round(cpu, 2),
        "wall_seconds": round(wall, 2),
        "peak_mib": round(memory),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("onnx")
    parser.add_argument("photo")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--out", default="results/light_path.csv")
    options = parser.parse_args()
    rows = [measure(source, options.photo, options.times) for source in (options.checkpoint, options.onnx)]
    with open(options.out, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(*(f"{key} {value}" for key, value in row.items()), sep="  ")


if __name__ == "__main__":
    main()
