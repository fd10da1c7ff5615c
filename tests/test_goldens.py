"""fastmeta in float64 against JAX on the paper's formulas (goldens/make_goldens.py).

Both sides take the same float32-rounded frequencies and phases, so only float64 round-off is left.
The largest relative errors seen are 6e-14 (rates through Adam, which divides by small gradients),
2e-14 (Reptile's small difference of weights) and below 3e-15 elsewhere; TIGHT leaves an order of
magnitude for other machines and orders of summation.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastmeta as fm
from fastmeta import rules

TIGHT = 1e-12
GOLDENS = np.load(Path(__file__).parent / "goldens" / "goldens.npz")
IMPLS = ("reference", None)  # the specification, and what a user who names no worker gets


def golden(key: str) -> Tensor:
    return torch.from_numpy(GOLDENS[key]).double()


def goldens(section: str, *names: str) -> list[Tensor]:
    return [golden(f"{section}/{name}") for name in names]


def agree(found: Tensor, key: str, tolerance: float = TIGHT, part=...) -> None:
    """Relative norm of the difference; both of one shape, and the golden not trivially zero."""
    wanted = golden(key)[part]
    assert found.dtype == torch.float64 and found.shape == wanted.shape, (key, found.shape)
    assert wanted.norm() > 0, key
    error = float((found.detach() - wanted).norm() / wanted.norm())
    assert error <= tolerance, f"{key}: relative error {error:.1e}, accepted {tolerance:.0e}"


def mse(y: Tensor, target: Tensor) -> Tensor:
    return ((y - target) ** 2).mean((1, 2))  # [T]


def leaf(value: Tensor) -> Tensor:
    return value.clone().requires_grad_()


def agree_on_loss(net, params, v, batch, section, impl) -> None:
    """loss_grad and loss_hvp against loss, grad and hvp of a section."""
    loss, grad = fm.loss_grad(net, params, batch, impl=impl)
    again, hvp = fm.loss_hvp(net, params, v, batch, impl=impl)
    agree(loss, f"{section}/loss")
    for g in (grad, again):
        agree(g, f"{section}/grad")
    agree(hvp, f"{section}/hvp")


def agree_on_autograd(loss_of, params, v, section) -> None:
    """The same three through autograd, twice; loss_of(params) -> [T]."""
    params = leaf(params)
    loss = loss_of(params)
    (grad,) = torch.autograd.grad(loss.sum(), params, create_graph=True)
    (hvp,) = torch.autograd.grad((grad * v).sum(), params)
    for name, found in (("loss", loss), ("grad", grad), ("hvp", hvp)):
        agree(found, f"{section}/{name}")


# -- a: JAX's normal numbers


@pytest.mark.parametrize(("seed", "shape"), [(0, (2, 256)), (7, (3, 5)), (2**40 + 3, (1, 4))])
def test_gaussian_matrix_is_jax_normal(seed, shape):
    """JAX evaluates erfinv as a float32 polynomial: at most 8 units in the last place apart."""
    wanted = GOLDENS[f"normal/seed{seed}"].reshape(shape)
    B = fm.Encoding.gaussian(*shape, 1.0, seed).B.numpy()
    assert wanted.dtype == B.dtype == np.float32 and B.shape == (shape[0], 2 * shape[1])
    for half in np.split(B, 2, axis=1):
        assert np.all(np.abs(half - wanted) <= 8 * np.spacing(np.abs(wanted)))


def test_ct_network_has_the_authors_matrix():
    encoding = fm.fourier_mlp(2, 1).encoding
    wanted = 30 * np.tile(GOLDENS["normal/seed0"], (1, 2))
    assert np.all(np.abs(encoding.B.numpy() - wanted) <= 8 * np.spacing(np.abs(wanted)))
    phi = np.repeat(np.float32([0, np.pi / 2]), 256)
    assert np.array_equal(encoding.phi.numpy(), phi)


# -- b, c, g: networks and losses

SIRENS = {
    "siren200": fm.siren(2, 3, width=9, depth=4, w0=200.0, output_shift=0.5),
    "siren30": fm.siren(2, 3, width=11, depth=3, w0=30.0, output_shift=0.5),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", SIRENS)
def test_siren(name, impl):
    net, (params, v, x, y) = SIRENS[name], goldens(name, "params", "v", "x", "y")
    agree(fm.mlp(net, params, x, impl=impl), f"{name}/out")
    agree_on_loss(net, params, v, fm.Batch(x, y), name, impl)
    agree_on_autograd(lambda p: mse(fm.mlp(net, p, x, impl=impl), y), params, v, name)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", SIRENS)
def test_siren_gradient_in_the_coordinates(name, impl):
    params, x, y = goldens(name, "params", "x", "y")
    params, x = leaf(params), leaf(x)
    loss = mse(fm.mlp(SIRENS[name], params, x, impl=impl), y).sum()
    (x_bar,) = torch.autograd.grad(loss, x, create_graph=True)
    agree(x_bar, f"{name}/x_bar")
    if name == "siren200":
        along = (x_bar * golden("siren200/w")).sum()
        mixed, twice = torch.autograd.grad(along, (params, x))
        agree(mixed, "siren200/mixed")
        agree(twice, "siren200/x_twice")


ACTIVATIONS = {  # output activation, shift
    "relu": ("linear", 0.25),
    "tanh": ("sigmoid", 0.0),
    "sigmoid": ("tanh", 0.0),
    "softplus": ("softplus", -0.5),
    "gelu": ("linear", 0.0),
    "silu": ("relu", 0.5),
    "none": ("linear", 0.0),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation(activation, impl):
    output, shift = ACTIVATIONS[activation]
    net = fm.MLP(3, 2, 6, 3, activation, output=output, output_shift=shift)
    params, v, x, y = goldens("activations", "params", "v", "x", "y")
    section = f"activations/{activation}"
    agree(fm.mlp(net, params, x, impl=impl), f"{section}/out")
    agree_on_loss(net, params, v, fm.Batch(x, y), section, impl)
    agree_on_autograd(lambda p: mse(fm.mlp(net, p, x, impl=impl), y), params, v, section)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("name", "loss"), [("l1", "l1"), ("clamped", ("l1", 0.1))])
def test_l1_losses(name, loss, impl):
    net = fm.MLP(2, 1, 7, 3, "tanh")
    params, v, x, y = goldens("losses", "params", "v", "x", "y")
    agree_on_loss(net, params, v, fm.Batch(x, y, loss=loss), f"losses/{name}", impl)


# -- d: fits and learned starts

START = fm.siren(2, 2, width=6, depth=3, w0=30.0, output_shift=0.5)
RULES = {
    "momentum": rules.Momentum(0.9),
    "nesterov": rules.Momentum(0.9, nesterov=True),
    "decay": rules.Momentum(0.9, weight_decay=0.01),
    "nesterov_decay": rules.Momentum(0.9, nesterov=True, weight_decay=0.01),
    "adam": rules.Adam(),
}
CASES = ("sgd", "sgd_parameter", "sgd_step", "sgd_task", *RULES)


def support(query: bool = False) -> fm.Batch:
    x, y, qx, qy = goldens("maml", "support_x", "support_y", "query_x", "query_y")
    return fm.Batch(x, y, query=fm.Batch(qx, qy) if query else None)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("query", [False, True])
@pytest.mark.parametrize("K", [2, 3])
@pytest.mark.parametrize("order", [2, 1])
@pytest.mark.parametrize("name", CASES)
def test_maml(name, order, K, query, impl):
    alpha = golden(f"maml/{name}/alpha")
    alpha = nn.Parameter(alpha[:K] if alpha.dim() == 3 else alpha)
    rule, start = RULES.get(name, "sgd"), golden("maml/start")
    maml = fm.MAML(START, K, alpha, order=order, rule=rule, init=start, impl=impl)
    loss = maml(support(query))
    loss.backward()
    at = (K - 2, int(query))
    agree(loss, f"maml/{name}/loss", part=at)
    agree(maml.init.grad, f"maml/{name}/grad", part=(*at, 2 - order))
    rate_at = (*at, 2 - order, slice(0, K)) if alpha.dim() == 3 else (*at, 2 - order)
    agree(alpha.grad, f"maml/{name}/rate", part=rate_at)


@pytest.mark.parametrize("order", [2, 1])
def test_meta_sgd_learns_its_rates(order):
    alpha = golden("maml/sgd_parameter/alpha")
    start = golden("maml/start")
    maml = fm.MAML(START, 3, alpha, order=order, rule="meta_sgd", init=start)
    maml(support(query=True)).backward()
    agree(maml.init.grad, "maml/sgd_parameter/grad", part=(1, 1, 2 - order))
    agree(maml.inner_lr.grad, "maml/sgd_parameter/rate", part=(1, 1, 2 - order))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("max_memory", [None, 0])
@pytest.mark.parametrize("name", ["sgd", "sgd_parameter", "momentum", "nesterov", "decay", "adam"])
def test_fit_and_reptile(name, max_memory, impl):
    start, alpha = goldens("maml", "start", f"{name}/alpha")
    options = {"rule": RULES.get(name, "sgd"), "max_memory": max_memory, "impl": impl}
    fit = fm.adapt(START, start, support(), 3, alpha, keep=name == "sgd", **options)
    agree(fit.params, f"fit/{name}/trajectory", part=-1)
    agree(fit.losses, f"fit/{name}/losses")
    if name == "sgd":
        agree(fit.trajectory, "fit/sgd/trajectory")
    reptile = fm.Reptile(START, 3, alpha, init=start, **options)
    loss = reptile(support())
    (3 * loss).backward()  # the incoming cotangent multiplies
    agree(loss, f"fit/{name}/reptile_loss")
    agree(reptile.init.grad / 3, f"fit/{name}/reptile")


# -- e: computed tomography


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [24, 33])
def test_projector_and_its_adjoint(size, impl):
    image, angles, cotangent = goldens(f"project/{size}", "image", "angles", "cotangent")
    image = leaf(image)
    sinogram = fm.project(image, angles, impl=impl)
    agree(sinogram, f"project/{size}/sinogram")
    (image_bar,) = torch.autograd.grad(sinogram, image, cotangent)
    agree(image_bar, f"project/{size}/image_bar")


def test_projector_on_ones():
    """The numbers of the authors' operator: 1.0 at 0; min .418, mean .828 at π/4; .996 at π/2."""
    angles = torch.tensor([[0, torch.pi / 4, torch.pi / 2]], dtype=torch.float64)
    sinogram = fm.project(torch.ones(1, 256, 256, dtype=torch.float64), angles)[0]
    agree(sinogram, "project/ones/sinogram")
    assert torch.equal(sinogram[0], torch.ones(256, dtype=torch.float64))
    seen = torch.stack([sinogram[1].min(), sinogram[1].mean(), sinogram[2].mean()])
    assert torch.allclose(seen, torch.tensor([0.418, 0.828, 0.996]).double(), atol=5e-4, rtol=0)


