"""``transcnn compare``: networks side by side in parameters, multiply-adds, speed and memory.

Every case, a network with an engine at a size, is warmed up first; then rounds go over all cases, so that drift of the
machine hits all alike, and the median counts. Peak memory is that of a fresh process for each case.
"""

from __future__ import annotations

import csv
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import UserError
from ..models import PAPER_TOP1
from .engines import ENGINES, build, count, load_reference, prepare, prepare_training, same_weights
from .plot import draw

__all__ = ["PAPER", "compare"]

# What arXiv 2106.03180 compares with, as far as timm has it, in the sizes nearest to ours; ImageNet-1K top-1 in percent
# as each network's own paper reports it (ResNet and ResNeXt: torchvision's first weights), None where it gives none.
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
}
REFERENCE = "reference"


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


def compare(
    models: str | list[str] = "transcnn_tiny,resnet50,swin_tiny_patch4_window7_224,pvt_v2_b1",
    *,
    sizes: str | list[int] = "256",
    batch: int = 8,
    dtype: str | list[str] = "fp32",
    engine: str | list[str] = "eager,optimize",
    train: bool = False,
    reference: str | None = None,
    rounds: int = 5,
    seconds: float = 0.5,
    memory: bool = True,
    threads: int | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    out: str | None = None,
) -> list[dict[str, Any]]:
    """Measure networks side by side: parameters, multiply-adds, images a second, peak memory.

    Speed is the median over interleaved rounds. Networks have fresh weights: what they answer means nothing, but the
    column "difference" tells how far an engine's answers are from the same network's in eager fp32.

    Args:
        models: Networks of this package, timm or torchvision, separated by commas; paper stands for all that the paper
            compares with. Arguments go behind a colon, as in transcnn_tiny:grid_sizes=auto:pool_ratios=auto.
        sizes: Sides of the images in pixels, separated by commas.
        batch: Images at a time.
        dtype: fp32, bf16, fp16, or several separated by commas; eager engines use autocast for the latter two.
        engine: One or more of eager, channels_last, optimize, compile, optimize_compile, onnxruntime, openvino.
        train: Time training steps (forward, backward, AdamW, channels-last) instead of inference.
        reference: FILE.py:FACTORY, another implementation; where its tensors match one of ours, both get the same
            weights. It runs with the engines asked for, but for optimize.
        rounds: How often each case is timed.
        seconds: Least time of one round of one case.
        memory: Also measure the peak memory, each case in a process of its own.
        threads: Processor threads; without it, PyTorch's choice.
        device: cpu or cuda.
        out: Directory for compare.csv and compare.png; without it nothing is written.

    Returns:
        One dict a case, in the order of the table.

    Raises:
        UserError: An argument outside its values, a network that doesn't exist.
    """
    if threads:
        torch.set_num_threads(threads)
    names = [name for item in _items(models) for name in (PAPER if item == "paper" else [item])]
    cases = [
        Case(name, chosen, kind, "train" if train else "infer", size, batch)
        for size in _numbers("sizes", sizes)
        for kind in _chosen("dtype", dtype, ("fp32", "bf16", "fp16"))
        for name in ([REFERENCE] if reference else []) + names
        for chosen in (["train"] if train else _chosen("engine", engine, ENGINES))
        if not (name == REFERENCE and chosen.startswith("optimize"))
    ]
    for name, value in (("batch", batch), ("rounds", rounds)):
        if value < 1:
            raise UserError(f"{name} must be 1 or more, got {value}")
    if reference:
        load_reference(reference)  # errors before anything takes time
    runs = []
    for case in cases:
        _say(f"preparing {_title(case)}")
        try:
            runs.append((case, *_prepare(case, reference, device, names)))
        except (UserError, KeyboardInterrupt):
            raise
        except Exception as error:  # one network or engine that fails leaves the others their line
            case.note = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
    _measure(runs, rounds, seconds)
    if memory and device == "cpu":
        for case, *_ in runs:
            _say(f"memory of {_title(case)}")
            _peak_memory(case, reference)
    _say("")
    _print(cases)
    rows = [{key: value for key, value in asdict(case).items() if key != "times"} for case in cases]
    if out:
        _write(Path(out), rows, device)
        draw(rows, Path(out) / "compare.png")
    return rows


