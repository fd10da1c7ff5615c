"""
Learned rates: Meta-SGD
=======================

``rule="meta_sgd"`` learns a rate for each parameter along with the start. The exact meta-gradient
reaches both.
"""

# %%
# The same phantoms and the same outer steps, once with one fixed rate and once with learned ones,
# which begin at that rate.
import matplotlib.pyplot as plt
import torch

import fastmeta as fm
from fastmeta.tasks import images, phantoms

net = fm.siren(2, 1, width=32, depth=4, w0=30.0, output_shift=0.5)
init = net.init(generator=torch.Generator().manual_seed(0))[0]
train, _, test = phantoms.phantom_splits(size=32, train=2000, test=32)


def learned(rule):
    maml = fm.MAML(net, inner_steps=2, inner_lr=0.05, rule=rule, init=init)
    optimizer = torch.optim.Adam(maml.parameters(), lr=1e-3)
    losses = []
    for step in range(300):
        pixels = torch.stack([train[(4 * step + i) % len(train)] for i in range(4)])
        loss = maml(images.image_batch(pixels, net))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return maml, losses


fixed, fixed_losses = learned("sgd")
free, free_losses = learned("meta_sgd")

# %%
# On phantoms that were not among them, in dB after each step:
batch = images.image_batch(torch.stack([test[i] for i in range(32)]), net)
for name, maml in (("one fixed rate", fixed), ("learned rates", free)):
    rate = maml.inner_lr if maml is fixed else maml.inner_lr.detach()
    fit = fm.adapt(net, maml.init.detach(), batch, 3, rate, rule=maml.rule)
    scores = [f"{score:.1f}" for score in -10 * torch.log10(fit.losses).mean(1)]
    print(f"{name}: {', '.join(scores)} dB after 0, 1, 2 steps")

# %%
# The losses while learning, and where the rates went, layer by layer. Some are negative: nothing
# holds a rate above 0.
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
left.semilogy(fixed_losses, label="one fixed rate")
left.semilogy(free_losses, label="learned rates")
left.set(xlabel="outer step", ylabel="loss after 2 inner steps")
left.legend()
layers = [weight.flatten() for weight, _ in net.layers(free.inner_lr.detach())]
right.violinplot([layer.numpy() for layer in layers], showextrema=False, showmedians=True)
right.axhline(0.05, color="0.6", linestyle=":")
right.set(xlabel="layer", ylabel="rates of the weights", xticks=range(1, len(layers) + 1))
figure.tight_layout()
print(f"{(free.inner_lr < 0).float().mean():.1%} of the rates are below 0")
