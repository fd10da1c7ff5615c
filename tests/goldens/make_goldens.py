"""Writes goldens.npz: the paper's formulas in plain jax.numpy, float64, every derivative by jax.

    python make_goldens.py            (needs jax and numpy, nothing else; about two minutes)

tests/test_goldens.py compares fastmeta with these numbers where JAX is not installed. Nothing here
knows fastmeta: a network is a list of (w [in,out], b [out]), the projector is ``map_coordinates``,
an adapted start is an unrolled loop under ``jax.grad``. Keys are "section/quantity"; what float32
holds exactly (the random inputs) is stored as float32, to be read as float64.

Flat parameters [P]: layer by layer, weight [out,in] row-major, then bias.
Letters: T tasks, N points, D coordinates, C outputs, P parameters, K inner steps, A angles, R rays,
S samples.
Source: Tancik et al. 2021 and the authors' notebooks.
"""

from functools import partial
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_threefry_partitionable", False)

GOLDENS = {}
SINE_COSINE = np.float32(np.pi / 2)  # fastmeta keeps phases and frequencies in float32


def store(section, **arrays):
    for name, value in arrays.items():
        value = np.asarray(value)
        assert np.isfinite(value).all(), f"{section}/{name}"
        exact = np.array_equal(value.astype(np.float32), value)
        GOLDENS[f"{section}/{name}"] = value.astype(np.float32) if exact else value


def held_by_float32(value):
    return np.asarray(value, np.float32).astype(np.float64)


# ---------------------------------------------------------------- networks


def unflatten(flat, sizes):
    """[P] -> [(w [in,out], b [out]), ...]."""
    layers, at = [], 0
    for i, o in sizes:
        w = flat[at : at + i * o].reshape(o, i).T
        layers.append((w, flat[at + i * o : at + i * o + o]))
        at += i * o + o
    assert at == flat.shape[0]
    return layers


def sizes_of(inputs, width, depth, outputs):
    dims = [inputs] + [width] * (depth - 1) + [outputs]
    return list(pairwise(dims))


ACTIVATIONS = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "softplus": jax.nn.softplus,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
    "none": lambda z: z,
    "linear": lambda z: z,
}


def siren(layers, x, w0, shift=0.5):
    """sin(w0 (xW + b)), the last layer xW + b + shift without w0."""
    h = x
    for w, b in layers[:-1]:
        h = jnp.sin(w0 * (h @ w + b))
    w, b = layers[-1]
    return h @ w + b + shift


def mlp(layers, h, activation="relu", output="linear", shift=0.0):
    for w, b in layers[:-1]:
        h = ACTIVATIONS[activation](h @ w + b)
    w, b = layers[-1]
    return ACTIVATIONS[output](h @ w + b) + shift


def encode(x, B, phi):
    return jnp.sin(x @ B + phi)


def siren_start(rng, sizes, w0, tasks):
    """U(±1/in) first, U(±√(6/in)/w0) after; biases not 0, so that w0's hold on them shows."""
    rows = []
    for index, (i, o) in enumerate(sizes):
        bound = 1 / i if index == 0 else np.sqrt(6 / i) / w0
        rows += [rng.uniform(-bound, bound, (tasks, o * i)), rng.uniform(-1, 1, (tasks, o)) / w0]
    return held_by_float32(np.concatenate(rows, 1))


def dense_start(rng, sizes, tasks):
    rows = []
    for i, o in sizes:
        rows += [rng.normal(0, np.sqrt(1.5 / i), (tasks, o * i)), rng.normal(0, 0.2, (tasks, o))]
    return held_by_float32(np.concatenate(rows, 1))


# ---------------------------------------------------------------- losses


def mse(y, target):
    return jnp.mean((y - target) ** 2)  # over points and channels


def l1(y, target):
    return jnp.mean(jnp.abs(y - target))


def clamped_l1(y, target, clamp):
    return jnp.mean(jnp.abs(jnp.clip(y, -clamp, clamp) - jnp.clip(target, -clamp, clamp)))


