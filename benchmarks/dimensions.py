"""H-MHSA over sequences and volumes: what it costs, that masks are exact, and two data sets learnt beside peers.

    python benchmarks/dimensions.py macs                     # results/dimensions_macs.csv
    python benchmarks/dimensions.py cost                     # results/dimensions_cost.csv
    python benchmarks/dimensions.py masks                    # results/dimensions_masks.csv
    python benchmarks/dimensions.py hosts                    # results/dimensions_hosts.csv
    python benchmarks/dimensions.py digits spoken_digits.npz [--speakers]   # results/spoken_digits.csv
    python benchmarks/dimensions.py voxels voxels.npz --seeds 0 1 2 3 4     # results/voxels.csv

Costs are of one forward pass of one H-MHSA with the levels of "auto", beside plain attention while that fits. Time is
this process's CPU time on one thread, memory what its peak grew by, each case in a process of its own.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import transcnn
from transcnn.attention import BATCH_NORMS, CONVS
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
        return Plain(len(size), dim).eval()
    grids, ratios = further_levels(size)
    kind = ATTENTIONS[len(size)]
    return kind(dim, head_dim=16, grid_sizes=grids, pool_ratios=ratios, norm_layer=GROUP_NORM).eval()


def cost_of(case: tuple[tuple[int, ...], int, bool]) -> dict[str, Any]:
    """Multiply-adds, CPU time and memory of one forward pass; a case is a size, channels, and whether it is plain."""
    size, dim, plain = case
    torch.set_num_threads(1)
    module, positions = attention_over(size, dim, plain), int(np.prod(size))
    x = torch.randn(1, dim, *size)
    with torch.inference_mode():
        module(torch.randn(1, dim, *(2 for _ in size)))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        times = []
        for _ in range(3 if positions <= 2**17 else 1):
            start = time.process_time()
            module(x)
            times.append(time.process_time() - start)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "size": "x".join(map(str, size)),
        "positions": positions,
        "attention": "plain" if plain else f"{len(module.local) + 1} levels",  # pyright: ignore
        "MACs a position": round(macs_of(size, dim, plain) / positions),
        "CPU ns a position": round(1e9 * min(times) / positions),
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
    largest = {False: args.positions, True: args.plain}
    cases = [(size, args.dim, plain) for size in SIZES for plain in largest if np.prod(size) <= largest[plain]]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        rows = [print(row) or row for row in pool.imap(cost_of, cases)]
    write(rows, ROOT / "results" / "dimensions_cost.csv")


# --- masks ------------------------------------------------------------------------------------------------------------


def masks(args: argparse.Namespace) -> None:
    """Random masked cases against the slow reference of the tests, in float64."""
    sys.path.insert(0, str(ROOT / "tests"))
    import reference

    rng = np.random.default_rng(args.seeds[0])
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


# --- learning ---------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """A basic block of a ResNet in any dimension."""

    def __init__(self, ndim: int, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        conv, norm = CONVS[ndim], BATCH_NORMS[ndim]
        first, second = conv(inputs, outputs, 3, stride, 1, bias=False), conv(outputs, outputs, 3, 1, 1, bias=False)
        self.body = nn.Sequential(first, norm(outputs), nn.ReLU(), second, norm(outputs))
        self.shortcut = nn.Sequential(conv(inputs, outputs, 1, stride, bias=False), norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *S) -> (B, C', *⌈S/stride⌉)."""
        return torch.relu(self.body(x) + self.shortcut(x))


