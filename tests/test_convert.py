"""Networks in and out: exact round trips, the authors' own files, other packages' networks written
out once more, and pickles that mean harm."""

import base64
import collections
import copy
import math
import os
import pickle
import subprocess
import sys
import types
import zipfile
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from fastmeta.convert import (
    LAYOUTS,
    from_module,
    from_state_dict,
    from_tcnn,
    load_learnit,
    load_tcnn,
    peer_arguments,
    reorder,
    to_module,
    to_state_dict,
    to_tcnn,
)
from fastmeta.spec import ACTIVATIONS, MLP, OUTPUTS, Encoding, fourier_mlp, nerf_mlp, siren

NETS = {
    "images": siren(2, 3, 17, 5, w0=200.0, output_shift=0.5),
    "ct": fourier_mlp(2, 1, 9, 5, features=16),
    "views": nerf_mlp(11, 6, frequencies=4, max_exponent=2.0),
    "two_w0": MLP(3, 2, 7, 3, "sine", 30.0, 1 / 3, coords="centers"),
    # depth 2 has no second sine layer, so w0 shows in no computation; it still has to come back
    "depth_2": MLP(1, 1, 4, 2, "sine", 30.0, 7.0, output="tanh", output_shift=-0.1),
    "raw_too": MLP(
        3, 4, 5, 4, "gelu", encoding=Encoding.frequencies(3, 2, 1.0, include_input=True)
    ),
    **{f"hidden_{a}": MLP(2, 3, 6, 4, a) for a in ACTIVATIONS if a != "sine"},
    **{f"output_{o}": MLP(2, 3, 6, 3, "tanh", output=o, output_shift=1e-3) for o in OUTPUTS},
}
every_net = pytest.mark.parametrize("net", NETS.values(), ids=NETS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def weights(net: MLP, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    """Starting weights with biases that are not zero, [P]."""
    generator = torch.Generator().manual_seed(seed)
    init = net.init(generator=generator)[0].to(dtype)
    return init + 0.01 * torch.randn(init.shape, generator=generator).to(dtype)


def plain(net: MLP, params: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The network written out once more, from the paper's text: shares no code with fastmeta.

    Source: Tancik et al. 2021; Sitzmann et al. 2020.
    """
    phi = {
        "relu": lambda z: z.clamp(min=0),
        "tanh": torch.tanh,
        "sigmoid": lambda z: 1 / (1 + (-z).exp()),
        "softplus": lambda z: (1 + z.exp()).log(),
        "gelu": lambda z: z * 0.5 * (1 + (z / math.sqrt(2)).erf()),
        "silu": lambda z: z / (1 + (-z).exp()),
        "none": lambda z: z,
        "linear": lambda z: z,
    }
    h = x
    if net.encoding is not None:
        h = torch.sin(x @ net.encoding.B.to(x) + net.encoding.phi.to(x))
        h = torch.cat([x, h], -1) if net.encoding.include_input else h
    at = 0
    for index in range(net.depth):
        last = index == net.depth - 1
        rows, columns = net.out_features if last else net.width, h.shape[-1]
        w = params[at : at + rows * columns].view(rows, columns)
        b = params[at + rows * columns : at + rows * columns + rows]
        at += rows * columns + rows
        h = h @ w.T + b
        if last:
            h = phi[net.output](h) + net.output_shift
        elif net.activation == "sine":
            h = torch.sin((net.w0 if index else net.w0_first) * h)
        else:
            h = phi[net.activation](h)
    assert at == params.numel()
    return h


# ---- to_module


@every_net
def test_module_computes_the_network_in_float64(net):
    params = weights(net, dtype=torch.float64)
    x = torch.rand(3, 17, net.in_features, dtype=torch.float64)
    y = to_module(net, params)(x)
    expected = plain(net, params, x)
    assert y.dtype == torch.float64 and y.shape == (3, 17, net.out_features)
    assert (y - expected).abs().max() <= 1e-12 * max(1.0, expected.abs().max().item())


@every_net
def test_module_computes_the_network_in_float32(net):
    """The error may be twice that of plain torch at the same precision, plus one rounding."""
    params, x = weights(net), torch.rand(1000, net.in_features)
    truth = plain(net, params.double(), x.double())
    own = (to_module(net, params)(x) - truth).abs().max().item()
    other = (plain(net, params, x) - truth).abs().max().item()
    rounding = torch.finfo(torch.float32).eps * truth.abs().max().item()
    print(f"error {own:.3g}, plain torch {other:.3g}")
    assert own <= 2 * other + rounding


@every_net
def test_gradients_of_the_module_are_those_of_the_network(net):
    """Within ten times what moving every weight by one rounding does to them (w0 = 200: 1e-12)."""

    def gradient(params):
        params = params.detach().requires_grad_()
        return torch.autograd.grad(plain(net, params, x).square().mean(), params)[0]

    params, x = weights(net, dtype=torch.float64), torch.rand(13, net.in_features).double()
    expected = gradient(params)
    signs = torch.randint(0, 2, params.shape).double() * 2 - 1
    moved = gradient(params * (1 + signs * torch.finfo(torch.float64).eps)) - expected
    module = to_module(net, params.requires_grad_())
    module(x).square().mean().backward()
    grad = torch.cat([p.grad.reshape(-1) for p in module.parameters()])
    assert params.grad is None
    assert (grad - expected).abs().max() <= 10 * moved.abs().max()


@every_net
def test_round_trip_through_everything_a_user_does(net, tmp_path):
    params = weights(net)
    module = to_module(net, params)
    torch.save(module, tmp_path / "m.pt")
    loaded = torch.load(tmp_path / "m.pt", weights_only=False)
    copies = [module, loaded, copy.copy(module), copy.deepcopy(module), copy.deepcopy(loaded)]
    copies += [pickle.loads(pickle.dumps(copy.deepcopy(loaded))), to_module(net, params).double()]
    for other in copies:
        back, flat = from_module(other)
        assert back == net and torch.equal(flat.float(), params) and not flat.requires_grad
    assert copies[-1](torch.rand(2, net.in_features).double()).dtype == torch.float64


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@every_net
def test_export_trace_and_func(net):
    module, x = to_module(net, weights(net)), torch.rand(5, net.in_features)
    y = module(x)
    assert torch.equal(torch.export.export(module, (x,)).module()(x), y)
    assert torch.equal(torch.jit.trace(module, x)(x), y)
    doubled = {name: 2 * value.detach() for name, value in module.named_parameters()}
    changed = torch.func.functional_call(module, doubled, x)
    flat = torch.cat([value.reshape(-1) for value in doubled.values()])
    assert torch.equal(changed, to_module(net, flat)(x)) and not torch.equal(changed, y)


@every_net
def test_state_dict_through_safetensors(net, tmp_path):
    params, x = weights(net), torch.rand(5, net.in_features)
    module = to_module(net, params)
    names = [f"layers.{i}.{part}" for i in range(net.depth) for part in ("weight", "bias")]
    names += ["encoding.B", "encoding.phi"] if net.encoding is not None else []
    assert sorted(module.state_dict()) == sorted(names)
    save_file(module.state_dict(), tmp_path / "m.safetensors")
    empty = to_module(net, torch.zeros_like(params))
    empty.load_state_dict(load_file(tmp_path / "m.safetensors"))
    assert torch.equal(empty(x), module(x)) and torch.equal(from_module(empty)[1], params)


def test_module_runs_in_a_process_without_fastmeta(tmp_path):
    for name, net in NETS.items():
        module, x = to_module(net, weights(net).double()), torch.rand(5, net.in_features).double()
        torch.save((module, x, module(x).detach()), tmp_path / f"{name}.pt")
    script = """
import sys, torch
sys.modules["fastmeta"] = None  # any import of it raises
from pathlib import Path
files = sorted(Path(sys.argv[1]).glob("*.pt"))
for file in files:
    module, x, y = torch.load(file, weights_only=False)
    assert y.dtype == torch.float64 and (module(x) - y).abs().max() <= 1e-10, file
    opt = torch.optim.SGD(module.parameters(), lr=1e-7)  # w0 = 200: a curvature of about 1e6
    loss = (module(x) - y - 1).square().mean()
    loss.backward()
    opt.step()
    assert (module(x) - y - 1).square().mean() < loss, file
    torch.save(module, file)
print("ran", len(files))
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", script, str(tmp_path)], capture_output=True, text=True
    )
    assert done.stdout.strip() == f"ran {len(NETS)}", done.stderr
    for name, net in NETS.items():  # trained over there, and back
        back, flat = from_module(torch.load(tmp_path / f"{name}.pt", weights_only=False))
        moved = (flat - weights(net)).abs().max()
        assert back == net and 0 < moved < 1e-4


def test_module_trains_and_keeps_its_own_copy():
    net = NETS["images"]
    params = weights(net)
    before, state = params.clone(), torch.get_rng_state()
    module = to_module(net, params)
    assert torch.equal(torch.get_rng_state(), state)  # building it draws no random numbers
    generator = torch.Generator().manual_seed(1)
    x, y = torch.rand(64, 2, generator=generator), torch.rand(64, 3, generator=generator)
    opt = torch.optim.Adam(module.parameters(), lr=1e-4)
    losses = []
    for _ in range(60):
        loss = (module(x) - y).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0] and torch.equal(params, before)
    back, flat = from_module(module)
    assert back == net and (plain(back, flat, x) - module(x)).abs().max() < 1e-4
    assert torch.equal(flat, torch.nn.utils.parameters_to_vector(module.parameters()))


@pytest.mark.parametrize(
    "spoil, said",
    [(lambda p: p[:-1], "accepted is one row"), (lambda p: p[None], "accepted is one row")]
    + [(lambda p: p.long(), "torch.int64"), (lambda p: p.tolist(), "list")],
)
def test_to_module_refuses(spoil, said):
    with pytest.raises(ValueError, match=said):
        to_module(NETS["images"], spoil(weights(NETS["images"])))


def softened(module):
    module.activation = nn.Softplus(beta=2)


def widened(module):
    module.layers.get_submodule("1").weight = nn.Parameter(torch.rand(9, 6))
    module.layers.get_submodule("1").out_features = 9


def swapped(module):
    setattr(module.layers, "1", nn.Sequential(nn.Linear(6, 6)))


def shifted(module):
    result = next(node for node in module.graph.nodes if node.op == "output")
    with module.graph.inserting_before(result):
        result.args = (module.graph.call_function(torch.add, (result.args[0], 1.0)),)
    module.recompile()


def hooked(module):
    module.layers.get_submodule("0").register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    "change, said",
    [
        (softened, "Softplus(beta=2"),
        (widened, "layers have sizes"),
        (swapped, "layers.1 is Sequential"),
        (shifted, "its graph does not compute"),
        (hooked, "hooks"),
        (lambda m: m.register_forward_pre_hook(lambda *_: None), "hooks"),
        (lambda m: setattr(m.spec, "fields", "{}"), "no specification"),
        (lambda m: delattr(m.spec, "fields"), "no specification"),
    ],
)
def test_a_module_that_was_changed_is_refused(change, said):
    module = to_module(NETS["hidden_softplus"], weights(NETS["hidden_softplus"]))
    change(module)
    with pytest.raises(ValueError) as caught:
        from_module(module)
    assert said in str(caught.value)


