"""How long something may take in a test, by the CPU's clock, on whatever machine runs it."""

from __future__ import annotations

import sys
import time

LOOP = 0.03  # seconds of the loop below on the machine that limits were set on
TRACED = 3  # so many times as long takes Python that coverage watches


def allowed(seconds: float) -> float:
    """What takes ``seconds`` on the machine that limits were set on may take so long on this one, now."""
    began = time.process_time()
    sum(i for i in range(1_000_000))
    slower = (time.process_time() - began) / LOOP
    return seconds * max(1.0, slower) * (TRACED if sys.gettrace() else 1)
