"""Build hook: wheels made with TRANSCNN_WHEEL_KERNELS=1 (``make build``) bring compiled C++ kernels for x86-64 Linux.

All other wheels, and those installed from source, are for any system: there the kernels are compiled when they are
first needed.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LIBRARIES = "transcnn/fast/cpu/lib"


class KernelsHook(BuildHookInterface):
    """Compiles the kernels for each kind of CPU and puts them into the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the libraries, and the tag of the systems that they are for."""
        if version == "editable" or os.environ.get("TRANSCNN_WHEEL_KERNELS", "0") == "0":
            return
        if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
            raise RuntimeError(
                f"kernels are packaged for x86-64 Linux, this is {platform.system()} {platform.machine()}"
            )
        path = Path(self.root, "src/transcnn/fast/cpu/build.py")
        spec: Any = importlib.util.spec_from_file_location("build", path)
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        self.folder = tempfile.TemporaryDirectory()
        files = build.compile_variants(Path(self.folder.name))
        build_data["force_include"].update({str(file): f"{LIBRARIES}/{file.name}" for file in files})
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-manylinux_2_{max(map(_glibc, files))}_x86_64"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was compiled."""
        if hasattr(self, "folder"):
            self.folder.cleanup()


def _glibc(library: Path) -> int:
    """The newest GLIBC_2.x that a library asks for, at least 17."""
    return max([17, *(int(minor) for minor in re.findall(rb"GLIBC_2\.(\d+)", library.read_bytes()))])
