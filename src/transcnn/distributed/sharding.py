"""FSDP2: weights, gradients and optimizer state shared out between processes, in checkpoints as if they weren't.

Lightning's strategy for it writes folders of shards, or whole files that only itself can read again. Here a
checkpoint is the same whatever the strategy: names to whole tensors, and the optimizer's state numbered as the
optimizer numbers it. So a run of FSDP goes on with DDP or in one process, and the other way round.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from ..errors import UserError
from .processes import world

__all__ = ["Sharded", "choose_strategy", "full_state", "load_full", "shard"]

LARGE = 60e6  # parameters from which on weights are shared out on GPUs unless asked otherwise: transcnn_large has 80 M

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
LEAST_SHARE = 0.01  # of all parameters: what has fewer is gathered together with what it is in


def choose_strategy(wanted: str, network: nn.Module, accelerator: str) -> Any:
    """Lightning's strategy for ``ddp``, ``fsdp`` or ``auto``; of one process alone any other would do as well."""
    if world() == 1:
        if wanted == "fsdp":
            raise UserError("fsdp shares weights out to several processes: start them by torchrun, or with --devices")
        return "auto"
    gpus = torch.cuda.is_available() and accelerator != "cpu"
    large = sum(p.numel() for p in network.parameters()) >= LARGE
    return Sharded(world()) if wanted == "fsdp" or (wanted == "auto" and gpus and large) else "ddp"


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Share a network's parameters out to the processes of ``mesh``; each block is gathered when it is computed."""
    model.to(memory_format=torch.contiguous_format)  # pyright: ignore  (others can't be shared out)
    least = LEAST_SHARE * sum(p.numel() for p in model.parameters())
    for block in reversed(list(_blocks(model))):  # inner ones first
        if sum(p.numel() for p in block.parameters()) >= least:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)  # else weights stay whole after a validation


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """What is called one after the other: items of lists that consist of several layers each."""
    containers = (nn.Sequential, nn.ModuleList)
    for module in model.modules():
        if isinstance(module, containers):
            yield from (m for m in module if not isinstance(m, containers) and next(m.children(), None) is not None)


def full_state(module: nn.Module) -> dict[str, Any]:
    """``module.state_dict()`` with whole tensors. If it is sharded, all processes call this, and the first gets it."""
    if any(isinstance(part, FSDPModule) for part in module.modules()):
        return get_model_state_dict(module, options=WHOLE)
    return module.state_dict()


def load_full(module: nn.Module, state: Mapping[str, Any]) -> None:
    """The opposite of ``full_state``; each process has the whole state."""
    if any(isinstance(part, FSDPModule) for part in module.modules()):
        set_model_state_dict(module, dict(state), options=StateDictOptions(full_state_dict=True))
    else:
        module.load_state_dict(state)


class Sharded(ModelParallelStrategy):
    """FSDP2 over all processes, with checkpoints like those of every other strategy."""

    def __init__(self, processes: int) -> None:
        super().__init__(processes, 1, save_distributed_checkpoint=False)

    @property
    def mesh(self) -> DeviceMesh:
        """The processes that share."""
        return self.device_mesh["data_parallel"]

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Yes, through ``load_optimizer_state_dict``."""
        return True

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """The whole checkpoint, read where it lies."""
        return torch.load(checkpoint_path, mmap=True, map_location="cpu", weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Each process takes its share of whole tensors."""
        assert self.lightning_module is not None
        load_full(self.lightning_module, checkpoint["state_dict"])

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """As ``optimizer.state_dict()`` would be without sharding; empty but in the first process."""
        optimizer = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        assert self.model is not None
        named: dict[str, Any] = get_optimizer_state_dict(self.model, optimizer, options=WHOLE)
        if not named:
            return {}
        groups = named["param_groups"]
        number = {name: i for i, name in enumerate(chain.from_iterable(group["params"] for group in groups))}
        # What a scheduler or timm put into the groups isn't always what torch gives back; the optimizer knows.
        own = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        return {
            "state": {number[name]: state for name, state in named["state"].items()},
            "param_groups": [
                {**settings, "params": [number[name] for name in group["params"]]}
                for settings, group in zip(own, groups, strict=True)
            ],
        }

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Whole states, each process takes its share."""
        assert self.model is not None
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            numbers = chain.from_iterable(group["params"] for group in saved["param_groups"])
            own = chain.from_iterable(group["params"] for group in optimizer.param_groups)
            name = {number: names[parameter] for number, parameter in zip(numbers, own, strict=True)}
            named: dict[str, Any] = {
                "state": {name[number]: state for number, state in saved["state"].items()},
                "param_groups": [
                    {**group, "params": [name[number] for number in group["params"]]} for group in saved["param_groups"]
                ],
            }
            set_optimizer_state_dict(self.model, optimizer, named, options=StateDictOptions(full_state_dict=True))
