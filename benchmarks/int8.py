"""Does 8-bit arithmetic pay? Accuracy and speed of one network in fp32, bf16 and int8, in one run.

    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/int8.py CIFAR10_FOLDER [--checkpoint transcnn_nano.cifar10]
        [--calibrate 256] [--batch 16] [--rounds 15] [--out results/int8.csv]

int8 is ONNX Runtime's static quantisation (weights by channel, activations by the range or the percentiles that
calibration on training images saw), written as QDQ nodes, which ONNX Runtime and OpenVINO both run. Accuracy is on all
test images. Engines take turns, batch by batch, so that other work on the machine slows all alike; times are medians,
and what counts is the ratio to the first row, a median of each round's own ratio.
"""

from __future__ import annotations

import argparse
import csv
import functools
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import transcnn
from transcnn.checkpoints.loading import load
from transcnn.export import export_model
from transcnn.export.int8 import OPERATORS, quantise, read, top1
from transcnn.plugging.cost import interleaved_seconds

Run = Callable[[np.ndarray], np.ndarray]


def onnxruntime(path: Path) -> Run:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0]


def openvino(path: Path, precision: str) -> Run:
    import openvino

    hints = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    model = openvino.Core().compile_model(str(path), "CPU", {**hints, "PERFORMANCE_HINT": "LATENCY"})
    return lambda images: model(images)[0]


def by_torch(model: Any) -> Run:
    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(images)).float().numpy()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--checkpoint", default="transcnn_nano.cifar10")
    parser.add_argument("--calibrate", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", default="results/int8.csv")
    options = parser.parse_args()
    loaded = load(options.checkpoint)
    images, labels = read(options.data, "test", loaded)
    known, _ = read(options.data, "train", loaded, options.calibrate)
    model = loaded.model
    runs: dict[str, Run] = {
        "torch optimize fp32": by_torch(transcnn.optimize(model)),
        "torch optimize bf16": by_torch(transcnn.optimize(model, dtype="bf16")),
    }
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "model.onnx"
        export_model(loaded, plain, static=images.shape[-1], tolerance=1e-4)
        runs["ONNX Runtime fp32"] = onnxruntime(plain)
        runs["OpenVINO fp32"] = openvino(plain, "f32")
        runs["OpenVINO bf16"] = openvino(plain, "bf16")
        for what, ops in (("", OPERATORS), (" of convolutions", OPERATORS[:2])):
            for method in ("MinMax", "Percentile"):
                file = Path(folder) / f"{method}{len(ops)}.onnx"
                quantise(plain, file, known, method, ops)
                runs[f"ONNX Runtime int8{what} ({method})"] = onnxruntime(file)
                runs[f"OpenVINO int8{what} ({method})"] = openvino(file, "f32")
        calls = {name: functools.partial(run, images[: options.batch]) for name, run in runs.items()}
        interleaved_seconds(calls, 3)  # warm-up
        times = interleaved_seconds(calls, options.rounds)
        first = next(iter(runs))
        rows = []
        for name, run in runs.items():
            ratios = [reference / own for reference, own in zip(times[first], times[name], strict=True)]
            rows.append(
                {
                    "engine": name,
                    "top1": f"{top1(run, images, labels):.2f}",
                    "images_per_second": f"{options.batch / statistics.median(times[name]):.0f}",
                    "times_as_fast": f"{statistics.median(ratios):.2f}",
                    "test_images": len(labels),
                    "calibrated_on": options.calibrate if "int8" in name else "",
                    "batch": options.batch,
                    "threads": torch.get_num_threads(),
                    "processor": torch.cpu.get_capabilities().get("cpu_name", ""),
                    "note": "interleaved medians, one pinned thread of a machine with other work on it",
                }
            )
            print(*rows[-1].values(), flush=True)
    with open(options.out, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