def derivatives(loss, params, v, *data):
    """loss [T], grad [T,P], Hessian-vector product [T,P] of loss(p, *data of the task)."""

    def one(p, u, *d):
        grad = jax.grad(lambda q: loss(q, *d))
        return loss(p, *d), *jax.jvp(grad, (p,), (u,))

    value, grad, hvp = jax.vmap(one)(params, v, *data)
    return {"loss": value, "grad": grad, "hvp": hvp}


# ---------------------------------------------------------------- a, b, c, g


def section_gaussian():
    """In float32: the authors' CT weights belong to normal(PRNGKey(0), (2, 256)) * 30."""
    for seed, shape in ((0, (2, 256)), (7, (3, 5)), (2**40 + 3, (4,))):
        store(
            "normal",
            **{f"seed{seed}": jax.random.normal(jax.random.PRNGKey(seed), shape, jnp.float32)},
        )


def section_siren():
    T = 3
    for name, seed, w0, width, depth, N in (
        ("siren200", 1, 200.0, 9, 4, 17),
        ("siren30", 2, 30.0, 11, 3, 13),
    ):
        rng, sizes = np.random.default_rng(seed), sizes_of(2, width, depth, 3)
        params, v = siren_start(rng, sizes, w0, T), siren_start(rng, sizes, w0, T)
        x, y = (
            held_by_float32(rng.uniform(0, 1, (T, N, 2))),
            held_by_float32(rng.uniform(0, 1, (T, N, 3))),
        )
        w = held_by_float32(rng.normal(size=(T, N, 2)))

        def forward(p, x, sizes=sizes, w0=w0):
            return siren(unflatten(p, sizes), x, w0)

        def loss(p, x, y, forward=forward):
            return mse(forward(p, x), y)

        def slope_along(p, x, y, w, loss=loss):  # <w, dL/dx>
            return jnp.sum(w * jax.grad(loss, argnums=1)(p, x, y))

        store(name, params=params, v=v, x=x, y=y)
        store(name, out=jax.vmap(forward)(params, x), **derivatives(loss, params, v, x, y))
        store(name, x_bar=jax.vmap(jax.grad(loss, argnums=1))(params, x, y))
        if name == "siren200":
            mixed, twice = jax.vmap(jax.grad(slope_along, argnums=(0, 1)))(params, x, y, w)
            store(name, w=w, mixed=mixed, x_twice=twice)


CASES = (  # activation, output activation, shift
    ("relu", "linear", 0.25),
    ("tanh", "sigmoid", 0.0),
    ("sigmoid", "tanh", 0.0),
    ("softplus", "softplus", -0.5),
    ("gelu", "linear", 0.0),
    ("silu", "relu", 0.5),
    ("none", "linear", 0.0),
)


def section_activations():
    T, N, rng, sizes = 2, 15, np.random.default_rng(3), sizes_of(3, 6, 3, 2)
    params = dense_start(rng, sizes, T)
    v = held_by_float32(rng.normal(size=params.shape))
    x, y = (
        held_by_float32(rng.uniform(-1, 1, (T, N, 3))),
        held_by_float32(rng.normal(size=(T, N, 2))),
    )
    store("activations", params=params, v=v, x=x, y=y)
    for activation, output, shift in CASES:

        def forward(p, x, case=(activation, output, shift)):
            return mlp(unflatten(p, sizes), x, *case)

        def loss(p, x, y, forward=forward):
            return mse(forward(p, x), y)

        store(f"activations/{activation}", out=jax.vmap(forward)(params, x))
        store(f"activations/{activation}", **derivatives(loss, params, v, x, y))


def section_losses():
    """A distance network (tanh) under L1 and L1 clamped at 0.1; the data straddle the clamp."""
    T, N, rng, sizes = 2, 31, np.random.default_rng(4), sizes_of(2, 7, 3, 1)
    params = dense_start(rng, sizes, T) * 0.5
    v = held_by_float32(rng.normal(size=params.shape))
    x, y = (
        held_by_float32(rng.uniform(-1, 1, (T, N, 2))),
        held_by_float32(rng.normal(0, 0.12, (T, N, 1))),
    )
    store("losses", params=params, v=v, x=x, y=y)
    for name, measure in (("l1", l1), ("clamped", partial(clamped_l1, clamp=0.1))):

        def loss(p, x, y, measure=measure):
            return measure(mlp(unflatten(p, sizes), x, "tanh"), y)

        store(f"losses/{name}", **derivatives(loss, params, v, x, y))
    seen = jnp.abs(jax.vmap(lambda p, x: mlp(unflatten(p, sizes), x, "tanh"))(params, x))
    assert 0.2 < jnp.mean(seen > 0.1) < 0.8 and 0.2 < np.mean(np.abs(y) > 0.1) < 0.8


