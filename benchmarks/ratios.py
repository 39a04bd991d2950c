"""How fast optimize() is beside other engines on the same weights: results/speed_ratios.csv, a line an engine.

    python benchmarks/ratios.py                                   # 14 networks, about two hours on two quiet cores
    python benchmarks/ratios.py --networks hatnet_tiny,resnet50 --dtypes bf16 --batches 1 --engines optimize,openvino

Engines run in turns in one process. With one thread the CPU's time counts, which other work on the machine disturbs
little; with more it is the clock, and nothing else should run. ``ratio`` is the median over rounds of the engine's time
by that of ``optimize`` (above 1: optimize is faster), ``least`` and ``most`` its smallest and largest. A case whose
lines are in the file is not timed again, so a run that was ended goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # for all engines alike: before torch takes its first memory

import torch
from seeds import read_runs, write_rows

import transcnn
from transcnn.compare.engines import build, prepare

OURS = [f"{design}_{size}" for design in ("transcnn", "hatnet") for size in ("tiny", "small", "medium", "large")]
OTHERS = ["resnet50", "mobilenetv2_100", "efficientnet_b0", "repvit_m1_1", "fastvit_t8", "convnext_nano"]
PLUGGED = "+hmhsa"
FIELDS = [
    "network",
    "size",
    "dtype",
    "batch",
    "threads",
    "engine",
    "images_per_s",
    "ratio",
    "least",
    "most",
    "clock",
    "rounds",
    "machine",
    "note",
]
Run = Callable[[torch.Tensor], object]
OUT = Path(__file__).resolve().parent.parent / "results" / "speed_ratios.csv"


def network(name: str, size: int) -> torch.nn.Module:
    """A network by name, with H-MHSA plugged in where the name ends so."""
    model = build(name.removesuffix(PLUGGED), size)
    if name.endswith(PLUGGED):
        model = transcnn.plug(model, example=torch.zeros(1, 3, size, size)).eval()
    return model


def prepared(engine: str, model: torch.nn.Module, dtype: str, images: torch.Tensor) -> tuple[Run | None, str]:
    """An engine, warm; or None and why it can't run this, which leaves the others their line."""
    try:
        run = prepare(engine, model, dtype, images)
        for _ in range(2):
            run(images)
        return run, ""
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return None, lines[-1][:100]


def measure(name: str, dtype: str, batch: int, options: argparse.Namespace) -> list[dict[str, object]]:
    """The lines of one case."""
    clock = time.process_time if options.threads == 1 else time.perf_counter
    model, images = network(name, options.size), torch.randn(batch, 3, options.size, options.size)
    common = {"network": name, "size": options.size, "dtype": dtype, "batch": batch, "threads": options.threads}
    common |= {"clock": "CPU" if options.threads == 1 else "wall", "rounds": options.rounds}
    common |= {"machine": options.machine}
    runs: dict[str, Run] = {}
    lines: list[dict[str, object]] = []
    for engine in options.engines:
        run, note = prepared(engine, model, dtype, images)
        if run is None:
            lines.append({**common, "engine": engine, "note": note})
        else:
            runs[engine] = run
    times: dict[str, list[float]] = {engine: [] for engine in runs}
    for _ in range(options.rounds):
        for engine, run in runs.items():
            start = clock()
            run(images)
            times[engine].append(clock() - start)
    for engine, taken in times.items():
        ratios = [one / first for one, first in zip(taken, times["optimize"], strict=True)]
        speed = {"images_per_s": f"{batch / statistics.median(taken):.2f}", "ratio": f"{statistics.median(ratios):.3f}"}
        bounds = {"least": f"{min(ratios):.3f}", "most": f"{max(ratios):.3f}"}
        lines.append({**common, "engine": engine, **speed, **bounds, "note": ""})
        print(f"{name:24} {dtype} batch {batch} {engine:12} {speed['images_per_s']:>8} images/s, {speed['ratio']}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [*OURS, *OTHERS, *(name + PLUGGED for name in OTHERS)]
    lists = {"networks": default, "dtypes": ["fp32", "bf16"], "batches": ["1", "8"]}
    lists["engines"] = ["optimize", "eager", "openvino", "onnxruntime", "compile"]
    for name, values in lists.items():
        parser.add_argument(f"--{name}", type=lambda text: text.split(","), default=values, help=",".join(values))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--machine", default=f"{platform.machine()}, {os.cpu_count()} cores", help="its name in the table"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    if options.engines[0] != "optimize":
        parser.error("the first engine must be optimize, which the others are compared with")
    torch.set_num_threads(options.threads)
    lines = read_runs(options.out, ())
    keys = ("network", "size", "dtype", "batch", "threads")
    for name in options.networks:
        for dtype in options.dtypes:
            for batch in map(int, options.batches):
                case = (name, options.size, dtype, batch, options.threads)
                done = {
                    line["engine"] for line in lines if tuple(str(line[key]) for key in keys) == tuple(map(str, case))
                }
                if done >= set(options.engines):
                    continue
                lines += [line for line in measure(name, dtype, batch, options) if line["engine"] not in done]
                write_rows(options.out, lines, FIELDS)


if __name__ == "__main__":
    main()
