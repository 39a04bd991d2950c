"""How fast the kernels that a wheel brings are, beside those compiled for the CPU at hand: results/wheel.csv.

    python benchmarks/wheel.py [--rounds 15] [--out results/wheel.csv]

Two processes take turns, so that other work on the machine slows both alike: one has the packaged libraries (compiled
here first, as ``make build`` does), the other one compiled with ``-march=native``. Medians of the rounds; what counts
is ``packaged_over_native``, the median of each round's own ratio of speeds.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from transcnn.fast.cpu import build

CASES = {"fp32": ("fp32", 8, 256), "bf16": ("bf16", 8, 256), "fp32, one image": ("fp32", 1, 224)}
WORKER = """
import sys, time, torch, transcnn
from pathlib import Path
from transcnn.fast.cpu import build
build.PACKAGED = Path(sys.argv[1])
torch.manual_seed(0)
model = transcnn.create_model("transcnn_tiny").eval()
dtype, batch, side = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
fast, images = transcnn.optimize(model, dtype), torch.randn(batch, 3, side, side)
with torch.inference_mode():
    fast(images), fast(images)
    print(build.library()._name, flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        fast(images), fast(images)
        print((time.perf_counter() - began) / 2, flush=True)
"""


def start(folder: str, changes: dict[str, str], case: tuple[str, int, int]) -> Any:
    """A process that times two passes for each line that it gets."""
    command = [sys.executable, "-c", WORKER, folder, *map(str, case)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **changes}
    )


def ask(worker: Any) -> float:
    """Seconds of one pass."""
    worker.stdin.write("go\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


def main() -> None:
    """Time all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("results/wheel.csv"))
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        build.compile_variants(Path(folder))
        for name, case in CASES.items():
            workers = [start(folder, changes, case) for changes in ({}, {"TRANSCNN_NATIVE": "compile"})]
            library, _ = (Path(worker.stdout.readline().strip()).name for worker in workers)
            pairs = [[ask(worker) for worker in workers] for _ in range(options.rounds)]
            for worker in workers:
                worker.stdin.close()
                worker.wait()
            ratios = [native / packaged for packaged, native in pairs]
            images = [case[1] / statistics.median(seconds) for seconds in zip(*pairs, strict=True)]
            rows.append(
                {
                    "case": name,
                    "library": library.rpartition("-")[0],
                    "packaged_images_per_second": f"{images[0]:.1f}",
                    "native_images_per_second": f"{images[1]:.1f}",
                    "packaged_over_native": f"{statistics.median(ratios):.3f}",
                    "half_range": f"{(max(ratios) - min(ratios)) / 2:.3f}",
                }
            )
            print(*rows[-1].values(), sep="  ", flush=True)
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