# ---------------------------------------------------------------- d: learned starts


def step_sgd(theta, g, alpha, state, k):
    return theta - alpha * g, state


def step_momentum(theta, g, alpha, state, k, mu=0.9, nesterov=False):
    b = mu * (0.0 if state is None else state) + g
    return theta - alpha * (g + mu * b if nesterov else b), b


def step_adam(theta, g, alpha, state, k, beta1=0.9, beta2=0.999, eps=1e-8):
    m, v = (0.0, 0.0) if state is None else state
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    m_hat, v_hat = m / (1 - beta1 ** (k + 1)), v / (1 - beta2 ** (k + 1))
    return theta - alpha * m_hat / (jnp.sqrt(v_hat) + eps), (m, v)


def inner_loop(loss, theta, alpha, step, decay=0.0, first_order=False):
    """θ_0..θ_K and the K losses; alpha [K,P].

    First order: the direction of a step (weight decay in it) is a constant, its rate is not.
    """
    path, losses, state = [theta], [], None
    for k in range(alpha.shape[0]):
        at = jax.lax.stop_gradient(theta) if first_order else theta
        g = jax.grad(loss)(at) + decay * at
        losses.append(loss(theta))
        theta, state = step(theta, g, alpha[k], state, k)
        path.append(theta)
    return jnp.stack(path), jnp.stack(losses)


RULES = {  # name: step, weight decay
    "sgd": (step_sgd, 0.0),
    "momentum": (step_momentum, 0.0),
    "nesterov": (partial(step_momentum, nesterov=True), 0.0),
    "decay": (step_momentum, 0.01),
    "nesterov_decay": (partial(step_momentum, nesterov=True), 0.01),
    "adam": (step_adam, 0.0),
}


def meta_gradients(task_loss, rule, start, alpha, K, support, query):
    """Mean query loss at θ_K; its gradient in the start and in alpha, [exact, first order].

    alpha broadcasts to [K,T,P]; rates of further steps, if it has any, get gradient 0.
    """
    step, decay = RULES[rule]
    T = support[0].shape[0]

    def outer(theta, alpha, first_order):
        alpha = alpha[:K] if jnp.ndim(alpha) == 3 else alpha
        rates = jnp.broadcast_to(alpha, (K, T, theta.shape[0]))

        def one(rate, support, query):
            path, _ = inner_loop(
                lambda p: task_loss(p, *support), theta, rate, step, decay, first_order
            )
            return task_loss(path[-1], *query)

        return jnp.mean(jax.vmap(one, in_axes=(1, 0, 0))(rates, support, query))

    run = jax.jit(jax.value_and_grad(outer, argnums=(0, 1)), static_argnums=2)
    (loss, exact), (_, first) = run(start, alpha, False), run(start, alpha, True)
    pairs = [jnp.stack(pair) for pair in zip(exact, first, strict=True)]
    return {"loss": loss, "grad": pairs[0], "rate": pairs[1]}


