# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # Train on your own images
#
# From a folder of images to a network that is trained, scored and asked, in less than a minute on one core. The
# images are drawn here; with photographs of yours in a folder `DATA` of class folders, begin at *Train*.

# %%
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from transcnn.commands.evaluate import evaluate
from transcnn.commands.predict import predict
from transcnn.commands.train import train

HERE = Path(tempfile.mkdtemp(prefix="transcnn-example-"))
DATA = HERE / "shapes"

# %% [markdown]
# ## Images
#
# Four shapes in all colours, sizes and angles, for training, validation and test.


# %%
def draw_shape(corners: int, rng: np.random.Generator) -> Image.Image:
    """A light disc (0 corners), polygon, or star (10) on a dark ground."""
    dark, light = rng.integers(0, 110, 3), rng.integers(145, 256, 3)
    image = Image.fromarray(rng.normal(dark, 12, (64, 64, 3)).clip(0, 255).astype("uint8"))
    radius, turn, (x, y) = rng.uniform(14, 24), rng.uniform(0, 7), rng.uniform(25, 39, 2)
    angles = np.arange(corners or 60) / (corners or 60) * 2 * np.pi + turn
    radii = np.where(np.arange(len(angles)) % 2 * (corners == 10), 0.45 * radius, radius)
    points = np.stack([x + radii * np.cos(angles), y + radii * np.sin(angles)], 1)
    ImageDraw.Draw(image).polygon([(float(a), float(b)) for a, b in points], fill=tuple(map(int, light)))
    return image


generator = np.random.default_rng(0)
for part, count in {"train": 60, "val": 15, "test": 25}.items():
    for corners, name in {0: "disc", 3: "triangle", 4: "square", 10: "star"}.items():
        (DATA / part / name).mkdir(parents=True)
        for i in range(count):
            draw_shape(corners, generator).save(DATA / part / name / f"{i:02}.jpg", quality=90)

# %% [markdown]
# ## Train
#
# `transcnn_nano` comes with weights that have seen CIFAR-10, so a few epochs are enough. A larger network for larger
# images: `model="transcnn_tiny", img_size=256`.

# %%
result = train(
    str(DATA), model="transcnn_nano", pretrained=True, img_size=32, epochs=8, num_workers=0, out=str(HERE / "run")
)
print(
    f"{result.metrics['top1']:.1f} % of the test images; curves and mistakes: {HERE / 'run' / 'report' / 'index.html'}"
)

# %% [markdown]
# ## Score and ask

# %%
metrics = evaluate(str(HERE / "run"), str(DATA), split="test", quiet=True)
for name, accuracy in metrics["class_accuracy"].items():
    print(f"{name:10} {accuracy:5.1f} %")

# %%
for row in predict(str(HERE / "run"), [str(DATA / "test" / "star" / f"{i:02}.jpg") for i in range(4)], quiet=True):
    print(Path(row["file"]).name, row["top"][0])