def _prepare(
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
    case.params, case.macs = count(model, case.size)
    case.paper_top1 = PAPER.get(case.model)
    model = model.to(device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(case.batch, 3, case.size, case.size, generator=generator).to(device)
    if case.mode == "train":
        run = prepare_training(model, case.dtype, accelerate=case.model != REFERENCE)
        run(images)
        return run, images
    run = prepare(case.engine, model, case.dtype, images)
    answer = run(images)
    if isinstance(answer, Tensor) and not (case.engine == "eager" and case.dtype == "fp32"):
        with torch.no_grad():
            exact = model(images).double()
        case.difference = float((answer.double() - exact).norm() / exact.norm())
    return run, images


def _measure(runs: list[tuple[Case, Callable[[Tensor], Any], Tensor]], rounds: int, seconds: float) -> None:
    for i in range(rounds):
        for case, run, images in runs:
            _say(f"round {i + 1} of {rounds}: {_title(case)}")
            case.times.append(_time(run, images, seconds))
    for case, *_ in runs:
        median = statistics.median(case.times)
        case.images_per_s = case.batch / median
        case.spread = (max(case.times) - min(case.times)) / median
        case.ns_per_pixel = median / (case.batch * case.size**2) * 1e9
        if case.macs is not None and case.mode == "infer":
            case.gflops_per_s = 2 * case.macs * case.batch / median / 1e9


def _time(run: Callable[[Tensor], Any], images: Tensor, seconds: float) -> float:
    """Seconds of one call, over as many as fill ``seconds``."""

    def finish() -> None:
        if images.device.type == "cuda":
            torch.cuda.synchronize()

    calls, start = 0, time.perf_counter()
    while not calls or time.perf_counter() - start < seconds:
        run(images)
        finish()
        calls += 1
    return (time.perf_counter() - start) / calls


def _peak_memory(case: Case, reference: str | None) -> None:
    """Fills in the case's memory, as a process of its own measures it."""
    what = {**asdict(case), "times": [], "reference": reference, "threads": torch.get_num_threads()}
    child = [sys.executable, "-c", "from transcnn.compare.command import _child; _child()"]
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
    before = _memory_mb("VmRSS")
    if case.mode == "train":
        run = prepare_training(model, case.dtype, accelerate=case.model != REFERENCE)
    else:
        run = prepare(case.engine, model, case.dtype, images)
    del model
    run(images)
    peak = _memory_mb("VmHWM")
    print(json.dumps([peak, peak - before]))


def _memory_mb(kind: str) -> float:
    """This process's resident memory now (``VmRSS``) or at its peak (``VmHWM``)."""
    try:  # not getrusage, whose peak a process has from the one that started it
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(kind + ":"))
    except OSError:  # not Linux: the peak so far
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _print(cases: list[Case]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    heads = (
        "network",
        "engine",
        "dtype",
        "size",
        "params M",
        "GMACs",
        "images/s",
        "± %",
        "ns/pixel",
        "peak MB",
        "difference",
    )
    for head in heads:
        table.add_column(head, justify="left" if head in ("network", "engine", "dtype") else "right")

    def show(value: float | None, form: str, factor: float = 1) -> str:
        return "-" if value is None else format(value * factor, form)

    for case in cases:
        table.add_row(
            case.model,
            case.engine,
            case.dtype,
            str(case.size),
            show(case.params, ".2f", 1e-6),
            show(case.macs, ".2f", 1e-9),
            show(case.images_per_s, ".2f"),
            show(case.spread, ".0f", 50),
            show(case.ns_per_pixel, ".0f"),
            show(case.peak_mb, ".0f"),
            show(case.difference, ".0e"),
        )
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table)
    for case in cases:
        if case.note:
            print(f"{_title(case)}: {case.note}")


def _write(folder: Path, rows: list[dict[str, Any]], device: str) -> None:
    """compare.csv, each line with what it was measured on."""
    import importlib.metadata

    machine = {
        "hardware": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **{name: importlib.metadata.version(name) for name in ("timm", "transcnn")},
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "compare.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], *machine])
        writer.writeheader()
        for row in rows:
            short = {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in row.items()}
            writer.writerow({**short, **machine})


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(line.replace("\t", "").split(": ", 1) for line in lines if ": " in line)
    flags = facts.get("flags", "").split()
    extras = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8") if flag in flags]
    return f"{facts.get('model name', platform.machine())} family {facts.get('cpu family', '?')} ({' '.join(extras)})"


def _items(text: str | Iterable[str]) -> list[str]:
    parts = text.split(",") if isinstance(text, str) else [str(part) for part in text]
    return [part.strip() for part in parts if part.strip()]


def _chosen(name: str, text: str | list[str], allowed: Iterable[str]) -> list[str]:
    chosen = _items(text)
    for item in chosen:
        if item not in allowed:
            raise UserError(f"{name} must be of {', '.join(allowed)}, got {item!r}")
    return chosen


def _numbers(name: str, text: str | list[int]) -> list[int]:
    try:
        numbers = [int(item) for item in _items(text if isinstance(text, str) else map(str, text))]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise UserError(f"{name} must be whole numbers of 1 or more separated by commas, got {text!r}")
    return numbers


def _title(case: Case) -> str:
    return f"{case.model} {case.engine} {case.dtype} {case.size}"


def _say(text: str) -> None:
    """Progress on one line of standard error, where that is a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