def section_maml():
    T, N, rng, sizes = 3, 11, np.random.default_rng(5), sizes_of(2, 6, 3, 2)
    P = sum(i * o + o for i, o in sizes)

    def task_loss(p, x, y):
        return mse(siren(unflatten(p, sizes), x, 30.0), y)

    start = siren_start(rng, sizes, 30.0, 1)[0]
    data = {
        name: tuple(held_by_float32(rng.uniform(0, 1, (T, n, c))) for c in (2, 2))
        for name, n in (("support", N), ("query", N + 6))
    }
    for name, (x, y) in data.items():
        store("maml", **{f"{name}_x": x, f"{name}_y": y})
    store("maml", start=start)
    rates = {  # name of the case: rule, alpha
        "sgd": ("sgd", np.float64(1e-2)),
        "sgd_parameter": ("sgd", held_by_float32(rng.uniform(2e-3, 2e-2, P))),
        "sgd_step": ("sgd", held_by_float32(rng.uniform(2e-3, 2e-2, (3, 1, 1)))),
        "sgd_task": ("sgd", held_by_float32(rng.uniform(2e-3, 2e-2, (T, 1)))),
        "momentum": ("momentum", np.float64(5e-3)),
        "nesterov": ("nesterov", np.float64(5e-3)),
        "decay": ("decay", np.float64(5e-3)),
        "nesterov_decay": ("nesterov_decay", np.float64(5e-3)),
        "adam": ("adam", np.float64(1e-2)),
    }
    for name, (rule, alpha) in rates.items():
        found = [
            meta_gradients(task_loss, rule, start, alpha, K, data["support"], data[query])
            for K in (2, 3)
            for query in ("support", "query")
        ]
        for key in ("loss", "grad", "rate"):  # [K, query, ...] with K in (2, 3)
            both = np.stack([f[key] for f in found])
            store(f"maml/{name}", **{key: both.reshape(2, 2, *both.shape[1:])})
        store(f"maml/{name}", alpha=alpha)

    # fits of K = 3 steps, and Reptile's pseudo-gradient: start - mean over tasks of θ_K
    for name in ("sgd", "sgd_parameter", "momentum", "nesterov", "decay", "adam"):
        rule, alpha = rates[name]
        step, decay = RULES[rule]
        rate = jnp.broadcast_to(alpha, (3, P))
        path, losses = jax.vmap(
            lambda x, y, r=rate, s=step, d=decay: inner_loop(
                lambda p: task_loss(p, x, y), start, r, s, d
            )
        )(*data["support"])
        last = jax.vmap(task_loss)(path[:, -1], *data["support"])
        trajectory = path.transpose(1, 0, 2)  # [K+1,T,P]; of the others the end is kept
        store(f"fit/{name}", trajectory=trajectory[0 if name == "sgd" else -1 :], losses=losses.T)
        store(f"fit/{name}", reptile=start - path[:, -1].mean(0), reptile_loss=last.mean())
        if name == "adam":  # no gradient is 0, or near enough for Adam's square root to lose digits
            g = jax.vmap(jax.vmap(jax.grad(task_loss), (0, None, None)))(
                path[:, :-1], *data["support"]
            )
            assert jnp.abs(g).min() > 1e-6, jnp.abs(g).min()


# ---------------------------------------------------------------- e: computed tomography


def rotated_indices(size, theta):
    y, x = jnp.meshgrid(jnp.arange(size) / size - 0.5, jnp.arange(size) / size - 0.5, indexing="ij")
    x_rotated = x * jnp.cos(theta) - y * jnp.sin(theta)
    y_rotated = x * jnp.sin(theta) + y * jnp.cos(theta)
    return jnp.stack([y_rotated, x_rotated]).reshape(2, -1) * size + 0.5 * size


def project(image, angles):
    """[N,N], [A] -> [A,N]: rotate by nearest pixel (half away from 0; outside, 0), mean of rows."""
    size = image.shape[0]

    def one(theta):
        rotated = map_coordinates(image, rotated_indices(size, theta), order=0, mode="constant")
        return rotated.reshape(size, size).mean(0)

    return jax.vmap(one)(angles)


def far_from_ties(size, angles):
    """No index near a half: the goldens then depend on no rounding of the cosine."""
    for theta in np.ravel(angles):
        index = rotated_indices(size, theta)
        assert jnp.abs(index - jnp.floor(index) - 0.5).min() > 1e-9, (size, theta)