def test_other_graph_modules_are_refused():
    with pytest.raises(ValueError, match="not made by to_module"):
        from_module(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))))


# ---- from_module

HIDDEN = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "none": nn.Identity,
}


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("activation", HIDDEN)
def test_sequential(activation, output):
    act = HIDDEN[activation]
    module = nn.Sequential(
        nn.Linear(2, 5), act(), nn.Linear(5, 5), act(), nn.Linear(5, 3), nn.Identity()
    ).double()
    if output != "linear":
        module.append(HIDDEN[output]())
    net, params = from_module(module, coords="centers")
    assert net == MLP(2, 3, 5, 3, activation, output=output, coords="centers")
    assert torch.equal(params, torch.nn.utils.parameters_to_vector(module.parameters()))
    x = torch.rand(9, 2, dtype=torch.float64)
    assert torch.equal(to_module(net, params)(x), module(x))
    assert (plain(net, params, x) - module(x)).abs().max() <= 1e-13
    params.zero_()
    assert module[0].weight.abs().max() > 0  # a copy


def test_sequential_nested_shared_and_without_bias():
    act = nn.ReLU(inplace=True)  # one module in three places
    block = nn.Sequential(nn.Sequential(nn.Linear(4, 4, bias=False), act), nn.Linear(4, 4), act)
    module = nn.Sequential(nn.Linear(3, 4), act, block, nn.Linear(4, 2, bias=False))
    net, params = from_module(module)
    assert net == MLP(3, 2, 4, 4, "relu")
    layers = net.layers(params)
    assert torch.equal(layers[1][0], block[0][0].weight) and not layers[1][1].any()
    assert torch.equal(layers[2][1], block[1].bias) and not layers[3][1].any()
    x = torch.rand(7, 3)
    assert torch.equal(to_module(net, params)(x), module(x))


class Sine(nn.Module):
    def forward(self, x):
        return torch.sin(30 * x)


class OwnLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x).abs()


class OwnSequential(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


def line(*sizes, act=nn.ReLU):
    parts = []
    for i, o in zip(sizes[:-1], sizes[1:], strict=True):
        parts += [nn.Linear(i, o), act()]
    return nn.Sequential(*parts[:-1])


@pytest.mark.parametrize(
    "module, said",
    [
        (line(2, 4, 5, 1), "hidden widths are [4, 5]"),
        (line(2, 4), "1 nn.Linear"),
        (nn.Sequential(), "0 nn.Linear"),
        (nn.Linear(2, 3), "module is Linear"),
        (OwnSequential(nn.Linear(2, 2), nn.Linear(2, 2)), "module is OwnSequential"),
        (nn.Sequential(line(2, 4, 4), OwnSequential(nn.Linear(4, 4))), "1 is OwnSequential"),
        (line(2, 4, 4, 1, act=Sine), "1 is Sine()"),
        (line(2, 4, 4, 1, act=lambda: nn.Dropout(0.1)), "1 is Dropout(p=0.1"),
        (line(2, 4, 4, 1, act=lambda: nn.Softplus(beta=2)), "Softplus(beta=2"),
        (line(2, 4, 4, 1, act=lambda: nn.Softplus(threshold=5)), "threshold=5"),
        (line(2, 4, 4, 1, act=lambda: nn.GELU("tanh")), "GELU(approximate='tanh')"),
        (line(2, 4, 4, 1, act=nn.LeakyReLU), "LeakyReLU"),
        (nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)), "1 is BatchNorm1d"),
        (nn.Sequential(OwnLinear(2, 4), nn.ReLU(), nn.Linear(4, 1)), "0 is OwnLinear"),
        (nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 1)), "0 is LazyLinear"),
        (nn.Sequential(nn.ReLU(), *line(2, 4, 1)), "0 is ReLU() and follows nothing"),
        (nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Tanh(), nn.Linear(4, 1)), "2 is Tanh()"),
        (nn.Sequential(*line(2, 4, 4), nn.Tanh(), nn.Linear(4, 1)), "['relu', 'tanh']"),
        (nn.Sequential(*line(2, 4, 1), nn.GELU()), "output activation is gelu"),
        (nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(3, 1)), "with 4 outputs"),
        (nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1).double()), "float64"),
        (nn.Sequential(nn.Linear(2, 4), nn.utils.spectral_norm(nn.Linear(4, 1))), "1 has forward"),
        (
            nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 4)), nn.Linear(4, 1)),
            "0 is Parametrized",
        ),
    ],
)
def test_what_a_specification_cannot_hold_is_refused(module, said):
    with pytest.raises(ValueError) as caught:
        from_module(module)
    assert said in str(caught.value) and "\n" not in str(caught.value)


# ---- the authors' files


def haiku(net: MLP, params: torch.Tensor, names: str) -> dict:
    """{"layer": {"w": [in,out], "b": [out]}}, in haiku's naming."""
    return {
        names.format("" if i == 0 else f"_{i}"): {"w": w.T.numpy().copy(), "b": b.numpy().copy()}
        for i, (w, b) in enumerate(net.layers(params))
    }


SIREN, LINEAR = "siren__model/siren_layer{}/linear", "model/linear{}"
AUTHORS = {
    "images": (siren(2, 3, 6, 13, w0=200.0, output_shift=0.5), SIREN),
    "ct": (fourier_mlp(2, 1, 6, 5), LINEAR),
    "views": (nerf_mlp(6, 12), LINEAR),
}
authors = pytest.mark.parametrize("net, names", AUTHORS.values(), ids=AUTHORS)


