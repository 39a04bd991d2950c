"""The page about faults shows the table that ``make faults`` wrote."""

from __future__ import annotations

import csv


def test_the_page_shows_the_table(root):
    with (root / "results" / "faults.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    page = (root / "docs" / "faults.md").read_text(encoding="utf-8")
    assert "\n".join(f"| {' | '.join(row)} |" for row in rows[1:]) in page
