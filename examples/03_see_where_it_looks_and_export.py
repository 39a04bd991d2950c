# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # See where a network looks, and export it
#
# With the network that comes with the package (ten classes of CIFAR-10) and a photograph that comes with
# scikit-learn. Nothing is downloaded.

# %%
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

import transcnn
from transcnn.checkpoints.loading import load
from transcnn.commands.explain import explain
from transcnn.commands.export import export
from transcnn.explain import deletion_insertion, grad_cam
from transcnn.onnx.predict import OnnxModel, answers, to_input

HERE = Path(tempfile.mkdtemp(prefix="transcnn-example-"))
photo = Image.fromarray(load_sample_image("china.jpg"))
photo.save(HERE / "photo.jpg")
loaded = load("transcnn_nano.cifar10")

# %% [markdown]
# ## What one spot attends to
#
# For each step of each block the weights of the softmax, on the tokens and on the image's pixels. They are exact: these
# are the numbers that the network computes with.

# %%
image = torch.from_numpy(to_input(photo, {**loaded.preprocessing, "input_size": [3, 64, 64]}))
for m in transcnn.attention_maps(loaded.model, image, query=(20, 40), stage=1):
    print(m.name, m.step, tuple(m.pixels.shape), f"sum {m.weights.sum().item():.4f}")

# %% [markdown]
# ## What speaks for a class, and how good such a map is

# %%
ship = loaded.class_names.index("ship")
values = grad_cam(loaded.model, image, target=ship)
scores = deletion_insertion(loaded.model, image, values)
print(f"Grad-CAM {tuple(values.shape)}: deletion {scores.deletion:.3f}, insertion {scores.insertion:.3f}")

# %% [markdown]
# All of it in one picture, as the command `transcnn explain` draws it:

# %%
explain("transcnn_nano.cifar10", str(HERE / "photo.jpg"), img_size=64, out=str(HERE / "explained.png"))

# %% [markdown]
# ## Export
#
# Written, compared with the network, and run by ONNX Runtime alone. `static=32` makes the graph for one size.

# %%
result = export("transcnn_nano.cifar10", out=str(HERE / "model.onnx"), static=32)
model = OnnxModel(result.file, accelerator="cpu", threads=1)
x = to_input(photo, model.data_config)[None]
print(answers(model(x), model.class_names, top_k=3)[0])
with torch.inference_mode():
    wanted = loaded.model(torch.from_numpy(x)).numpy()
print("largest difference:", float(np.abs(model(x) - wanted).max()))
