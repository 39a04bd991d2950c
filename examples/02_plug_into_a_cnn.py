# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # Put H-MHSA into a CNN
#
# A plugged CNN answers as before; training decides what becomes of the new branch. Here a small ResNet learns to say
# whether two marks, far apart, have the same colour: a question that needs a look from one end to the other.

# %%
import timm
import torch
from torch import nn

import transcnn

torch.manual_seed(0)


def make_images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(count, 3, 64, 64) with a mark at the left and one at the right, and whether they have one colour."""
    images = 0.3 * torch.randn(count, 3, 64, 64)
    left, same = torch.randint(0, 3, (count,)), torch.randint(0, 2, (count,))
    right = (left + (1 - same) * torch.randint(1, 3, (count,))) % 3
    rows = torch.randint(4, 52, (count, 2))
    for i in range(count):
        images[i, left[i], rows[i, 0] : rows[i, 0] + 8, 4:12] += 3
        images[i, right[i], rows[i, 1] : rows[i, 1] + 8, 52:60] += 3
    return images, same


# %% [markdown]
# ## Where it goes
#
# `at` names modules; `"auto"` takes the last one at each of strides 8, 16 and 32.

# %%
model = timm.create_model("test_resnet", num_classes=2)
images, labels = make_images(64)
with torch.inference_mode():
    before = model.eval()(images)
transcnn.plug(model, at=["layer1", "layer2"], example=images[:1])
with torch.inference_mode():
    print("largest change of an answer:", float((model.eval()(images) - before).abs().max()))
for place in transcnn.plug_spec(model):
    print(place["at"], {key: place[key] for key in ("grid_sizes", "pool_ratios") if key in place})

# %% [markdown]
# ## Train it


# %%
def accuracy(network: nn.Module, count: int = 256) -> float:
    """Accuracy on new images."""
    images, labels = make_images(count)
    with torch.inference_mode():
        return float((network.eval()(images).argmax(1) == labels).float().mean())


optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
for step in range(60):
    images, labels = make_images(48)
    loss = nn.functional.cross_entropy(model.train()(images), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 19:
        print(f"step {step + 1}: loss {loss.item():.3f}, {100 * accuracy(model):.0f} % of new images")

# %% [markdown]
# ## What the branch does now
#
# `scale` was zero at first. Where one spot looks: `attention_maps` works on plugged CNNs too.

# %%
for name, parameter in model.named_parameters():
    if name.endswith("hmhsa.scale"):
        print(name, f"mean size {parameter.abs().mean().item():.4f}")
maps = transcnn.attention_maps(model.eval(), images[0], query=(30, 8))
for m in maps:
    print(m.name, m.step, tuple(m.weights.shape), f"largest share {m.weights.max().item():.3f}")

# %% [markdown]
# ## Save, load, take out

# %%
spec = transcnn.plug_spec(model)
twin = transcnn.plug_like(timm.create_model("test_resnet", num_classes=2), spec)
twin.load_state_dict(model.state_dict())
assert torch.equal(twin.eval()(images), model.eval()(images))
transcnn.unplug(model)
print("unplugged:", not transcnn.plug_spec(model))
