"""Compiles the C++ kernels, once for each kind of CPU, and caches the library; needs nothing but a C++ compiler."""

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

SOURCES = Path(__file__).parent / "src"
FLAGS = ["-O3", "-march=native", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared"]
# A build for tests (TRANSCNN_NATIVE_DEBUG=1), which ends the process where a kernel reads or writes out of bounds.
DEBUG = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
TIME_LIMIT = 300  # seconds for the compiler
_log = logging.getLogger(__name__)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels; None where they can't be compiled, which the log explains (level INFO).

    The compiler is ``$CXX`` or else g++; the library is cached in ``$XDG_CACHE_HOME/transcnn`` (``~/.cache/transcnn``),
    under a name that depends on the sources, the compiler and the CPU. ``TRANSCNN_NATIVE=0`` switches the kernels off.
    ``TRANSCNN_NATIVE_DEBUG=1`` compiles them with the address and undefined behaviour sanitizers; the process must have
    been started with ``LD_PRELOAD=$(g++ -print-file-name=libasan.so)``.
    """
    if os.environ.get("TRANSCNN_NATIVE", "1") == "0":
        return None
    try:
        return ctypes.CDLL(str(_compiled()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        _log.info("the C++ kernels can't be compiled, PyTorch's operations are used: %s", reason)
        return None


@functools.cache
def supports(dtype: torch.dtype) -> bool:
    """Whether the kernels are there and compute in ``dtype``."""
    kernels = library()
    isa = 0 if kernels is None else kernels.isa_support()
    return bool(isa & {torch.float32: 1, torch.bfloat16: 2}.get(dtype, 0))


def _compiled() -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        raise FileNotFoundError("there is no g++, and CXX names no other compiler")
    sources = sorted(path for path in SOURCES.iterdir() if path.suffix in (".cpp", ".h"))
    version = _run([compiler, "--version"])
    content = b"".join(path.read_bytes() for path in sources)
    flags = [*FLAGS, *_debug_flags()]
    identity = "\n".join([version, _cpu(), *flags]).encode()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "transcnn"
    path = folder / f"kernels-{hashlib.sha256(identity + content).hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as directory:  # another process may compile it, too
            made = Path(directory) / path.name
            files = [str(source) for source in sources if source.suffix == ".cpp"]
            command = [compiler, *flags, *files, "-o", str(made)]
            _run(command)
            made.replace(path)
    return path


def _debug_flags() -> list[str]:
    if os.environ.get("TRANSCNN_NATIVE_DEBUG", "0") == "0":
        return []
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):  # otherwise it would end the process
        raise RuntimeError("TRANSCNN_NATIVE_DEBUG needs LD_PRELOAD=$(g++ -print-file-name=libasan.so)")
    return DEBUG


def _run(command: list[str]) -> str:
    return subprocess.run(
        command, check=True, capture_output=True, text=True, errors="replace", timeout=TIME_LIMIT
    ).stdout


def _cpu() -> str:
    """What ``-march=native`` depends on, so that a home shared by several machines has a library for each kind."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    known = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join([platform.machine(), platform.processor(), *sorted(known)])
