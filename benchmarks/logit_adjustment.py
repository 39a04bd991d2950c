"""The strength of the logit adjustment of each CamVid run, chosen on its validation split, then scored on test.

    python benchmarks/logit_adjustment.py DATA RUN RUN ... --out results/camvid_logit_adjustment.csv

``segment.logit_adjustment`` of recipes/camvid.yaml was chosen for our network. So that others aren't evaluated with a
setting chosen for ours, this tries the same five values for each run, after training, and scores the test split once,
with the value that is best on the run's own validation split.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

from torch import Tensor

from transcnn.checkpoints.loading import load
from transcnn.plain import with_new_names
from transcnn.tasks import get_task
from transcnn.training.evaluation import measure

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def row_of(run: Path, data: str) -> dict[str, Any]:
    """mIoU of one run: of the validation split for each strength, and of the test split for the best."""
    loaded = load(run)
    args = loaded.info["task_args"]
    logit_adjustment = loaded.model.logit_adjustment
    if not isinstance(logit_adjustment, Tensor):
        raise SystemExit(f"{run} has no segment.logit_adjustment")
    whole = logit_adjustment / with_new_names(args)["logit_adjustment"]

    def open_split(split: str) -> Any:
        how = {"val_fraction": 0.1, "seed": 0, "strict": True}
        return get_task("segment").open_split(data, split, loaded.class_names, args, **how)

    def miou(split: Any, strength: float) -> float:
        loaded.model.logit_adjustment = strength * whole  # pyright: ignore
        _, scores, _ = measure(loaded, split, batch_size=8, precision="auto")
        return round(float(scores["miou"]), 2)

    held = open_split("val")
    val = {strength: miou(held, strength) for strength in STRENGTHS}
    best = max(val, key=val.__getitem__)
    columns = {f"val_{strength}": value for strength, value in val.items()}
    return {"run": run.name, **columns, "logit_adjustment": best, "test_miou": miou(open_split("test"), best)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = []
    for run in options.runs:
        rows.append(row_of(run, options.data))
        print(rows[-1], flush=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
