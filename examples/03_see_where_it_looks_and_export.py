# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # See where a network looks, and export it
#
# With the network that comes with the package and a photograph that comes with scikit-learn. Nothing is downloaded.
# The network knows ten things, from airplanes to trucks; the photograph shows a temple, which is none of them. So what
# follows is no praise of its answer: it shows what the answer came from.

# %%
import tempfile
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data import create_transform

import transcnn
from transcnn.commands.explain import explain
from transcnn.commands.export import export
from transcnn.commands.predict import predict
from transcnn.explain import deletion_insertion, grad_cam

HERE = Path(tempfile.mkdtemp(prefix="transcnn-example-"))
photo = Image.fromarray(load_sample_image("china.jpg"))
photo.save(HERE / "photo.jpg")
loaded = transcnn.load("transcnn_nano.cifar10")

# %% [markdown]
# ## What one spot attends to
#
# For each step of each block the weights of the softmax, on the tokens and on the image's pixels. They are exact: these
# are the numbers that the network computes with.

# %%
image = create_transform(**{**loaded.preprocessing, "input_size": (3, 64, 64)})(photo)  # (3, 64, 64)
for m in transcnn.attention_maps(loaded.model, image, query=(20, 40), stage=1):
    print(m.name, m.step, tuple(m.pixels.shape), f"sum {m.weights.sum().item():.4f}")

# %% [markdown]
# ## Class maps, and how good such a map is
#
# The class is the network's own first choice.

# %%
target = int(loaded.model(image[None]).argmax())
print("the network predicts:", loaded.class_names[target])
values = grad_cam(loaded.model, image, target=target)
scores = deletion_insertion(loaded.model, image, values)
print(f"Grad-CAM {tuple(values.shape)}: deletion {scores.deletion:.3f}, insertion {scores.insertion:.3f}")

# %% [markdown]
# All of it in one figure, as the command `transcnn explain` draws it:

# %%
explain("transcnn_nano.cifar10", str(HERE / "photo.jpg"), img_size=64, out=str(HERE / "explained.png"))

# %% [markdown]
# ## Export
#
# Written, compared with the network, and run by ONNX Runtime alone. `static=32` makes the graph for one size.

# %%
result = export("transcnn_nano.cifar10", out=str(HERE / "model.onnx"), static=32, quiet=True)
for model in ("transcnn_nano.cifar10", str(result.file)):
    (row,) = predict(model, [str(HERE / "photo.jpg")], top_k=3, quiet=True)
    print(Path(model).name, row["top"])
