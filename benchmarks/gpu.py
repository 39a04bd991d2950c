"""Checks and times everything on one GPU, in under 8 minutes; writes CSV with hardware and versions in it.

    python benchmarks/gpu.py                    # results/gpu_kernels.csv and gpu_networks.csv
    python benchmarks/gpu.py --only kernels

``kernels`` compares the Triton grid attention with PyTorch's own operations, in answers, gradients, time and share of
the measured copy bandwidth. ``inference`` and ``training`` time whole networks in bf16, channels-last: ours, the plain
layers (``benchmarks/plain.py``), and timm's Swin-T, PVTv2-B2, ConvNeXt-T and MaxViT-T, with batches that fill a GPU
and with a small one. ``compiled`` is the plain layers by ``torch.compile``; ``graphs`` is the peers as CUDA graphs, by
which nobody waits for Python. The plain layers only take sizes that their grids divide; 224 isn't one, and their line
says so. Figures are medians of rounds in which networks take turns; those that train run alone, for the memory.

    python benchmarks/gpu.py --draw             # results/gpu.png from what results/gpu_networks.csv holds
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import triton
from plain import plain
from torch import nn

import transcnn
from transcnn.attention import grid_attention as plain_grids
from transcnn.compare.engines import randomise
from transcnn.fast import accelerate_training, record_training
from transcnn.fast.cuda_graphs import CapturedInference
from transcnn.fast.triton.local_attention import grid_attention
from transcnn.report.plots import BLUE, ORANGE, draw_bars, new_figure, style

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("swin_tiny_patch4_window7_224", "pvt_v2_b2", "convnext_tiny", "maxvit_tiny_tf_224")
LARGE = ((224, 256), (512, 64), (1024, 16))  # side of the images, images in a batch
SMALL = (256, 16)
ROUNDS = 3
LAST = torch.channels_last
Row = dict[str, Any]


def milliseconds(run: Callable[[], Any], times: int = 10, warm: int = 3) -> float:
    """Median time of one call; calls follow each other as they do in use, so the GPU needn't wait for Python."""
    for _ in range(warm):
        run()
    taken = []
    for _ in range(3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(times):
            run()
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end) / times)
    return statistics.median(taken)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


# --- kernels ---------------------------------------------------------------------------------------------------------


def kernels() -> list[Row]:
    """Grid attention at the shapes of transcnn_tiny and at ragged ones."""
    a, b = (torch.empty(2**30, dtype=torch.int8, device="cuda") for _ in range(2))
    copy = 2 * a.numel() / milliseconds(lambda: b.copy_(a)) / 1e6  # GB/s, read and written
    rows = []
    for batch, side, dim, head_dim, size in (
        (64, 128, 64, 64, 8), (64, 64, 128, 64, 8), (64, 32, 256, 64, 8), (64, 113, 64, 64, 8), (64, 114, 96, 48, 7),
    ):  # fmt: skip
        for dtype, tolerance in ((torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 1e-5)):
            rows.append(_grids(batch, side, dim, head_dim, size, dtype))
            rows[-1]["right"] = max(rows[-1]["error"], rows[-1]["grad_error"]) <= tolerance
    for row in rows:
        row["copy_gb_per_s"] = copy
        for way in ("forward", "backward"):
            row[f"{way}_share_of_copy"] = row[f"{way}_gb"] / row[f"{way}_ms"] * 1e3 / copy
    return rows


def _grids(batch: int, side: int, dim: int, head_dim: int, size: int, dtype: torch.dtype) -> Row:
    one = batch * side**2 * dim * torch.finfo(dtype).bits / 8e9  # GB of a map
    qkv = torch.randn(batch, side, side, 3 * dim, device="cuda", dtype=dtype, requires_grad=True)
    up = torch.randn(batch, side, side, dim, device="cuda", dtype=dtype)

    def usual(x: torch.Tensor) -> torch.Tensor:
        return plain_grids(x.permute(0, 3, 1, 2), head_dim, size).permute(0, 2, 3, 1)

    def ours(x: torch.Tensor) -> torch.Tensor:
        return grid_attention(x, head_dim, size)

    some = slice(0, 4)  # images that are computed in double precision, too
    exact = qkv.detach()[some].double().requires_grad_()
    expected = usual(exact)
    (slope,) = torch.autograd.grad(expected, exact, up[some].double())
    row: Row = {"kernel": "grids", "batch": batch, "side": side, "dim": dim, "size": size, "dtype": str(dtype)[6:]}
    for prefix, attend in (("plain_", usual), ("", ours)):
        out = attend(qkv)
        (grad,) = torch.autograd.grad(out, qkv, up)
        row |= {f"{prefix}error": error(out[some], expected), f"{prefix}grad_error": error(grad[some], slope)}
        with torch.no_grad():
            row[f"{prefix}forward_ms"] = milliseconds(partial(attend, qkv))
        out = attend(qkv)
        row[f"{prefix}backward_ms"] = milliseconds(lambda out=out: torch.autograd.grad(out, qkv, up, retain_graph=True))
        del out, grad
    return row | {"forward_gb": 4 * one, "backward_gb": 7 * one}