class ResNet(nn.Module):
    """A ResNet-10 in any dimension."""

    def __init__(self, ndim: int, classes: int, width: int, stem_stride: int) -> None:
        super().__init__()
        conv, norm = CONVS[ndim], BATCH_NORMS[ndim]
        self.stem = nn.Sequential(conv(1, width, 7, stem_stride, 3, bias=False), norm(width), nn.ReLU())
        blocks = [Residual(ndim, width * max(1, 2 ** (i - 1)), width * 2**i, 1 if i == 0 else 2) for i in range(4)]
        self.layers = nn.Sequential(*blocks)
        self.head = nn.Linear(8 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, *S) -> (B, classes)."""
        return self.head(self.layers(self.stem(x)).flatten(2).mean(2))


def m5(classes: int, width: int) -> nn.Module:
    """M5 (arXiv 1610.00087): raw sound, a kernel of 80, and a pooling by 4 after each convolution."""
    layers: list[nn.Module] = []
    for i, o, k, s in [(1, width, 80, 4), (width, width, 3, 1), (width, 2 * width, 3, 1), (2 * width, 4 * width, 3, 1)]:
        conv = nn.Conv1d(i, o, k, s, k // 2, bias=False)
        layers.append(nn.Sequential(conv, nn.BatchNorm1d(o), nn.ReLU(), nn.MaxPool1d(4)))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4 * width, classes))


def peers(ndim: int, classes: int, size: tuple[int, ...]) -> dict[str, Callable[[], nn.Module]]:
    """Ours, and peers as wide as gives about as many multiply-adds; those with H-MHSA plugged in as well."""
    name = f"transcnn{ndim}d_nano"
    x = torch.empty(1, 1, *size, device="meta")
    with torch.device("meta"):
        wanted = count(transcnn.create_model(name, num_classes=classes), x).macs

    def as_wide(make: Callable[[int], nn.Module]) -> Callable[[], nn.Module]:
        with torch.device("meta"):
            off = {width: abs(count(make(width), x).macs - wanted) for width in range(8, 257, 8)}
        best = min(off, key=off.__getitem__)
        return lambda: make(best)

    others = {"ResNet": as_wide(lambda width: ResNet(ndim, classes, width, 4 if ndim == 1 else 2))}
    if ndim == 1:
        others["M5"] = as_wide(lambda width: m5(classes, width))
    example = torch.zeros(1, 1, *size)
    plugged = {
        f"{other} with H-MHSA": lambda make=make: transcnn.plug(make(), example=example)
        for other, make in others.items()
    }
    return {name: lambda: transcnn.create_model(name, num_classes=classes), **others, **plugged}


def learn(
    model: nn.Module,
    batches: Callable[[], Iterable[tuple[Tensor, Tensor, Tensor]]],
    steps: int,
    epochs: int,
    rate: float = 3e-3,
) -> nn.Module:
    """AdamW with one cycle; ``batches`` gives inputs, masks and labels of one epoch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps * epochs, pct_start=0.2)
    model.train()
    for _ in range(epochs):
        for x, mask, labels in batches():
            loss = nn.functional.cross_entropy(answer(model, x, mask), labels, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


def answer(model: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """Ours takes the mask; peers see zeros."""
    return model(x, mask) if isinstance(model, transcnn.TransCNN) else model(x * mask)


@torch.inference_mode()
def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor, Tensor]]) -> float:
    """Percent."""
    right = [(answer(model, x, mask).argmax(1) == labels).float() for x, mask, labels in batches]
    return 100 * float(torch.cat(right).mean())


