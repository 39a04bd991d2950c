"""The compiled library is loaded only if it is what was compiled, in a directory of the user's, and computes right."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from transcnn.fast import dispatch
from transcnn.fast.cpu import build, support

LIBRARY = build.library()
pytestmark = pytest.mark.skipif(LIBRARY is None or not support.supports(torch.float32), reason="needs the kernels")
STUB = """
extern "C" long isa_support() { return 3; }
#define KERNEL(NAME) extern "C" void NAME##_fp32() {} extern "C" void NAME##_bf16() {}
KERNEL(inverted_residual) KERNEL(stem) KERNEL(downsample) KERNEL(local_attention) KERNEL(global_attention)
KERNEL(grid_forward) KERNEL(grid_backward) KERNEL(global_forward) KERNEL(global_backward) KERNEL(channel_sums)
KERNEL(bn_silu) KERNEL(bn_silu_backward_sums) KERNEL(bn_backward) KERNEL(bn_silu_dwconv_forward)
KERNEL(bn_silu_dwconv_backward)
"""


def script(path: Path, *lines: str) -> str:
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)
    return str(path)


def compiler(path: Path, library: str, log: Path, *before: str) -> str:
    """A compiler that takes no time: it copies a library in place of linking, and counts that."""
    lines = ['[ "$1" = --version ] && echo 1 && exit', *before, 'case " $* " in *" -c "*) exit 0;; esac']
    lines.append(f"echo compiled >> {log}")
    return script(path, *lines, 'while [ "$1" != -o ]; do shift; done', f'cp {library} "$2"')


def forget() -> None:
    build.library.cache_clear()
    support._supports.cache_clear()


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Iterator[Path]:
    """An empty cache, and a compiler that copies the library there is; ``log`` beside it counts its calls."""
    folder = tmp_path / "cache" / "transcnn"
    monkeypatch.delenv("TRANSCNN_NATIVE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent))
    assert LIBRARY is not None
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", LIBRARY._name, tmp_path / "log"))
    forget()
    yield folder
    forget()


def compilations(cache: Path) -> int:
    log = cache.parent.parent / "log"
    return log.read_text().count("compiled") if log.exists() else 0


def works() -> bool:
    """Whether a fresh process, as it were, has kernels that compute right."""
    forget()
    return support.supports(torch.float32)


def library_of(cache: Path) -> Path:
    (path,) = cache.glob("*.so")
    return path


def test_a_library_is_compiled_once_and_private(cache):
    assert works()
    assert works()
    assert compilations(cache) == 1
    assert cache.stat().st_mode & 0o777 == 0o700
    assert library_of(cache).stat().st_mode & 0o077 == 0


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(
    damage=st.sampled_from(["truncated", "flipped", "empty", "appended", "no hash", "other hash", "text"]),
    at=st.floats(0, 1),
)
def test_a_damaged_library_is_compiled_again(damage, at, cache):
    assert works()
    path, before = library_of(cache), compilations(cache)
    content = bytearray(path.read_bytes())
    place = min(int(at * len(content)), len(content) - 1)
    path.unlink()  # the process has it mapped
    if damage == "flipped":
        content[place] ^= 1 << place % 8
    changed = {"truncated": content[:place], "empty": b"", "appended": content + b"0", "text": b"no library"}
    path.write_bytes(changed.get(damage, content))
    path.chmod(0o700)
    if damage == "no hash":
        path.with_suffix(".sha256").unlink()
    elif damage == "other hash":
        path.with_suffix(".sha256").write_bytes(b"\xff" * 64)
    assert works()
    assert compilations(cache) == before + 1


def test_a_library_that_others_can_write_or_a_link_is_compiled_again(cache, tmp_path):
    assert works()
    path = library_of(cache)
    path.chmod(0o722)
    assert works()
    assert compilations(cache) == 2
    elsewhere = tmp_path / "elsewhere.so"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    assert works()
    assert compilations(cache) == 3
    assert not path.is_symlink()


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775])
def test_a_directory_that_others_can_write_is_not_used(mode, cache, caplog):
    assert works()
    cache.chmod(mode)
    with caplog.at_level(logging.INFO, build.__name__):
        assert not works()
    assert "can be written by other users" in caplog.text
    assert not dispatch.fits_cpu(torch.zeros(1, 1, 1, 32), 32)
    cache.chmod(0o700)
    assert works()


def test_a_directory_of_somebody_else_is_not_used(cache, caplog, monkeypatch):
    assert works()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with caplog.at_level(logging.INFO, build.__name__):
        assert not works()
    assert "belongs to another user" in caplog.text


@pytest.fixture(scope="module")
def stub(tmp_path_factory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("stub")
    (folder / "stub.cpp").write_text(STUB)
    subprocess.run(["g++", "-shared", "-fPIC", "stub.cpp", "-o", "stub.so"], cwd=folder, check=True)
    return folder / "stub.so"


def place(other: Path) -> None:
    """Another library where ours belongs, with a hash that fits."""
    path, _ = build._target()
    path.parent.mkdir(mode=0o700, parents=True)
    shutil.copy(other, path)
    path.chmod(0o700)
    path.with_suffix(".sha256").write_text(build.hashlib.sha256(path.read_bytes()).hexdigest())


def test_a_library_that_computes_something_else_is_compiled_again(cache, stub, caplog):
    place(stub)
    with caplog.at_level(logging.INFO, "transcnn"):
        assert works()
    assert "was wrong; the library was compiled again" in caplog.text
    assert compilations(cache) == 1
    assert works()
    assert compilations(cache) == 1


def test_where_that_does_not_help_pytorch_serves(cache, stub, caplog, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", compiler(tmp_path / "wrong", str(stub), tmp_path / "log"))
    with caplog.at_level(logging.INFO, "transcnn"):
        assert not works()
        assert not support.supports(torch.float32)
    assert "is wrong on this CPU, PyTorch's operations are used" in caplog.text
    assert compilations(cache) == 2
    assert not dispatch.fits_cpu(torch.zeros(1, 1, 1, 32), 32)


def test_a_compiler_with_arguments(cache, monkeypatch, tmp_path):
    wrapper = script(tmp_path / "ccache", 'exec "$@"')
    monkeypatch.setenv("CXX", f"{wrapper} {os.environ['CXX']}")
    assert works()
    spaced = tmp_path / "a compiler"
    shutil.copy(tmp_path / "cxx", spaced)
    monkeypatch.setenv("CXX", str(spaced))
    assert works()


def is_running(pid: int) -> bool:
    """Whether there is such a process; one that nobody has asked how it ended is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_compiler_that_hangs_is_given_up(cache, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(build, "TIME_LIMIT", 1.0)
    other = tmp_path / "pid"
    hangs = compiler(tmp_path / "hangs", "nothing", tmp_path / "log", f"sleep 99 & echo $! > {other}; sleep 100")
    monkeypatch.setenv("CXX", hangs)
    began = time.monotonic()
    with caplog.at_level(logging.INFO, build.__name__):
        assert not works()
    assert time.monotonic() - began < 20
    assert "timed out" in caplog.text
    while is_running(int(other.read_text())):  # what it had started is ended, too
        assert time.monotonic() - began < 20
        time.sleep(0.05)
    assert not list(cache.glob("building-*"))


def test_where_one_file_cant_be_compiled_the_others_are_given_up(cache, monkeypatch, tmp_path, caplog):
    other = tmp_path / "pid"
    fails = (
        'case "$*" in *isa.cpp*) while [ ! -s {0} ]; do sleep 0.02; done; echo no such instruction >&2; exit 1;; esac'
    )
    hangs = [fails.format(other), f"sleep 99 & echo $! > {other}; sleep 100"]
    monkeypatch.setenv("CXX", compiler(tmp_path / "fails", "nothing", tmp_path / "log", *hangs))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(99))
    began = time.monotonic()
    with caplog.at_level(logging.INFO, build.__name__):
        assert not works()
    assert "no such instruction" in caplog.text
    while is_running(int(other.read_text())):
        assert time.monotonic() - began < 20
        time.sleep(0.05)
    assert not list(cache.glob("building-*"))


