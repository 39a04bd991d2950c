"""Training steps of our smaller networks beside plain ones and CNNs of as many multiply-adds.

    python benchmarks/training_steps.py                        # about three minutes of one core
    python benchmarks/training_steps.py --groups nano --rounds 9

Writes results/speed_training_steps.csv. A step is forward, cross-entropy, backward and AdamW, channels-last, in bf16
autocast where the CPU has instructions for it and else in fp32, as ``transcnn train`` takes it. All of a group take
their steps in turns in one process with one thread, by the CPU's clock, which other work on the machine disturbs
little. ``ratio`` is the median over rounds of the network's time by that of ours (above 1: ours is faster), ``least``
and ``most`` its smallest and largest; memory is the peak above the loaded network, of a fresh process each.

``plain`` is benchmarks/plain.py, the published layers written down as simply as they can be; ``eager`` is our network
without ``accelerate_training``.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # for all alike: before torch takes its first memory

import torch
from cifar10_peers import convnext
from plain import plain
from plug_cifar10 import ResNet20
from seeds import read_runs, training_dtype, write_rows
from torch import nn

from transcnn.compare.engines import build, prepare_training
from transcnn.compare.measuring import memory_mb
from transcnn.plugging.cost import count

OUT = Path(__file__).resolve().parent.parent / "results" / "speed_training_steps.csv"
NUMBERS = ["images_per_s", "ratio", "least", "most", "above_mb"]
FIELDS = ["network", "size", "batch", "dtype", "threads", "params", "macs", *NUMBERS, "clock", "rounds", "machine"]


class Group(NamedTuple):
    """Networks for images of one size, ours first; whose kernels train it is all that the first three differ in."""

    size: int
    batch: int
    networks: dict[str, Callable[[], nn.Module]]


def ours(name: str, size: int, peers: dict[str, Callable[[], nn.Module]], batch: int) -> Group:
    same = {f"{name}{kind}": lambda: build(name, size) for kind in ("", ", eager")}
    return Group(size, batch, {**same, f"{name}, plain": lambda: plain(build(name, size)), **peers})


CONVNEXT = "convnext_nano:dims=(72,144,288,576):depths=(2,2,8,2)"
GROUPS = {
    "hatnet": ours(
        "hatnet_tiny",
        224,
        {"resnet18": lambda: build("resnet18", 224), "ConvNeXt": lambda: build(CONVNEXT, 224)},
        batch=16,
    ),
    "nano": ours(
        "transcnn_nano",
        32,
        {"ResNet-20": lambda: ResNet20(10, 3, width=20), "ConvNeXt, small": lambda: convnext(10, 3)},
        batch=128,
    ),
}


def prepared(name: str, model: nn.Module, dtype: str) -> Callable[[torch.Tensor], Any]:
    return prepare_training(model, dtype, accelerate=not name.endswith(("eager", "plain")))


def memory(name: str, group: Group, dtype: str) -> float:
    """The peak above the loaded network, in MB, of this process, which has done nothing else."""
    images = torch.randn(group.batch, 3, group.size, group.size)
    model = group.networks[name]()
    before = memory_mb("VmRSS")
    run = prepared(name, model, dtype)
    del model
    run(images)
    return memory_mb("VmHWM") - before


def measure(key: str, options: argparse.Namespace) -> list[dict[str, object]]:
    """The lines of a group."""
    group = GROUPS[key]
    images = torch.randn(group.batch, 3, group.size, group.size)
    runs = {name: prepared(name, make(), options.dtype) for name, make in group.networks.items()}
    for run in runs.values():
        run(images)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            start = time.process_time()
            for _ in range(options.steps):
                run(images)
            times[name].append((time.process_time() - start) / options.steps)
    lines = []
    first = next(iter(times.values()))
    for name, taken in times.items():
        counted = count(group.networks[name]().eval(), images[:1])
        ratios = [one / base for one, base in zip(taken, first, strict=True)]
        child = [sys.executable, __file__, "--memory_of", key, name, "--dtype", options.dtype]
        above = float(subprocess.run(child, capture_output=True, text=True, check=True).stdout)
        line = {"network": name, "size": group.size, "batch": group.batch, "dtype": options.dtype, "threads": 1}
        line |= {"params": counted.params, "macs": counted.macs, "clock": "CPU", "rounds": options.rounds}
        line |= {"images_per_s": f"{group.batch / statistics.median(taken):.1f}", "above_mb": f"{above:.0f}"}
        line |= {"ratio": f"{statistics.median(ratios):.2f}", "machine": options.machine}
        lines.append(line | {"least": f"{min(ratios):.2f}", "most": f"{max(ratios):.2f}"})
        print(name, line["images_per_s"], "images/s,", line["ratio"], f"times ours' time, {line['above_mb']} MB")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default=training_dtype(), help="[as transcnn train here]")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=1, help="that a network takes in its turn")
    parser.add_argument("--machine", default=f"{platform.machine()}, one thread", help="its name in the table")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--memory_of", nargs=2, metavar=("GROUP", "NETWORK"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of:
        key, name = options.memory_of
        print(memory(name, GROUPS[key], options.dtype))
        return
    again = {(str(GROUPS[key].size), options.dtype) for key in options.groups}
    lines = [line for line in read_runs(options.out, ()) if (line["size"], line["dtype"]) not in again]
    for key in options.groups:
        lines += measure(key, options)
        write_rows(options.out, lines, FIELDS)


if __name__ == "__main__":
    main()