def sound_batches(sounds: list[Tensor], labels: Tensor, size: int, rng: np.random.Generator | None) -> Iterable[Any]:
    """Shuffled, louder or softer and shifted where there is a generator; sounds of about one length together else."""
    order = np.argsort([len(s) for s in sounds]) if rng is None else rng.permutation(len(sounds))
    for i in range(0, len(order) // size * size if rng is not None else len(order), size):
        chosen = order[i : i + size]
        pieces = [sounds[j] if rng is None else sounds[j][rng.integers(0, 200) :] * rng.uniform(0.5, 2) for j in chosen]
        x = nn.utils.rnn.pad_sequence([p.float() for p in pieces], batch_first=True)[:, None]
        lengths = torch.tensor([len(p) for p in pieces])
        yield x, (torch.arange(x.shape[2]) < lengths[:, None])[:, None], labels[torch.from_numpy(chosen)]


def digits(args: argparse.Namespace) -> None:
    data = np.load(args.data)
    sounds = [torch.from_numpy(s / s.std()) for s in np.split(data["samples"].astype(float), data["offsets"][1:-1])]
    labels = torch.from_numpy(data["digit"].astype(np.int64))
    splits = {"takes 0-4": data["take"] < 5}
    if args.speakers:
        splits = {f"speaker {speaker}": data["speaker"] == speaker for speaker in np.unique(data["speaker"])}
    rows = []
    for name, make in peers(1, 10, (4000,)).items():
        for split, held in splits.items():
            for seed in args.seeds if not args.speakers else args.seeds[:1]:
                torch.manual_seed(seed)
                rng = np.random.default_rng(seed)
                train, test = np.flatnonzero(~held), np.flatnonzero(held)
                model, mine = make(), [sounds[i] for i in train]
                begun = time.process_time()
                learn(
                    model,
                    lambda m=mine, t=train, r=rng: sound_batches(m, labels[t], 32, r),
                    len(train) // 32,
                    args.epochs,
                )
                top1 = accuracy(model, sound_batches([sounds[i] for i in test], labels[test], 32, None))
                rows.append(row(name, model, (4000,), split, seed, top1, begun))
    write(rows, ROOT / "results" / f"spoken_digits{'_speakers' if args.speakers else ''}.csv")


def voxels(args: argparse.Namespace) -> None:
    data = np.load(args.data)
    volumes = [np.unpackbits(data[n], axis=1).reshape(-1, 1, 32, 32, 32) for n in sorted(data.files)]
    held = [np.arange(len(v)) % 5 == 0 for v in volumes]
    test_x = torch.from_numpy(np.concatenate([v[h] for v, h in zip(volumes, held, strict=True)])).float()
    test_y = torch.cat([torch.full((int(h.sum()),), i) for i, h in enumerate(held)])
    rows = []
    for name, make in peers(3, 2, (32, 32, 32)).items():
        for seed in args.seeds:
            torch.manual_seed(seed)
            rng = np.random.default_rng(seed)
            few = [v[~h][rng.permutation(int((~h).sum()))[:40]] for v, h in zip(volumes, held, strict=True)]
            x, y = torch.from_numpy(np.concatenate(few)).float(), torch.arange(2).repeat_interleave(40)

            def batches(x: Tensor = x, y: Tensor = y) -> Iterable[Any]:
                for chosen in torch.randperm(len(x)).split(10):
                    flips = [[d for d in (2, 3) if torch.rand(()) < 0.5] for _ in chosen]
                    turned = [
                        x[i : i + 1].flip(f).rot90(int(torch.randint(4, ())), (2, 3))
                        for i, f in zip(chosen.tolist(), flips, strict=True)
                    ]
                    yield torch.cat(turned), torch.ones(len(chosen), 1, 32, 32, 32, dtype=torch.bool), y[chosen]

            begun = time.process_time()
            model = learn(make(), batches, 8, args.epochs)
            whole = (
                (a, torch.ones_like(a, dtype=torch.bool), b)
                for a, b in zip(test_x.split(20), test_y.split(20), strict=True)
            )
            rows.append(row(name, model, (32, 32, 32), "every fifth", seed, accuracy(model, whole), begun))
    write(rows, ROOT / "results" / "voxels.csv")


def row(name: str, model: nn.Module, size: tuple[int, ...], split: str, seed: int, top1: float, begun: float) -> dict:
    """One run of one network."""
    counts = count(model, torch.zeros(1, 1, *size))
    figures = {"parameters": counts.params, "MACs": counts.macs, "test": split, "seed": seed, "top-1": round(top1, 2)}
    return {"network": name, **figures, "CPU seconds": round(time.process_time() - begun)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["macs", "cost", "masks", "hosts", "digits", "voxels"])
    parser.add_argument("data", nargs="?", help="the .npz of digits or voxels")
    parser.add_argument("--dim", type=int, default=32, help="channels, in cost")
    parser.add_argument("--positions", type=int, default=2**24, help="the largest map, in cost")
    parser.add_argument("--plain", type=int, default=2**15, help="the largest map for plain attention, in cost")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--speakers", action="store_true", help="leave each speaker out in turn")
    args = parser.parse_args()
    if args.what in ("digits", "voxels") and not args.data:
        parser.error(f"{args.what} needs the .npz")
    {"macs": macs, "cost": cost, "masks": masks, "hosts": hosts, "digits": digits, "voxels": voxels}[args.what](args)


if __name__ == "__main__":
    main()
