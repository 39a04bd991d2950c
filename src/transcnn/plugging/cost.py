"""What a network costs: parameters, multiply-adds, and the time of a call."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..errors import UserError
from ..variants import PAPER_TOP1
from .build import build_model
from .running import call

__all__ = ["Counts", "count", "describe", "interleaved_seconds", "seconds_per_call"]

LAYERS = (torch.ops.aten.convolution, torch.ops.aten.addmm)
ATTENTION_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # which PyTorch leaves out of its count


class Counts(NamedTuple):
    """Parameters and multiply-adds; ``layer_macs`` are those of convolutions and linear layers alone."""

    params: int
    macs: int
    layer_macs: int


def count(model: nn.Module, *inputs: Any) -> Counts:
    """Count the parameters of a network, and the multiply-adds of one forward pass in evaluation mode.

    With inputs on the meta device nothing is computed: shapes are all that counting needs. A network that looks at
    numbers (a detector) needs real inputs.
    """
    with FlopCounterMode(display=False, custom_mapping={ATTENTION_ON_CPU: _attention}) as counter:
        call(model, inputs, {})
    operations = counter.get_flop_counts().get("Global", {})
    layers = sum(operations.get(op, 0) for op in LAYERS) // 2
    return Counts(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2, layers)


def _attention(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


def describe(name: str, img_size: int | None = None) -> dict[str, Any]:
    """A network's figures: ``name``, ``params``, ``macs``, ``layer_macs``, ``input_size`` and ``paper_top1``.

    ``macs`` are the multiply-adds of one image, ``layer_macs`` those of convolutions and linear layers alone, which is
    what the paper's FLOPs are.
    """
    with torch.device("meta"):
        model = build_model(name).eval()
    config: Any = model.pretrained_cfg
    channels, *size = config["input_size"]
    size = [img_size, img_size] if img_size else size
    if min(size) < 1:
        raise UserError(f"img_size must be 1 or more, got {img_size}")
    counts = count(model, torch.empty(1, channels, *size, device="meta"))
    return {
        "name": name,
        **counts._asdict(),
        "input_size": [channels, *size],
        "paper_top1": PAPER_TOP1.get(name),
    }


def seconds_per_call(run: Callable[[Tensor], Any], images: Tensor, min_run_time: float = 1.0) -> float:
    """Median time of ``run(images)`` over at least ``min_run_time`` seconds, by PyTorch's benchmark timer."""
    from torch.utils.benchmark import Timer  # takes seconds, and warns where a CUDA toolkit lies without a GPU

    timer = Timer("run(images)", globals={"run": run, "images": images}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=min_run_time).median


def interleaved_seconds(
    runs: Mapping[str, Callable[[], Any]], rounds: int = 5, budget: float = float("inf")
) -> dict[str, list[float]]:
    """Seconds of each call in each round; the order changes from round to round, so that other work slows all alike.

    Rounds end when all calls together took ``budget`` seconds. By hand, for PyTorch's timer takes seconds to import and
    calls once more than it times, which is long where one call is.
    """
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            began = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - began)
        if sum(map(sum, times.values())) >= budget:
            break
    return times