@authors
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_every_protocol(net, names, protocol, tmp_path):
    params = weights(net)
    tree = haiku(net, params, names)
    tree = dict(sorted(tree.items(), reverse=True))  # linear_9, ..., linear_10, linear_1, linear
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(tree, protocol=protocol))
    back, init = load_learnit(tmp_path / "a.pkl")
    assert back == net and torch.equal(init, params) and init.dtype == torch.float32


@authors
def test_npz(net, names, tmp_path):
    params = weights(net)
    arrays = {}
    for i, (w, b) in enumerate(net.layers(params)):
        arrays[f"w{i}"], arrays[f"b{i}"] = w.T.numpy(), b.numpy()
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", **arrays)
        back, init = load_learnit(tmp_path / "a.npz")
        assert back == net and torch.equal(init, params)


@pytest.mark.parametrize(
    "change",
    [np.asfortranarray, lambda a: a.astype(">f4"), lambda a: a.astype("f8"), lambda a: a * 1],
)
def test_arrays_of_other_layouts(change, tmp_path):
    net, names = AUTHORS["ct"]
    params = weights(net)
    tree = haiku(net, params, names)
    tree = {name: {k: change(v) for k, v in layer.items()} for name, layer in tree.items()}
    for protocol in (2, 4, 5):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(tree, protocol=protocol))
        back, init = load_learnit(tmp_path / "a.pkl")
        assert back == net and torch.equal(init.float(), params)
        double = tree["model/linear"]["w"].dtype == np.float64
        assert init.dtype == (torch.float64 if double else torch.float32)
    np.savez(
        tmp_path / "a.npz",
        **{f"{k}{i}": v for i, layer in enumerate(tree.values()) for k, v in layer.items()},
    )
    assert torch.equal(load_learnit(tmp_path / "a.npz")[1].float(), params)


def fake(monkeypatch, module: str, name: str, thing) -> None:
    """Makes ``thing`` importable, and so picklable, as module.name."""
    parts = module.split(".")
    for size in range(1, len(parts) + 1):
        full = ".".join(parts[:size])
        monkeypatch.setitem(sys.modules, full, types.ModuleType(full))
    setattr(sys.modules[module], name, thing)
    thing.__module__, thing.__qualname__ = module, name


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "module, name",
    [("haiku._src.data_structures", n) for n in ("FlatMapping", "FlatMap", "frozendict")]
    + [("collections", "OrderedDict")],
)
def test_mappings_of_haiku(module, name, protocol, tmp_path, monkeypatch):
    class Mapping:
        def __init__(self, mapping):
            self.mapping = mapping

        def __reduce__(self):
            return type(self), (self.mapping,)

    if module == "collections":
        Mapping = collections.OrderedDict  # noqa: N806
    else:
        fake(monkeypatch, module, name, Mapping)
    net, names = AUTHORS["views"]
    params = weights(net)
    tree = Mapping({k: Mapping(v) for k, v in haiku(net, params, names).items()})
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(tree, protocol=protocol))
    back, init = load_learnit(tmp_path / "a.pkl")
    assert back == net and torch.equal(init, params)


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "module, name",
    [
        ("jax._src.array", "_reconstruct_array"),
        ("jax._src.device_array", "reconstruct_device_array"),
    ],
)
def test_arrays_of_jax(module, name, protocol, tmp_path, monkeypatch):
    """As jax 0.3 to 0.10 reduce an array: (function, numpy's reduction, state, {weak_type})."""

    def rebuild(fun, args, state, aval):
        raise AssertionError("never called")

    fake(monkeypatch, module, name, rebuild)

    class Array:
        def __init__(self, value):
            self.value = value

        def __reduce__(self):
            fun, args, state = self.value.__reduce__()
            return rebuild, (fun, args, state, {"weak_type": False})

    net, names = AUTHORS["images"]
    params = weights(net)
    tree = haiku(net, params, names)
    tree = {name: {k: Array(v) for k, v in layer.items()} for name, layer in tree.items()}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(tree, protocol=protocol))
    back, init = load_learnit(tmp_path / "a.pkl")
    assert back == net and torch.equal(init, params)


JAX_PICKLE = (  # written by jax 0.10.2, protocol 4, zlib and base85: 2-2-3, values 0, 1/8, 2/8, ...
    "c-nPP%SyvQ6rChit&}2yA_zWqU8M*vr4_PsAPawBOw*Bxrb(Ghs96Zv*czCH;C1gO_z8Z3TX+76-"
    "Xs;O)C*^r$9c@X`O5Q$L8`igjy^~N$s@)_@sNkz`Ve{<m)$UkxF?|`857X$Ywy-(iS%txN-qPw#U%IRC{Z%?6{|0wk"
    "h~M6qj6?4KbG7crJ)Mug4Ut{sk%`yL9a!_A2}uW;1~m#L5CXDq~;XFhHea1Hs+<oygGs6VFnlYZfWBbT-QDS!m1WZ6"
    "buSyvu=;{2+0v|Jy6(&Zcey&!z!mDQD~ttNUU~5Q?$xl(VnN`cDr!a(V<VsVZTy~y;_s%qyHwxju&PotYyyBnpWPsg"
    "q)%GB_c;WB3=-$zq7>t5)Z5XT?_j{#XI8j&ks}k8)vMop#"
)


def test_a_pickle_of_a_real_jax(tmp_path):
    (tmp_path / "a.pkl").write_bytes(zlib.decompress(base64.b85decode(JAX_PICKLE)))
    net, init = load_learnit(tmp_path / "a.pkl")
    assert net == siren(2, 3, 2, 2, w0=200.0, output_shift=0.5)
    w0, b0, w1, b1 = (
        [0, 2, 1, 3],
        [4, 5],
        [6, 9, 7, 10, 8, 11],
        [12, 13, 14],
    )  # [in,out] -> [out,in]
    assert torch.equal(init, torch.tensor([*w0, *b0, *w1, *b1]) / 8)


def test_the_authors_own_weights(data_path, tmp_path):
    folder = data_path("learnit_celeba_maml")
    net, init = load_learnit(folder / "maml_ilr_0.01_olr_1e-05_bs_3_150000.pkl")
    assert net == siren(2, 3, w0=200.0, output_shift=0.5) and net.num_params == 198915
    other, same = load_learnit(folder / "siren_maml_celeba_150000.npz")
    assert other == net and init.shape == (198915,) and torch.equal(init, same)
    with np.load(folder / "siren_maml_celeba_150000.npz") as arrays:
        x = np.random.default_rng(0).random((50, 2))
        h = x
        for i in range(4):
            h = np.sin(200 * (h @ arrays[f"w{i}"].astype("f8") + arrays[f"b{i}"]))
        y = h @ arrays["w4"].astype("f8") + arrays["b4"] + 0.5
    module = to_module(net, init.double())
    assert np.abs(module(torch.from_numpy(x)).detach().numpy() - y).max() <= 1e-11
    assert 0.2 < y.mean() < 0.8  # the mean face


# ---- files that are none of these


def refused(path, *said, error=ValueError):
    with pytest.raises(error) as caught:
        load_learnit(path)
    text = str(caught.value)
    assert f"load_learnit: {path}" in text and "\n" not in text and len(text) < 600
    assert all(part in text for part in said), text
    assert type(caught.value) is error


def wrong_shape(tree):
    tree["model/linear_1"]["w"] = np.zeros((5, 6), "f4")


def one_number(tree):
    tree["model/linear_2"]["b"] = np.zeros((), "f4")


