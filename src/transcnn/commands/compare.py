"""``transcnn compare``: networks side by side in parameters, multiply-adds, speed and memory."""

from __future__ import annotations

import csv
import platform
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

from ..checkpoints.files import atomic_write, make_folder
from ..compare.engines import ENGINES, load_reference
from ..compare.measuring import PAPER, REFERENCE, Case, measure, peak_memory, prepare_case, show_progress, title
from ..compare.peers import MISSING
from ..compare.plot import draw
from ..data.paths import StrPath
from ..distributed.runtime import check_accelerator
from ..errors import MAX_SIDE, UserError, check_range
from ..text import print_whole, printable, rich_text

__all__ = ["compare"]


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
    out: StrPath | None = None,
) -> list[dict[str, Any]]:
    """Measure networks side by side: parameters, multiply-adds, images a second, peak memory.

    Speed is the median over interleaved rounds. Networks have fresh weights: their outputs mean nothing, but the
    column "difference" is how far an engine's outputs are from the same network's in eager fp32.

    Args:
        models: Networks of this package, timm or torchvision, separated by commas; paper stands for all that the paper
            compares with, five of which come with the extra "peers". Arguments go behind a colon, as in
            transcnn_tiny:grid_sizes=auto:pool_ratios=auto.
        sizes: Sides of the images in pixels, separated by commas.
        batch: Images at a time.
        dtype: fp32, bf16, fp16, or several separated by commas; eager engines use autocast for the latter two.
        engine: One or more of eager, channels_last, optimize, compile, optimize_compile, onnxruntime, openvino.
        train: Time training steps (forward, backward, AdamW, channels-last) instead of inference, by one engine alone.
        reference: FILE.py:FACTORY, another implementation; where its tensors match one of ours, both get the same
            weights. It runs with the engines asked for, but for optimize.
        rounds: How often each case is timed.
        seconds: Minimum time of one round of one case.
        memory: Also measure the peak memory, each case in a process of its own; on the CPU alone.
        threads: CPU threads; without it, PyTorch's choice.
        device: cpu or cuda.
        out: Directory for compare.csv and compare.png; without it nothing is written.

    Returns:
        One dict a case, in the order of the table.

    Raises:
        UserError: An argument outside its values, a network that doesn't exist.
    """
    check_range(1, 4096, threads=threads)
    check_range(1, MAX_SIDE, batch=batch, rounds=rounds)
    check_range(0, 3600, seconds=seconds)
    if device == "cuda":
        check_accelerator("gpu")
    if threads:
        torch.set_num_threads(threads)
    names = [name for item in _items(models) for name in (PAPER if item == "paper" else [item])]
    if not names and not reference:
        raise UserError("models must name a network or more, got none")
    cases = _cases(([REFERENCE] if reference else []) + names, sizes, dtype, engine, batch, train=train)
    if reference:
        load_reference(reference)  # errors before anything takes time
    if out:
        make_folder(Path(out), "compare.csv", "compare.png")
    _measure(cases, reference, device, names, rounds, seconds, memory=memory and device == "cpu")
    show_progress("")
    _print(cases)
    if "paper" in _items(models):
        print(f"not compared, as no library that is kept has it: {', '.join(MISSING)}")
    rows = [{key: value for key, value in asdict(case).items() if key != "times"} for case in cases]
    if out:
        _write(Path(out), rows, device)
        draw(rows, Path(out) / "compare.png")
    return rows


def _cases(
    names: list[str],
    sizes: str | list[int],
    dtype: str | list[str],
    engine: str | list[str],
    batch: int,
    *,
    train: bool,
) -> list[Case]:
    """All that is to be measured, in the order of the table."""
    return [
        Case(name, chosen, kind, "train" if train else "infer", size, batch)
        for size in _numbers("sizes", sizes)
        for kind in _chosen("dtype", dtype, ("fp32", "bf16", "fp16"))
        for name in names
        for chosen in (["train"] if train else _chosen("engine", engine, ENGINES))
        if not (name == REFERENCE and chosen.startswith("optimize"))
    ]


def _measure(
    cases: list[Case],
    reference: str | None,
    device: str,
    names: list[str],
    rounds: int,
    seconds: float,
    *,
    memory: bool,
) -> None:
    """Time all cases in turns, and take their peak memory; what they take, or why they don't run, is left in them."""
    runs = []
    for case in cases:
        show_progress(f"preparing {title(case)}")
        try:
            runs.append((case, *prepare_case(case, reference, device, names)))
        except (UserError, KeyboardInterrupt):
            raise
        except Exception as error:  # one network or engine that fails leaves the others their line
            case.note = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
    measure(runs, rounds, seconds)
    if memory:
        for case, *_ in runs:
            show_progress(f"memory of {title(case)}")
            peak_memory(case, reference)


def _print(cases: list[Case]) -> None:
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    heads = (
        "network",
        "engine",
        "dtype",
        "size",
        "params\nM",
        "GMACs",
        "images/s",
        "± %",
        "ns/\npixel",
        "peak\nMB",
        "difference",
    )
    for head in heads:
        table.add_column(head, justify="left" if head in ("network", "engine", "dtype") else "right")

    def show(value: float | None, form: str, factor: float = 1) -> str:
        return "-" if value is None else format(value * factor, form)

    for case in cases:
        table.add_row(
            rich_text(case.model),
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
    print_whole(table)
    for case in cases:
        if case.note:
            print(printable(f"{title(case)}: {case.note}"))


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

    def write(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*rows[0], *machine])
            writer.writeheader()
            for row in rows:
                short = {key: float(f"{cell:.5g}") if isinstance(cell, float) else cell for key, cell in row.items()}
                writer.writerow({**short, **machine})

    atomic_write(folder / "compare.csv", write)


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
    if not chosen:
        raise UserError(f"{name} must be of {', '.join(allowed)}, got none")
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
