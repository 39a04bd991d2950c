"""The scripts in examples/ run from nothing, each in a process of its own, in less than a minute of one core."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parent.parent / "examples").glob("*.py"))
SAYS = {
    "01_train_your_own_images": r"9\d\.\d % of the test images|100\.0 % of the test images",
    "02_plug_into_a_cnn": r"largest change of an answer: 0\.0\n",
    "04_sound": r"\d\.\d % of 80 new sounds\nlargest difference by padding: \d\.\de-0[5-9]\n",
    "05_volumes": r"\d\.\d % of 60 new volumes\nlargest difference when optimized: \d\.\de-0[5-9]\n",
    "03_see_where_it_looks_and_export": r"largest difference: \d\.\d+e-0[6-9]|largest difference: 0\.0\n",
}


@pytest.mark.slow
@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_an_example_runs_and_says_what_it_should(script: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    before = os.times()
    began = time.monotonic()
    command = [sys.executable, str(script)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    after = os.times()
    assert done.returncode == 0, done.stderr
    assert re.search(SAYS[script.stem], done.stdout), done.stdout
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    assert min(seconds, time.monotonic() - began) < 60


def test_examples_are_scripts_in_cells() -> None:
    """jupytext's percent format: each opens as a notebook, with words before code, and each is tested."""
    assert [script.stem for script in EXAMPLES] == sorted(SAYS)
    for script in EXAMPLES:
        text = script.read_text(encoding="utf-8")
        assert "format_name: percent" in text
        cells = re.split(r"^# %%", text, flags=re.MULTILINE)[1:]
        assert cells[0].startswith(" [markdown]\n# # ")
        assert len(cells) >= 6
        compile(text, script.name, "exec")
