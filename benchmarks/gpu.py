"""Checks and times everything on one GPU, in under 8 minutes; writes CSV with hardware and versions in it.

    python benchmarks/gpu.py                    # results/gpu_*.csv
    python benchmarks/gpu.py --only kernel

Three parts: ``kernel`` compares the Triton grid attention with plain attention, in its answers, gradients, time and
share of the measured copy bandwidth; ``inference`` and ``training`` time whole networks in bf16 at 224, 512 and 1024:
plain eager channels-last, ``torch.compile``d, ours, and timm's Swin-T, PVTv2-B2, ConvNeXt-T and MaxViT-T. The plain
network only takes sizes that its grids divide; 224 isn't one, and its line says so.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import triton
from plain import plain
from torch import nn

import transcnn
from transcnn.attention import grid_attention as plain_grid
from transcnn.compare.engines import enliven
from transcnn.fast import accelerate_training
from transcnn.kernels.grid_triton import grid_attention

ROOT = Path(__file__).resolve().parent.parent
OTHERS = ("swin_tiny_patch4_window7_224", "pvt_v2_b2", "convnext_tiny", "maxvit_tiny_tf_224")
SIZES = {224: 64, 512: 16, 1024: 4}  # side of the images -> images in a batch
PARTS = ("kernel", "inference", "training")


def milliseconds(run: Callable[[], Any], seconds: float = 0.4) -> float:
    """Median time of one call on the GPU."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    times, begun = [], time.perf_counter()
    while len(times) < 5 or time.perf_counter() - begun < seconds:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def kernel() -> list[dict[str, Any]]:
    """Grid attention alone, at the shapes of transcnn_tiny and at ragged ones."""
    a = torch.empty(2**28, dtype=torch.int8, device="cuda")
    b = torch.empty_like(a)
    copy = 2 * a.numel() / milliseconds(lambda: b.copy_(a)) / 1e6  # GB/s, read and written
    rows = []
    for batch, side, dim, head_dim, size in (
        (64, 64, 64, 64, 8), (64, 32, 128, 64, 8), (64, 16, 256, 64, 8), (64, 56, 64, 64, 8), (64, 28, 128, 64, 7),
        (4, 256, 64, 64, 8), (64, 57, 96, 48, 8),
    ):  # fmt: skip
        for dtype, tolerance in ((torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 3e-3)):  # fp32: TF32
            qkv = torch.randn(batch, side, side, 3 * dim, device="cuda", dtype=dtype, requires_grad=True)
            up = torch.randn(batch, side, side, dim, device="cuda", dtype=dtype)

            def usual(x: torch.Tensor, head_dim: int = head_dim, size: int = size) -> torch.Tensor:
                return plain_grid(x.permute(0, 3, 1, 2), head_dim, size).permute(0, 2, 3, 1)

            def ours(x: torch.Tensor, head_dim: int = head_dim, size: int = size) -> torch.Tensor:
                return grid_attention(x, head_dim, size)

            exact = qkv.detach().double().requires_grad_()
            expected = usual(exact)
            (slope,) = torch.autograd.grad(expected, exact, up.double())
            row = {
                "batch": batch,
                "side": side,
                "dim": dim,
                "head_dim": head_dim,
                "grid": size,
                "dtype": str(dtype)[6:],
            }
            for name, attend in (("plain", usual), ("triton", ours)):
                out = attend(qkv)
                (grad,) = torch.autograd.grad(out, qkv, up)
                row[f"{name}_error"] = float((out - expected).norm() / expected.norm())
                row[f"{name}_grad_error"] = float((grad - slope).norm() / slope.norm())
                with torch.no_grad():
                    row[f"{name}_forward_ms"] = milliseconds(lambda: attend(qkv), 0.1)  # noqa: B023
                row[f"{name}_both_ms"] = milliseconds(lambda: torch.autograd.grad(attend(qkv), qkv, up), 0.1)  # noqa: B023
            moved = 4 * dim * batch * side**2 * qkv.element_size()
            row["copy_gb_per_s"] = copy
            row["share_of_copy_bandwidth"] = moved / row["triton_forward_ms"] / 1e6 / copy
            row["right"] = max(row["triton_error"], row["triton_grad_error"]) <= tolerance
            rows.append(row)
    return rows


