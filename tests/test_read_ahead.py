"""Files are read by threads, in order, a bounded number ahead; what ends the reading ends the threads."""

from __future__ import annotations

import threading
import time
from contextlib import closing

import pytest

from transcnn.data.images import BrokenImage
from transcnn.data.loading.read_ahead import read_ahead


def test_in_order_with_errors_in_their_places():
    def read(file: str) -> int:
        time.sleep(0.002 * (int(file) % 3))
        if int(file) % 5 == 4:
            raise BrokenImage(f"no {file}")
        return int(file) ** 2

    files = [str(i) for i in range(23)]
    found = list(read_ahead(files, read, 6))
    assert [file for file, _ in found] == files
    for file, value in found:
        assert str(value) == (f"no {file}" if int(file) % 5 == 4 else str(int(file) ** 2))


def test_no_more_than_that_many_are_read_before_they_are_asked_for():
    begun = []
    with closing(read_ahead([str(i) for i in range(50)], lambda file: begun.append(file) or file, 4)) as reader:
        for asked, (file, _) in enumerate(reader):
            assert file == str(asked)
            assert len(begun) <= asked + 1 + 4
            if asked == 9:
                break
    assert len(begun) <= 14
    assert not any(thread.name.startswith("reader") for thread in threading.enumerate())


def test_other_errors_end_it():
    def read(file: str) -> str:
        raise MemoryError(file)

    with pytest.raises(MemoryError, match="a"):
        list(read_ahead(["a", "b"], read, 2))
    assert list(read_ahead([], read, 2)) == []
