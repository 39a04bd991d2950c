"""Tests of attacks run sealed: what they must not do is an error or is noticed."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
from safetensors.numpy import save

from transcnn.plugging.build import build_model


@pytest.fixture
def sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No socket is connected, no process started, nothing written but in ``inside``; a folder with a secret lies by."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"tried with {args}")

    build_model("transcnn_test")  # what is imported when first needed is imported now
    timm.create_model("test_vit")
    (tmp_path / "secret.pth").write_bytes(save({"x": np.zeros(1, np.float32)}))
    for name in ("inside", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    for name in ("HOME", "TORCH_HOME", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    for owner, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo")):
        monkeypatch.setattr(owner, name, refuse)
    for owner, name in ((subprocess, "Popen"), (os, "system"), (os, "fork"), (os, "posix_spawn")):
        monkeypatch.setattr(owner, name, refuse)
    yield tmp_path
    outside = {path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "inside")}
    assert outside == {tmp_path / "home", tmp_path / "secret.pth"}, "written outside"
