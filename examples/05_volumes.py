# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # Volumes
#
# `transcnn3d_nano` on voxels, with flips and quarter turns. From nothing in a minute, or, with `--data voxels.npz`,
# chairs and monitors with only 40 volumes of each to learn from: a file of numpy with packed bits of 32x32x32 a class.

# %%
import argparse
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import transcnn

matplotlib.use("Agg")
from matplotlib import pyplot as plt

parser = argparse.ArgumentParser()
parser.add_argument("--data", help="a .npz of voxels, instead of shapes made here")
parser.add_argument("--epochs", type=int, default=12)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", default=tempfile.mkdtemp(prefix="transcnn-example-"), help="where the figure goes")
args = parser.parse_known_args()[0]
L.seed_everything(args.seed)

# %% [markdown]
# ## Shapes
#
# Made here: hollow balls, hollow boxes and rings of all sizes, in noise.


# %%
def make_shape(kind: int, rng: np.random.Generator, side: int = 24) -> np.ndarray:
    """A ball, a box or a ring of voxels, (side, side, side)."""
    places = np.stack(np.meshgrid(*[np.arange(side) - side / 2] * 3, indexing="ij"), -1) - rng.uniform(-2, 2, 3)
    turn, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    x, y, z = np.moveaxis(places @ turn, -1, 0)
    radius = rng.uniform(5, 8)
    if kind == 0:
        distance = np.sqrt(x**2 + y**2 + z**2) - radius
    elif kind == 1:
        distance = np.abs([x, y, z]).max(0) - 0.8 * radius
    else:
        distance = np.hypot(np.hypot(x, y) - radius, z)
    return ((np.abs(distance) < 1.2) ^ (rng.random(distance.shape) < 0.02)).astype(np.float32)


def voxels(path: str, few: int = 40) -> tuple[TensorDataset, TensorDataset]:
    """``few`` volumes of each class to train with, every fifth to test with."""
    data = np.load(path)
    parts: list[list[Tensor]] = [[], []]
    labels: list[list[int]] = [[], []]
    for label, name in enumerate(sorted(data.files)):
        volumes = torch.from_numpy(np.unpackbits(data[name], axis=1).reshape(-1, 1, 32, 32, 32))
        held = torch.arange(len(volumes)) % 5 == 0
        chosen = torch.randperm(int((~held).sum()))[:few]
        for part, found in enumerate((volumes[~held][chosen], volumes[held])):
            parts[part].append(found.float())
            labels[part] += [label] * len(found)
    return tuple(TensorDataset(torch.cat(x), torch.tensor(y)) for x, y in zip(parts, labels, strict=True))  # pyright: ignore


def shapes(count: int, rng: np.random.Generator) -> TensorDataset:
    """Volumes (count, 1, D, H, W) and their kinds."""
    volumes = np.stack([make_shape(i % 3, rng) for i in range(count)])
    return TensorDataset(torch.from_numpy(volumes)[:, None], torch.arange(count) % 3)


if args.data:
    training, test = voxels(args.data)
else:
    generator = np.random.default_rng(args.seed)
    training, test = shapes(90, generator), shapes(60, generator)
classes = 1 + int(training.tensors[1].max())

# %% [markdown]
# ## Train
#
# Each volume is flipped and turned by quarters about its upright axis, which leaves what it is. In channels-last memory
# and with `accelerate_training` a step takes 0.6 of the time on a CPU.


# %%
def turned(x: Tensor) -> Tensor:
    """Volumes (B, C, D, H, W), each flipped or not, and turned by some quarters in its first two dimensions."""
    each = []
    for volume in x:
        volume = volume.flip(1) if torch.rand(()) < 0.5 else volume
        each.append(volume.rot90(int(torch.randint(4, ())), (1, 2)))
    return torch.stack(each).contiguous(memory_format=torch.channels_last_3d)


class Classifier(L.LightningModule):
    """The network, its loss and its optimizer."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        net = transcnn.create_model("transcnn3d_nano", num_classes=classes)
        self.net = transcnn.fast.accelerate_training(net).to(memory_format=torch.channels_last_3d)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, labels = batch
        return nn.functional.cross_entropy(self.net(turned(x)), labels, label_smoothing=0.1)

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        x, labels = batch
        self.log("accuracy", (self.net(x).argmax(1) == labels).float().mean(), batch_size=len(x), on_epoch=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.05)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


model = Classifier(classes)
trainer = L.Trainer(max_epochs=args.epochs, logger=False, enable_checkpointing=False, enable_model_summary=False)
trainer.fit(model, DataLoader(training, 10, shuffle=True))
accuracy = trainer.test(model, DataLoader(test, 20), verbose=False)[0]["accuracy"]
print(f"{100 * accuracy:.1f} % of {len(test)} new volumes")

# %% [markdown]
# ## Faster, with the same answers

# %%
net = model.net.eval()
fast = transcnn.optimize(net)
with torch.inference_mode():
    x = test.tensors[0][:8]
    print(f"largest difference when optimized: {(fast(x) - net(x)).abs().max().item():.1e}")

# %% [markdown]
# ## Where it looks
#
# From the middle of a volume: what the last block attends to, both seen from three sides.

# %%
volume = test.tensors[0][0]
middle = tuple(n // 2 for n in volume.shape[1:])
look = transcnn.attention_maps(net, volume, query=middle)[-1].pixels
figure, axes = plt.subplots(2, 3, figsize=(8, 5.4), layout="constrained")
for side in range(3):
    axes[0, side].imshow(volume[0].sum(side), cmap="Greys")
    axes[1, side].imshow(look.sum(side), cmap="viridis")
    for row in range(2):
        axes[row, side].set_axis_off()
figure.suptitle("A volume, and what its middle attends to in the last block, seen from three sides")
figure.savefig(Path(args.out) / "volume.png", dpi=120)
print(Path(args.out) / "volume.png")
