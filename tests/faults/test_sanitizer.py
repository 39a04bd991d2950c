"""The C++ kernels with address and undefined behaviour sanitizer: no read and no write beyond what they were given.

The sanitizer's library has to be there before anything else, so the kernels' own tests run in a process of their own::

    export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
    TRANSCNN_NATIVE_DEBUG=1 ASAN_OPTIONS=detect_leaks=0 python -m pytest tests/test_cpu_inference.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
TESTS = [
    f"tests/test_{name}.py"
    for name in ("cpu_inference", "cpu_passes", "chains", "cpu_training", "training_norms", "fast")
]
# A kernel told that a map has one row more than it has.
OVERRUN = """
import torch
from transcnn.fast.cpu import call as cpu
cpu.check = lambda *arguments: None
x, sums = torch.zeros(1, 4, 4, 16), torch.zeros(1, 2, 16, dtype=torch.double)
cpu.call("channel_sums", x.dtype, ("x", x, x.dtype, ()), ("sums", sums, sums.dtype, ()), 20, 16, threads=1)
"""


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    names = [["g++", f"-print-file-name={name}.so"] for name in ("libasan", "libstdc++")]
    paths = [subprocess.run(name, capture_output=True, text=True, check=True).stdout.strip() for name in names]
    if not all(map(os.path.isabs, paths)):
        pytest.skip("g++ has no address sanitizer")
    options = {"LD_PRELOAD": " ".join(paths), "TRANSCNN_NATIVE_DEBUG": "1", "ASAN_OPTIONS": "detect_leaks=0"}
    return {**os.environ, **options}


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3000
    )


@pytest.mark.slow  # half a minute of compiling
def test_the_sanitizer_sees_an_overrun(environment):
    result = run(environment, "-c", OVERRUN)
    assert result.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in result.stderr


@pytest.mark.slow
def test_the_kernels_stay_within_what_is_theirs(environment):
    result = run(
        environment,
        "-m",
        "pytest",
        "-x",
        *TESTS,
        "-k",
        "not compile and not library and not cpus and not without_memory",
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert " passed" in result.stdout
