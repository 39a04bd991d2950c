"""What ``transcnn compare`` measures of each network: speed in interleaved rounds, and peak memory.

Every case, a network with an engine at a size, is warmed up first; then rounds go over all cases, so that drift of the
machine hits all alike, and the median counts. Peak memory is that of a fresh process for each case.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..plugging.cost import count, seconds_per_call
from ..variants import PAPER_TOP1
from .engines import build, load_reference, prepare, prepare_training, same_weights

__all__ = [
    "PAPER",
    "REFERENCE",
    "Case",
    "measure",
    "memory_mb",
    "peak_memory",
    "prepare_case",
    "show_progress",
    "title",
]

# What arXiv 2106.03180 compares with or builds on, as far as a library has it (peers.py: what timm lacks), in the sizes
# nearest to ours; ImageNet-1K top-1 in percent as each network's own paper reports it (ResNet and ResNeXt:
# torchvision's first weights), None where it gives none or the library's network is another than the paper's.
PAPER: dict[str, float | None] = {
    **PAPER_TOP1,
    "resnet18": 69.8,
    "resnet50": 76.1,
    "resnet101": 77.4,
    "resnext50_32x4d": 77.6,
    "regnety_040": None,
    "vit_base_patch16_224": 77.9,
    "deit_tiny_patch16_224": 72.2,
    "deit_small_patch16_224": 79.8,
    "pvt_v2_b1": 78.7,
    "pvt_v2_b2": 82.0,
    "swin_tiny_patch4_window7_224": 81.3,
    "swin_small_patch4_window7_224": 83.0,
    "tnt_s_patch16_224": 81.5,
    "cait_xxs24_224": 77.6,
    "coat_lite_small": 81.9,
    "pit_s_224": 80.9,
    "mvitv2_tiny": 82.3,
    "pvt_tiny": 75.1,
    "pvt_small": 79.8,
    "deepvit_s": None,
    "t2t_vit_14": None,
    "localvit_t": None,
}
REFERENCE = "reference"
# Python would look for modules in the working folder first, where anything may lie.
CHILD = "import sys; sys.path[:] = filter(None, sys.path); from transcnn.compare.measuring import _child; _child()"


@dataclass
class Case:
    """One line of the table. Times are seconds for one batch; ``above_mb`` is the peak above the loaded network."""

    model: str
    engine: str
    dtype: str
    mode: str
    size: int
    batch: int
    params: int | None = None
    macs: int | None = None
    images_per_s: float | None = None
    spread: float | None = None  # (slowest - fastest round) / median
    ns_per_pixel: float | None = None
    gflops_per_s: float | None = None
    peak_mb: float | None = None
    above_mb: float | None = None
    difference: float | None = None  # from the same network in eager fp32, relative
    paper_top1: float | None = None
    note: str = ""
    times: list[float] = field(default_factory=list, repr=False)


def prepare_case(
    case: Case, reference: str | None, device: str, names: list[str]
) -> tuple[Callable[[Tensor], Any], Tensor]:
    """The case's function and its input; fills in what is counted rather than timed."""
    if case.model == REFERENCE:
        assert reference is not None
        model = load_reference(reference)
        same = any(same_weights(model, build(name, case.size)) for name in names)
        case.note = "" if same else "weights of its own"
    else:
        model = build(case.model, case.size)
        if reference and same_weights(load_reference(reference), model):
            case.note = "weights of the reference"
    case.params = sum(p.numel() for p in model.parameters())
    with suppress(Exception):  # some networks can't be run without computing
        case.macs = count(model, torch.empty(1, 3, case.size, case.size, device="meta")).macs
    case.paper_top1 = PAPER.get(case.model)
    model = model.to(device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(case.batch, 3, case.size, case.size, generator=generator).to(device)
    if case.mode == "train":
        run = prepare_training(model, case.dtype, accelerate=case.model != REFERENCE)
        run(images)
        return run, images
    run = prepare(case.engine, model, case.dtype, images)
    output = run(images)
    if isinstance(output, Tensor) and not (case.engine == "eager" and case.dtype == "fp32"):
        with torch.no_grad():
            exact = model(images).double()
        case.difference = float((output.double() - exact).norm() / exact.norm())
    return run, images


def measure(runs: list[tuple[Case, Callable[[Tensor], Any], Tensor]], rounds: int, seconds: float) -> None:
    for i in range(rounds):
        for case, run, images in runs:
            show_progress(f"round {i + 1} of {rounds}: {title(case)}")
            case.times.append(seconds_per_call(run, images, seconds))
    for case, *_ in runs:
        median = statistics.median(case.times)
        case.images_per_s = case.batch / median
        case.spread = (max(case.times) - min(case.times)) / median
        case.ns_per_pixel = median / (case.batch * case.size**2) * 1e9
        if case.macs is not None and case.mode == "infer":
            case.gflops_per_s = 2 * case.macs * case.batch / median / 1e9


def peak_memory(case: Case, reference: str | None) -> None:
    """Fills in the case's memory, as a process of its own measures it."""
    what = {**asdict(case), "times": [], "reference": reference, "threads": torch.get_num_threads()}
    child = [sys.executable, "-c", CHILD]
    done = subprocess.run(child, input=json.dumps(what), capture_output=True, text=True)
    if done.returncode:
        case.note = (case.note + " memory not measured").strip()
        return
    case.peak_mb, case.above_mb = json.loads(done.stdout.splitlines()[-1])


def _child() -> None:
    what = json.loads(sys.stdin.read())
    reference = what.pop("reference")
    torch.set_num_threads(what.pop("threads"))
    case = Case(**what)
    model = load_reference(reference) if case.model == REFERENCE else build(case.model, case.size)
    images = torch.randn(case.batch, 3, case.size, case.size)
    before = memory_mb("VmRSS")
    if case.mode == "train":
        run = prepare_training(model, case.dtype, accelerate=case.model != REFERENCE)
    else:
        run = prepare(case.engine, model, case.dtype, images)
    del model
    run(images)
    peak = memory_mb("VmHWM")
    print(json.dumps([peak, peak - before]))


def memory_mb(kind: str) -> float:
    """This process's resident memory now (``VmRSS``) or at its peak (``VmHWM``)."""
    try:  # not getrusage, whose peak a process has from the one that started it
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(kind + ":"))
    except OSError:  # not Linux: the peak so far
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def title(case: Case) -> str:
    return f"{case.model} {case.engine} {case.dtype} {case.size}"


def show_progress(text: str) -> None:
    """Progress on one line of standard error, where that is a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
