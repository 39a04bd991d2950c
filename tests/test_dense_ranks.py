"""Scores of segmentation and detection are those of the whole set however processes share its images out."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from transcnn.tasks.detect import Detect
from transcnn.tasks.segment import Segment

SHARES = {"three and one": [[0, 1, 2], [3]], "all and none": [[0, 1, 2, 3], []], "one": [[0, 1, 2, 3]]}


class Finder(nn.Module):
    """Finds two boxes in image k (all of whose pixels are k), one of them a bit off for odd k."""

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        return [self.find(int(image.flatten()[0])) for image in images]

    @staticmethod
    def find(k: int, *, truth: bool = False) -> dict[str, Any]:
        shift = 0 if truth or k % 2 == 0 else 2
        boxes = torch.tensor([[2.0, 2, 12, 14], [14 + shift, 10, 28 + shift, 30]])
        masks = torch.zeros(2, 1, 32, 32)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[:, y1:y2, x1:x2] = 1
        found = {"boxes": boxes, "labels": torch.tensor([0, k % 2])}
        if truth:
            extra = {"crowd": torch.tensor([False, False]), "area": torch.tensor([120.0, 280.0])}
            return {**found, **extra, "masks": masks[:, 0].byte(), "counts": torch.tensor(True)}
        return {**found, "masks": masks, "scores": torch.tensor([0.9, 0.6 + 0.05 * k])}


class Painter(nn.Module):
    """Says class k % 3 everywhere in image k."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        prediction = images[:, 0].long() % 3
        return nn.functional.one_hot(prediction, 3).permute(0, 3, 1, 2).float() * 4


def score(share: list[int]) -> dict[str, Any]:
    """The scores that this process has after its share of the images."""

    def reduce(value: torch.Tensor, reduce_op: str) -> torch.Tensor:
        if dist.is_initialized():
            dist.all_reduce(value, dist.ReduceOp.SUM if reduce_op == "sum" else dist.ReduceOp.MAX)
        return value

    world = dist.get_world_size() if dist.is_initialized() else 1
    trainer = SimpleNamespace(world_size=world, strategy=SimpleNamespace(reduce=reduce))
    detect = Detect(Finder(), ["a", "b"], {}, task_args={"detector": "maskrcnn"})
    segment = Segment(Painter(), ["a", "b", "c"], {})
    for task in (detect, segment):
        task._trainer = trainer  # pyright: ignore
    for k in share:
        image = torch.full((3, 32, 32), float(k))
        detect.evaluate_batch(([image], [Finder.find(k, truth=True)]), 0)
        truth = (torch.arange(32 * 32).view(1, 32, 32) // 300) % 3
        truth[:, : 4 * k] = -1
        segment.evaluate_batch(([image], list(truth)), 0)
    return {"detect": detect.scores(), "segment": segment.scores()}


def work(rank: int, folder: str) -> None:
    warnings.simplefilter("error")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name, shares in SHARES.items():
        if len(shares) == 2:
            torch.save(score(shares[rank]), Path(folder) / f"{name} {rank}.pt")
    dist.destroy_process_group()


@pytest.mark.usefixtures("forks")
def test_unequal_shares_give_the_scores_of_one_process(tmp_path):
    whole = score(SHARES["one"][0])
    assert 0 < whole["detect"]["mask_map"] < whole["detect"]["mask_map50"] <= 100 + 1e-6
    assert 0 < whole["segment"]["miou"] < 100
    mp.start_processes(work, args=(str(tmp_path),), nprocs=2, start_method="forkserver")  # pyright: ignore
    for name in ("three and one", "all and none"):
        for rank in (0, 1):
            there = torch.load(tmp_path / f"{name} {rank}.pt", weights_only=False)
            for task, scores in whole.items():
                numbers = {key: value for key, value in scores.items() if isinstance(value, float)}
                assert {key: there[task][key] for key in numbers} == pytest.approx(numbers)
                assert int(there[task]["images"]) == 4
            assert torch.equal(there["segment"]["confusion"], whole["segment"]["confusion"])
            assert there["detect"]["class_ap"] == pytest.approx(whole["detect"]["class_ap"])
