"""From a file to a prediction: images a CPU second of ``predict`` and ``eval``, and of their steps by themselves.

    python benchmarks/pipeline.py [--photos DIR] [--out results/pipeline.csv]

Two networks: nano at 64 pixels and tiny at 256, on JPEG photographs of 500x375 (made ones, or yours). One thread
computes, and what starting takes isn't counted. CPU seconds, not those on the clock: so readers that run beside the
network count, and other work on the machine changes little. All ways take turns, round by round; the median is told.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import timm
import torch
from PIL import Image

import transcnn
from transcnn.checkpoints.loading import Loaded, data_config_of
from transcnn.compare.engines import randomise
from transcnn.data.images import read_image
from transcnn.data.listing import list_images
from transcnn.export import export_model
from transcnn.fast import optimize
from transcnn.predictor.loading import load
from transcnn.predictor.network import NetworkPredictor
from transcnn.tasks.inference import get_inference

NETWORKS = {"nano, 64 px": ("transcnn_nano", 64, 256), "tiny, 256 px": ("transcnn_tiny", 256, 48)}
BATCH = 16


def make_photos(folder: Path, count: int) -> list[str]:
    """JPEG files of 500x375 with coarse and fine structure."""
    rng, files = np.random.default_rng(0), []
    for i in range(count):
        layers = [rng.integers(0, 256, (3 * n, 4 * n, 3), np.uint8) for n in (1, 8, 40)]
        total = sum(np.asarray(Image.fromarray(layer).resize((500, 375)), float) for layer in layers)
        files.append(str(folder / f"{i:04}.jpg"))
        Image.fromarray((total / len(layers)).astype(np.uint8)).save(files[-1], quality=90)
    return files


def ways(loaded: Loaded, files: list[str], folder: Path) -> dict[str, Callable[[], Any]]:
    """What is measured, each a call that goes through all files or as many inputs."""
    transform = get_inference("classify").image_transform(loaded.preprocessing)
    inputs = torch.stack([transform(read_image(file), 0) for file in files])

    def compute(model: torch.nn.Module) -> Callable[[], Any]:
        def run() -> None:
            with torch.inference_mode():
                for start in range(0, len(inputs), BATCH):
                    model(inputs[start : start + BATCH])

        return run

    def predict(**how: Any) -> Callable[[], Any]:
        predictor = NetworkPredictor.of(loaded, "cpu", how.get("precision", "32"), how["optimize"])
        return lambda: list(predictor.predict_iter(files, batch_size=BATCH))

    export_model(loaded, folder / "model.onnx")
    by_onnx = load(folder / "model.onnx")
    return {
        "predict --optimize false": predict(optimize=False),
        "predict": predict(optimize=True),
        "predict --precision bf16": predict(optimize=True, precision="bf16"),
        "predict model.onnx": lambda: list(by_onnx.predict_iter(files, batch_size=BATCH)),
        "reading and resizing alone": lambda: [transform(read_image(file), 0) for file in files],
        "the plain network alone": compute(loaded.model),
        "the optimized network alone": compute(optimize(loaded.model)),
        "the optimized network alone, bf16": compute(optimize(loaded.model, "bf16")),
    }


def measure(name: str, files: list[str], rounds: int) -> list[list[str]]:
    """A row for each way of one network: images a CPU second."""
    torch.manual_seed(0)
    model_name, side, _ = NETWORKS[name]
    model = timm.create_model(model_name, num_classes=10)
    randomise(model)
    config = {**data_config_of(model.eval(), 3), "input_size": [3, side, side]}
    loaded = Loaded(model, "classify", [str(i) for i in range(10)], config, name, {"model": model_name})
    with tempfile.TemporaryDirectory() as folder:
        runs = ways(loaded, files, Path(folder))
        times: dict[str, list[float]] = {way: [] for way in runs}
        for round_number in range(rounds + 1):
            for way, run in runs.items():
                began = time.process_time()
                run()
                if round_number:  # the first one warms up
                    times[way].append(time.process_time() - began)
    speeds = {way: len(files) / statistics.median(seconds) for way, seconds in times.items()}
    for way, speed in speeds.items():
        print(f"{name}\t{way}\t{speed:.1f}", flush=True)
    return [[name, way, str(len(files)), f"{speed:.1f}"] for way, speed in speeds.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--count", type=int, help="images, instead of 256 and 48")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--out", type=Path, default=Path("results/pipeline.csv"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.networks:
            count = options.count or NETWORKS[name][2]
            files = [str(file) for file in list_images(options.photos)][:count] if options.photos else None
            rows += measure(name, files or make_photos(Path(folder), count), options.rounds)
    head = ["network", "way", "images", "images_per_cpu_second", "processor", "versions"]
    about = [torch.cpu.get_capabilities().get("cpu_name", ""), f"torch {torch.__version__}, {transcnn.__version__}"]
    with options.out.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *([*row, *about] for row in rows)])


if __name__ == "__main__":
    main()
