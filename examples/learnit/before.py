"""The paper authors' SIREN in JAX and haiku: a checkpoint is read, trained on by MAML
and fitted to a picture.

Source: the images notebook of Tancik et al. 2021, github.com/tancik/learnit.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from jax.example_libraries import optimizers

from examples.shared import pictures


class SirenLayer(hk.Module):
    def __init__(self, outputs: int, first: bool = False, last: bool = False, w0: float = 200.0):
        super().__init__()
        self.outputs, self.first, self.last, self.w0 = outputs, first, last, w0

    def __call__(self, x):
        inputs = x.shape[-1]
        b = 1 / inputs if self.first else np.sqrt(6 / inputs) / self.w0
        x = hk.Linear(self.outputs, w_init=hk.initializers.RandomUniform(-b, b))(x)
        return x + 0.5 if self.last else jnp.sin(self.w0 * x)


class Siren_Model(hk.Module):
    def __init__(self, width: int = 64, depth: int = 4):
        super().__init__()
        self.width, self.depth = width, depth

    def __call__(self, x):
        x = SirenLayer(self.width, first=True)(x)
        for _ in range(self.depth - 2):
            x = SirenLayer(self.width)(x)
        return SirenLayer(3, last=True)(x)


model = hk.without_apply_rng(hk.transform(lambda x: Siren_Model()(x)))


def loss(params, x, target):
    return jnp.mean((model.apply(params, x) - target) ** 2)


def inner(params, x, target):
    """Two SGD steps."""
    for _ in range(2):
        grads = jax.grad(loss)(params, x, target)
        params = jax.tree.map(lambda p, g: p - 1e-2 * g, params, grads)
    return params


@jax.jit
def outer(params, x, y):
    """(the mean loss after the inner steps, its gradient)."""

    def after(params):
        return jax.vmap(lambda target: loss(inner(params, x, target), x, target))(y).mean()

    return jax.value_and_grad(after)(params)


def checkpoint(path: str | Path) -> None:
    """A start, as haiku draws it, to a file."""
    with open(path, "wb") as file:
        pickle.dump(model.init(jax.random.PRNGKey(0), jnp.zeros((1, 2))), file)


def flat(tree) -> np.ndarray:
    """[P] layer by layer, weight [out,in] and bias, to compare with."""
    names = sorted(tree, key=lambda name: (len(name), name))
    parts = [part for name in names for part in (tree[name]["w"].T, tree[name]["b"])]
    return np.concatenate([np.ravel(part) for part in parts])


def main(
    path: str | Path = "start.pkl", outer_steps: int = 3, tasks: int = 16, side: int = 32
) -> dict[str, np.ndarray]:
    x, y = (jnp.asarray(a.numpy()) for a in pictures(tasks, side, coords="unit"))
    x = x[0]  # [N,2]
    if not Path(path).exists():
        checkpoint(path)
    with open(path, "rb") as file:
        params = pickle.load(file)
    start, update, get = optimizers.adam(1e-4)
    state, losses = start(params), []
    for step in range(outer_steps):
        value, grads = outer(get(state), x, y)
        state = update(step, grads, state)
        losses.append(float(value))
    params, fit = get(state), []
    for _ in range(3):  # fits the first picture
        value, step_grads = jax.value_and_grad(loss)(params, x, y[0])
        params = jax.tree.map(lambda p, g: p - 1e-2 * g, params, step_grads)
        fit.append(float(value))
    made = {"losses": np.array(losses), "gradient": flat(grads), "params": flat(get(state))}
    return {**made, "fit": np.array(fit)}


if __name__ == "__main__":
    result = main(*sys.argv[1:])
    print(result["losses"], result["fit"])
