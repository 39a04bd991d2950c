"""What an attack must end in."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from timing import allowed
from transcnn.errors import UserError


def refused(action: Callable[[], object], match: str = ".", *, seconds: float = 1.0) -> str:
    """``action`` must end in one line for the user, soon (by the CPU's clock: machines are shared)."""
    began = time.process_time()
    with pytest.raises(UserError, match=match) as caught:
        action()
    assert time.process_time() - began < allowed(seconds)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 1000
    return text