# --- networks --------------------------------------------------------------------------------------------------------


def ours() -> nn.Module:
    model = transcnn.create_model("transcnn_tiny").cuda()
    randomise(model)
    return model


def peer(name: str, size: int) -> nn.Module:
    fixed = timm.get_pretrained_cfg(name)
    sized = fixed is not None and (fixed.fixed_input_size or "swin" in name)
    return timm.create_model(name, **({"img_size": size} if sized else {}))


def inference() -> list[Row]:
    rows = []
    for size, batch in (*LARGE, SMALL):
        x = images(size, batch)
        cases = {
            "ours, optimize/launched": partial(_optimized, x, graphs=False),
            "plain/launched": lambda x=x: _forward(plain(ours()), x),
            **{f"{name}/launched": partial(_forward_peer, name, x) for name in PEERS},
            "ours, optimize/graph": partial(_optimized, x, graphs=True),
        }
        rows += _race("inference", x, cases)
    return rows


def training() -> list[Row]:
    rows = []
    for size, batch in (*LARGE, SMALL):
        x = images(size, batch)
        cases = {
            "ours/launched": lambda x=x: _step(accelerate_training(ours()), x),
            "plain/launched": lambda x=x: _step(plain(ours()), x),
            **{f"{name}/launched": partial(_step_of_peer, name, x) for name in PEERS},
            "ours/graph": lambda x=x: _step(accelerate_training(ours()), x, graph=True),
            "plain/graph": lambda x=x: _step(plain(ours()), x, graph=True),
        }
        rows += _race("training", x, cases, together=False)
    return rows


def compiled() -> list[Row]:
    """The plain layers by ``torch.compile``."""
    rows = []
    for size, batch in LARGE[1:]:
        x = images(size, batch)
        rows += _race(
            "inference", x, {"plain, torch.compile/launched": lambda x=x: _forward(_compiled(plain(ours())), x)}
        )
    return rows


def graphs() -> list[Row]:
    """The peers as CUDA graphs. Last of all: PyTorch isn't itself any more after a recording that failed."""
    x = images(*SMALL)
    cases = {f"{name}/graph": partial(_forward_peer, name, x, graph=True) for name in PEERS}
    rows = _race("inference", x, {"plain/graph": lambda: _forward(plain(ours()), x, graph=True), **cases})
    cases = {f"{name}/graph": partial(_step_of_peer, name, x, graph=True) for name in PEERS}
    return rows + _race("training", x, cases, together=False)


def images(size: int, batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, device="cuda").contiguous(memory_format=LAST)


def _optimized(x: torch.Tensor, graphs: bool) -> Callable[[], Any]:
    fast = transcnn.optimize(ours(), torch.bfloat16, graphs=graphs)

    def run() -> Any:
        with torch.no_grad():
            return fast(x)

    return run


def _forward_peer(name: str, x: torch.Tensor, graph: bool = False) -> Callable[[], Any]:
    return _forward(peer(name, x.shape[2]), x, graph)


def _step_of_peer(name: str, x: torch.Tensor, graph: bool = False) -> Callable[[], None]:
    return _step(peer(name, x.shape[2]), x, graph)


def _compiled(model: nn.Module) -> nn.Module:
    torch.compiler.reset()
    model.compile(dynamic=False)
    return model


def _forward(model: nn.Module, x: torch.Tensor, graph: bool = False) -> Callable[[], Any]:
    model = model.cuda().eval().to(memory_format=LAST)  # pyright: ignore
    model = CapturedInference(model) if graph else model

    def run() -> Any:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            return model(x)

    return run


