# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # Sounds of many lengths
#
# `transcnn1d_nano` on raw waveforms. Sounds of a batch are filled up to the longest, and a mask tells the network which
# samples are real: each sound gets the answer that it would get alone. From nothing in a minute, or, with
# `--data spoken_digits.npz`, on recordings: a file of numpy with `samples`, `offsets`, `digit` and `take`.

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
from torch.utils.data import DataLoader

import transcnn

matplotlib.use("Agg")
from matplotlib import pyplot as plt

parser = argparse.ArgumentParser()
parser.add_argument("--data", help="a .npz of recordings, instead of sounds made here")
parser.add_argument("--epochs", type=int, default=7)
parser.add_argument("--out", default=tempfile.mkdtemp(prefix="transcnn-example-"), help="where the figure goes")
args = parser.parse_known_args()[0]
L.seed_everything(0)
Sound = tuple[Tensor, int]  # samples (L), and the class

# %% [markdown]
# ## Sounds
#
# Made here: a pitch that rises, falls, stays, or stays and is broken off in the middle; 0.05 to 0.2 seconds at 8 kHz.


# %%
def make_sound(kind: int, rng: np.random.Generator) -> Tensor:
    """One sound of a kind, in noise."""
    length = int(rng.integers(400, 1600))
    low, high = rng.uniform(200, 500), rng.uniform(900, 1500)
    ends = [(low, high), (high, low), (low, low), (high, high)][kind if kind < 2 else int(rng.integers(2, 4))]
    wave = np.sin(2 * np.pi * np.cumsum(np.linspace(*ends, length)) / 8000)
    if kind == 3:
        wave[length // 3 : length * 2 // 3] = 0
    return torch.from_numpy(wave + 0.2 * rng.standard_normal(length)).float()


def recordings(path: str) -> tuple[list[Sound], list[Sound]]:
    """Those to train with and those to test with, takes 0 to 4 of each speaker and digit."""
    data = np.load(path)
    pieces = np.split(data["samples"].astype(np.float32), data["offsets"][1:-1])
    parts: tuple[list[Sound], list[Sound]] = ([], [])
    for samples, digit, take in zip(pieces, data["digit"], data["take"], strict=True):
        parts[take < 5].append((torch.from_numpy(samples / samples.std()), int(digit)))
    return parts


if args.data:
    training, test = recordings(args.data)
else:
    generator = np.random.default_rng(0)
    training, test = ([(make_sound(i % 4, generator), i % 4) for i in range(count)] for count in (288, 80))
classes = 1 + max(label for _, label in training)

# %% [markdown]
# ## A batch and its mask


# %%
def collate(sounds: list[Sound]) -> tuple[Tensor, Tensor, Tensor]:
    """Samples (B, 1, L) filled up with zeros, which of them are real, and classes (B,)."""
    x = nn.utils.rnn.pad_sequence([samples for samples, _ in sounds], batch_first=True)[:, None]
    lengths = torch.tensor([len(samples) for samples, _ in sounds])
    return x, (torch.arange(x.shape[2]) < lengths[:, None])[:, None], torch.tensor([label for _, label in sounds])


# %% [markdown]
# ## Train


# %%
class Classifier(L.LightningModule):
    """The network, its loss and its optimizer."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.net = transcnn.create_model("transcnn1d_nano", num_classes=classes)

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], index: int) -> Tensor:
        x, mask, labels = batch
        x = x * torch.empty(len(x), 1, 1, device=x.device).uniform_(0.5, 2)  # louder or softer
        return nn.functional.cross_entropy(self.net(x, mask), labels, label_smoothing=0.1)

    def test_step(self, batch: tuple[Tensor, Tensor, Tensor], index: int) -> None:
        x, mask, labels = batch
        right = (self.net(x, mask).argmax(1) == labels).float().mean()
        self.log("accuracy", right, batch_size=len(x), on_epoch=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.02)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


model = Classifier(classes)
trainer = L.Trainer(
    max_epochs=args.epochs, gradient_clip_val=1, logger=False, enable_checkpointing=False, enable_model_summary=False
)
trainer.fit(model, DataLoader(training, 16, shuffle=True, collate_fn=collate, drop_last=True))  # pyright: ignore
batches = DataLoader(test, 16, collate_fn=collate)  # pyright: ignore
accuracy = trainer.test(model, batches, verbose=False)[0]["accuracy"]
print(f"{100 * accuracy:.1f} % of {len(test)} new sounds")

# %% [markdown]
# ## Alone or in a batch, one answer

# %%
net = model.net.eval()
x, mask, _ = collate(test[:8])
with torch.inference_mode():
    together = net(x, mask)
    alone = torch.cat([net(samples[None, None]) for samples, _ in test[:8]])
print(f"largest difference by padding: {(together - alone).abs().max().item():.1e}")

# %% [markdown]
# ## Where it looks
#
# From the middle of a sound: what the last block attends to.

# %%
samples = test[0][0]
maps = transcnn.attention_maps(net, samples[None], query=(len(samples) // 2,))
figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
axes.plot(samples, color="0.6", linewidth=0.5)
axes.fill_between(range(len(samples)), maps[-1].pixels / maps[-1].pixels.max() * samples.max(), alpha=0.4)
axes.set(title="A sound, and what its middle attends to in the last block", xlabel="Sample")
figure.savefig(Path(args.out) / "sound.png", dpi=120)
print(Path(args.out) / "sound.png")