def tomograph() -> fm.MLP:
    encoding = fm.Encoding(golden("ct/B"), golden("ct/phi"))
    return fm.MLP(2, 1, 7, 3, encoding=encoding, output="sigmoid", coords="unit_xy")


def tomography() -> fm.Batch:
    grid, angles, y = goldens("ct", "grid", "angles", "y")
    return fm.Batch(grid, y, measure=fm.Project(angles))


@pytest.mark.parametrize("impl", IMPLS)
def test_tomography(impl):
    net, (params, v, grid, angles, y) = (
        tomograph(),
        goldens("ct", "params", "v", "grid", "angles", "y"),
    )
    image = fm.mlp(net, params, grid, impl=impl)
    agree(image, "ct/image")
    agree_on_loss(net, params, v, tomography(), "ct", impl)

    def loss(p):
        seen = fm.mlp(net, p, grid, impl=impl).view(2, 11, 11)
        return mse(fm.project(seen, angles, impl=impl), y)

    agree_on_autograd(loss, params, v, "ct")


def test_tomography_with_cosines_in_place_of_phases():
    """[sin, cos] proper: float32's phase moves cosines by 4.4e-8; the preset's B is ulps off."""
    params, grid = goldens("ct", "params", "grid")
    agree(fm.mlp(tomograph(), params, grid), "ct/pure_image", 1e-6)
    preset = fm.fourier_mlp(2, 1, width=7, depth=3, features=8, scale=30.0, seed=0)
    # |B| up to 64 within 4 units in the last place, 2⁻¹⁸ each: phases move by at most 3e-5 rad
    # where all errors meet; 5e-7 was seen
    agree(fm.mlp(preset, params, grid), "ct/pure_image", 5e-6)


