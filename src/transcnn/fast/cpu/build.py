"""The library of C++ kernels: one that came with the package, or one that is compiled here and cached.

Wheels made by ``make build`` bring a library for each of :data:`VARIANTS`; where none fits, a C++ compiler is all that
is needed. A library runs with all rights of its user, so one is loaded only from a directory that belongs to the user
(a packaged one may be the system's) and that nobody else can write, and only if it has the SHA-256 that was stored
beside it when it was compiled; else it is compiled again. :mod:`.support` compares what it computes with PyTorch.

This file needs the standard library alone: the build hook of the wheel loads it, too.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

__all__ = ["compile_variants", "isa_support", "library", "rebuild"]

SOURCES = Path(__file__).parent / "src"
FLAGS = ["-O3", "-march=native", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC"]
PACKAGED = Path(__file__).parent / "lib"  # in wheels alone
_AVX512 = ["-march=x86-64-v4", "-mprefer-vector-width=512", "-mavx512vnni", "-mavx512bf16"]
# Instead of -march=native, the fastest first: flags of the compiler, and those of /proc/cpuinfo that a CPU must have.
VARIANTS = {
    "amx": ([*_AVX512, "-mamx-tile", "-mamx-bf16"], "avx512_bf16 avx512_vnni avx512dq avx512vl amx_tile amx_bf16"),
    "avx512": (_AVX512, "avx512_bf16 avx512_vnni avx512f avx512bw avx512cd avx512dq avx512vl"),
    "avx2": (["-march=x86-64-v3"], "avx2 fma bmi1 bmi2 f16c movbe abm"),
}
# A build for tests (TRANSCNN_NATIVE_DEBUG=1), which ends the process where a kernel reads or writes out of bounds.
DEBUG = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
TIME_LIMIT = 180.0  # seconds for the compiler, which takes about twenty of one core, and half as long with two
DEBUG_TIME_LIMIT = 1800.0
_log = logging.getLogger(__name__)


_rebuilt = 0  # how often in this process


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels; None where there are none and they can't be compiled, which the log explains (level INFO).

    A packaged library is taken where one fits the CPU, unless ``TRANSCNN_NATIVE=compile``. Otherwise the compiler is
    ``$CXX`` (which may have arguments: ``ccache g++``) or else g++; the library is cached in
    ``$XDG_CACHE_HOME/transcnn`` (``~/.cache/transcnn``), under a name that depends on the sources, the compiler and the
    CPU. Processes that start together compile it once. ``TRANSCNN_NATIVE=0`` switches the kernels off.
    ``TRANSCNN_NATIVE_DEBUG=1`` compiles them with the address and undefined behaviour sanitizers; the process must have
    been started with ``LD_PRELOAD=$(g++ -print-file-name=libasan.so)``.
    """
    if os.environ.get("TRANSCNN_NATIVE", "1") == "0":
        return None
    try:
        path = _packaged() or _compiled()
        # dlopen takes a library of the same name for the same, even if the file was replaced.
        return ctypes.CDLL(os.path.join(path.parent, *["."] * _rebuilt, path.name))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        _log.info("the C++ kernels can't be compiled, PyTorch's operations are used: %s", reason)
        return None


def rebuild() -> ctypes.CDLL | None:
    """Compile the library again, for what :func:`library` gave is wrong; the new one."""
    global _rebuilt
    _rebuilt += 1  # from now on no packaged one is taken
    path, _ = _target()
    with contextlib.suppress(OSError):
        _stored_hash(path).unlink()
    library.cache_clear()
    return library()


def isa_support() -> int:
    """What the library computes in on this CPU: bit 0 is fp32, bit 1 bf16, bit 2 bf16 by AMX; 0 without a library."""
    kernels = library()
    return 0 if kernels is None else int(kernels.isa_support())


def compile_variants(folder: Path) -> list[Path]:
    """Compile a library for each of :data:`VARIANTS` into a folder, for wheels; the libraries and their hashes."""
    made = []
    for name, (flags, _) in VARIANTS.items():
        path = folder / _packaged_name(name)
        _compile(path, [*_compiler(), *_variant_flags(flags)], DEBUG_TIME_LIMIT)  # nobody waits for an answer
        made += [path, _stored_hash(path)]
    return made


def _packaged() -> Path | None:
    """The packaged library for this CPU; None where there is none that may be loaded, which the log explains."""
    if _rebuilt or _is_debug() or os.environ.get("TRANSCNN_NATIVE") == "compile" or not PACKAGED.is_dir():
        return None
    features = _cpu_features()
    name = next((name for name, (_, needs) in VARIANTS.items() if set(needs.split()) <= features), None)
    path = PACKAGED / _packaged_name(name) if name else None
    if path is None or not path.exists():
        _log.info("no packaged C++ kernels are for this CPU and these sources")
        return None
    try:
        _refuse_foreign_directory(PACKAGED, system=True)
    except PermissionError as error:
        _log.warning("the packaged C++ kernels are not loaded: %s", error)
        return None
    if not _is_trusted(path, system=True):
        _log.warning(
            "the packaged C++ kernels are not loaded: %s is not what was packaged, or others can write it", path
        )
        return None
    return path


def _packaged_name(variant: str) -> str:
    """A file name that changes with what the library is compiled from."""
    content = b"".join(path.read_bytes() for path in _sources(".cpp", ".h"))
    identity = " ".join(_variant_flags(VARIANTS[variant][0])).encode()
    return f"kernels-{variant}-{hashlib.sha256(identity + content).hexdigest()[:16]}.so"


