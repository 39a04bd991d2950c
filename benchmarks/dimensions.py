"""H-MHSA over sequences and volumes: what it costs, that masks are exact, and that hosts stay as they are.

    python benchmarks/dimensions.py macs                     # results/dimensions_macs.csv
    python benchmarks/dimensions.py cost                     # results/dimensions_cost.csv
    python benchmarks/dimensions.py masks                    # results/dimensions_masks.csv
    python benchmarks/dimensions.py hosts                    # results/dimensions_hosts.csv

Costs are of one forward pass of one H-MHSA with the levels of "auto", beside plain attention while that fits, each case
in a process of its own. Time is CPU time of one thread, so that it can be taken on a busy machine, in two parts: what
the process computes, and what the system takes to hand out pages of memory, which it does anew for every tensor beyond
32 MB. Memory is what the process's peak grew by. At 32 channels 256x256x256 would take 13 GB, so it runs with 8.
"""

from __future__ import annotations

import argparse
import csv
import math
import multiprocessing
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import transcnn
from transcnn.attention import CONVS
from transcnn.backbone import ATTENTIONS, norm_layers
from transcnn.levels import further_levels
from transcnn.plugging.cost import count

ROOT = Path(__file__).resolve().parent.parent
SIZES = [*((2**n,) for n in range(13, 21)), *((2**n,) * 3 for n in range(4, 9))]  # 8 k to 1 M, 16³ to 256³
GROUP_NORM = norm_layers()["groupnorm1"]


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """A CSV of these rows, also on the screen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(path.read_text())


# --- cost -------------------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """Multi-head attention over all positions by PyTorch's fused kernel, (B, C, *S) -> (B, C, *S)."""

    def __init__(self, ndim: int, dim: int, head_dim: int = 16) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = GROUP_NORM(dim), CONVS[ndim](dim, 3 * dim, 1), CONVS[ndim](dim, dim, 1)
        self.head_dim = head_dim

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *S) -> (B, C, *S)."""
        q, k, v = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3, -1, self.head_dim)).mT.contiguous().unbind(1)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).mT.reshape(x.shape))


def attention_over(size: tuple[int, ...], dim: int, plain: bool) -> nn.Module:
    """H-MHSA with the levels that a map of this size calls for, or plain attention."""
    if plain:
        return Plain(len(size), dim, min(16, dim)).eval()
    grids, ratios = further_levels(size)
    kind = ATTENTIONS[len(size)]
    return kind(dim, head_dim=min(16, dim), grid_sizes=grids, pool_ratios=ratios, norm_layer=GROUP_NORM).eval()


def cost_of(case: tuple[tuple[int, ...], int, bool]) -> dict[str, Any]:
    """Multiply-adds, CPU time and memory of one forward pass; a case is a size, channels, and whether it is plain."""
    size, dim, plain = case
    torch.set_num_threads(1)
    module, positions = attention_over(size, dim, plain), math.prod(size)
    x = torch.randn(1, dim, *size)
    with torch.inference_mode():
        module(torch.randn(1, dim, *(2 for _ in size)))
        before = resource.getrusage(resource.RUSAGE_SELF)
        module(x)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before.ru_maxrss
        passes = 1 if plain else max(1, 2**20 // positions)
        before = resource.getrusage(resource.RUSAGE_SELF)
        for _ in range(passes):
            module(x)
        after = resource.getrusage(resource.RUSAGE_SELF)
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    return {
        "size": "x".join(map(str, size)),
        "positions": positions,
        "channels": dim,
        "attention": "plain" if plain else f"{len(module.local) + 1} levels",  # pyright: ignore
        "MACs a position": round(macs_of(size, dim, plain) / positions),
        "ns a position": round(1e9 * user / positions / passes),
        "ns for new pages": round(1e9 * system / positions / passes),
        "bytes a position": round(1024 * grown / positions),
    }


def macs_of(size: tuple[int, ...], dim: int, plain: bool) -> int:
    """Multiply-adds of one forward pass, without computing it."""
    return count(attention_over(size, dim, plain).to("meta"), torch.empty(1, dim, *size, device="meta")).macs


def macs(args: argparse.Namespace) -> None:
    """Exact, and there at once."""
    rows = []
    for size in SIZES:
        ours, plain = (macs_of(size, args.dim, kind) / np.prod(size) for kind in (False, True))
        levels = len(attention_over(size, args.dim, False).local) + 1  # pyright: ignore
        shape = {"size": "x".join(map(str, size)), "positions": int(np.prod(size)), "levels": levels}
        rows.append({**shape, "MACs a position": round(ours), "plain attention": round(plain)})
    write(rows, ROOT / "results" / "dimensions_macs.csv")


def cost(args: argparse.Namespace) -> None:
    cases = [(size, args.dim, False) for size in SIZES if math.prod(size) <= args.positions]
    cases += [(size, args.dim, True) for size in SIZES if math.prod(size) <= args.plain]
    cases += [(size, 8, False) for size in SIZES[-4:]]
    context = multiprocessing.get_context("forkserver")  # a process a case, which needn't import everything again
    context.set_forkserver_preload(["transcnn.plugging.cost"])
    rows = []
    with context.Pool(1, maxtasksperchild=1) as pool:
        for row in pool.imap(cost_of, cases):
            print(*row.values(), flush=True)
            rows.append(row)
    write(rows, ROOT / "results" / "dimensions_cost.csv")  # drawn by docs/make_figures.py


# --- masks ------------------------------------------------------------------------------------------------------------


def masks(args: argparse.Namespace) -> None:
    """Random masked cases against the slow reference of the tests, in float64."""
    sys.path.insert(0, str(ROOT / "tests"))
    import reference

    rng = np.random.default_rng(0)
    worst: dict[int, float] = dict.fromkeys((1, 2, 3), 0.0)
    cases: dict[int, int] = dict.fromkeys((1, 2, 3), 0)
    for case in range(args.cases):
        ndim, levels, norm = case % 3 + 1, int(rng.integers(0, 4)), ("batch", "group")[int(rng.integers(2))]
        sizes = [[tuple(rng.integers(1, most, ndim).tolist()) for _ in range(levels)] for most in (6, 5)]
        kind: Callable[..., nn.Module] = ATTENTIONS[ndim]
        layer = GROUP_NORM if norm == "group" else None
        module = kind(6, head_dim=3, grid_sizes=sizes[0], pool_ratios=sizes[1], norm_layer=layer).double().eval()
        arrays = reference.weights({k: tuple(v.shape) for k, v in module.state_dict().items()}, case)
        module.load_state_dict({name: torch.from_numpy(np.asarray(value)) for name, value in arrays.items()})
        shape = (2, 6, *rng.integers(1, {1: 40, 2: 11, 3: 6}[ndim], ndim).tolist())
        x, mask = rng.standard_normal(shape), rng.random((2, 1, *shape[2:])) < rng.random()
        expected = torch.from_numpy(reference.hmhsa(x, arrays, 3, *sizes, norm, mask=mask))  # pyright: ignore
        with torch.no_grad():
            error = (module(torch.from_numpy(x), torch.from_numpy(mask)) - expected).norm()
        worst[ndim] = max(worst[ndim], float(error / expected.norm().clamp(min=1e-300)) if mask.any() else float(error))
        cases[ndim] += 1
    rows = [{"dimensions": n, "cases": cases[n], "largest relative error": f"{worst[n]:.1e}"} for n in cases]
    write(rows, ROOT / "results" / "dimensions_masks.csv")


def hosts(args: argparse.Namespace) -> None:
    """The hosts of the tests: where H-MHSA went, and how far outputs are from those before."""
    sys.path.insert(0, str(ROOT / "tests"))
    from test_plug_dimensions import HOSTS

    rows = []
    for name, (make, size, _) in HOSTS.items():
        torch.manual_seed(0)
        model, x = make().eval(), torch.randn(2, *size)
        with torch.no_grad():
            before = model(x)
            transcnn.plug(model, example=x)
            difference = float((model(x) - before).abs().max())
        places = " ".join(line["at"] for line in transcnn.plug_spec(model))
        rows.append({"host": name, "input": "x".join(map(str, size)), "places": places, "difference": difference})
    write(rows, ROOT / "results" / "dimensions_hosts.csv")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["macs", "cost", "masks", "hosts"])
    parser.add_argument("--dim", type=int, default=32, help="channels, in cost")
    parser.add_argument("--positions", type=int, default=2**21, help="the largest map, in cost")
    parser.add_argument("--plain", type=int, default=2**15, help="the largest map for plain attention, in cost")
    parser.add_argument("--cases", type=int, default=1000)
    args = parser.parse_args()
    {"macs": macs, "cost": cost, "masks": masks, "hosts": hosts}[args.what](args)


if __name__ == "__main__":
    main()