def section_projector():
    rng = np.random.default_rng(6)
    ones = project(jnp.ones((256, 256)), jnp.array([0, np.pi / 4, np.pi / 2]))
    means, low = ones.mean(1), ones.min(1)
    assert jnp.all(ones[0] == 1) and abs(low[1] - 0.418) < 5e-4 and abs(means[1] - 0.828) < 5e-4
    assert abs(means[2] - 0.996) < 5e-4
    store("project/ones", sinogram=ones)
    # 33 does without π/4: an odd size has a whole diagonal of exact ties there
    for size, angles in (
        (24, [[0, np.pi / 4, np.pi / 2, 0, 0]] * 2),
        (33, [[0, np.pi / 2, 0, 0, 0]]),
    ):
        angles = np.array(angles)
        angles[:, 3:] = rng.uniform(0, np.pi, angles[:, 3:].shape)
        if size == 33:
            angles[0, 2] = 2.5
        far_from_ties(size, angles)
        image = held_by_float32(rng.normal(size=(len(angles), size, size)))
        cotangent = held_by_float32(rng.normal(size=(*angles.shape, size)))
        sinogram, pull = jax.vjp(
            lambda i, a=angles: jax.vmap(project)(i, jnp.asarray(a)), jnp.asarray(image)
        )
        store(f"project/{size}", image=image, angles=angles, cotangent=cotangent)
        store(f"project/{size}", sinogram=sinogram, image_bar=pull(jnp.asarray(cotangent))[0])


def section_tomography():
    """Gaussian features, ReLU, sigmoid on the 'xy' grid [0,1)² -> sinogram -> MSE."""
    T, A, size, F, rng = 2, 3, 11, 8, np.random.default_rng(7)
    sizes = sizes_of(2 * F, 7, 3, 1)
    B = jax.random.normal(jax.random.PRNGKey(0), (2, F), jnp.float32) * jnp.float32(30)
    B, phi = jnp.concatenate([B, B], 1), np.repeat(np.float32([0, SINE_COSINE]), F)
    axis = jnp.linspace(0, 1, size + 1)[:-1]
    grid = jnp.stack(jnp.meshgrid(axis, axis, indexing="xy"), -1).reshape(-1, 2)
    angles = rng.uniform(0, np.pi, (T, A))
    far_from_ties(size, angles)
    params = dense_start(rng, sizes, T)
    v = held_by_float32(rng.normal(size=params.shape))
    y = held_by_float32(rng.uniform(0, 1, (T, A, size)))
    store("ct", B=B, phi=phi, grid=grid, angles=angles, params=params, v=v, y=y)
    B, phi = B.astype(jnp.float64), phi.astype(np.float64)

    def image(p, features):
        return mlp(unflatten(p, sizes), features, "relu", "sigmoid")

    def loss(p, angles, y):
        return mse(project(image(p, encode(grid, B, phi)).reshape(size, size), angles), y)

    store("ct", image=jax.vmap(lambda p: image(p, encode(grid, B, phi)))(params))
    q = grid @ B[:, :F]
    store(
        "ct",
        pure_image=jax.vmap(lambda p: image(p, jnp.concatenate([jnp.sin(q), jnp.cos(q)], 1)))(
            params
        ),
    )
    store("ct", **derivatives(loss, params, v, angles, y))
    store(
        "ct/maml",
        **meta_gradients(loss, "sgd", params[0], np.float64(0.5), 2, (angles, y), (angles, y)),
    )


# ---------------------------------------------------------------- f: view synthesis


def frequency_features(x, exponents):
    """Per frequency sin(x, y, z), then cos(x, y, z); no π, xyz itself not included."""
    parts = [part for f in 2.0**exponents for part in (jnp.sin(f * x), jnp.cos(f * x))]
    return jnp.concatenate(parts, -1)


def frequency_matrix(exponents):
    eye = np.eye(3)
    B = np.concatenate([np.concatenate([f * eye, f * eye], 1) for f in 2.0**exponents], 1)
    return B.astype(np.float32), np.tile(np.repeat(np.float32([0, SINE_COSINE]), 3), len(exponents))


def section_encoding():
    rng, exponents = np.random.default_rng(8), np.linspace(0, 8, 20)
    x = held_by_float32(rng.uniform(-1.5, 1.5, (3, 3)))
    B, phi = frequency_matrix(exponents)
    store("frequencies", x=x, B=B, phi=phi, pure=frequency_features(x, exponents))
    store("frequencies", rounded=encode(x, B.astype(np.float64), phi.astype(np.float64)))


DENSITIES = {"relu": jax.nn.relu, "softplus": jax.nn.softplus}
MARCHES = {  # δ of the last sample, white background
    "shapenet": (1e-3, True),
    "phototourism": (1e10, False),
}


