"""Compiles the kernels once for each processor and keeps them; nothing else is needed than a C++ compiler."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

__all__ = ["library", "supports"]

SOURCES = Path(__file__).parent
FLAGS = ["-O3", "-march=native", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared"]
# A build for tests (TRANSCNN_NATIVE_DEBUG=1) that ends the process where a kernel reads or writes what isn't its own.
DEBUG = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
_log = logging.getLogger(__name__)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels; None where they can't be had, which the log explains (level INFO).

    The compiler is ``$CXX`` or else g++; what it makes is kept in ``$XDG_CACHE_HOME/transcnn`` (``~/.cache/transcnn``),
    under a name that depends on these sources, the compiler and the processor. ``TRANSCNN_NATIVE=0`` forbids all of it.
    ``TRANSCNN_NATIVE_DEBUG=1`` has address and undefined behaviour sanitizer compiled in, in a process that was started
    with the former's library preloaded (``LD_PRELOAD=$(g++ -print-file-name=libasan.so)``).
    """
    if os.environ.get("TRANSCNN_NATIVE", "1") == "0":
        return None
    try:
        return ctypes.CDLL(str(_compiled()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        _log.info("kernels for this processor can't be had, PyTorch's own are used: %s", reason)
        return None


@functools.cache
def supports(dtype: torch.dtype) -> bool:
    """Whether the kernels are there, and compute in ``dtype``."""
    kernels = library()
    kinds = 0 if kernels is None else kernels.kinds()
    return bool(kinds & {torch.float32: 1, torch.bfloat16: 2}.get(dtype, 0))


def _compiled() -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        raise FileNotFoundError("there is no g++, and CXX names no other compiler")
    sources = sorted(path for path in SOURCES.iterdir() if path.suffix in (".cpp", ".h"))
    version = _run([compiler, "--version"])
    content = b"".join(path.read_bytes() for path in sources)
    flags = [*FLAGS, *_debug_flags()]
    known = "\n".join([version, _processor(), *flags]).encode()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "transcnn"
    path = folder / f"kernels-{hashlib.sha256(known + content).hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as workshop:  # another process may be making it, too
            made = Path(workshop) / path.name
            files = [str(source) for source in sources if source.suffix == ".cpp"]
            command = [compiler, *flags, *files, "-o", str(made)]
            _run(command)
            made.replace(path)
    return path


def _debug_flags() -> list[str]:
    if os.environ.get("TRANSCNN_NATIVE_DEBUG", "0") == "0":
        return []
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):  # the sanitizer would end the process
        raise RuntimeError("TRANSCNN_NATIVE_DEBUG needs LD_PRELOAD=$(g++ -print-file-name=libasan.so)")
    return DEBUG


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=300).stdout


def _processor() -> str:
    """What the compiler's code depends on, so that a home on several machines keeps a library for each kind."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    kinds = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join([platform.machine(), platform.processor(), *sorted(kinds)])