# -- f: view synthesis


def identity(encoding: fm.Encoding) -> tuple[fm.MLP, Tensor]:
    """A network that returns encode(x)."""
    E = encoding.out_features
    net = fm.MLP(3, E, E, 2, "none", encoding=encoding, coords="world")
    params = torch.zeros(1, net.num_params, dtype=torch.float64)
    for weight, _ in net.layers(params):
        weight.copy_(torch.eye(E))
    return net, params


@pytest.mark.parametrize("impl", IMPLS)
def test_frequency_encoding(impl):
    encoding = fm.nerf_mlp().encoding
    # a power computed elsewhere may round to the neighbouring float32
    B = golden("frequencies/B")
    assert ((encoding.B.double() - B).abs() <= 2**-23 * B.abs()).all()
    assert torch.equal(encoding.phi.double(), golden("frequencies/phi"))
    x = golden("frequencies/x")[None]
    given = fm.Encoding(B, golden("frequencies/phi"))
    net, params = identity(given)
    agree(fm.mlp(net, params, x, impl=impl)[0], "frequencies/rounded")
    net, params = identity(encoding)
    pure = (fm.mlp(net, params, x, impl=impl)[0] - golden("frequencies/pure")).abs()
    # f and φ are float32: half a unit of f's 24 bits on a phase |f x|, one at a rounding border
    assert (pure <= 2**-23 * (x[0].abs() @ B) + 4.4e-8).all()


