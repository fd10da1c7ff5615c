"""
Sound with MAML
===============

Notes with overtones, each a task of one dimension: time in, amplitude out.
"""

# %%
# A class of signals of our own: tensors with the values are all that a batch needs. A note has a
# pitch, four overtones and a decay.
import math

import matplotlib.pyplot as plt
import torch

import fastmeta as fm

N = 512
x = torch.arange(N)[:, None] / N  # [N,1]
draws = torch.Generator().manual_seed(0)


def notes(tasks):
    pitch = 4 * 2 ** (torch.rand(tasks, 1, generator=draws) * 1.5)
    strength = torch.rand(tasks, 4, 1, generator=draws) / torch.arange(1, 5)[:, None]
    phase = 2 * math.pi * torch.rand(tasks, 4, 1, generator=draws)
    decay = 1 + 3 * torch.rand(tasks, 1, generator=draws)
    waves = torch.sin(2 * math.pi * pitch[:, None] * torch.arange(1, 5)[:, None] * x.T + phase)
    sound = (strength * waves).sum(1) * torch.exp(-decay * x.T)  # [T,N]
    return fm.Batch(x, sound[..., None] / 2)


# %%
# Twelve notes an outer step; the inner steps of all of them are one call.
torch.manual_seed(0)
net = fm.siren(1, 1, width=64, depth=4, w0=60.0)
maml = fm.MAML(net, inner_steps=3, inner_lr=0.02)
optimizer = torch.optim.Adam(maml.parameters(), lr=5e-4)
for _ in range(300):
    loss = maml(notes(12))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

# %%
# A new note after three steps, and the error over thirty of them. The random start has the best of
# five rates, chosen on other notes.
batch, others = notes(16), notes(16)
random = net.init(generator=torch.Generator().manual_seed(1))[0]


def errors(init, lr, on):
    return fm.adapt(net, init, on, 31, lr).losses.mean(1)  # [31]


rate = min((0.003, 0.01, 0.02, 0.05, 0.1), key=lambda lr: errors(random, lr, others)[3].item())
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
for name, init, lr in (("learned", maml.init.detach(), 0.02), ("random", random, rate)):
    fit = fm.adapt(net, init, batch, 3, lr)
    y = fm.mlp(net, fit.params, x).detach()
    left.plot(x[:, 0], y[0, :, 0], label=f"{name} start, 3 steps")
    right.semilogy(errors(init, lr, batch), label=f"{name}, rate {lr:g}")
left.plot(x[:, 0], batch.y[0, :, 0], "k:", label="target")
left.set(xlabel="time", ylabel="amplitude")
right.set(xlabel="gradient steps", ylabel="mean squared error, 16 notes")
left.legend(fontsize=8)
right.legend(fontsize=8)
figure.tight_layout()