def other_width(tree):
    tree["model/linear_1"] = {"w": np.zeros((6, 7), "f4"), "b": np.zeros(7, "f4")}
    tree["model/linear_2"]["w"] = np.zeros((7, 6), "f4")


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t: t.pop("model/linear_3"), "numbered [0, 1, 2, 4]"),
        (lambda t: t.update({"model/linear_01": t["model/linear_2"]}), "numbered"),
        (lambda t: t.update({"other/linear": t["model/linear"]}), "'other/linear'"),
        (lambda t: t.update({"siren__model/linear": t["model/linear"]}), "layer name"),
        (lambda t: t["model/linear_2"].pop("b"), "'model/linear_2' holds ['w']"),
        (lambda t: t["model/linear_2"].update(c=1), "holds ['b', 'c', 'w']"),
        (lambda t: t["model/linear_2"].update(w=1.0), "w or b is no array"),
        (lambda t: t.update({"model/linear_2": [1]}), "holds list"),
        (lambda t: t.clear(), "accepted is a mapping"),
        (wrong_shape, "layer 1: takes 5 inputs, 6 come"),
        (one_number, "layer 2: w has shape (6, 6) and b ()"),
        (other_width, "hidden widths are [6, 7, 6, 6]"),
        (lambda t: t["model/linear"]["b"].fill(np.nan), "NaN or infinity"),
        (lambda t: t["model/linear"].update(b=np.zeros(6, "i4")), "dtype 'i4'"),
        (lambda t: t["model/linear"].update(b=np.zeros(6, "f8")), "all float32 or all float64"),
        (lambda t: t["model/linear"].update(b=np.zeros(6, "f2")), "dtype 'f2'"),
        (lambda t: t["model/linear"].update(b=np.array([print], "O")), "dtype 'O8'"),
        (lambda t: t["model/linear"].update(b=np.zeros(6, [("a", "f4")])), "dtype 'V4'"),
        (lambda t: t["model/linear"].update(w=np.zeros((100, 6), "f4")), "100 -> 1"),
    ],
)
def test_unrecognised_networks(change, said, tmp_path):
    net, names = AUTHORS["ct"]
    tree = haiku(net, weights(net), names)
    change(tree)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(tree, protocol=3))
    refused(tmp_path / "a.pkl", said)


def test_names_and_ends_belong_together(tmp_path):
    for name, names in (("images", LINEAR), ("ct", SIREN), ("views", SIREN)):
        net = AUTHORS[name][0]
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(haiku(net, weights(net), names)))
        refused(tmp_path / "a.pkl", "is none of the paper's")


