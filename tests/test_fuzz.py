"""What the fuzzer (fuzz.py) found once is read again, and a few new files of each kind."""

from __future__ import annotations

import random

import pytest

import fuzz

KEPT = sorted(path for path in fuzz.CORPUS.glob("*/*") if path.is_file())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", KEPT, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_failed_once_is_read_or_refused(path):
    assert not fuzz.attempt(path.parent.name, path.read_bytes())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["image", "ids", "tar", "manifest", "coco", "voc", "yolo", "vectors", "classes", "weights", "csv", "jsonl"]
)
def test_changed_files_are_read_or_refused(name):
    draw = random.Random(7)
    seeds = fuzz.TARGETS[name][1]()
    for content in seeds:
        assert not fuzz.attempt(name, content)
    for _ in range(12 * fuzz.CASES // 1000):
        content = fuzz.change(name, draw.choice(seeds), draw)
        problem = fuzz.attempt(name, content)
        assert not problem, f"{content[:300]!r}: {problem}"


def test_the_corpus_is_small():
    assert sum(path.stat().st_size for path in KEPT) < 200_000
