"""Data that all fault tests train on, and an undisturbed run to compare with."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import BUSY, Command
from PIL import Image

ROWS: list[dict[str, Any]] = []


@pytest.fixture
def account() -> Callable[..., None]:
    """Takes down what a fault did: ``account(fault, tried, recovered, updates_lost, weights, how)``.

    Where the environment variable ``TRANSCNN_FAULTS`` names a file, as in ``make faults``, the table is written there.
    """

    def take_down(fault: str, tried: int, recovered: int, updates_lost: int | str, weights: str, how: str) -> None:
        row = {"fault": fault, "tried": tried, "recovered": recovered, "updates lost at most": updates_lost}
        ROWS.append({**row, "weights": weights, "how": how})

    return take_down


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the table, and show it on the page about faults; where ``-k`` chose some tests, the other rows stay."""
    target = os.environ.get("TRANSCNN_FAULTS")
    if not target or not ROWS:
        return
    kept: list[dict[str, Any]] = []
    if session.config.getoption("keyword") and os.path.exists(target):
        with open(target, newline="", encoding="utf-8") as file:
            kept = list(csv.DictReader(file))
    rows = sorted({row["fault"]: row for row in [*kept, *ROWS]}.values(), key=lambda row: row["fault"])
    with open(target, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(map(str, row.values())) for row in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    page = Path(__file__).resolve().parents[2] / "docs" / "faults.md"
    before, rest = page.read_text(encoding="utf-8").split("| fault |")
    page.write_text(before + table + rest[rest.index("\n\n") :], encoding="utf-8")


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory, class_image: Callable[..., Image.Image]) -> Path:
    """Two classes of 12 images each: 22 to learn from, five batches of four an epoch."""
    folder = tmp_path_factory.mktemp("images")
    for label in range(2):
        (folder / f"class_{label}").mkdir()
        for i in range(12):
            class_image(label, i).save(folder / f"class_{label}" / f"{i:03}.png")
    return folder


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """A run of four epochs that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with Command("train", images, *BUSY, "--epochs=4", "--out", folder / "run", log=folder / "log") as command:
        assert command.wait() == 0, command.text
    return folder / "run"
