"""Fails if optimize() isn't well ahead of plain eager on this machine: CI's guard of speed, with a wide margin.

    python benchmarks/ratio.py                                                   # make bench, which does both
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/ratio.py  # as a CPU without AVX-512

The two run in turn in one process, so a busy machine slows both; the best round of each counts. Where PyTorch may use
AVX2 alone, so do our kernels, and fp32 alone is measured.
"""

from __future__ import annotations

import os
import sys
import time

import torch
from plain import plain

import transcnn
from transcnn.compare.engines import randomise
from transcnn.distributed.runtime import choose_precision
from transcnn.fast.cpu import build

AVX2 = os.environ.get("ATEN_CPU_CAPABILITY") == "avx2"
LEAST = {"fp32": 1.15, "bf16": 1.2}  # without our kernels 1.7 to 2, with them 2.7 and 4 (AVX2: 1.9)


def main() -> int:
    if AVX2:
        build.FLAGS[build.FLAGS.index("-march=native")] = "-march=x86-64-v3"
    torch.manual_seed(0)
    images = torch.randn(4, 3, 256, 256)
    ours = transcnn.create_model("transcnn_tiny").eval()
    randomise(ours)
    theirs = plain("transcnn_tiny").eval()
    theirs.load_state_dict(ours.state_dict())
    failed = 0
    cases = [("fp32", torch.float32)]
    if (
        not AVX2 and choose_precision("auto", "cpu") != "32-true"
    ):  # elsewhere bf16 is emulated, and its speed no concern
        cases.append(("bf16", torch.bfloat16))
    for name, dtype in cases:
        fast = transcnn.optimize(ours, dtype)
        best = [float("inf")] * 2
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=name == "bf16"):
            for _ in range(12):
                for i, model in enumerate((theirs, fast)):
                    start = time.perf_counter()
                    model(images)
                    best[i] = min(best[i], time.perf_counter() - start)
        ratio = best[0] / best[1]
        failed += ratio < LEAST[name]
        speeds = f"plain eager {4 / best[0]:.1f} images/s, optimize() {4 / best[1]:.1f}"
        print(f"{name}: {speeds}: {ratio:.2f} times as fast, at least {LEAST[name]} wanted")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
