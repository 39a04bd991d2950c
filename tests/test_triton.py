"""The Triton kernels, run by its interpreter on the CPU: ``tests/gpu`` in a process of its own.

``TRITON_INTERPRET`` must be set before Triton is imported, and would stay for other tests.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_the_triton_kernels_under_the_interpreter():
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(here / "gpu")],
        env={**os.environ, "TRITON_INTERPRET": "1", "TRANSCNN_NATIVE": "0", "OMP_NUM_THREADS": "1"},
        cwd=here.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout
    assert int(passed[1]) >= 40
