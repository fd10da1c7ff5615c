"""
Text images with MAML
=====================

A start for pictures of text: after two gradient steps from it, a string that was never seen can
be read. From a random start the same steps give noise.
"""

# %%
# The class of signals is rendered when it is asked for: image i is a function of the seed and i.
import matplotlib.pyplot as plt
import torch

import fastmeta as fm
from fastmeta.tasks import images, text

torch.manual_seed(0)
net = fm.siren(2, 3, width=64, depth=5, w0=60.0, output_shift=0.5)
train, _, test = text.text_splits(size=40, train=600, test=4)

# %%
# One outer step takes six strings, walks K = 2 steps of gradient descent from the start on each of
# them, and asks for the gradient of the losses at the end with respect to the start.
maml = fm.MAML(net, inner_steps=2, inner_lr=0.05)
optimizer = torch.optim.Adam(maml.parameters(), lr=5e-4)
losses = []
for _, pixels, _ in images.batches(train, tasks=6, seed=0, stop=150):
    loss = maml(images.image_batch(pixels, net))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

# %%
# Four strings that were not among them, fitted from both starts; the random one has the best of
# four rates.
batch = images.image_batch(torch.stack([test[i] for i in range(4)]), net)
random = net.init(generator=torch.Generator().manual_seed(1))[0]


def fitted(init, steps, lr):
    """Pictures [T,H,W,C], and their mean score in dB."""
    fit = fm.adapt(net, init, batch, steps, lr)
    y = fm.mlp(net, fit.params, batch.x).detach()
    psnr = -10 * torch.log10(((y - batch.y) ** 2).mean((1, 2))).mean().item()
    return images.to_pixels(y.clamp(0, 1), 40), psnr


rate = max((0.02, 0.05, 0.1, 0.2), key=lambda lr: fitted(random, 2, lr)[1])
shown = {}
for name, init, lr in (("learned", maml.init.detach(), 0.05), ("random", random, rate)):
    for steps in (0, 2):
        pictures, psnr = fitted(init, steps, lr)
        shown[f"{name}, {steps} steps\n{psnr:.1f} dB"] = pictures
shown["target\n"] = images.to_pixels(batch.y, 40)

figure, axes = plt.subplots(4, 5, figsize=(8, 6.8))
for column, (name, pictures) in zip(axes.T, shown.items(), strict=True):
    column[0].set_title(name, fontsize=9)
    for ax, picture in zip(column, pictures, strict=True):
        ax.imshow(picture)
        ax.axis("off")
figure.tight_layout()

# %%
# The loss after two steps, over the outer steps.
figure, ax = plt.subplots(figsize=(6, 2.6))
ax.semilogy(losses)
ax.set(xlabel="outer step", ylabel="loss after 2 inner steps")
figure.tight_layout()