MARCHES = {"shapenet": (1e-3, True), "phototourism": (1e10, False)}  # last interval, background


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("kind", "density", "name"),
    [(k, d, "raw") for k in MARCHES for d in ("relu", "softplus")]
    + [("phototourism", "relu", "thin")],
)
def test_composite(kind, density, name, impl):
    """thin: densities of 1e-11 to 3e-10 before the interval of 1e10, whose adjoints reach 1e10."""
    raw, t = (leaf(value) for value in goldens("composite", name, "t"))
    last, white = MARCHES[kind]
    out = fm.composite(raw, t, fm.March(9, last, white, density), impl=impl)
    section = f"composite/{kind}/{density}/{name}"
    for found, key in zip(out, ("rgb", "depth", "acc"), strict=True):
        agree(found, f"{section}/{key}")
    bars = goldens("composite", "rgb_bar", "depth_bar", "acc_bar")
    raw_bar, t_bar = torch.autograd.grad(out, (raw, t), bars)
    agree(t_bar, f"{section}/t_bar")
    for part in ((..., slice(0, 3)), (..., 3)):  # colours, densities: far apart in size
        agree(raw_bar[part], f"{section}/raw_bar", part=part)
    assert raw_bar[..., 3].abs().max() > (1e9 if name == "thin" else 0.1)


VIEWS = {
    "shapenet": fm.March(9, *MARCHES["shapenet"], "relu"),
    "phototourism": fm.March(9, *MARCHES["phototourism"], "softplus"),
}
RADIANCE = fm.nerf_mlp(width=7, depth=3, frequencies=3, max_exponent=2.0)  # 1, 2, 4: exact


def views(name: str) -> tuple[fm.Rays, Tensor]:
    origins, directions, near, far, y = goldens(name, "origins", "directions", "near", "far", "y")
    return fm.Rays(origins, directions, near, far), y


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", VIEWS)
def test_render(name, impl):
    rays, _ = views(name)
    params = leaf(golden("views/params"))
    out = fm.render(RADIANCE, params, rays, VIEWS[name], impl=impl)
    for found, key in zip(out, ("rgb", "depth", "acc"), strict=True):
        agree(found, f"{name}/{key}")
    bars = goldens(name, "rgb_bar", "depth_bar", "acc_bar")
    agree(torch.autograd.grad(out, params, bars)[0], f"{name}/params_bar")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", VIEWS)
def test_view_synthesis(name, impl):
    (rays, y), (params, v), march = views(name), goldens("views", "params", "v"), VIEWS[name]
    agree_on_loss(RADIANCE, params, v, fm.Batch(rays, y, measure=march), name, impl)

    def loss(p):
        return mse(fm.render(RADIANCE, p, rays, march, impl=impl)[0], y)

    agree_on_autograd(loss, params, v, name)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("order", [2, 1])
@pytest.mark.parametrize("name", ["ct", *VIEWS])
def test_maml_through_a_measurement(name, order, impl):
    if name == "ct":
        net, batch, start, alpha = tomograph(), tomography(), golden("ct/params")[0], 0.5
    else:
        rays, y = views(name)
        batch = fm.Batch(rays, y, measure=VIEWS[name])
        net, start, alpha = RADIANCE, golden("views/params")[0], 0.1
    alpha = nn.Parameter(torch.tensor(alpha, dtype=torch.float64))
    maml = fm.MAML(net, 2, alpha, order=order, init=start, impl=impl)
    loss = maml(batch)
    loss.backward()
    agree(loss, f"{name}/maml/loss")
    agree(maml.init.grad, f"{name}/maml/grad", part=2 - order)
    agree(alpha.grad, f"{name}/maml/rate", part=2 - order)
