"""Bad data from end to end: a training on it loses the bad files, says which, and nothing else."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest

from transcnn.commands.train import train
from transcnn.errors import UserError
from transcnn.settings import Augment

QUICK = dict(model="transcnn_test", img_size=32, epochs=1, precision="32", accelerator="cpu", val_fraction=0.2)


@pytest.mark.parametrize(("policy", "batch_size"), [("imagenet", 64), ("small", 8)])
def test_a_training_on_bad_data_loses_the_bad_files_only(oddities, tmp_path, policy, batch_size):
    root, bad = oddities
    run = tmp_path / "run"
    options = dict(batch_size=batch_size, num_workers=0, quiet=True)
    result = train(str(root), out=str(run), augment=Augment(policy=policy), **options, **QUICK)  # pyright: ignore
    with (run / "skipped.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    assert {name for name, _ in rows} == bad
    assert all(reason and "\n" not in reason for _, reason in rows)
    assert result.metrics["skipped"] == len(bad)
    report = (run / "report" / "index.html").read_text(encoding="utf-8")
    assert all(Path(name).name in report for name in bad)
    assert "no permission" in str(rows) or not os.geteuid()
    assert (run / "best.safetensors").is_file()


def test_classes_that_no_weights_can_be_of_are_refused_before_training(class_folder, tmp_path):
    """Their names would be refused where the weights are read, after all the work."""
    files = sorted(class_folder.rglob("*.png"))
    with (tmp_path / "table.csv").open("w", newline="") as file:
        rows = [[path, ("x" * 1001 if i % 2 else "y")] for i, path in enumerate(files)]
        csv.writer(file).writerows([["file", "label"], *rows])
    with pytest.raises(UserError, match=r"can't be learnt: class_names may be .* of 1,000 characters"):
        train(str(tmp_path / "table.csv"), out=str(tmp_path / "run"), num_workers=0, quiet=True, **QUICK)  # pyright: ignore
    assert not (tmp_path / "run").exists()