@pytest.mark.parametrize(
    "arrays, said",
    [
        ({"w0": np.zeros((2, 3), "f4")}, "accepted are w0, b0"),
        ({"w0": np.zeros((2, 3), "f4"), "b1": np.zeros(3, "f4")}, "accepted are w0, b0"),
        ({"w0": np.zeros((2, 3), "f4"), "b0": np.zeros(3, "f4")}, "1 layers"),
        ({"images": np.zeros(3, "u1")}, "'images'"),
        ({}, "0 layers"),
        ({"w0": np.array([print], "O"), "b0": np.zeros(3, "f4")}, "allow_pickle=False"),
    ],
)
def test_other_npz(arrays, said, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    refused(tmp_path / "a.npz", said)


def test_damaged_npz(tmp_path):
    net = AUTHORS["images"][0]
    path = tmp_path / "a.npz"
    arrays = {}
    for i, (w, b) in enumerate(net.layers(weights(net))):
        arrays[f"w{i}"], arrays[f"b{i}"] = w.T.numpy(), b.numpy()
    np.savez_compressed(path, **arrays)
    data = path.read_bytes()
    for tenth in range(1, 10):
        path.write_bytes(data[: len(data) * tenth // 10])
        refused(path, "damaged .npz")
    for at in range(60, len(data) - 30, 97):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
        try:
            assert load_learnit(path)[0] == net
        except ValueError as error:
            assert str(path) in str(error)
    header = b"\x93NUMPY\x01\x00v\x00"
    for shape in ("(1000000000000000,)", "(-1,)", "(2,)", "x"):
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("w0.npy", header + text.encode() + bytes(8))
            archive.writestr("b0.npy", "not an array")
        refused(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:  # 300 MB of zeros in 0.3 MB
        archive.writestr("w0.npy", bytes(300 * 2**20))
        archive.writestr("b0.npy", b"")
    refused(path, "unpacks to")


def test_places(tmp_path):
    refused(tmp_path / "none", "no such file", error=FileNotFoundError)
    refused(tmp_path, "a folder")
    (tmp_path / "a").write_bytes(b"")
    refused(tmp_path / "a")
    with open(tmp_path / "a", "wb") as file:
        file.truncate(300 * 2**20)  # sparse
    refused(tmp_path / "a", "larger than")


# ---- pickles that mean harm


class Reduced:
    """Pickles as a call of function(*args)."""

    def __init__(self, function, *args, state=None):
        self.reduction = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduction


def owned(tmp_path) -> str:
    return f"touch {tmp_path / 'owned'}"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("depth", ["top", "layer", "leaf", "argument", "state"])
@pytest.mark.parametrize("what", ["os.system", "builtins.eval", "subprocess.Popen", "getattr"])
def test_calls_are_refused_by_name_and_not_made(what, depth, protocol, tmp_path):
    command = owned(tmp_path)
    bomb, name = {
        "os.system": (Reduced(os.system, command), f"'{os.system.__module__}.system'"),
        "builtins.eval": (Reduced(eval, f"__import__('os').system({command!r})"), "eval'"),
        "subprocess.Popen": (Reduced(subprocess.Popen, command, -1), ".Popen'"),
        "getattr": (Reduced(getattr, "", "upper"), "getattr'"),
    }[what]
    net, names = AUTHORS["images"]
    tree = haiku(net, weights(net), names)
    first = next(iter(tree))
    if depth == "top":
        tree = bomb
    elif depth == "layer":
        tree[first] = bomb
    elif depth == "leaf":
        tree[first]["w"] = bomb
    elif depth == "argument":
        tree[first]["w"] = Reduced(np.dtype, bomb)
    else:
        tree[first]["w"] = Reduced(collections.OrderedDict, state=bomb)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(tree, protocol=protocol))
    refused(tmp_path / "a.pkl", name, "refused")
    assert not (tmp_path / "owned").exists()


def short(text: str) -> bytes:
    """SHORT_BINUNICODE."""
    return b"\x8c" + bytes([len(text)]) + text.encode()


NDARRAY = b"cnumpy\nndarray\n"
RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n"


LATIN1 = b"c_codecs\nencode\n(h\x00" + short("latin1") + b"tR"
STATE = RECONSTRUCT + b"(" + NDARRAY + b"K\x00\x85C\x01btR(K\x01"  # then shape, dtype, order, bytes
F4 = b"cnumpy\ndtype\n" + short("f4") + b"\x85R\x89"
DOUBLED = b"q\x00h\x00\x86" * 200  # a pair of (a pair of (...)), 2**200 leaves to hash or to print

HARM = {
    # a global by way of the stack, of the memo, of a name in parts
    "stack": (short("os") + short("system") + b"\x93" + short("id") + b"\x85R.", "'os.system'"),
    "memo": (short("os") + b"\x94h\x00" + short("popen") + b"\x93.", "'os.popen'"),
    "dotted": (short("numpy") + short("ndarray.tofile") + b"\x93.", "'numpy.ndarray.tofile'"),
    "split": (b"cnumpy.core\nmultiarray.fromstring\n.", "'numpy.core.multiarray.fromstring'"),
    "no text": (b"K\x01K\x02\x93.", "without a name"),
    "import": (b"cthis\ns\n.", "'this.s'"),
    # what a known global may not be used for
    "class": (
        RECONSTRUCT + b"(ccollections\nOrderedDict\nK\x00\x85C\x01btR.",
        "class 'collections.OrderedDict'",
    ),
    "memmap": (RECONSTRUCT + b"(cnumpy\nmemmap\nK\x00\x85C\x01btR.", "'numpy.memmap'"),
    "class is a number": (RECONSTRUCT + b"(K\x07K\x00\x85C\x01btR.", "class 'int'"),
    "call ndarray": (NDARRAY + b"(K\x09tR.", "a call of 'numpy.ndarray'"),
    "state of a global": (NDARRAY + b"}" + short("a") + NDARRAY + b"sb.", "a state for 'Name'"),
    "state of a class": (b"ccollections\nOrderedDict\n(N}tb.", "a state for 'Name'"),
    "state twice": (STATE + b")" + F4 + b"C\x04abcdtb(NNNNNtb.", "a state for 'Array'"),
    "name as text": (short("os.system") + short("id") + b"\x85R.", "not a known global"),
    "encode": (
        b"c_codecs\nencode\n(" + short("a") + short("zlib") + b"tR.",
        "'_codecs.encode'",
    ),
    "no tuple": (b"cnumpy\ndtype\n]R.", "not a known global"),
    "system in jax": (
        b"cjax._src.array\n_reconstruct_array\n(cos\nsystem\n" + short("id") + b"\x85N}tR.",
        "'os.system'",
    ),
    "jax in jax": (b"cjax._src.array\n_reconstruct_array\nq\x00(h\x00)N}tR.", "do not give it"),
    # other ways to run or to name something
    "instance": (b"(" + short("id") + b"ios\nsystem\n.", "opcode INST"),
    "object": (b"(cos\nsystem\n" + short("id") + b"o.", "'os.system'"),
    "new object": (NDARRAY + b")\x81.", "opcode NEWOBJ"),
    "extension": (b"\x82\x01.", "opcode EXT1"),
    "persistent": (b"P1\n.", "opcode PERSID"),
    "persistent binary": (b"K\x01Q.", "opcode BINPERSID"),
    "out of band": (b"\x97.", "opcode NEXT_BUFFER"),
    # memory and time
    "bytes": (b"\x8e" + (2**62).to_bytes(8, "little") + b"x.", "bytes"),
    "bytearray": (b"\x96" + (2**40).to_bytes(8, "little") + b"x.", "bytes"),
    "memo index": (b"Nr\xff\xff\xff\x7f.", "holds NoneType"),
    "array size": (
        STATE + b"\x8a\x06" + (2**40).to_bytes(6, "little") + b"\x85" + F4 + b"C\x00tb.",
        "without a shape",
    ),
    "array bytes": (STATE + b"K\x09\x85" + F4 + b"C\x04abcdtb.", "(9,) of float32 with 4 bytes"),
    "array list": (STATE + b"K\x01\x85" + F4 + b"]tb.", "an array of list"),
    "many": (b"]" + b"N" * 100_000 + b".", "more than 100000 opcodes"),
    "doubled key": (b"}N" + DOUBLED + b"Ns.", "keys are not names"),
    "doubled class": (RECONSTRUCT + b"(N" + DOUBLED + b"NNtR.", "class 'tuple'"),
    "doubled layer": (b"}" + short("model/linear") + b"N" + DOUBLED + b"s.", "holds tuple"),
    "doubled text": (
        b"X\x80\x1a\x06\x00" + b"x" * 400_000 + b"q\x00" + LATIN1 * 9 + b".",
        "repeat",
    ),
    "within itself": (b"}q\x00" + short("model/linear") + b"h\x00s.", "holds ['model/linear']"),
    # nonsense
    "empty": (b"", ""),
    "no end": (b"N", ""),
    "only an end": (b".", "damaged pickle"),
    "no mark": (b"t.", "damaged pickle"),
    "no memo": (b"h\x07.", "damaged pickle"),
    "no utf-8": (b"X\x01\x00\x00\x00\xff.", ""),
    "long number": (b"I" + b"9" * 5000 + b"\n.", ""),
    "list": (b"](K\x01K\x02e.", "holds list"),
    "append to a mapping": (b"}K\x01a.", "a list that is none"),
    "set in a list": (b"]" + short("a") + b"Ns.", "a mapping"),
    "text": (b"hello world", ""),
}


@pytest.mark.parametrize("data, said", HARM.values(), ids=HARM)
def test_opcodes_that_mean_harm(data, said, tmp_path):
    (tmp_path / "a.pkl").write_bytes(data)
    refused(tmp_path / "a.pkl", said)
    assert "this" not in sys.modules


SMALL = pickle.dumps(haiku(siren(2, 3, 2, 2), torch.arange(15.0), SIREN), protocol=4)


@settings(
    deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(edits=st.lists(st.tuples(st.integers(0, 999), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_pickle_is_an_error_or_other_numbers(edits, tmp_path):
    data = bytearray(SMALL)
    for at, byte in edits:
        data[at % len(data)] = byte
    (tmp_path / "a.pkl").write_bytes(data)
    try:
        net, init = load_learnit(tmp_path / "a.pkl")
    except ValueError as error:
        assert str(tmp_path) in str(error)
    else:
        assert net == siren(2, 3, 2, 2, w0=200.0, output_shift=0.5) and init.shape == (15,)


def test_a_pickle_cut_short(tmp_path):
    for size in range(len(SMALL)):
        (tmp_path / "a.pkl").write_bytes(SMALL[:size])
        refused(tmp_path / "a.pkl")


# ---- state_dicts of other packages: each network written out from its package's text


class Affine(nn.Module):
    """xWᵀ + b under any package's two names."""

    def __init__(self, i, o):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(o, i) * math.sqrt(2 / i))
        self.bias = nn.Parameter(torch.rand(o) - 0.5)

    def forward(self, x):
        return x @ self.weight.mT + self.bias


class Wave(nn.Module):
    def __init__(self, w0):
        super().__init__()
        self.w0 = w0

    def forward(self, x):
        return torch.sin(self.w0 * x)


class Sitzmann(nn.Module):
    """SingleBVPNet: net.net.0.0, net.net.1.0, ...; each but the last followed by its activation."""

    def __init__(self, in_features, out_features, hidden_features, num_hidden_layers, type):
        super().__init__()
        sizes = [in_features, *[hidden_features] * (num_hidden_layers + 1), out_features]
        phi = {"sine": Wave(30), "relu": nn.ReLU(), "tanh": nn.Tanh(), "softplus": nn.Softplus()}
        blocks = [[Affine(i, o), phi[type]] for i, o in zip(sizes[:-1], sizes[1:], strict=True)]
        blocks[-1].pop()
        self.net = nn.Module()
        self.net.net = nn.Sequential(*[nn.Sequential(*block) for block in blocks])

    def forward(self, x):
        return self.net.net(x)


class Lucidrains(nn.Module):
    """SirenNet: layers.0, layers.1, ... and last_layer, each with an activation inside it."""

    def __init__(self, dim_in, dim_hidden, dim_out, num_layers, w0, w0_initial, final_activation):
        super().__init__()
        sizes = [dim_in, *[dim_hidden] * num_layers]
        pairs = zip(sizes[:-1], sizes[1:], strict=True)
        self.layers = nn.ModuleList(Affine(i, o) for i, o in pairs)
        self.last_layer = Affine(dim_hidden, dim_out)
        self.w0, self.first, self.final = w0, w0_initial, final_activation

    def forward(self, x):
        for index, layer in enumerate(self.layers):
            x = torch.sin((self.w0 if index else self.first) * layer(x))
        return self.final(self.last_layer(x))


class GradNCP(nn.Module):
    """MetaSiren: layers.0.linear, ...; MetaSirenPenultimate: the last one is last_layer.linear."""

    def __init__(self, dim_in, dim_hidden, dim_out, num_layers, w0, w0_initial, penultimate=False):
        super().__init__()
        sizes = [dim_in, *[dim_hidden] * (num_layers - 1), dim_out]
        self.layers = nn.ModuleList()
        for i, o in zip(sizes[:-1], sizes[1:], strict=True):
            self.layers.append(nn.Module())
            self.layers[-1].linear = Affine(i, o)
        if penultimate:
            self.last_layer = self.layers[-1]
            del self.layers[-1]
        self.w0, self.first, self.penultimate = w0, w0_initial, penultimate

    def forward(self, x):
        parts = [layer.linear for layer in self.layers]
        parts += [self.last_layer.linear] if self.penultimate else []
        for index, part in enumerate(parts[:-1]):
            x = torch.sin((self.w0 if index else self.first) * part(x))
        return parts[-1](x) + 0.5


class NerfMeta(nn.Module):
    """SimpleNeRF without its last sigmoid and ReLU: net.0.freqs, net.1, net.3, ..."""

    def __init__(
        self, in_features, max_freq, num_freqs, hidden_features, hidden_layers, out_features
    ):
        super().__init__()
        self.net = nn.ModuleList([nn.Module()])
        self.net[0].register_buffer("freqs", 2.0 ** torch.linspace(0, max_freq, num_freqs))
        sizes = [2 * num_freqs * in_features, *[hidden_features] * hidden_layers, out_features]
        for i, o in zip(sizes[:-1], sizes[1:], strict=True):
            self.net.extend([Affine(i, o), nn.ReLU()])
        del self.net[-1]

    def forward(self, x):
        arguments = torch.cat([x * f for f in self.net[0].freqs.to(x)], -1)
        x = torch.cat([arguments.sin(), arguments.cos()], -1)
        for part in list(self.net)[1:]:
            x = part(x)
        return x


PEERS = {
    "sitzmann": (Sitzmann, siren(2, 3, 11, 4, 30.0)),
    "sitzmann_relu": (Sitzmann, MLP(3, 1, 11, 3, "relu")),
    "sitzmann_tanh": (Sitzmann, MLP(1, 1, 11, 2, "tanh")),
    "lucidrains": (Lucidrains, siren(2, 3, 11, 4, 1.0, 30.0)),
    "lucidrains_sigmoid": (Lucidrains, MLP(2, 3, 11, 3, "sine", 20.0, 40.0, output="sigmoid")),
    "gradncp": (GradNCP, siren(2, 3, 11, 4, 30.0, output_shift=0.5)),
    "gradncp_penultimate": (GradNCP, siren(3, 2, 11, 3, 50.0, 25.0, output_shift=0.5)),
    "nerf_meta": (NerfMeta, nerf_mlp(11, 5, frequencies=5, max_exponent=4.0)),
}
every_peer = pytest.mark.parametrize("name", PEERS)


def peer(name: str):
    """(layout, the package's network written out, our network)."""
    kind, net = PEERS[name]
    layout = name if name in LAYOUTS else name.rsplit("_", 1)[0]
    extra = {"penultimate": True} if layout == "gradncp_penultimate" else {}
    return layout, kind(**peer_arguments(net, layout), **extra).double(), net


def options(net: MLP) -> dict:
    """What a package's file does not say."""
    names = ("activation", "w0", "w0_first", "output", "output_shift", "coords")
    if net.activation != "sine":
        names = ("activation", "output", "output_shift", "coords")
    return {name: getattr(net, name) for name in names}


def near(net: MLP) -> float:
    """Relative error in float64: rounding; behind an encoding, that of π/2 to float32, 4.4e-8."""
    return 1e-12 if net.encoding is None else 2e-6


@every_peer
def test_their_network_loads_ours_and_computes_the_same(name):
    layout, module, net = peer(name)
    params = weights(net, dtype=torch.float64)
    leaf = params.clone().requires_grad_()
    state = to_state_dict(net, leaf, layout)
    assert not any(part.requires_grad for part in state.values())
    module.load_state_dict(state)  # strict: every name and shape
    x = torch.rand(13, net.in_features, dtype=torch.float64)
    expected = plain(net, params, x)
    assert (module(x) - expected).abs().max() <= near(net) * expected.abs().max()
    for part in state.values():
        part.zero_()  # copies
    assert torch.equal(leaf, params)
    back, again = from_state_dict(to_state_dict(net, params, layout), layout, **options(net))
    assert back == net and torch.equal(again, params)


@every_peer
def test_our_network_loads_theirs_and_computes_the_same(name):
    layout, module, net = peer(name)
    got, params = from_state_dict(module.state_dict(), layout, **options(net))
    x = torch.rand(13, net.in_features, dtype=torch.float64)
    expected = module(x)
    assert expected.std(0).min() > 1e-3  # no dead network
    assert (plain(got, params, x) - expected).abs().max() <= near(net) * expected.abs().max()
    assert got.sizes == net.sizes and got.coords == net.coords
    state = to_state_dict(got, params, layout)
    theirs = module.state_dict()
    assert state.keys() == theirs.keys()
    assert all(torch.equal(state[key].to(theirs[key]), theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", ["sitzmann", "gradncp", "nerf_meta"])
def test_stacked_weights_wrappers_and_buffers(name):
    layout, module, net = peer(name)
    rows = torch.stack([weights(net, seed) for seed in range(3)])
    state = to_state_dict(net, rows, layout)
    one = to_state_dict(net, rows[1], layout)
    assert all(torch.equal(state[k][1], one[k]) for k in one if not k.endswith("freqs"))
    wrapped = {f"module.decoder.{key}": value for key, value in state.items()}
    if layout == "gradncp":
        wrapped["module.grid"] = torch.zeros(5, 2)
    back, again = from_state_dict(wrapped, layout, **options(net))
    assert back == net and torch.equal(again, rows)


def test_defaults_are_the_packages():
    for name, expected in [
        ("sitzmann", siren(2, 3, 11, 4, 30.0)),
        ("lucidrains", siren(2, 3, 11, 4, 1.0, 30.0)),
        ("gradncp", siren(2, 3, 11, 4, 30.0, output_shift=0.5)),
        ("nerf_meta", PEERS["nerf_meta"][1]),
    ]:
        layout, module, _ = peer(name)
        got, _ = from_state_dict(module.state_dict(), layout)
        own = {**options(expected), "coords": "world" if name == "nerf_meta" else "corners"}
        assert options(got) == own
    no_bias = {k: v for k, v in peer("lucidrains")[1].state_dict().items() if "bias" not in k}
    renamed = {key.replace("layers.", "net."): value for key, value in no_bias.items()}
    net, params = from_state_dict(renamed, "lucidrains")  # as early versions name them
    assert all(
        not b.any() and torch.equal(w, renamed[key])
        for (w, b), key in zip(net.layers(params), renamed, strict=True)
    )


def test_siren_pytorch_itself():
    siren_pytorch = pytest.importorskip("siren_pytorch")
    net = MLP(2, 3, 11, 3, "sine", 20.0, 40.0, output="sigmoid", coords="corners")
    params, x = weights(net), torch.rand(16, 2)
    module = siren_pytorch.SirenNet(**peer_arguments(net, "lucidrains"))
    wrapper = siren_pytorch.SirenWrapper(module, image_width=4, image_height=4)
    module.load_state_dict(to_state_dict(net, params, "lucidrains"))
    assert (module(x) - plain(net, params, x)).abs().max() < 1e-5  # outputs in (0,1), phases < 99
    back, again = from_state_dict(wrapper.state_dict(), "lucidrains", **options(net))
    assert back == net and torch.equal(again, params)
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, 4)] * 2, indexing="ij")
    image = plain(net, params, torch.stack([y, x], -1).view(-1, 2)).view(4, 4, 3)
    assert (wrapper().squeeze(0).permute(1, 2, 0) - image).abs().max() < 1e-5  # coords "corners"


def test_the_papers_view_network_comes_back_from_nerf_meta_as_it_is():
    net = nerf_mlp()
    params = weights(net)
    state = to_state_dict(net, params, "nerf_meta")
    assert list(state)[:3] == ["net.0.freqs", "net.1.weight", "net.1.bias"]
    # the sine of the second frequency: column 3 there, column 6 here
    assert torch.equal(state["net.1.weight"][:, 3], net.layers(params)[0][0][:, 6])
    back, again = from_state_dict(state, "nerf_meta")
    assert back == net and torch.equal(again, params)


def test_a_sitzmann_network_behind_its_nerf_encoding():
    """mode="nerf": x, then per frequency 2^i π and coordinate sin and cos."""
    f = [math.pi * 2.0**i for i in range(2) for _ in range(2)]
    columns = torch.zeros(2, 8)
    for place, (value, d) in enumerate(zip(f, [0, 1] * 2, strict=True)):
        columns[d, 2 * place : 2 * place + 2] = value
    encoding = Encoding(columns, torch.tensor([0.0, math.pi / 2] * 4), include_input=True)
    module = Sitzmann(10, 1, 7, 1, "relu").double()
    net, params = from_state_dict(
        module.state_dict(), "sitzmann", activation="relu", encoding=encoding
    )
    x = torch.rand(9, 2, dtype=torch.float64)
    parts = [x]
    for i in range(2):
        for d in range(2):
            z = x[:, d : d + 1] * math.pi * 2.0**i
            parts += [z.sin(), z.cos()]
    # float32 frequencies: 2π in error by 2e-7
    assert (plain(net, params, x) - module(torch.cat(parts, 1))).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("gradncp", lambda s: s.pop("layers.0.linear.weight"), "no layers.0.linear.weight; it hol"),
        ("gradncp", lambda s: s.pop("layers.1.linear.weight"), "1 layers"),
        ("gradncp", lambda s: s.update(rbf=torch.zeros(1)), "'rbf' is no part of such a network"),
        ("gradncp_penultimate", lambda s: s.pop("last_layer.linear.weight"), "weight is missing"),
        ("nerf_meta", lambda s: s.pop("net.0.freqs"), "'net.0.freqs' is missing"),
        ("nerf_meta", lambda s: s.update({"net.0.freqs": torch.ones(4)}), "no multiple"),
        ("nerf_meta", lambda s: s.update({"net.0.freqs": torch.ones(5).double() / 3}), "float32"),
        ("sitzmann", lambda s: s.update({"net.net.1.0.weight": torch.zeros(9, 11)}), "bias is"),
        ("sitzmann", lambda s: s.update({"net.net.1.0.weight": torch.zeros(11)}), r"is \[11\]"),
        ("sitzmann", lambda s: s.update({"net.net.1.0.bias": torch.zeros(11)}), "one floating-p"),
        ("sitzmann", lambda s: s.update({"net.net.1.0.bias": 3}), "bias is int"),
        ("sitzmann", lambda s: s.update({"b.net.0.0.weight": torch.zeros(1)}), "two networks"),
        ("lucidrains", lambda s: s.update({"to_latent.0.bias": torch.ones(1)}), "no part of such"),
    ],
)
def test_other_state_is_refused(name, change, said):
    layout, module, net = peer(name)
    state = dict(module.state_dict())
    change(state)
    with pytest.raises(ValueError, match=f"^from_state_dict: layout '{layout}': .*{said}"):
        from_state_dict(state, layout, **options(net))


def test_other_layers_options_and_layouts_are_refused():
    state = dict(Sitzmann(2, 3, 11, 2, "sine").state_dict())
    wide = {**state, "net.net.1.0.weight": torch.zeros(9, 11), "net.net.1.0.bias": torch.zeros(9)}
    with pytest.raises(ValueError, match=r"hidden widths are \[11, 9, 11\]"):
        from_state_dict(wide, "sitzmann")
    odd = {**state, "net.net.1.0.weight": torch.zeros(11, 9)}
    with pytest.raises(ValueError, match=r"net.net.1.0.weight is \[11, 9\]; accepted is \[11,11\]"):
        from_state_dict(odd, "sitzmann")
    with pytest.raises(ValueError, match="layout is 'siren'; accepted are sitzmann, lucidrains"):
        from_state_dict(state, "siren")
    with pytest.raises(TypeError, match="option 'width'; accepted are activation"):
        from_state_dict(state, "sitzmann", width=3)
    with pytest.raises(ValueError, match="state is list"):
        from_state_dict([], "sitzmann")


@pytest.mark.parametrize(
    ("net", "layout", "said"),
    [
        (siren(2, 3, 8, 3, 60.0), "sitzmann", "w0 is 60.0, it has 30.0; w0_first is 60.0"),
        (siren(2, 3, 8, 3, 30.0, output_shift=0.5), "sitzmann", "output_shift is 0.5, it has 0.0"),
        (MLP(2, 3, 8, 3, "gelu"), "sitzmann", "activation is 'gelu', it has sine, relu"),
        (MLP(2, 3, 8, 3, "relu", output="tanh"), "sitzmann", "output is 'tanh', it has linear"),
        (fourier_mlp(2, 1, 8, 3, features=4), "sitzmann", "encoding is .* it has none"),
        (MLP(2, 3, 8, 3), "lucidrains", "activation is 'relu', it has sine"),
        (siren(2, 3, 8, 3), "gradncp", "output_shift is 0.0, it has 0.5"),
        (MLP(3, 4, 8, 3), "nerf_meta", "encoding is None, it has one of frequencies"),
        (
            fourier_mlp(3, 4, 8, 3, features=4),
            "nerf_meta",
            "output|is not sin and cos of f x alone",
        ),
        (
            MLP(3, 4, 8, 3, encoding=Encoding.frequencies(3, 2, 1.0, include_input=True)),
            "nerf_meta",
            "is not sin and cos of f x alone",
        ),
        (
            MLP(3, 4, 8, 3, encoding=Encoding.gaussian(3, 6, 1.0)),
            "nerf_meta",
            "is not sin and cos of f x alone",
        ),
    ],
)
def test_what_a_package_cannot_represent_is_refused(net, layout, said):
    with pytest.raises(ValueError, match=f"to_state_dict: {layout} cannot .*{said}"):
        to_state_dict(net, net.init()[0], layout)
    with pytest.raises(ValueError, match=f"peer_arguments: {layout} cannot .*{said}"):
        peer_arguments(net, layout)


@pytest.mark.parametrize("params", [torch.zeros(3), torch.zeros(0, 3, 4), [1.0], None])
def test_rows_that_do_not_fit(params):
    net = siren(2, 3, 8, 3)
    for call in (
        lambda: to_state_dict(net, params, "sitzmann"),
        lambda: to_tcnn(net, params),
        lambda: reorder(net, params, nerf_mlp().encoding),
    ):
        with pytest.raises(ValueError, match="params is"):
            call()


def test_reorder_moves_columns_and_refuses_other_features():
    own = Encoding.frequencies(2, 3, 2.0, include_input=True)
    order = torch.randperm(12)
    other = Encoding(own.B[:, order], own.phi[order], include_input=True)
    net = MLP(2, 3, 6, 3, "tanh", encoding=own)
    rows = torch.stack([weights(net, seed, torch.float64) for seed in range(2)])
    moved, params = reorder(net, rows, other)
    x = torch.rand(9, 2, dtype=torch.float64)
    for a, b in zip(rows, params, strict=True):
        assert not torch.equal(a, b)
        assert (plain(moved, b, x) - plain(net, a, x)).abs().max() < 1e-14
    back, again = reorder(moved, params, own)
    assert back == net and torch.equal(again, rows)
    for wrong, said in [
        (Encoding(own.B, own.phi), "accepted are equal sizes"),
        (Encoding(own.B * 2, own.phi, True), "is no feature of net.encoding"),
        (Encoding(own.B[:, [0] * 12], own.phi[[0] * 12], True), "comes more often"),
    ]:
        with pytest.raises(ValueError, match=said):
            reorder(net, rows, wrong)
    with pytest.raises(ValueError, match="net has no encoding"):
        reorder(siren(2, 3, 8, 3), weights(siren(2, 3, 8, 3)), own)


# ---- tiny-cuda-nn


def tcnn(D, C, encoding, network, vector, x):
    """What its kernels compute, element by element: the padding holds ones, no layer a bias."""
    features = []
    if encoding["otype"] == "Frequency":
        for d in range(D):
            for k in range(encoding["n_frequencies"]):
                for quarter in range(2):
                    z = x[:, d] * 2.0**k * math.pi + quarter * math.pi / 2
                    features.append(z.sin())
    else:
        features = [x[:, d] for d in range(D)]
    features += [torch.ones_like(x[:, 0])] * (-len(features) % 16)
    h = torch.stack(features, 1)
    phi = {
        "None": lambda z: z,
        "ReLU": lambda z: z.clamp(min=0),
        "Sine": torch.sin,
        "Sigmoid": lambda z: 1 / (1 + (-z).exp()),
        "Tanh": torch.tanh,
        "SiLU": lambda z: z / (1 + (-z).exp()),
    }
    H, at = network["n_neurons"], 0
    for layer in range(network["n_hidden_layers"] + 1):
        last = layer == network["n_hidden_layers"]
        rows = C + -C % 16 if last else H
        w = vector[at : at + rows * h.shape[1]].view(rows, h.shape[1]).to(x)
        at += w.numel()
        h = phi[network["output_activation" if last else "activation"]](h @ w.T)
    assert at == vector.numel()
    return h[:, :C]


def only_first_bias(net: MLP, params: torch.Tensor, first: bool = True) -> torch.Tensor:
    params = params.clone()
    for index, (_, bias) in enumerate(net.layers(params)):
        if index or not first:
            bias.zero_()
    return params


def ladder(D: int, F: int) -> Encoding:
    return Encoding.frequencies(D, F, F - 1.0, pi=True)


TCNN = {
    "relu": MLP(2, 3, 64, 3),
    "narrow": MLP(3, 17, 24, 2, "tanh", output="sigmoid"),
    "sine": siren(2, 3, 32, 4, 30.0, 20.0),
    "silu": MLP(16, 1, 16, 3, "silu"),
    "frequencies": MLP(3, 4, 32, 3, encoding=ladder(3, 4), output="tanh"),
    "one": MLP(2, 5, 16, 3, encoding=ladder(2, 1), output="relu"),
    "filled": MLP(2, 3, 16, 3, "sigmoid", encoding=ladder(2, 4)),  # 16 features: no padding
}
every_tcnn = pytest.mark.parametrize("net", TCNN.values(), ids=TCNN)


@every_tcnn
def test_tcnn_computes_what_we_export(net):
    params = only_first_bias(net, weights(net), net.encoded_features % 16 != 0)
    made = to_tcnn(net, params)
    x = torch.rand(13, net.in_features, dtype=torch.float64)
    got = tcnn(net.in_features, net.out_features, *made, x)
    expected = plain(net, params.double(), x)
    assert expected.std(0).max() > 1e-3  # no dead network
    # the rounding of w0 W to float32, and of float32 frequencies against exact ones
    assert (got - expected).abs().max() <= 2e-5 * max(1.0, expected.abs().max().item())


@every_tcnn
def test_tcnn_comes_back(net):
    """Exactly, with the features in tiny-cuda-nn's order, and w0 in the weights."""
    rows = torch.stack(
        [
            only_first_bias(net, weights(net, seed), net.encoded_features % 16 != 0)
            for seed in range(2)
        ]
    )
    made = to_tcnn(net, rows)
    assert torch.equal(to_tcnn(net, rows[1]).params, made.params[1])
    again = from_tcnn(
        net.in_features, net.out_features, made.encoding, made.network, coords=net.coords
    )
    params = load_tcnn(again, made.params)
    if net.activation == "sine":
        for index, (got, own) in enumerate(
            zip(again.layers(params), net.layers(rows), strict=True)
        ):
            w0 = (*net.frequencies, 1.0)[index]
            assert all(torch.equal(a, b * w0) for a, b in zip(got, own, strict=True))
        assert options(again) == {**options(net), "w0": 1.0, "w0_first": 1.0}
        return
    if net.encoding is not None:
        back, params = reorder(again, params, net.encoding)
        assert torch.equal(load_tcnn(net, made.params), params)  # or at once
        again = back
    assert again == net and torch.equal(params, rows)


def test_tcnn_weights_of_its_own_in_half_precision():
    """Every entry of the padding is used there; its columns add up, its rows are no output."""
    encoding = {"otype": "Frequency", "n_frequencies": 3}
    network = {"otype": "FullyFusedMLP", "activation": "ReLU", "output_activation": "Sigmoid"}
    network |= {"n_neurons": 16, "n_hidden_layers": 2}
    net = from_tcnn(3, 2, encoding, network, coords="world")
    vector = (torch.rand(16 * 32 + 16 * 16 + 16 * 16) - 0.5).half()
    params = load_tcnn(net, vector)
    assert params.dtype == torch.float32 and net.coords == "world"
    x = torch.rand(13, 3, dtype=torch.float64)
    expected = tcnn(3, 2, encoding, network, vector.double(), x)
    # 14 padding columns are added in float32: 14 roundings of numbers below 4
    assert (plain(net, params.double(), x) - expected).abs().max() < 1e-5
    half = to_tcnn(net, only_first_bias(net, params).half().float(), dtype=torch.float16)
    assert half.params.dtype == torch.float16
    assert torch.equal(load_tcnn(net, half.params), params.half().float())


def test_tcnn_defaults_and_names_in_any_case():
    net = from_tcnn(2, 3, None, {})
    assert net == MLP(2, 3, 128, 6, "relu")
    net = from_tcnn(2, 3, {"otype": "frequency"}, {"otype": "cutlassmlp", "activation": "SINE"})
    assert net.encoding.out_features == 2 * 2 * 12 and net.activation == "sine" and net.w0 == 1.0


@pytest.mark.parametrize(
    ("encoding", "network", "said"),
    [
        ({}, {}, "encoding: otype is 'OneBlob'; accepted are Identity, Frequency"),
        ({"otype": "HashGrid"}, {}, "encoding: otype is 'HashGrid'"),
        ({"otype": "Identity", "scale": 2.0}, {}, "scale is 2.0; accepted is 1.0, apply it"),
        ({"otype": "Identity", "offset": 0.5}, {}, "offset is 0.5"),
        ({"otype": "Identity", "n_dims_to_encode": 1}, {}, "n_dims_to_encode is 1"),
        ({"otype": "Frequency", "n_frequencies": 0}, {}, "n_frequencies is 0"),
        ({"otype": "Frequency", "degree": 3}, {}, "encoding: 'degree' is unknown"),
        (None, {"otype": "CutlassResNet"}, "network: otype is 'CutlassResNet'"),
        (None, {"activation": "Softplus"}, r"'Softplus' \(tiny-cuda-nn's is log\(1 \+ exp\(10 z"),
        (None, {"activation": "Exponential"}, "activation is 'Exponential'; accepted are None"),
        (None, {"output_activation": "Sine"}, "output_activation is 'Sine'; accepted are None"),
        (None, {"n_neurons": 48, "otype": "FullyFusedMLP"}, "n_neurons is 48; accepted are 16, 32"),
        (None, {"n_neurons": 20}, "n_neurons is 20; accepted are multiples of 8"),
        (None, {"n_hidden_layers": 0}, "n_hidden_layers is 0; accepted is an integer >= 1"),
        (None, {"feedback_alignment": True}, "feedback_alignment is True"),
        (None, {"skip": 1}, "network: 'skip' is unknown"),
        ("Identity", {}, "encoding is str"),
    ],
)
def test_tcnn_configurations_that_are_refused(encoding, network, said):
    with pytest.raises(ValueError, match=f"from_tcnn: .*{said}"):
        from_tcnn(2, 3, encoding, network)


def biased(net: MLP, layer: int) -> torch.Tensor:
    params = only_first_bias(net, net.init()[0], first=False)
    net.layers(params)[layer][1][-1] = 0.25
    return params


@pytest.mark.parametrize(
    ("net", "layer", "said"),
    [
        (MLP(2, 3, 16, 3), 1, "layer 1 has a bias, it has one in layer 0 only"),
        (MLP(2, 3, 16, 3), 2, "layer 2 has a bias"),
        (TCNN["filled"], 0, "layer 0 has a bias, and 16 features leave no padding for it"),
        (MLP(2, 3, 20, 3), 0, "width is 20, it has multiples of 8"),
        (MLP(2, 3, 16, 3, "softplus"), 0, r"activation is 'softplus' \(tiny-cuda-nn's is log"),
        (MLP(2, 3, 16, 3, "gelu"), 0, "activation is 'gelu', it has none, relu, sine"),
        (MLP(2, 3, 16, 3, output="softplus"), 0, "output is 'softplus'"),
        (MLP(2, 3, 16, 3, output_shift=0.5), 0, "output_shift is 0.5, it has none"),
        (nerf_mlp(16, 3), 0, "is not sin and cos of 2\\^k π x"),
        (
            MLP(2, 3, 16, 3, encoding=Encoding.frequencies(2, 2, 1.0, pi=True, include_input=True)),
            0,
            "is not sin and cos of",
        ),
        (siren(2, 3, 16, 3, 1e39), 0, "no finite number in torch.float32"),
    ],
)
def test_what_tcnn_cannot_represent_is_refused(net, layer, said):
    with pytest.raises(ValueError, match=f"to_tcnn: tiny-cuda-nn cannot .*{said}"):
        to_tcnn(net, biased(net, layer))


def test_tcnn_precisions_and_lengths_that_are_refused():
    net = MLP(2, 3, 16, 3)
    params = biased(net, 0) * 1e6
    with pytest.raises(ValueError, match="no finite number in torch.float16"):
        to_tcnn(net, params, dtype=torch.float16)
    assert torch.isfinite(to_tcnn(net, params).params).all()
    with pytest.raises(ValueError, match="dtype is torch.bfloat16"):
        to_tcnn(net, params, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"shape \[7\]; accepted are \[768\] and \[T,768\]"):
        load_tcnn(net, torch.zeros(7))
    with pytest.raises(ValueError, match="params is torch.float64; accepted is a float16"):
        load_tcnn(net, torch.zeros(768).double())
    with pytest.raises(ValueError, match="is not sin and cos of"):
        load_tcnn(nerf_mlp(16, 3), torch.zeros(768))