def composite(raw, t, last_interval, white, density):
    """[S,4], [S] -> rgb [3], depth, acc."""
    color, sigma = jax.nn.sigmoid(raw[:, :3]), DENSITIES[density](raw[:, 3])
    delta = jnp.concatenate([t[1:] - t[:-1], jnp.array([last_interval])])
    alpha = -jnp.expm1(-sigma * delta)
    transmitted, weights = 1.0, []
    for a in alpha:
        weights.append(transmitted * a)
        transmitted = transmitted * jnp.minimum(1.0, 1.0 - a + 1e-10)
    w = jnp.stack(weights)
    rgb = w @ color + (1.0 - w.sum() if white else 0.0)
    return rgb, w @ t, w.sum()


def section_composite():
    T, R, S, rng = 2, 4, 9, np.random.default_rng(9)
    raw = rng.normal(0, 1.5, (T, R, S, 4))
    raw[0, 0, :, 3] = -1.0  # nothing there (relu)
    raw[0, 1, 4, 3] = 90.0  # opaque in the middle
    raw[1, 2, :, 3] = 0.0  # relu'(0) = 0
    raw = held_by_float32(raw)
    t = held_by_float32(2 + 4 * np.sort(rng.uniform(0, 1, (T, R, S)), -1))
    thin = raw.copy()  # a last sample so thin that 1e10 does not hide it: adjoints of size 1e10
    thin[..., 3] = held_by_float32(-np.abs(thin[..., 3]))
    thin[..., -1, 3] = held_by_float32(rng.uniform(1e-11, 3e-10, (T, R)))
    bars = [held_by_float32(rng.normal(size=s)) for s in ((T, R, 3), (T, R), (T, R))]
    store("composite", raw=raw, thin=thin, t=t, rgb_bar=bars[0], depth_bar=bars[1], acc_bar=bars[2])
    for kind, (last, white) in MARCHES.items():
        for density in DENSITIES:
            for name, r in (("raw", raw), ("thin", thin)):
                if name == "thin" and (kind, density) != ("phototourism", "relu"):
                    continue
                one = partial(composite, last_interval=last, white=white, density=density)
                out, pull = jax.vjp(jax.vmap(jax.vmap(one)), jnp.asarray(r), jnp.asarray(t))
                raw_bar, t_bar = pull(tuple(jnp.asarray(b) for b in bars))
                store(f"composite/{kind}/{density}/{name}", rgb=out[0], depth=out[1], acc=out[2])
                store(f"composite/{kind}/{density}/{name}", raw_bar=raw_bar, t_bar=t_bar)


def look_at(eye, up=(0.0, 0.0, 1.0)):
    """A camera-to-world pose [4,4] that looks at the origin along its own -z."""
    back = eye / np.linalg.norm(eye)
    right = np.cross(up, back) / np.linalg.norm(np.cross(up, back))
    pose = np.eye(4)
    pose[:3, :] = np.stack([right, np.cross(back, right), back, eye], 1)
    return held_by_float32(pose)


def pixel_indices(height, width):
    return jnp.meshgrid(jnp.arange(width), jnp.arange(height), indexing="xy")


def shapenet_rays(height, width, camera_angle_x, c2w):
    """Blender's: ((i − W/2)/f, −(j − H/2)/f, −1) rotated by c2w; not normalised, no half pixel."""
    focal = width / 2 / jnp.tan(camera_angle_x / 2)
    i, j = pixel_indices(height, width)
    d = (
        jnp.stack([(i - width / 2) / focal, -(j - height / 2) / focal, -jnp.ones(i.shape)], -1)
        @ c2w[:3, :3].T
    )
    return jnp.broadcast_to(c2w[:3, 3], d.shape), d  # [H,W,3] twice


def phototourism_rays(height, width, inverse_k, c2w):
    """(i, j, 1) K⁻ᵀ rotated by c2w; the translation × 0.05. K⁻¹ holds the flips (+, −, −1)."""
    i, j = pixel_indices(height, width)
    d = jnp.stack([i, j, jnp.ones(i.shape)], -1) @ inverse_k.T @ c2w[:3, :3].T
    return jnp.broadcast_to(c2w[:3, 3] * 0.05, d.shape), d