def _variant_flags(flags: list[str]) -> list[str]:
    return [*flags, *(flag for flag in FLAGS if flag != "-march=native")]


def _sources(*suffixes: str) -> list[Path]:
    return sorted(path for path in SOURCES.iterdir() if path.suffix in suffixes)


def _compiled() -> Path:
    """The path of a library that may be loaded, compiled if there is none."""
    path, command = _target()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _refuse_foreign_directory(path.parent)
    if not _is_trusted(path):
        with _locked(path.parent):
            if not _is_trusted(path):  # another process may have compiled it meanwhile
                _compile(path, command)
    return path


def _target() -> tuple[Path, list[str]]:
    """Where the library belongs, and the compiler with its flags."""
    compiler = _compiler()
    content = b"".join(path.read_bytes() for path in _sources(".cpp", ".h"))
    flags = [*FLAGS, *_debug_flags()]
    identity = "\n".join([_run([*compiler, "--version"]), _cpu(), *flags]).encode()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "transcnn"
    path = folder / f"kernels-{hashlib.sha256(identity + content).hexdigest()[:16]}.so"
    return path, [*compiler, *flags]


def _compiler() -> list[str]:
    named = os.environ.get("CXX")
    if not named:
        found = shutil.which("g++")
        if found is None:
            raise FileNotFoundError("there is no g++, and CXX names no other compiler")
        return [found]
    return [named] if shutil.which(named) else shlex.split(named)


def _refuse_foreign_directory(folder: Path, *, system: bool = False) -> None:
    found = folder.stat()
    if not _is_own(found, system):
        raise PermissionError(f"{folder} belongs to another user; XDG_CACHE_HOME can name another directory")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{folder} can be written by other users (chmod go-w would change that)")


def _is_own(found: os.stat_result, system: bool) -> bool:
    """Whether a file is this user's, or the system administrator's where ``system``."""
    return not hasattr(os, "geteuid") or found.st_uid == os.geteuid() or (system and found.st_uid == 0)


def _is_trusted(path: Path, *, system: bool = False) -> bool:
    """Whether the file is the user's, nobody else can write it, and it is what was compiled."""
    try:
        found, expected = path.lstat(), _stored_hash(path).read_text().strip()
        own = _is_own(found, system)
        private = stat.S_ISREG(found.st_mode) and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        return own and private and hashlib.sha256(path.read_bytes()).hexdigest() == expected
    except (OSError, UnicodeDecodeError):
        return False


def _stored_hash(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _compile(path: Path, compiler: list[str], limit: float | None = None) -> None:
    """Compile into a directory of its own, then move the library and its hash to their places.

    The files of :data:`SOURCES` are compiled side by side, one a CPU.
    """
    deadline = time.monotonic() + (limit or _time_limit())
    for stale in path.parent.glob("building-*"):  # of a process that was killed: this one holds the lock
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="building-", dir=path.parent) as directory:
        made = Path(directory) / path.name
        sources = sorted(_sources(".cpp"), key=lambda file: -file.stat().st_size)  # what takes longest first
        objects = [str(Path(directory) / f"{source.stem}.o") for source in sources]
        steps = zip(sources, objects, strict=True)
        _run_all([[*compiler, "-c", str(source), "-o", compiled] for source, compiled in steps], deadline)
        _run([*compiler, "-shared", *objects, "-o", str(made)], deadline)
        made.chmod(0o700)
        _stored_hash(made).write_text(hashlib.sha256(made.read_bytes()).hexdigest() + "\n")
        made.replace(path)
        _stored_hash(made).replace(_stored_hash(path))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; the lock is the directory's own, and ends with its process."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        deadline = time.monotonic() + _time_limit() + 5
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError("another process has been compiling the C++ kernels for too long") from None
                time.sleep(0.1)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(descriptor)


def _is_debug() -> bool:
    return os.environ.get("TRANSCNN_NATIVE_DEBUG", "0") != "0"


def _debug_flags() -> list[str]:
    if not _is_debug():
        return []
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):  # otherwise it would end the process
        raise RuntimeError("TRANSCNN_NATIVE_DEBUG needs LD_PRELOAD=$(g++ -print-file-name=libasan.so)")
    return DEBUG


def _time_limit() -> float:
    return DEBUG_TIME_LIMIT if _is_debug() else TIME_LIMIT


def _run_all(commands: list[list[str]], deadline: float) -> None:
    """Run commands side by side, as many at a time as there are CPUs; where one fails, all others end, too."""
    stop = threading.Event()
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(cpus) as pool:
        steps = [pool.submit(_run, command, deadline, stop) for command in commands]
        try:
            for step in as_completed(steps):
                step.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _run(command: list[str], deadline: float | None = None, stop: threading.Event | None = None) -> str:
    """What a command prints; it and what it has started are killed when the time is up or ``stop`` is set."""
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    deadline = deadline or time.monotonic() + _time_limit()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,
    )
    try:
        out, err = _output(process, deadline, stop or threading.Event())
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, out, err)
    return out


def _output(process: subprocess.Popen[str], deadline: float, stop: threading.Event) -> tuple[str, str]:
    """What a process prints until it ends."""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=0.1)
        if stop.is_set():
            raise InterruptedError("another step of the compilation failed")
        if time.monotonic() > deadline:
            raise TimeoutError("the C++ compiler timed out")


def _cpu_features() -> set[str]:
    """What Linux says of the CPU's instructions; nothing elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if platform.machine() == "x86_64" and info.exists() else []
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())


def _cpu() -> str:
    """What ``-march=native`` depends on, so that a home shared by several machines has a library for each kind."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    known = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join([platform.machine(), platform.processor(), *sorted(known)])