def _step(model: nn.Module, x: torch.Tensor, graph: bool = False) -> Callable[[], None]:
    """A whole step: bf16 autocast, cross-entropy, fused AdamW."""
    model = model.cuda().train().to(memory_format=LAST)  # pyright: ignore
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    labels = torch.arange(len(x), device="cuda")
    forward = record_training(model) if graph else model

    def run() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = nn.functional.cross_entropy(forward(x).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def _race(
    mode: str, x: torch.Tensor, cases: dict[str, Callable[[], Callable[[], Any]]], together: bool = True
) -> list[Row]:
    """A row for each case: images a second, and memory above what lies there already.

    Cases take turns, or, where the memory wouldn't hold them all ``together``, run alone for as many rounds.
    """
    rows, runs, calls = [], {}, {}
    for label, make in cases.items():
        network, _, way = label.partition("/")
        row: Row = {"mode": mode, "network": network, "way": way, "size": x.shape[2], "batch": len(x), "note": ""}
        rows.append(row)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            run = make()
            for _ in range(5):  # races, and recordings
                run()
            torch.cuda.synchronize()
            row["peak_gb"] = (torch.cuda.max_memory_allocated() - before) / 1e9
            begun = time.perf_counter()
            run()
            torch.cuda.synchronize()
            calls[label] = max(1, round(0.06 / (time.perf_counter() - begun)))  # in a round
            if together:
                runs[label] = run
            else:
                _count(row, [milliseconds(run, calls[label], 0) for _ in range(ROUNDS)])
        except Exception as problem:  # the others still get their line
            row["note"] = (str(problem) or type(problem).__name__).splitlines()[0][:120]
        run = None
    taken: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(ROUNDS):
        for label, run in runs.items():
            taken[label].append(milliseconds(run, calls[label], 0))
    for row in rows:
        label = f"{row['network']}/{row['way']}"
        if label in taken:
            _count(row, taken[label])
        print({key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    return rows


def _count(row: Row, taken: list[float]) -> None:
    row["images_per_s"] = row["batch"] / statistics.median(taken) * 1e3
    row["half_range"] = (max(taken) - min(taken)) / 2 / statistics.median(taken)


# --- all -------------------------------------------------------------------------------------------------------------


PARTS: tuple[Callable[[], list[Row]], ...] = (kernels, inference, training, compiled, graphs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[part.__name__ for part in PARTS])
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    parser.add_argument("--draw", action="store_true", help="only draw what was measured")
    options = parser.parse_args()
    if options.draw:
        with (options.out / "gpu_networks.csv").open(newline="") as file:
            draw(list(csv.DictReader(file)), options.out / "gpu.png")
        return 0
    if not torch.cuda.is_available():
        print("no GPU: nothing measured", file=sys.stderr)
        return 2
    options.out.mkdir(exist_ok=True)
    right, networks = True, []
    for part in PARTS:
        if options.only not in (None, part.__name__):
            continue
        begun = time.perf_counter()
        rows = part()
        right &= all(row.get("right", True) for row in rows)
        if part is not kernels:
            networks += rows
        _write(options.out / f"gpu_{'kernels' if part is kernels else 'networks'}.csv", networks or rows)
        if networks:
            draw(networks, options.out / "gpu.png")
        print(f"{part.__name__}: {time.perf_counter() - begun:.0f} s", flush=True)
    return 0 if right else 1


def draw(rows: list[Row], path: Path) -> None:
    """A bar for each network at 512x512, in a panel for inference and one for training."""
    rows = [row for row in rows if int(row["size"]) == 512 and row["images_per_s"]]
    modes = [mode for mode in ("inference", "training") if any(row["mode"] == mode for row in rows)]
    if not rows:
        return
    with style():
        figure = new_figure(7.5, 0.3 * len(rows) + 1.1 * len(modes))
        heights = [sum(row["mode"] == mode for row in rows) + 2 for mode in modes]
        panels = figure.subplots(len(modes), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
        for mode, axes in zip(modes, panels, strict=True):
            shown = [row for row in rows if row["mode"] == mode]
            speeds = [float(row["images_per_s"]) for row in shown]
            names = [row["network"] + (", CUDA graph" if row["way"] == "graph" else "") for row in shown]
            colours = [ORANGE if row["network"].startswith("ours") else BLUE for row in shown]
            draw_bars(axes, names, speeds, [f"{speed:.0f}" for speed in speeds], colours)
            axes.set(xlabel="images/s", title=f"{mode.capitalize()}, 512x512, batch {shown[0]['batch']}, bf16")
        figure.savefig(path)


def _write(path: Path, rows: list[Row]) -> None:
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
             "cuda": torch.version.cuda, "timm": timm.__version__, "date": time.strftime("%Y-%m-%d")}  # fmt: skip
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*columns, *about])
        writer.writeheader()
        writer.writerows({**row, **about} for row in rows)


if __name__ == "__main__":
    sys.exit(main())
