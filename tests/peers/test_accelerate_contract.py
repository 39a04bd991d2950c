"""What accelerate does with a network: prepares it, places it on devices and disks, saves it."""

from __future__ import annotations

import copy

import pytest
import torch
from contract import SMALL, images, small
from torch.utils.data import DataLoader, TensorDataset

accelerate = pytest.importorskip("accelerate")

each_kind = pytest.mark.parametrize("kind", SMALL)


@each_kind
def test_a_prepared_network_learns_what_it_would_alone(kind):
    alone = small(kind)
    model, x, labels = copy.deepcopy(alone), images(4), torch.tensor([0, 1, 2, 3])
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    loader = DataLoader(TensorDataset(x, labels), 2)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1), loader)
    for batch, wanted in loader:
        with accelerator.accumulate(model):
            accelerator.backward(torch.nn.functional.cross_entropy(model(batch), wanted))
            accelerator.clip_grad_norm_(model.parameters(), 100.0)
            optimizer.step()
            optimizer.zero_grad()
    torch.nn.functional.cross_entropy(alone(x), labels).backward()
    with torch.no_grad():
        for (name, p), q in zip(alone.named_parameters(), accelerator.unwrap_model(model).parameters(), strict=True):
            torch.testing.assert_close(p - 0.1 * p.grad, q, rtol=1e-3, atol=1e-5, msg=name)


@each_kind
def test_it_is_made_without_memory_and_runs_from_memory_and_disk(kind, tmp_path):
    model, x = small(kind), images()
    accelerate.Accelerator(cpu=True).save_model(model, tmp_path / "saved", max_shard_size="100KB")
    with accelerate.init_empty_weights():
        empty = small(kind)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    blocks = ["Block", "BasicBlock", "ConvNeXtBlock"]
    devices = {child: "cpu" if i % 2 else "disk" for i, (child, _) in enumerate(empty.named_children())}
    placed = accelerate.load_checkpoint_and_dispatch(
        empty, tmp_path / "saved", devices, offload_folder=tmp_path / "offload", no_split_module_classes=blocks
    )
    with torch.no_grad():
        torch.testing.assert_close(placed(x), model(x), rtol=0, atol=0)
        torch.testing.assert_close(accelerate.cpu_offload(copy.deepcopy(model), "cpu")(x), model(x), rtol=0, atol=0)
    devices = accelerate.infer_auto_device_map(model, {"cpu": 100_000}, no_split_module_classes=blocks)
    assert set(devices.values()) <= {"cpu", "disk"}
