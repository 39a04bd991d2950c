"""The share of the class weights that each CamVid run takes back, chosen on its validation part, then scored on test.

    python benchmarks/weights_back.py camvid.tar runs/camvid runs/camvid-resnet18 --out results/camvid_weights_back.csv

``segment.weights_back`` of recipes/camvid.yaml was chosen for our network. So that others aren't judged by a setting
chosen for ours, this tries the same five values for each run, after training, and scores the test part once, with the
value that the run's own validation part likes best.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

from torch import Tensor

from transcnn.checkpoints.loading import load
from transcnn.tasks import get_task
from transcnn.training.evaluation import measure

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def row_of(run: Path, data: str) -> dict[str, Any]:
    """mIoU of one run: of the validation part for each share, and of the test part for the best."""
    loaded = load(run)
    args = loaded.info["task_args"]
    handicap = loaded.model.handicap
    if not isinstance(handicap, Tensor):
        raise SystemExit(f"{run} takes no class weights back (segment.weights_back)")
    whole = handicap / args["weights_back"]

    def part_of(split: str) -> Any:
        how = {"val_fraction": 0.1, "seed": 0, "strict": True}
        return get_task("segment").open_part(data, split, loaded.class_names, args, **how)

    def miou(part: Any, share: float) -> float:
        loaded.model.handicap = share * whole  # pyright: ignore
        _, scores = measure(loaded, part, batch_size=8, precision="auto")
        return round(float(scores["miou"]), 2)

    held = part_of("val")
    val = {share: miou(held, share) for share in SHARES}
    best = max(val, key=val.__getitem__)
    columns = {f"val_{share}": value for share, value in val.items()}
    return {"run": run.name, **columns, "weights_back": best, "test_miou": miou(part_of("test"), best)}


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
