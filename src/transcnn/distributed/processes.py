"""One run in many processes: how they are launched, which of them decides, and what they exchange.

torchrun and Slurm start processes and give each its rank; with ``--devices N`` Lightning starts N on this machine. The
rendezvous (``launch``) comes before anything is decided or written, so that the first process alone can do both.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from ..errors import UserError

__all__ = [
    "all_or_none",
    "first_decides",
    "first_here",
    "gather",
    "gather_lists",
    "launch",
    "launch_name",
    "lost_process",
    "per_machine",
]
__all__ += ["placement", "rank", "restarts", "world"]

T = TypeVar("T")

# Processes a machine and machines, after the rendezvous. torch.distributed keeps its process group for the process as a
# whole as well, and knows all that is asked for but how many of them share a machine.
_launched: list[tuple[int, int]] = []


def rank() -> int:
    """This process's number, from 0; the first one writes."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def per_machine() -> int:
    """How many of the processes are on this machine."""
    return _launched[0][0] if _launched else 1


def launch(accelerator: str = "auto", devices: int = 1, num_nodes: int = 1) -> None:
    """The rendezvous of all processes of this run; what isn't started yet is started (a second call does nothing).

    Raises:
        UserError: There aren't as many devices.
    """
    if _launched:
        return
    asked = {"devices": devices, "num_nodes": num_nodes}
    devices, num_nodes = _shape(devices, num_nodes)
    for (name, wanted), started in zip(asked.items(), (devices, num_nodes), strict=True):
        if wanted > 1 and wanted != started:
            raise UserError(
                f"{name} is {wanted}, but torchrun or Slurm has started {started}: have it start as many, or leave out "
                f"--{name}"
            )
    if devices < 1 or num_nodes < 1:
        raise UserError(f"devices and num_nodes must be 1 or more, got {devices} and {num_nodes}")
    if devices * num_nodes > 1:
        from lightning import Fabric
        from lightning.fabric.plugins.environments import TorchElasticEnvironment

        try:
            if TorchElasticEnvironment.detect() and restarts():
                _rendezvous_again(accelerator)
            Fabric(accelerator=_device(accelerator), devices=devices, num_nodes=num_nodes, strategy="ddp").launch()
        except (ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"the rendezvous of {devices * num_nodes} processes failed: {reason}") from error
        _launched.append((devices, num_nodes))


def _rendezvous_again(accelerator: str) -> None:
    """The rendezvous of restarted processes, under keys of its own.

    torchrun's agent keeps one store for all restarts. What is left there from before are the addresses of processes
    that have ended, and the first one to come would take them for those of the running ones.
    """
    store, number, processes = next(rendezvous("env://"))
    gpu = accelerator != "cpu" and torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store = dist.PrefixStore(f"restart {restarts()}", store)
    dist.init_process_group("nccl" if gpu else "gloo", store=store, rank=number, world_size=processes)


def _shape(devices: int, num_nodes: int) -> tuple[int, int]:
    """Processes a machine and machines: as torchrun or Slurm have it, else as asked for."""
    from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    if TorchElasticEnvironment.detect():
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        return here, int(os.environ["WORLD_SIZE"]) // here
    if SLURMEnvironment.detect():
        nodes = int(os.environ.get("SLURM_NNODES", "1"))
        return int(os.environ.get("SLURM_NTASKS", "1")) // nodes, nodes
    return devices, num_nodes


def placement(accelerator: str = "auto", strategy: Any = "ddp") -> dict[str, Any]:
    """The arguments of Lightning's Trainer that say where it works."""
    accelerator = _device(accelerator)
    if not _launched:
        return {"accelerator": accelerator, "devices": 1}
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    devices, num_nodes = _launched[0]
    placed = {"accelerator": accelerator, "devices": devices, "num_nodes": num_nodes, "strategy": strategy}
    if SLURMEnvironment.detect():  # runs go on from their own checkpoints, not from what Lightning would write
        placed["plugins"] = [SLURMEnvironment(auto_requeue=False)]
    return placed


def _device(accelerator: str) -> str:
    """Lightning's word for the device; its own ``auto`` is Apple's GPU on a Mac, which has no float64 to score with."""
    gpu = torch.cuda.is_available() if accelerator == "auto" else accelerator != "cpu"
    return "cuda" if gpu else "cpu"


def first_decides(decide: Callable[[], T]) -> T:
    """What ``decide`` returns in the first process, for all; an error there is everybody's, and reported once."""
    if world() == 1:
        return decide()
    found: list[Any] = [None, ""]
    failure: Exception | None = None
    if rank() == 0:
        try:
            found = [decide(), ""]
        except Exception as error:  # whatever it is, the others wait for an answer
            found, failure = [None, str(error) or type(error).__name__], error
    dist.broadcast_object_list(found)
    if failure is not None:
        raise failure
    if found[1]:
        raise _told(found[1])
    return found[0]


def first_here(work: Callable[[], T]) -> T:
    """What ``work`` returns in each process; the first one of each machine does it before the others there begin.

    So what it downloads or unpacks is there for them. All processes call this, and an error of one is everybody's.
    """
    if rank() % per_machine() != 0:
        all_or_none(lambda: None)
        return all_or_none(work)
    found = all_or_none(work)
    all_or_none(lambda: None)
    return found


def all_or_none(work: Callable[[], T]) -> T:
    """What ``work`` returns in each process, which do it at the same time; an error of one is everybody's.

    All processes call this: one that failed alone would leave the others waiting for it, or ending for no reason that
    they know.
    """
    if world() == 1:
        return work()
    results: list[T] = []
    failure: Exception | None = None
    try:
        results.append(work())
    except Exception as error:  # whatever it is, the others wait for this process
        failure = error
    failed = [text for text in gather("" if failure is None else str(failure) or type(failure).__name__) if text]
    if failed:
        raise failure if failure is not None and rank() == 0 else _told(failed[0])
    return results[0]


def _told(message: str) -> UserError:
    """An error that the first process reports."""
    error = UserError(message)
    error.reported = rank() > 0
    return error


def gather(value: T) -> list[T]:
    """Each process's value, in their order; all processes call this."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def gather_lists(values: list[T]) -> list[T]:
    """The entries of all processes' lists, in the processes' order; all processes call this."""
    return [value for part in gather(values) for value in part]


def lost_process(error: RuntimeError) -> str:
    """What is to be said if an error means that another process of the run is gone; else nothing."""
    gone = ("closed by peer", "reset by peer", "Broken pipe", "NCCL", "timed out", "Timed out")
    if world() > 1 and any(words in str(error) for words in gone):
        return f"process {rank()} of {world()} has lost another one ({str(error).splitlines()[0][:200]})"
    return ""


def restarts() -> int:
    """How often torchrun has restarted the processes of this run, or Slurm the job."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or os.environ.get("SLURM_RESTART_COUNT") or 0)


def launch_name() -> str:
    """A name that all restarts of one torchrun command or Slurm job have, and no other; "" without these."""
    run, job = os.environ.get("TORCHELASTIC_RUN_ID"), os.environ.get("SLURM_JOB_ID")
    if run:  # without --rdzv-id all are called "none"; their agents (our parents) then distinguish them
        return f"{run} {socket.gethostname()} {os.getppid()}"
    return f"slurm {job}" if job else ""
