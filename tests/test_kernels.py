"""The GPU kernel, run by Triton's interpreter on the processor, equals the plain grid attention and its gradients."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

# In a process of its own: TRITON_INTERPRET must be set before triton is imported, and would stay for other tests.
CHECK = """
import json, sys, torch
from transcnn.attention import grid_attention as plain
from transcnn.kernels.grid_triton import grid_attention as fused
torch.set_num_threads(1)
out = []
for batch, height, width, heads, head_dim, size, dtype in json.load(sys.stdin):
    torch.manual_seed(0)
    dtype = getattr(torch, dtype)
    qkv = torch.randn(batch, height, width, 3 * heads * head_dim).to(dtype)
    exact = qkv.double().requires_grad_()
    expected = plain(exact.permute(0, 3, 1, 2), head_dim, size).permute(0, 2, 3, 1)
    up = torch.randn(expected.shape).to(dtype)
    expected.backward(up.double())
    ours = qkv.clone().requires_grad_()
    got = fused(ours, head_dim, size)
    got.backward(up)
    error = lambda a, b: float((a.detach().double() - b).norm() / b.norm())
    out.append([error(got, expected.detach()), error(ours.grad, exact.grad)])

# A whole network, optimized and in training, goes through the kernel.
import timm, transcnn
from transcnn.compare import engines
from transcnn.fast import accelerate_training, optimize
from transcnn.kernels import grid_triton
launches, launch = [], grid_triton._launch
grid_triton._launch = lambda kernel, *args, **kwargs: (launches.append(1), launch(kernel, *args, **kwargs))
model = timm.create_model("transcnn_test", dims=(16, 16, 16, 32), head_dim=16, grid_sizes=(4, 4, None, None))
engines.enliven(model)
model.eval()
x = torch.randn(1, 3, 41, 36)
with torch.no_grad():
    expected = model(x).double()
    out.append([error(optimize(model)(x), expected), len(launches) - 2])
expected = torch.autograd.grad(model(x).square().sum(), list(p for p in model.parameters() if p.requires_grad))
trained = accelerate_training(model)
grads = torch.autograd.grad(trained(x).square().sum(), list(p for p in model.parameters() if p.requires_grad))
out.append([max(error(a, b.double()) for a, b in zip(grads, expected) if b.norm() > 1e-4), len(launches) - 6])
print(json.dumps(out))
"""
# No bfloat16: the interpreter multiplies it as if its bits were whole numbers. benchmarks/gpu.py checks it on a GPU.
CASES = [
    (2, 16, 16, 1, 16, 8, "float32"),
    (1, 11, 13, 2, 16, 8, "float32"),
    (1, 3, 5, 1, 32, 8, "float32"),
    (2, 9, 15, 1, 48, 7, "float32"),
    (1, 8, 12, 3, 16, 4, "float32"),
    (1, 11, 9, 2, 16, 8, "float16"),
]
TOLERANCE = {"float32": 1e-5, "float16": 2e-3}


@pytest.fixture(scope="module")
def errors():
    done = subprocess.run(
        [sys.executable, "-c", CHECK],
        input=json.dumps(CASES),
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("i", range(len(CASES)), ids=lambda i: "-".join(map(str, CASES[i])))
def test_forward_and_backward(i, errors):
    forward, backward = errors[i]
    assert forward <= TOLERANCE[CASES[i][-1]]
    assert backward <= TOLERANCE[CASES[i][-1]]


def test_a_network_goes_through_the_kernel(errors):
    (inference, missing), (training, absent) = errors[-2:]
    assert inference <= 1e-5
    assert training <= 1e-4
    assert missing == absent == 0  # launches: one a local step, and one more in the backward pass


def test_what_the_kernel_is_made_for():
    from transcnn.kernels.grid_triton import supports

    assert supports(torch.float32, 64, 8)
    assert not supports(torch.float32, 64, 16)
    assert not supports(torch.float32, 8, 8)
    assert not supports(torch.double, 64, 8)
