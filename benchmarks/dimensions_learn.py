"""Spoken digits and voxels: our 1-D and 3-D networks beside peers of as many multiply-adds, and peers with H-MHSA.

    python benchmarks/dimensions_learn.py digits spoken_digits.npz --tune
    python benchmarks/dimensions_learn.py digits spoken_digits.npz --seeds 0 1 2
    python benchmarks/dimensions_learn.py digits spoken_digits.npz --speakers
    python benchmarks/dimensions_learn.py voxels voxels.npz --tune
    python benchmarks/dimensions_learn.py voxels voxels.npz --seeds 0 1 2 3 4

Digits are learnt from the raw waveform; takes 0 to 4 of each speaker are the test split, or each speaker in turn
(``--speakers``). Voxels, a chair or a monitor, from 40 volumes of each; every fifth volume is of the test split.
``--tune`` chooses a learning rate for each network by examples held back from training (takes 5 to 9; volumes that are
neither among the 40 nor of the test split), results/DATA_tuning.csv, from which the other runs take it.

Peers are as wide as gives about as many multiply-adds. Ours takes the mask of real samples; peers see zeros after the
end, in training as in the test. Sounds are learnt in bf16, volumes in fp32: gradients of PyTorch's 3-D convolutions in
bf16 are NaN now and then on a CPU. Writes results/spoken_digits.csv, spoken_digits_speakers.csv and voxels.csv, a line
a run, anew after each; runs that a file holds are not repeated.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from seeds import best_rate, mean_and_spread, read_runs, run_missing
from torch import Tensor, nn

import transcnn
from transcnn.attention import BATCH_NORMS, CONVS
from transcnn.plugging.cost import count

ROOT = Path(__file__).resolve().parent.parent
Batches = Iterable[tuple[Tensor, Tensor, Tensor]]  # inputs (B, 1, *S), masks (B, 1, *S), labels (B,)


# --- networks ---------------------------------------------------------------------------------------------------------


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


# --- data -------------------------------------------------------------------------------------------------------------


class Digits:
    """Spoken digits of unlike lengths; a split's name is "takes 0-4" or that of the speaker who is left out."""

    file, classes, size, whole = "spoken_digits", 10, (4000,), "takes 0-4"
    bf16 = True

    def __init__(self, path: str) -> None:
        data = np.load(path)
        self.sounds = [
            torch.from_numpy(s / s.std()) for s in np.split(data["samples"].astype(float), data["offsets"][1:-1])
        ]
        self.labels = torch.from_numpy(data["digit"].astype(np.int64))
        self.take, self.speaker = data["take"], data["speaker"].astype(str)
        self.speakers = sorted(set(self.speaker))

    def splits(self, name: str, seed: int, tune: bool) -> tuple[np.ndarray, np.ndarray]:
        """Indices to learn from and to score."""
        test = self.take < 5 if name == self.whole else self.speaker == name
        held = ~test & (self.take < 10) if tune else test
        return np.flatnonzero(~test & ~held), np.flatnonzero(held)

    def batches(self, chosen: np.ndarray, rng: np.random.Generator | None) -> Batches:
        """32 sounds of about one length together; with a generator shuffled, louder or softer, and shifted."""
        order = chosen if rng is None else rng.permutation(chosen)
        pool = len(order) if rng is None else 256
        near = [sorted(order[i : i + pool], key=lambda j: len(self.sounds[j])) for i in range(0, len(order), pool)]
        groups = [group[i : i + 32] for group in near for i in range(0, len(group), 32)]
        for group in groups if rng is None else [groups[i] for i in rng.permutation(len(groups))]:
            sounds = [self.sounds[j] for j in group]
            if rng is not None:
                sounds = [s[rng.integers(0, 200) :] * rng.uniform(0.5, 2) for s in sounds]
            x = nn.utils.rnn.pad_sequence([s.float() for s in sounds], batch_first=True)[:, None]
            lengths = torch.tensor([len(s) for s in sounds])
            yield x, (torch.arange(x.shape[2]) < lengths[:, None])[:, None], self.labels[torch.tensor(group)]


class Voxels:
    """Chairs and monitors, 32x32x32."""

    file, classes, size, whole = "voxels", 2, (32, 32, 32), "every fifth"
    bf16 = False

    def __init__(self, path: str) -> None:
        data = np.load(path)
        kinds = [np.unpackbits(data[n], axis=1).reshape(-1, 1, 32, 32, 32) for n in sorted(data.files)]
        self.volumes = torch.from_numpy(np.concatenate(kinds)).float()
        self.labels = torch.arange(2).repeat_interleave(torch.tensor([len(k) for k in kinds]))
        self.nth = np.concatenate([np.arange(len(k)) for k in kinds])

    def splits(self, name: str, seed: int, tune: bool) -> tuple[np.ndarray, np.ndarray]:
        """Forty of each kind to learn from, and the test split or what remains."""
        rng = np.random.default_rng(seed)
        test = self.nth % 5 == 0
        kinds = [np.flatnonzero(~test & (self.labels.numpy() == kind)) for kind in (0, 1)]
        few = np.concatenate([rng.permutation(kind)[:40] for kind in kinds])
        return few, np.setdiff1d(np.concatenate(kinds), few) if tune else np.flatnonzero(test)

    def batches(self, chosen: np.ndarray, rng: np.random.Generator | None) -> Batches:
        """Shuffled, flipped and turned around the upright axis where there is a generator."""
        order = chosen if rng is None else rng.permutation(chosen)
        for i in range(0, len(order), 10):
            index = torch.from_numpy(order[i : i + 10])
            x = self.volumes[index]
            if rng is not None:
                x = torch.stack([turned(v, rng) for v in x])
            yield x, torch.ones_like(x, dtype=torch.bool), self.labels[index]