def test_who_waits_for_a_compiler_that_hangs_gives_up_too(cache, monkeypatch, caplog):
    monkeypatch.setattr(build, "TIME_LIMIT", -4.5)  # and five seconds more
    cache.mkdir(mode=0o700, parents=True)
    program = f"import fcntl, os; fcntl.flock(os.open({str(cache)!r}, os.O_RDONLY), fcntl.LOCK_EX); print(); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-uc", program], **pipes) as holder:
        assert holder.stdout.readline() == "\n"
        monkeypatch.setattr(build, "_run", lambda command: "")
        with caplog.at_level(logging.INFO, build.__name__):
            assert not works()
        holder.stdin.write("\n")
    assert "another process has been compiling" in caplog.text


def test_what_a_killed_compilation_left_is_removed(cache):
    (cache / "building-old").mkdir(parents=True)
    cache.chmod(0o700)
    (cache / "building-old" / "kernels.so").touch()
    assert works()
    assert not list(cache.glob("building-*"))


# --- packaged libraries ----------------------------------------------------------------------------------------------


@pytest.fixture
def packaged(cache, monkeypatch, tmp_path) -> Path:
    """A folder as wheels bring it, with the library there is under the name for this CPU; the path of that file."""
    folder = tmp_path / "lib"
    folder.mkdir(mode=0o755)
    monkeypatch.setattr(build, "PACKAGED", folder)
    monkeypatch.setattr(build, "_cpu_features", lambda: set(build.VARIANTS["avx2"][1].split()))
    monkeypatch.setattr(build, "_rebuilt", 0)
    path = folder / build._packaged_name("avx2")
    assert LIBRARY is not None
    shutil.copyfile(LIBRARY._name, path)
    path.chmod(0o755)
    path.with_suffix(".sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest() + "\n")
    return path


def loaded() -> Path:
    assert works()
    library = build.library()
    assert library is not None
    return Path(library._name)


def test_a_packaged_library_needs_no_compiler(packaged, cache, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    assert loaded() == packaged
    assert not cache.exists()


def test_compiling_can_be_asked_for(packaged, cache, monkeypatch):
    monkeypatch.setenv("TRANSCNN_NATIVE", "compile")
    assert loaded().parent == cache
    assert compilations(cache) == 1


@pytest.mark.parametrize("wrong", ["content", "no hash", "file mode", "folder mode", "link"])
def test_a_packaged_library_that_cant_be_trusted_is_not_loaded(wrong, packaged, cache, caplog):
    if wrong == "content":
        packaged.write_bytes(packaged.read_bytes() + b"0")
    elif wrong == "no hash":
        packaged.with_suffix(".sha256").unlink()
    elif wrong == "file mode":
        packaged.chmod(0o757)
    elif wrong == "folder mode":
        packaged.parent.chmod(0o777)
    else:
        packaged.rename(packaged.with_name("elsewhere"))
        packaged.symlink_to(packaged.with_name("elsewhere"))
    with caplog.at_level(logging.WARNING):
        assert loaded().parent == cache
    assert "the packaged C++ kernels are not loaded" in caplog.text


def test_a_packaged_library_of_another_user_is_not_loaded_but_the_systems_is(packaged, cache, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    owner = packaged.stat().st_uid
    assert (build._packaged() == packaged) is (owner == 0)
    monkeypatch.setattr(build, "_is_own", lambda found, system: False)
    assert build._packaged() is None


@pytest.mark.parametrize("why", ["another CPU", "other sources"])
def test_a_packaged_library_for_something_else_is_not_loaded(why, packaged, cache, monkeypatch, tmp_path):
    if why == "another CPU":
        monkeypatch.setattr(build, "_cpu_features", lambda: {"sse4_2", "avx"})
    else:
        sources = tmp_path / "sources"
        shutil.copytree(build.SOURCES, sources)
        (sources / "further.h").write_text("// a file more\n")
        monkeypatch.setattr(build, "SOURCES", sources)
    assert loaded().parent == cache


def test_a_packaged_library_that_computes_wrong_is_replaced_by_a_compiled_one(packaged, cache, tmp_path):
    source, stub = tmp_path / "stub.cpp", packaged
    source.write_text(STUB)
    packaged.unlink()
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(stub)], check=True)
    stub.chmod(0o755)
    stub.with_suffix(".sha256").write_text(hashlib.sha256(stub.read_bytes()).hexdigest())
    assert loaded().parent == cache


@pytest.mark.parametrize(
    ("features", "variant"),
    [
        ("amx", "amx"),
        ("avx512", "avx512"),
        ("avx2", "avx2"),
    ],
)
def test_the_fastest_variant_that_a_cpu_can_run_is_taken(features, variant, packaged, monkeypatch):
    known = set(build.VARIANTS["avx2"][1].split()) | set(build.VARIANTS[features][1].split())
    known |= set(build.VARIANTS["avx512"][1].split()) if features == "amx" else set()
    monkeypatch.setattr(build, "_cpu_features", lambda: known)
    for name in build.VARIANTS:
        path = packaged.with_name(build._packaged_name(name))
        if path != packaged:
            shutil.copyfile(packaged, path)
            shutil.copyfile(packaged.with_suffix(".sha256"), path.with_suffix(".sha256"))
    assert build._packaged() == packaged.with_name(build._packaged_name(variant))


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a compiler")
@pytest.mark.parametrize("march", ["x86-64", pytest.param("x86-64-v3", marks=pytest.mark.slow)])
def test_kernels_for_any_sizes_as_compiled_for_shorter_vectors(march):
    """Maps whose channels fill no vector: sizes that are right with 16 lanes wrote elsewhere with 8 and with 4."""
    if "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU can't run what is compiled for it")
    files = [f"tests/{name}.py" for name in ("test_chains", "test_training_norms")]
    child = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *files]
    env = {**os.environ, "KERNELS_FOR": march, "TRANSCNN_NATIVE": "compile"}
    env = {name: value for name, value in env.items() if not name.startswith(("PYTEST", "COV"))}
    done = subprocess.run(child, cwd=Path(__file__).resolve().parent.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