def networks(size: int) -> dict[str, nn.Module]:
    """Name -> network, in evaluation mode on the CPU."""
    made = {}
    for name in OTHERS:
        fixed = timm.get_pretrained_cfg(name)
        arguments = {"img_size": size} if fixed is not None and (fixed.fixed_input_size or "swin" in name) else {}
        made[name] = timm.create_model(name, **arguments).eval()
    return made


def inference() -> list[dict[str, Any]]:
    """Whole networks, bf16, channels-last."""
    rows = []
    for size, batch in SIZES.items():
        x = torch.randn(batch, 3, size, size, device="cuda").contiguous(memory_format=torch.channels_last)
        ours = transcnn.create_model("transcnn_tiny").eval()
        enliven(ours)
        cases: dict[str, Callable[[], nn.Module]] = {
            "ours optimize": lambda ours=ours: transcnn.optimize(ours.cuda(), torch.bfloat16),
            "ours optimize compile": lambda ours=ours: transcnn.optimize(ours.cuda(), torch.bfloat16, compile=True),
            "ours eager": lambda ours=ours: ours.cuda(),
        }
        cases["plain eager"] = lambda: plain("transcnn_tiny").cuda().eval()
        cases["plain compile"] = lambda: torch.compile(plain("transcnn_tiny").cuda().eval())  # pyright: ignore
        cases |= {name: lambda model=model: model.cuda() for name, model in networks(size).items()}
        for name, make in cases.items():
            rows.append(case("inference", name, size, batch, make, lambda model, x=x: forward(model, x)))
    return rows


def training() -> list[dict[str, Any]]:
    """A whole step, bf16 autocast, channels-last, fused AdamW."""
    rows = []
    for size, batch in SIZES.items():
        x = torch.randn(batch, 3, size, size, device="cuda").contiguous(memory_format=torch.channels_last)
        y = torch.randint(0, 1000, (batch,), device="cuda")
        cases: dict[str, Callable[[], nn.Module]] = {
            "ours": lambda: accelerate_training(transcnn.create_model("transcnn_tiny")).cuda(),
            "plain eager": lambda: plain("transcnn_tiny").cuda(),
            **{name: lambda model=model: model.cuda() for name, model in networks(size).items()},
        }

        def step(model: nn.Module, x: torch.Tensor = x, y: torch.Tensor = y) -> Callable[[], None]:
            model = model.train().to(memory_format=torch.channels_last)  # pyright: ignore
            optimizer = torch.optim.AdamW(model.parameters(), fused=True)

            def run() -> None:
                with torch.autocast("cuda", torch.bfloat16):
                    loss = nn.functional.cross_entropy(model(x).float(), y)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            return run

        rows += [case("training", name, size, batch, make, step) for name, make in cases.items()]
    return rows


def forward(model: nn.Module, x: torch.Tensor) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            return model(x)

    return run


def case(
    mode: str, name: str, size: int, batch: int, make: Callable[[], nn.Module], runner: Callable[[nn.Module], Callable]
) -> dict[str, Any]:
    """One line of the table; a network that fails has its reason there instead of figures."""
    row: dict[str, Any] = {"mode": mode, "network": name, "size": size, "batch": batch}
    torch.cuda.reset_peak_memory_stats()
    try:
        taken = milliseconds(runner(make()))
        row |= {"images_per_s": batch / taken * 1e3, "peak_mb": torch.cuda.max_memory_allocated() / 2**20, "note": ""}
    except Exception as error:  # the others still get their line
        row |= {"images_per_s": "", "peak_mb": "", "note": str(error).splitlines()[0][:100] if str(error) else ""}
    torch.cuda.empty_cache()
    print(row, flush=True)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: nothing measured", file=sys.stderr)
        return 2
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
             "cuda": torch.version.cuda, "timm": timm.__version__, "date": time.strftime("%Y-%m-%d")}  # fmt: skip
    options.out.mkdir(exist_ok=True)
    right = True
    for part in (kernel, inference, training):
        if options.only not in (None, part.__name__):
            continue
        rows = part()
        right &= all(row.get("right", True) for row in rows)
        with (options.out / f"gpu_{part.__name__}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], *about])
            writer.writeheader()
            writer.writerows({**row, **about} for row in rows)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
