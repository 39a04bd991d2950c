"""What exported files answer and how fast: a row for each network, format and shape of images.

    python benchmarks/exports.py PHOTO [PHOTO ...] [--models transcnn_nano.cifar10 transcnn_tiny] [--out FILE.csv]

Differences are the largest over all outputs, relative to the largest output; milliseconds are for one image, the median
of five. Names without a tag get fresh weights with which every layer matters.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import tempfile
from pathlib import Path

import torch

from transcnn.engines import build
from transcnn.export import FORMATS, export_model
from transcnn.runs import Loaded, data_config_of, load


def network(name: str) -> Loaded:
    """Packaged weights by a name with a tag, else a fresh network for 1,000 classes."""
    if "." in name:
        return load(name)
    model = build(name, 256)
    config = data_config_of(model, 3)
    return Loaded(model, "classify", [str(i) for i in range(1000)], config, name, {"model": name})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="+")
    parser.add_argument("--models", nargs="+", default=["transcnn_nano.cifar10", "transcnn_tiny"])
    parser.add_argument("--out", default="results/exports.csv")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            loaded = network(name)
            for format, kind in FORMATS.items():
                file = Path(folder) / f"model{kind.suffix}"
                result = export_model(loaded, file, format=format, images=options.photos, tolerance=1e-4)
                size = sum(part.stat().st_size for part in (file, file.with_suffix(".bin")) if part.exists())
                for row in result.rows:
                    values = {key: f"{value:.3g}" for key, value in dataclasses.asdict(row).items()}
                    rows.append(
                        {"model": name, "task": loaded.task, "format": format, **values, "mb": f"{size / 1e6:.1f}"}
                    )
                    print(*rows[-1].values())
    for row in rows:
        row["threads"] = torch.get_num_threads()
        row["processor"] = torch.cpu.get_capabilities().get("cpu_name", "")
    with open(options.out, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
