"""From 1,000 photographs to predictions: reading alone, computing alone, and ``predict``, which does both at once.

    python benchmarks/pipeline.py [--photos DIR] [--count 1000] [--rounds 2] [--out results/pipeline.csv]

Two networks, nano at 64 pixels and tiny at 256, on JPEG photographs of 500x375 (generated, or yours), on all cores, by
the code and in the environment of ``transcnn predict``: in fp32, in bf16 where the CPU has it, by an exported file, and
by the plain network (a tenth of the photographs). What starting takes isn't counted. For each way the time on the clock
and CPU seconds, of all threads, the medians of the rounds, in which all ways take turns.

``over_larger`` is predict's time over the larger of reading and computing, each of which has all cores when alone.
Where both keep all cores busy it can't be less than ``bound``, their sum over the larger. ``over_work`` is its CPU
seconds over those of reading and computing: what doing both at once costs, on a busy machine, too. Some four minutes on
two quiet cores.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transcnn.cli import ENVIRONMENT

os.environ.update({**ENVIRONMENT, **os.environ})  # before torch is imported, as the command does

import numpy as np
import timm
import torch
from PIL import Image

import transcnn
from transcnn.checkpoints.loading import Loaded, data_config_of
from transcnn.compare.engines import randomise
from transcnn.data.images import read_image
from transcnn.data.listing import list_images
from transcnn.data.loading.read_ahead import read_ahead
from transcnn.export import export_model
from transcnn.predictor.base import Predictor
from transcnn.predictor.loading import load
from transcnn.predictor.network import NetworkPredictor

NETWORKS = {"nano, 64 px": ("transcnn_nano", 64), "tiny, 256 px": ("transcnn_tiny", 256)}
BATCH = 32  # as for predict
DISTINCT = 50  # generated photographs; the others are copies
HEAD = ("network", "way", "images", "cores", "read_s", "compute_s", "predict_s", "read_cpu_s", "compute_cpu_s",
        "predict_cpu_s", "images_per_s", "images_per_cpu_s", "over_larger", "bound", "over_work")  # fmt: skip


@dataclass
class Way:
    """One way to predictions, and the images that it is measured on.

    Attributes:
        steps: ``read``, ``compute`` and ``predict``, each a call that goes through all images.
        times: Of each step (seconds, CPU seconds) of each round.
    """

    images: int
    steps: dict[str, Callable[[], Any]]
    times: dict[str, list[tuple[float, float]]]


def make_photos(folder: Path, count: int) -> list[str]:
    """JPEG files of 500x375 with coarse and fine structure, some 67 kB each."""
    rng, files = np.random.default_rng(0), []
    for i in range(count):
        files.append(folder / f"{i:04}.jpg")
        if i >= DISTINCT:
            files[-1].write_bytes(files[i % DISTINCT].read_bytes())
            continue
        layers = [rng.integers(0, 256, (3 * n, 4 * n, 3), np.uint8) for n in (1, 8, 40)]
        mean = np.mean([np.asarray(Image.fromarray(layer).resize((500, 375)), float) for layer in layers], 0)
        Image.fromarray(mean.astype(np.uint8)).save(files[-1], quality=90)
    return [str(file) for file in files]


def way_of(predictor: Predictor, files: list[str]) -> Way:
    """What predict does, and its two halves alone; the inputs for computing are the first ones, over and over."""
    make_input, predict_inputs = predictor._steps(5)
    inputs = [make_input(read_image(file)) for file in files[:BATCH]]

    def read() -> None:
        with closing(read_ahead(files, lambda file: make_input(read_image(file)), 2 * BATCH)) as found:
            deque(found, maxlen=0)

    def compute() -> None:
        for start in range(0, len(files), BATCH):
            predict_inputs(inputs[: len(files) - start])

    def both() -> None:
        deque(predictor.predict_iter(files, batch_size=BATCH), maxlen=0)

    return Way(len(files), {"read": read, "compute": compute, "predict": both}, {})


def ways(name: str, files: list[str], folder: Path) -> dict[str, Way]:
    """All ways of one network."""
    torch.manual_seed(0)
    model_name, side = NETWORKS[name]
    model = timm.create_model(model_name, num_classes=10)
    randomise(model)
    config = {**data_config_of(model.eval(), 3), "input_size": [3, side, side]}
    loaded = Loaded(model, "classify", [str(i) for i in range(10)], config, name, {"model": model_name})
    export_model(loaded, folder / f"{model_name}.onnx")
    of = partial(NetworkPredictor.of, loaded, "cpu")
    found = {
        "predict --optimize false": way_of(of("32", False), files[: max(BATCH, len(files) // 10)]),
        "predict": way_of(of("32", True), files),
        "predict model.onnx": way_of(load(folder / f"{model_name}.onnx"), files),
    }
    if torch.cpu.get_capabilities().get("avx512_bf16"):
        found["predict --precision bf16"] = way_of(of("bf16", True), files)
    return found


def measure(found: dict[str, Way], rounds: int) -> None:
    """Time all steps of all ways in turns, after each has run on a batch or more."""
    for way in found.values():
        way.steps["compute"]()
    for _ in range(rounds):
        for way in found.values():
            for step, run in way.steps.items():
                began, used = time.perf_counter(), time.process_time()
                run()
                spent = time.perf_counter() - began, time.process_time() - used
                way.times.setdefault(step, []).append(spent)


def row_of(name: str, title: str, way: Way) -> list[str]:
    """A line of the table, as ``HEAD`` says."""
    wall, cpu = ({step: statistics.median(t[i] for t in times) for step, times in way.times.items()} for i in (0, 1))
    larger = max(wall["read"], wall["compute"])
    ratios = wall["predict"] / larger, (wall["read"] + wall["compute"]) / larger
    work = cpu["predict"] / (cpu["read"] + cpu["compute"])
    seconds = [f"{values[step]:.4f}" for values in (wall, cpu) for step in ("read", "compute", "predict")]
    speeds = [f"{way.images / values['predict']:.1f}" for values in (wall, cpu)]
    return [
        name,
        title,
        str(way.images),
        str(os.cpu_count()),
        *seconds,
        *speeds,
        *(f"{r:.2f}" for r in (*ratios, work)),
    ]


def markdown(row: dict[str, str]) -> str:
    """A line as docs/speed.md has it: images a CPU second of reading, computing, predict; the ratios."""
    speeds = (int(row["images"]) / float(row[f"{step}_cpu_s"]) for step in ("read", "compute", "predict"))
    cells = [*(f"{speed:.0f}" if speed >= 100 else f"{speed:.1f}" for speed in speeds), row["over_work"]]
    return f"| {row['network']}: `{row['way']}` | {' | '.join(cells)} | {row['over_larger']} ({row['bound']}) |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="a folder of JPEG photographs instead of generated ones")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--out", type=Path, default=Path("results/pipeline.csv"))
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = [*map(str, list_images(options.photos))][: options.count] if options.photos else None
        files = files or make_photos(folder, options.count)
        for network in options.networks:
            found = ways(network, files, folder)
            measure(found, options.rounds)
            rows += [row_of(network, title, way) for title, way in found.items()]
    about = [torch.cpu.get_capabilities().get("cpu_name", ""), f"torch {torch.__version__}, {transcnn.__version__}"]
    with options.out.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([[*HEAD, "processor", "versions"], *([*row, *about] for row in rows)])
    for row in rows:
        print(markdown(dict(zip(HEAD, row, strict=True))), flush=True)


if __name__ == "__main__":
    main()
