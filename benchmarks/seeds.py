"""What benchmarks that train networks with several seeds share: runs that go on, their CSV, mean and spread."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from transcnn.commands.train import train
from transcnn.distributed.runtime import choose_precision

__all__ = [
    "beside",
    "best_rate",
    "mean_and_spread",
    "read_runs",
    "run_missing",
    "train_or_resume",
    "training_dtype",
    "write_rows",
]


def training_dtype() -> str:
    """The type that ``transcnn train`` computes in on this CPU: bf16 where it has instructions for it, else fp32."""
    return "bf16" if choose_precision("auto", "cpu") == "bf16-mixed" else "fp32"


def train_or_resume(folder: Path, data: str, **settings: Any) -> dict[str, Any]:
    """The metrics of a run in ``folder``: trained now, or gone on with where it was cut off."""
    started = (folder / "last.ckpt").is_file()
    place: dict[str, Any] = {"resume": str(folder)} if started else {"out": str(folder)}
    return train(data, **settings, **place, channels_last=True, quiet=True).metrics


def read_runs(path: Path, numbers: Iterable[str]) -> list[dict[str, Any]]:
    """The rows of a CSV, the columns of ``numbers`` as numbers; none if there is no such file yet."""
    if not path.is_file():
        return []
    numbers = set(numbers)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: _number(value) if key in numbers else value for key, value in row.items()} for row in rows]


def run_missing(
    path: Path,
    numbers: Iterable[str],
    keys: Iterable[dict[str, Any]],
    run: Callable[[dict[str, Any]], dict[str, Any]],
    after_each: Callable[[list[dict[str, Any]]], object] = lambda rows: None,
) -> list[dict[str, Any]]:
    """The rows of a CSV of runs, once every one of ``keys`` has its row there: those that lack one are run.

    ``numbers`` are the columns that hold numbers, ``after_each`` is told all rows after each run. The file is read anew
    each time, so that two processes with other seeds or networks may fill one.
    """
    numbers = set(numbers)
    for key in keys:
        if not any(key.items() <= row.items() for row in read_runs(path, numbers)):
            print(row := {**key, **run(key)}, flush=True)
            write_rows(path, rows := [*read_runs(path, numbers), row])
            after_each(rows)
    return read_runs(path, numbers)


def write_rows(path: Path, rows: list[dict[str, Any]], columns: list[str] | None = None) -> None:
    """A CSV of ``rows``, with the columns of the first unless told otherwise; its folder is made if need be.

    A run that ends meanwhile leaves the file that was there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns or list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    part.replace(path)


def beside(path: Path, what: str) -> Path:
    """results/attention.csv, "runs" -> results/attention_runs.csv."""
    return path.with_stem(f"{path.stem}_{what}")


def best_rate(tuning: Path, network: str, rate: str, score: str) -> float:
    """The learning rate of a network's runs in a CSV with the highest mean score, by the names of both columns."""
    rows = [row for row in read_runs(tuning, (rate, score)) if row["network"] == network]
    if not rows:
        raise SystemExit(f"{tuning} has no rate of {network}; run --tune first")
    rates = sorted({row[rate] for row in rows})
    return max(rates, key=lambda one: statistics.mean(row[score] for row in rows if row[rate] == one))


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation over the seeds, the latter 0 for one."""
    return round(statistics.mean(values), 3), round(statistics.stdev(values), 3) if len(values) > 1 else 0.0


def _number(value: str) -> int | float:
    return float(value) if "." in value or "e" in value else int(value)
