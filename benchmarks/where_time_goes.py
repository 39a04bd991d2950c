"""Which operations take the time of transcnn_tiny on this CPU, with kernels of our own and without.

    python benchmarks/where_time_goes.py        # writes results/profile.csv, a minute on two quiet cores

Inference at 256x256, 8 images, by ``optimize``, in fp32 and bf16; a training step of 16 images, AdamW, bf16 autocast,
channels-last. Milliseconds are an operation's own, of one pass or step; the profiler itself takes a little.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from transcnn.compare.engines import build, prepare, prepare_training
from transcnn.fast.cpu import call as cpu

ROOT = Path(__file__).resolve().parent.parent
CASES = {"inference fp32": 8, "inference bf16": 8, "training bf16": 16}
PASSES = 5


def show_kernels() -> None:
    """Have the profiler see our kernels, too."""
    call = cpu.call

    def seen(name: str, *arguments: object, **options: object) -> None:
        with record_function(f"transcnn::{name}"):
            call(name, *arguments, **options)  # pyright: ignore

    cpu.call = seen  # pyright: ignore


def measure(case: str, threads: int) -> list[tuple[str, float]]:
    torch.set_num_threads(threads)
    task, dtype = case.split()
    images, model = torch.randn(CASES[case], 3, 256, 256), build("transcnn_tiny", 256)
    run = prepare_training(model, dtype) if task == "training" else prepare("optimize", model, dtype, images)
    for _ in range(3):
        run(images)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(PASSES):
            run(images)
    rows = [(event.key, event.self_cpu_time_total / 1e3 / PASSES) for event in seen.key_averages()]
    return sorted(rows, key=lambda row: -row[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "profile.csv")
    parser.add_argument("--case", choices=CASES, help="print this one alone, of this very process")
    options = parser.parse_args()
    if options.case:
        show_kernels()
        csv.writer(sys.stdout).writerows(measure(options.case, options.threads))
        return
    lines = [("case", "kernels of our own", "operation", "ms", "share %")]
    for case in CASES:
        for kernels in ("0", "1"):
            command = [sys.executable, __file__, "--case", case, "--threads", str(options.threads)]
            environment = {**os.environ, "TRANSCNN_NATIVE": kernels}
            text = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows = [(name, float(ms)) for name, ms in csv.reader(text.splitlines())]
            total = sum(ms for _, ms in rows)
            print(f"{case}, kernels of our own {'yes' if kernels == '1' else 'no'}: {total:.0f} ms")
            for name, ms in rows[:12]:
                print(f"  {name:48} {ms:8.1f} ms {100 * ms / total:5.1f} %")
                lines.append((case, kernels, name, f"{ms:.1f}", f"{100 * ms / total:.1f}"))
    with options.out.open("w", newline="") as file:
        csv.writer(file).writerows(lines)


if __name__ == "__main__":
    main()
