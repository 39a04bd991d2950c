"""The tables of docs/speed.md, each in one run on this machine: results/speed_{inference,training,large}.csv, and those
of benchmarks/pipeline.py and start.py, results/pipeline.csv and results/start.csv.

    python benchmarks/tables.py                      # all five, about 20 minutes on two quiet cores
    python benchmarks/tables.py --only large --big   # with the plain network at 2048, too (9 GB)

Nothing else should run meanwhile. ``transcnn compare`` does the measuring; this says what to measure.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # for all cases alike: before torch takes its first memory

import torch

from transcnn.commands.compare import compare
from transcnn.compare.plot import draw

ROOT = Path(__file__).resolve().parent.parent
PLAIN = f"{ROOT / 'benchmarks' / 'plain.py'}:plain"
AUTO = "transcnn_tiny:grid_sizes=auto:pool_ratios=auto"


def inference(out: str, options: argparse.Namespace) -> None:
    engines = "eager,channels_last,optimize,onnxruntime,openvino" + (",compile" if options.compile else "")
    compare("transcnn_tiny", sizes="256", batch=8, dtype="fp32,bf16", engine=engines, reference=PLAIN, out=out,
            threads=options.threads, memory=False, rounds=9, seconds=1.0)  # fmt: skip


def training(out: str, options: argparse.Namespace) -> None:
    compare("transcnn_tiny", sizes="256", batch=16, dtype="bf16", train=True, reference=PLAIN, out=out,
            threads=options.threads, rounds=5, seconds=1.0)  # fmt: skip
    others = out + "_others"
    compare("resnet50,swin_tiny_patch4_window7_224", sizes="224", batch=16, dtype="bf16", train=True, out=others,
            threads=options.threads, rounds=5, seconds=1.0)  # fmt: skip
    append(Path(others), Path(out))


def large(out: str, options: argparse.Namespace) -> None:
    common = dict(batch=1, dtype="fp32", threads=options.threads, rounds=2, seconds=0.0)
    compare(AUTO, sizes="512,1024,2048,4096", engine="optimize", out=out, **common)
    levels, others, plain = out + "_levels", out + "_others", out + "_plain"
    compare("transcnn_tiny", sizes="512,1024,2048", engine="optimize", out=levels, **common)
    names = "resnet50,pvt_v2_b1,swin_tiny_patch4_window7_224"
    compare(names, sizes="512,1024,2048", engine="eager", out=others, **common)
    sizes = "512,1024,2048" if options.big else "512,1024"
    compare([], sizes=sizes, engine="eager", reference=PLAIN, out=plain, **common)
    for folder in (levels, others, plain):
        append(Path(folder), Path(out))


def append(source: Path, target: Path) -> None:
    """Put the lines of one table under another's, and drop the folder they came from."""
    lines = (source / "compare.csv").read_text().splitlines(keepends=True)
    with (target / "compare.csv").open("a") as file:
        file.writelines(lines[1:])
    shutil.rmtree(source)
    with (target / "compare.csv").open(newline="") as file:
        draw(list(csv.DictReader(file)), target / "compare.png")


class Limit:
    """What the CPU can do at most: a large matrix product in fp32 and bf16, timed before and after each table.

    The median of many, as for the networks: a shared machine has moments that nothing longer than a product can use.
    """

    def __init__(self) -> None:
        self.times: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}

    def measure(self, seconds: float = 2.0) -> None:
        for dtype, times in self.times.items():
            a, b = torch.randn(2048, 2048, dtype=dtype), torch.randn(2048, 2048, dtype=dtype)
            a @ b
            start = time.perf_counter()
            while (begun := time.perf_counter()) - start < seconds:
                a @ b
                times.append(time.perf_counter() - begun)

    def write(self, path: Path) -> None:
        lines = ["dtype,TFLOP/s,best TFLOP/s,products"]
        for dtype, times in self.times.items():
            median, best = (2 * 2048**3 / value / 1e12 for value in (statistics.median(times), min(times)))
            lines.append(f"{str(dtype)[6:]},{median:.4f},{best:.4f},{len(times)}")
        path.write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("inference", "training", "large", "pipeline", "start"))
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--big", action="store_true", help="the plain network at 2048, too: 9 GB, some minutes")
    parser.add_argument("--compile", action="store_true", help="torch.compile, too: some minutes more")
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(exist_ok=True)
    limit = Limit()
    for table in (inference, training, large):
        if options.only in (None, table.__name__):
            folder = options.out / f"speed_{table.__name__}.tmp"
            limit.measure()
            table(str(folder), options)
            limit.measure()
            for suffix in ("csv", "png"):
                shutil.move(folder / f"compare.{suffix}", options.out / f"speed_{table.__name__}.{suffix}")
            shutil.rmtree(folder)
    if all(limit.times.values()):
        limit.write(options.out / "speed_limit.csv")
    for name in ("pipeline", "start"):
        if options.only in (None, name):
            script = Path(__file__).with_name(f"{name}.py")
            subprocess.run([sys.executable, script, "--out", options.out / f"{name}.csv"], check=True)
    sys.exit(0)
