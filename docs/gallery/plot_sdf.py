"""
Distance fields with MAML
=========================

A task is a closed curve: the network says how far each point of the square lies from it, below 0
inside. Where the network is 0 is the curve.
"""

# %%
# A class of curves, drawn as pictures: ``tasks.sdf`` computes their distances and samples points,
# half of them near the curve.
import math

import matplotlib.pyplot as plt
import torch

import fastmeta as fm
from fastmeta import rng
from fastmeta.tasks import sdf

SIZE = 48
draws = torch.Generator().manual_seed(0)


def drawings(count):
    """[n,SIZE,SIZE] uint8: dark flowers of 3 to 6 petals on white."""
    axis = (2 * torch.arange(SIZE) + 1) / SIZE - 1
    row, column = torch.meshgrid(axis, axis, indexing="ij")
    petals = torch.randint(3, 7, (count, 1, 1), generator=draws)
    turn, depth, size = torch.rand(3, count, 1, 1, generator=draws)
    wave = torch.cos(petals * (torch.atan2(row, column) + 2 * math.pi * turn))
    radius = (0.4 + 0.2 * size) * (1 + 0.4 * depth * wave)
    inside = torch.hypot(row, column) < radius
    return (~inside * 255).to(torch.uint8)


options = sdf.SDF(dimensions=2, points=1024)
fields = sdf.open_all(drawings(300).numpy(), options)

# %%
# Four curves an outer step. Each inner step draws 512 of a curve's points anew, from its seed.
torch.manual_seed(0)
net = fm.siren(2, 1, width=64, depth=4, w0=15.0)
maml = fm.MAML(net, inner_steps=4, inner_lr=0.02)
optimizer = torch.optim.Adam(maml.parameters(), lr=5e-4)
for step in range(250):
    chosen = [fields[(4 * step + i) % 290] for i in range(4)]
    loss = maml(sdf.learn(chosen, options, net, rng.task_seeds(0, step, 4), per_step=512))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

# %%
# Curves that were not among them, after four steps; blue is inside, the bright line the curve. The
# random start has the best of four rates.
items = [fields[i] for i in range(290, 294)]
batch = sdf.observe(items, options, net, rng.task_seeds(1, 0, 4))
random = net.init(generator=torch.Generator().manual_seed(1))[0]


def after(params):
    return fm.loss_grad(net, params, batch.query)[0].mean().item()


tried = [fm.adapt(net, random, batch, 4, lr).params for lr in (0.01, 0.02, 0.05, 0.1)]
rows = {
    "learned start": fm.adapt(net, maml.init.detach(), batch, 4, 0.02).params,
    "random start": min(tried, key=after),
}
figure, axes = plt.subplots(3, 4, figsize=(7.2, 5.6))
for ax, item in zip(axes[0], items, strict=True):
    ax.imshow(sdf.truth(item, options))
axes[0, 0].set_ylabel("target", fontsize=9)
for line, (name, params) in zip(axes[1:], rows.items(), strict=True):
    for ax, row, item in zip(line, params, items, strict=True):
        ax.imshow(sdf.picture(net, row, item, options).clamp(0, 1))
    line[0].set_ylabel(f"{name}\nerror {after(params):.3f}", fontsize=9)
for ax in axes.flat:
    ax.set(xticks=[], yticks=[])
figure.tight_layout()
