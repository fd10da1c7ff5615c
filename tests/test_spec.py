"""Specifications: sizes, layouts, initialisations, encodings, what is refused."""

import math

import pytest
import torch
from helpers import error, generator, nets, rand

import fastmeta as fm
from fastmeta.spec import ACTIVATIONS


def test_the_papers_networks_have_their_sizes():
    image = fm.siren(2, 3, width=256, depth=5, w0=200.0, output_shift=0.5)
    assert image.sizes == ((2, 256), (256, 256), (256, 256), (256, 256), (256, 3))
    assert image.num_params == 198_915
    assert fm.fourier_mlp(2, 1).sizes[0] == (512, 256) and fm.fourier_mlp(2, 1).depth == 5
    assert fm.nerf_mlp().sizes == ((120, 256), *[(256, 256)] * 4, (256, 4))


@pytest.mark.parametrize("net", nets(), ids=lambda n: f"{n.activation}-{n.output}")
def test_layers_flatten_as_linear_modules_do(net):
    modules = torch.nn.Sequential(*[torch.nn.Linear(i, o) for i, o in net.sizes]).double()
    flat = torch.nn.utils.parameters_to_vector(modules.parameters())
    for module, (weight, bias) in zip(modules, net.layers(flat), strict=True):
        assert torch.equal(module.weight, weight) and torch.equal(module.bias, bias)
    batched = net.layers(flat.detach().expand(3, -1))
    assert [w.shape for w, _ in batched] == [(3, o, i) for i, o in net.sizes]


def test_siren_init():
    net = fm.siren(2, 3, width=256, depth=5, w0=200.0)
    layers = net.layers(net.init(4, generator=generator(0)))
    for index, (weight, bias) in enumerate(layers):
        fan_in = weight.shape[-1]
        bound = 1 / fan_in if index == 0 else math.sqrt(6 / fan_in) / 200
        assert not bias.any()
        assert weight.abs().max() <= bound
        assert weight.abs().max() > 0.98 * bound  # 3000 uniform draws come that near
        assert abs(float(weight.std()) / (bound / math.sqrt(3)) - 1) < 0.05


def test_relu_init_is_a_normal_cut_at_two_deviations():
    net = fm.MLP(100, 3, 400, 3)
    weight, bias = net.layers(net.init(generator=generator(0)))[1]
    std = 1 / math.sqrt(400)
    assert not bias.any()
    assert 1.98 * std < weight.abs().max() <= 2 * std
    # a normal cut at ±2 has standard deviation 0.8796; 160 000 draws are within 1 %
    assert abs(float(weight.std()) / (0.8796 * std) - 1) < 0.01


def test_init_is_seeded_and_a_task_does_not_depend_on_how_many_there_are():
    net = fm.siren(2, 3, 16, 3)
    three = net.init(3, generator=generator(5))
    assert torch.equal(three[:1], net.init(1, generator=generator(5)))
    assert not torch.equal(three[0], three[1])
    assert not torch.equal(three, net.init(3, generator=generator(6)))


def test_frequencies_stand_in_the_papers_order():
    encoding = fm.Encoding.frequencies(3, 20, 8.0)
    x = rand(5, 3, low=-1)
    parts = []
    for f in 2.0 ** torch.linspace(0, 8, 20, dtype=torch.float64):
        parts += [torch.sin(f * x), torch.cos(f * x)]
    got = torch.sin(x @ encoding.B.double() + encoding.phi.double())
    # B is float32: |x| f · 2⁻²⁵ <= 1.3e-5 in the argument
    assert (got - torch.cat(parts, 1)).abs().max() < 2e-5
    pi = fm.Encoding.frequencies(2, 4, 3.0, pi=True, include_input=True)
    assert torch.allclose(pi.B[0, ::4], math.pi * torch.tensor([1.0, 2.0, 4.0, 8.0]))
    assert pi.out_features == 2 + 16
    assert torch.allclose(
        fm.Encoding.frequencies(1, 3, 2.0, base=3.0).B[0, ::2], torch.tensor([1.0, 3.0, 9.0])
    )


def test_gaussian_features_are_the_authors():
    encoding = fm.Encoding.gaussian(2, 256, 30.0)
    assert abs(float(encoding.B[0, 0]) + 2.0546 * 30) < 0.01  # JAX's original generator, key 0
    assert torch.equal(encoding.B[:, :256], encoding.B[:, 256:])
    assert encoding.phi.tolist() == [0.0] * 256 + [pytest.approx(math.pi / 2)] * 256


def test_networks_are_hashable_by_value():
    assert fm.fourier_mlp(2, 1) == fm.fourier_mlp(2, 1)
    assert hash(fm.fourier_mlp(2, 1)) == hash(fm.fourier_mlp(2, 1))
    assert fm.fourier_mlp(2, 1, seed=0) != fm.fourier_mlp(2, 1, seed=1)
    assert fm.siren(2, 3, w0=30.0) == fm.siren(2, 3, w0=30.0, w0_first=30.0)
    assert len({fm.nerf_mlp(), fm.nerf_mlp(), fm.nerf_mlp(width=64)}) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "width is 0; accepted is an integer >= 1"),
        ({"depth": 1}, "depth is 1; accepted is an integer >= 2"),
        ({"in_features": 2.0}, "in_features is 2.0"),
        ({"activation": "elu"}, "activation is 'elu'; accepted are relu, sine"),
        ({"output": "exp"}, "output is 'exp'; accepted are linear"),
        ({"coords": "pixels"}, "coords is 'pixels'; accepted are unit"),
        ({"w0": 30.0}, "w0 belongs to sine layers only"),
        ({"activation": "sine", "w0": -1.0}, "w0 is -1.0; accepted is a finite number"),
        ({"output_shift": math.nan}, "output_shift is nan"),
        ({"encoding": fm.Encoding.frequencies(3, 2, 1.0)}, "takes 3 coordinates, in_features is 2"),
    ],
)
def test_bad_networks_are_refused(change, message):
    good = {"in_features": 2, "out_features": 3, "width": 8, "depth": 3}
    with pytest.raises(ValueError, match=message):
        fm.MLP(**{**good, **change})


def test_bad_encodings_are_refused():
    with pytest.raises(ValueError, match=r"B has shape \(2, 3\) and phi \(4,\)"):
        fm.Encoding(torch.zeros(2, 3), torch.zeros(4))
    with pytest.raises(ValueError, match="B holds NaN"):
        fm.Encoding(torch.full((2, 3), math.nan), torch.zeros(3))
    with pytest.raises(ValueError, match="3 columns"):
        fm.siren(2, 3).layers(torch.zeros(3))
    with pytest.raises(ValueError, match="tasks is 0"):
        fm.siren(2, 3).init(0)


def test_every_activation_is_tested_somewhere():
    assert {net.activation for net in nets()} == set(ACTIVATIONS)
    assert error(torch.tensor([math.nan]), torch.ones(1)) == math.inf


def test_the_number_of_parameters_is_the_sum_over_layers_at_any_depth():
    for depth in (2, 3, 16):
        for net in (fm.siren(2, 3, 8, depth), fm.fourier_mlp(2, 1, 7, depth, features=5)):
            assert net.num_params == sum(i * o + o for i, o in net.sizes)
    assert fm.MLP(2, 3, 8, 10**9).num_params > 10**9  # not by making a list of its layers