def section_views():
    T, exponents, rng = 2, np.linspace(0, 2, 3), np.random.default_rng(10)
    B32, phi32 = frequency_matrix(exponents)
    B, phi = B32.astype(np.float64), phi32.astype(np.float64)
    sizes = sizes_of(B.shape[1], 7, 3, 4)
    params = dense_start(rng, sizes, T)
    params[:, -1] += 0.5  # densities that live
    v = held_by_float32(rng.normal(size=params.shape))
    store("views", params=held_by_float32(params), v=v)
    params = held_by_float32(params)

    poses = np.stack([look_at(np.array([2.8, 1.9, 2.1])), look_at(np.array([-1.2, 3.4, 1.7]))])
    H, W = 4, 5
    rays = jax.vmap(lambda c: shapenet_rays(H, W, 0.6, c))(jnp.asarray(poses))
    store("shapenet", poses=poses, size=np.array([H, W]), camera_angle_x=np.float64(0.6))
    chairs = (rays, np.full(T, 2.0), np.full(T, 6.0))

    f, far_poses = 7.0, poses.copy()
    far_poses[:, :3, 3] = held_by_float32(poses[:, :3, 3] * 12.0)
    H, W = 3, 5
    inverse_k = np.array([[1 / f, 0, -W / 2 / f], [0, -1 / f, H / 2 / f], [0, 0, -1]])
    bounds = np.array([[31.0, 90.0], [22.0, 75.0]])
    near, far = (bounds * np.array([0.9, 1.2]) * 0.05).T
    rays = jax.vmap(lambda c: phototourism_rays(H, W, inverse_k, c))(jnp.asarray(far_poses))
    store(
        "phototourism", poses=far_poses, size=np.array([H, W]), inverse_k=inverse_k, bounds=bounds
    )
    landmarks = (rays, near, far)

    S = 9
    for name, ((o, d), near, far), density in (
        ("shapenet", chairs, "relu"),
        ("phototourism", landmarks, "softplus"),
    ):
        last, white = MARCHES[name]
        o, d = o.reshape(T, -1, 3), d.reshape(T, -1, 3)
        y = held_by_float32(rng.uniform(0, 1, o.shape))
        store(name, origins=o, directions=d, near=near, far=far, y=y)

        def render(p, o, d, near, far, march=(last, white, density)):
            t = jnp.linspace(near, far, S)

            def one(o, d):
                x = o + t[:, None] * d  # [S,3]
                return composite(mlp(unflatten(p, sizes), encode(x, B, phi)), t, *march)

            return jax.vmap(one)(o, d)

        def loss(p, o, d, near, far, y, render=render):
            return mse(render(p, o, d, near, far)[0], y)

        rgb, depth, acc = jax.vmap(render)(params, o, d, near, far)
        assert acc.mean() > 0.1 and rgb.std() > 0.02
        bars = tuple(held_by_float32(rng.normal(size=a.shape)) for a in (rgb, depth, acc))

        def weighed(p, o, d, near, far, bars, render=render):
            return sum(
                jnp.sum(a * b) for a, b in zip(render(p, o, d, near, far), bars, strict=True)
            )

        data = (o, d, near, far, y)
        store(
            name, rgb=rgb, depth=depth, acc=acc, rgb_bar=bars[0], depth_bar=bars[1], acc_bar=bars[2]
        )
        store(name, params_bar=jax.vmap(jax.grad(weighed))(params, o, d, near, far, bars))
        store(name, **derivatives(loss, params, v, *data))
        store(
            f"{name}/maml", **meta_gradients(loss, "sgd", params[0], np.float64(0.1), 2, data, data)
        )


def main():
    GOLDENS["versions"] = np.array([f"jax {jax.__version__}", f"numpy {np.__version__}"])
    section_gaussian()
    section_siren()
    section_activations()
    section_losses()
    section_maml()
    section_projector()
    section_tomography()
    section_encoding()
    section_composite()
    section_views()
    path = Path(__file__).with_name("goldens.npz")
    np.savez_compressed(path, **GOLDENS)
    size = path.stat().st_size / 1000
    print(f"{path.name}: {len(GOLDENS)} arrays, {size:.0f} kB, {GOLDENS['versions'][0]}")


if __name__ == "__main__":
    main()
