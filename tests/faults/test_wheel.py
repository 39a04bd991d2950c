"""The wheel's kernels: no compiler where they run, and the same bits as those that are compiled there."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.skipif((platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="for x86-64 Linux"),
]
RUN = """
import sys, torch, transcnn
from transcnn.fast.cpu import build, support
torch.manual_seed(0)
model, x = transcnn.create_model("transcnn_tiny").eval(), torch.randn(2, 3, 97, 131)
dtypes = ["fp32", "bf16"] if support.supports(torch.bfloat16) else ["fp32"]
with torch.no_grad():
    answers = {name: transcnn.optimize(model, name)(x) for name in dtypes}
transcnn.fast.accelerate_training(model.train())
model(x.to(memory_format=torch.channels_last)).square().mean().backward()
answers["gradients"] = torch.cat([p.grad.flatten() for p in model.parameters()])
torch.save(answers, sys.argv[1])
print(build.library()._name)
"""


def test_a_wheel_brings_kernels_for_a_machine_without_a_compiler(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, env={**os.environ, "TRANSCNN_WHEEL_KERNELS": "1"}
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert "-manylinux_2_" in wheel.name
    package = tmp_path / "package"
    zipfile.ZipFile(wheel).extractall(package)
    for path in [package, *package.rglob("*")]:
        path.chmod(0o755)
    answers = []
    for name, changes in {"packaged": {"PATH": "/nowhere"}, "compiled": {"TRANSCNN_NATIVE": "compile"}}.items():
        file, cache = tmp_path / f"{name}.pt", tmp_path / name
        environment = {**os.environ, "PYTHONPATH": str(package), "XDG_CACHE_HOME": str(cache), "CXX": "", **changes}
        done = subprocess.run([sys.executable, "-c", RUN, str(file)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        home = package if name == "packaged" else cache
        assert Path(done.stdout.strip().splitlines()[-1]).is_relative_to(home)
        answers.append(torch.load(file))
    for name, packaged in answers[0].items():
        assert torch.equal(packaged, answers[1][name]), name
