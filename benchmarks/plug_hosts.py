"""Plug H-MHSA into timm's convolutional networks, one after the other: results/plug_hosts.csv.

    python benchmarks/plug_hosts.py --minutes 12

Each network is plugged with ``at="auto"``; its outputs before, right after, and after ``unplug`` are compared exactly,
the module tree and tensor names too, and one backward pass must reach every branch's scale. Networks are taken in turn
from each of timm's convolutional model files, the smaller first; those above ``--max_params`` are left out. A worker
process runs them, so that one that hangs or dies costs no more than its own line. Networks that the file holds already
are not run again: delete it to start afresh, run again to go on.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import multiprocessing
import re
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# timm's model files of networks without attention among positions or transformer blocks. Left out, for being
# convolutional but in another layout, (B, H, W, C): mambaout.
FAMILIES = [
    "byobnet", "convmixer", "convnext", "cspnet", "cspnext", "densenet", "dla", "dpn", "efficientnet", "fasternet",
    "focalnet", "ghostnet", "hardcorenas", "hgnet", "hrnet", "inception_next", "inception_resnet_v2",
    "inception_v3", "inception_v4", "lcnetv2", "mobilenetv3", "nasnet", "nfnet", "pnasnet", "rdnet", "regnet",
    "repghost", "repvit", "res2net", "resnest", "resnet", "resnetv2", "rexnet", "selecsls", "senet", "sknet",
    "starnet", "tresnet", "vgg", "vovnet", "xception", "xception_aligned",
]  # fmt: skip
COLUMNS = [
    "model", "family", "params", "places", "difference", "unplug_difference", "same_tree", "gradient", "img_size",
    "seconds", "result",
]  # fmt: skip
SIZES = (64, 96, 128, 224)  # the first that a network takes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=12, help="start no further network after this time")
    parser.add_argument("--limit", type=int, default=1000, help="at most this many networks")
    parser.add_argument("--max_params", type=float, default=40e6, help="leave out networks above this size")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one network")
    parser.add_argument("--out", type=Path, default=Path("results/plug_hosts.csv"))
    options = parser.parse_args()

    rows: list[dict[str, Any]] = []
    if options.out.is_file():
        with options.out.open(newline="") as file:
            rows = list(csv.DictReader(file))
    done = {row["model"] for row in rows}
    start, worker = time.monotonic(), Worker(options.max_params)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for family, name in networks():
        if name in done:
            continue
        if time.monotonic() - start > options.minutes * 60 or len(rows) >= options.limit:
            break
        row = {"model": name, "family": family, **worker.check(name, options.timeout)}
        if row["result"] == "too large":
            continue
        rows.append(row)
        print(f"{len(rows):4d}  {name:40s} {row['result']}", flush=True)
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="")
            writer.writeheader()
            writer.writerows(sorted(rows, key=lambda row: (row["family"], row["model"])))
    worker.stop()
    working = sum(row["result"] == "works" for row in rows)
    print(f"{working} of {len(rows)} networks work, {time.monotonic() - start:.0f} s: {options.out}")


def networks() -> list[tuple[str, str]]:
    """(family, network), one of each family in turn, by the size that names tell (resnet18 before resnet152)."""
    import timm

    def size(name: str) -> tuple[bool, int, str]:
        words = ("large", "huge", "xl", "xxl", "_l", "giant", "base", "_m", "_b5", "_b6", "_b7", "_b8")
        number = next(iter(re.findall(r"\d+", name)), "0")
        return any(word in name for word in words), int(number), name

    columns = [[(family, n) for n in sorted(timm.list_models(module=family), key=size)] for family in FAMILIES]
    return [each for turn in itertools.zip_longest(*columns) for each in turn if each]


class Worker:
    """One process that checks networks; a new one takes over where it dies or takes too long."""

    def __init__(self, max_params: float) -> None:
        self.max_params = max_params
        self.start()

    def start(self) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs, self.max_params))
        self.process.start()
        theirs.close()

    def check(self, name: str, timeout: float) -> dict[str, Any]:
        try:
            self.pipe.send(name)
            if self.pipe.poll(timeout):
                return self.pipe.recv()
            result = f"took more than {timeout:.0f} s"
        except (EOFError, OSError):
            result = "the process died"
        self.stop()
        self.start()
        return {"result": result}

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


def serve(pipe: Connection, max_params: float) -> None:
    while True:
        name = pipe.recv()
        start = time.monotonic()
        try:
            row = check(name, max_params)
        except Exception as error:
            row = {"result": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        pipe.send({**row, "seconds": round(time.monotonic() - start, 1)})


def check(name: str, max_params: float) -> dict[str, Any]:
    """Plug one network, compare, take it out, compare."""
    import timm
    import torch

    from transcnn.plugging.plug import plug, plugged, unplug

    with torch.device("meta"):
        try:
            params = sum(p.numel() for p in timm.create_model(name).parameters())
        except Exception:  # some can't be made without numbers
            params = 0
    if params > max_params:
        return {"result": "too large"}
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    params = sum(p.numel() for p in model.parameters())
    tree = [(n, type(m)) for n, m in model.named_modules()]
    names = list(model.state_dict())
    image, before = first_that_fits(model)
    with torch.no_grad():
        plug(model)
        after = model(image)
    places = [place for place, _ in plugged(model)]
    kept = [n for n in model.state_dict() if ".hmhsa." not in n]
    model(image).sum().backward()
    scales = [branch.scale.grad for _, branch in plugged(model)]
    gradient = min(0.0 if grad is None else float(grad.abs().max()) for grad in scales)
    unplug(model)
    with torch.no_grad():
        restored = model(image)
    same_tree = tree == [(n, type(m)) for n, m in model.named_modules()] and names == kept == list(model.state_dict())
    difference, unplugged = (float((x - before).abs().max()) for x in (after, restored))
    works = difference == 0 and unplugged == 0 and same_tree and gradient > 0 and bool(before.isfinite().all())
    return {
        "params": params,
        "places": " ".join(places),
        "difference": difference,
        "unplug_difference": unplugged,
        "same_tree": same_tree,
        "gradient": f"{gradient:.1e}",
        "img_size": image.shape[-1],
        "result": "works" if works else "differs",
    }


def first_that_fits(model: Any) -> tuple[Any, Any]:
    """An image of the first size that the network takes, and its outputs."""
    import torch

    for size in SIZES:
        image = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
        with contextlib.suppress(RuntimeError, AssertionError, ValueError), torch.no_grad():
            return image, model(image)
    raise ValueError(f"takes none of {SIZES}")


if __name__ == "__main__":
    main()
