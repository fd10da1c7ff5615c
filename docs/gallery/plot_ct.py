"""
CT phantoms with Reptile
========================

A slice from four projections: the start knows what heads look like, the projections say which
head it is. The network never sees the slice, only the means along lines through it.
"""

# %%
# Phantoms are drawn when they are asked for. A task is one phantom, seen from ten random angles;
# ``measure=Project(angles)`` is what stands between the network's image and the data.
import matplotlib.pyplot as plt
import torch

import fastmeta as fm
from fastmeta import rng
from fastmeta.tasks import ct, phantoms

torch.manual_seed(0)
net = fm.fourier_mlp(2, 1, width=64, depth=4, features=64, scale=8.0)
options = ct.CT(size=40, angles=10)
train, _, test = phantoms.phantom_splits(size=40, train=2000, test=3)


def learn(step, tasks=2):
    chosen = [train[(step * tasks + i) % len(train)] for i in range(tasks)]
    seeds = rng.task_seeds(0, step, tasks)
    return ct.learn(chosen, options, net, seeds, per_step=None)


# %%
# Reptile moves the start towards where twelve inner steps end; the outer optimiser takes that
# difference for a gradient.
reptile = fm.Reptile(net, inner_steps=12, inner_lr=10.0)
optimizer = torch.optim.Adam(reptile.parameters(), lr=1e-3)
for step in range(200):
    loss = reptile(learn(step))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

# %%
# Three phantoms that were not among them, from four angles and fifty steps. Beside them random
# weights, with their best of four rates, and filtered back-projection of the same projections.
items = [test[i] for i in range(3)]
batch = ct.observe(items, options, net, rng.task_seeds(1, 0, 3), count=4)
target = torch.stack(items)[..., 0]  # [T,W,W]


def fitted(init, lr):
    fit = fm.adapt(net, init, batch, 50, lr)
    return fm.mlp(net, fit.params, batch.x).detach().view(3, 40, 40)


def psnr(image):
    return -10 * torch.log10(((image - target) ** 2).mean((1, 2))).mean().item()


random = net.init(generator=torch.Generator().manual_seed(1))[0]
shown = {
    "target": target,
    "learned start": fitted(reptile.init.detach(), 10.0),
    "random start": max((fitted(random, lr) for lr in (1.0, 3.0, 10.0, 30.0)), key=psnr),
    "filtered\nback-projection": ct.fbp(batch.y, batch.measure.angles).clamp(0, 1),
}
figure, axes = plt.subplots(3, 4, figsize=(7.2, 5.8))
for column, (name, pictures) in zip(axes.T, shown.items(), strict=True):
    score = "" if name == "target" else f"\n{psnr(pictures):.1f} dB"
    column[0].set_title(name + score, fontsize=9)
    for ax, picture in zip(column, pictures, strict=True):
        ax.imshow(picture, cmap="gray", vmin=0, vmax=1)
        ax.axis("off")
figure.tight_layout()