def turned(volume: Tensor, rng: np.random.Generator) -> Tensor:
    """(1, D, H, W), mirrored and turned by quarters in its two last-but-one axes."""
    flips = [axis for axis in (1, 2) if rng.random() < 0.5]
    return volume.flip(flips).rot90(int(rng.integers(4)), (1, 2))


# --- learning ---------------------------------------------------------------------------------------------------------


def learn(
    model: nn.Module, batches: Callable[[], Batches], steps: int, epochs: int, rate: float, bf16: bool
) -> nn.Module:
    """AdamW with one cycle of ``rate``, by autocast in bf16; ``batches`` gives those of one epoch, ``steps`` of them.

    Raises:
        FloatingPointError: Gradients aren't finite: what came of it would be no network's figure.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps * epochs, pct_start=0.2)
    model.train()
    for _ in range(epochs):
        for x, mask, labels in batches():
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                scores = logits(model, x, mask)
            loss = nn.functional.cross_entropy(scores.float(), labels, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if not norm.isfinite():
                raise FloatingPointError(f"the gradient's norm is {norm.item()}")
            optimizer.step()
            schedule.step()
    return model.eval()


def logits(model: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """Ours takes the mask; peers see zeros."""
    return model(x, mask) if isinstance(model, transcnn.TransCNN) else model(x * mask)


@torch.inference_mode()
def accuracy(model: nn.Module, batches: Batches) -> float:
    """Percent."""
    right = [(logits(model, x, mask).argmax(1) == labels).float() for x, mask, labels in batches]
    return 100 * float(torch.cat(right).mean())


# --- runs -------------------------------------------------------------------------------------------------------------

KEY = ("network", "split", "rate", "seed", "epochs")
NUMBERS = ("seed", "epochs", "rate", "top1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["digits", "voxels"])
    parser.add_argument("data", help="the .npz")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--speakers", action="store_true", help="of digits: leave each speaker out in turn")
    parser.add_argument("--networks", nargs="+", help="some of them alone, by name")
    parser.add_argument("--tune", action="store_true", help="compare --rates on held-back examples")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    args = parser.parse_args()
    data = (Digits if args.what == "digits" else Voxels)(args.data)
    splits = [data.whole] if not args.speakers else data.speakers  # pyright: ignore
    tuning = args.out / f"{data.file}_tuning.csv"
    path = tuning if args.tune else args.out / f"{data.file}{'_speakers' * args.speakers}.csv"
    for name, make in networks(data).items():
        if args.networks and name not in args.networks:
            continue
        rates = args.rates if args.tune else [best_rate(tuning, name, "rate", "top1")]
        keys = product([name], splits, rates, args.seeds, [args.epochs])
        run_missing(
            path, NUMBERS, (dict(zip(KEY, key, strict=True)) for key in keys), partial(run, data, make, args.tune)
        )
    rows = read_runs(path, NUMBERS)
    for name in dict.fromkeys(row["network"] for row in rows):
        print(name, "mean and spread", *mean_and_spread([row["top1"] for row in rows if row["network"] == name]))


def run(data: Digits | Voxels, make: Callable[[], nn.Module], tune: bool, key: dict[str, Any]) -> dict[str, Any]:
    """Train one network once and score it."""
    torch.manual_seed(key["seed"])
    rng = np.random.default_rng(key["seed"])
    train, test = data.splits(key["split"], key["seed"], tune)
    begun, model = time.process_time(), make()
    steps = sum(1 for _ in data.batches(train, np.random.default_rng(0)))
    learn(model, lambda: data.batches(train, rng), steps, key["epochs"], key["rate"], data.bf16)
    seconds = round(time.process_time() - begun)
    counts = count(model, torch.zeros(1, 1, *data.size))
    top1 = round(accuracy(model, data.batches(test, None)), 2)
    size = {"parameters": counts.params, "macs": counts.macs, "train_examples": len(train), "examples": len(test)}
    return {"top1": top1, "cpu_seconds": seconds, **size}


def networks(data: Digits | Voxels) -> dict[str, Callable[[], nn.Module]]:
    """Ours, peers as wide as gives about as many multiply-adds, and these with H-MHSA plugged in."""
    ndim = len(data.size)
    ours = f"transcnn{ndim}d_nano"
    x = torch.empty(1, 1, *data.size, device="meta")
    with torch.device("meta"):
        wanted = count(transcnn.create_model(ours, num_classes=data.classes), x).macs

    def as_wide(make: Callable[[int], nn.Module]) -> Callable[[], nn.Module]:
        with torch.device("meta"):
            off = {width: abs(count(make(width), x).macs - wanted) for width in range(8, 257, 8)}
        best = min(off, key=off.__getitem__)
        return lambda: make(best)

    others = {"ResNet-10": as_wide(lambda width: ResNet(ndim, data.classes, width, 4 if ndim == 1 else 2))}
    if ndim == 1:
        others["M5"] = as_wide(lambda width: m5(data.classes, width))
    example = torch.zeros(1, 1, *data.size)
    plugged = {f"{name} + H-MHSA": partial(plugged_into, make, example) for name, make in others.items()}
    return {ours: lambda: transcnn.create_model(ours, num_classes=data.classes), **others, **plugged}


def plugged_into(make: Callable[[], nn.Module], example: Tensor) -> nn.Module:
    return transcnn.plug(make(), example=example)


if __name__ == "__main__":
    main()
