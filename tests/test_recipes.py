"""recipes.py: the paper's numbers, literally; what the command line makes of them; configurations
of every kind of signal, stored and read back."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

import fastmeta as fm
from fastmeta import cli, recipes
from fastmeta import config as cfg
from fastmeta import train as tr
from fastmeta.cli import main
from fastmeta.tasks import KINDS, kind_of, options
from fastmeta.tasks.audio import Audio
from fastmeta.tasks.ct import CT
from fastmeta.tasks.images import Images
from fastmeta.tasks.phototourism import Phototourism
from fastmeta.tasks.sdf import SDF
from fastmeta.tasks.views import Views
from fastmeta.tasks.volumes import Volumes

PAPER = ("celeba", "ct", "shapenet", "phototourism", "sdf")


def layers(*sizes):
    """2, 256, 3 -> ((2, 256), (256, 3))."""
    return tuple(zip(sizes[:-1], sizes[1:], strict=True))


def values(config):
    """Options of the signal and of training, in one mapping; what a test names must be there."""
    return tr.as_json(config)


def paper(name):
    return recipes.configure(name, "paper", data="d", out=Path("o"))


# the paper's numbers


def test_images():
    config = paper("celeba")
    net = tr.network(config)
    assert net.sizes == layers(2, 256, 256, 256, 256, 3) and net.encoding is None
    assert (net.activation, net.w0, net.w0_first) == ("sine", 200.0, 200.0)
    assert (net.output, net.output_shift, net.coords) == ("linear", 0.5, "unit")
    assert net.num_params == 198_915  # of the authors' published weights
    assert values(config).items() >= {
        "kind": "images", "size": 178, "channels": 3, "algorithm": "maml", "order": 2,
        "inner_steps": 2, "inner_lr": 1e-2, "rule": "sgd", "per_step": None, "tasks": 3, "lr": 1e-5,
        "clip": None, "iterations": 150_000, "test_steps": None, "test_counts": (),
    }.items()  # fmt: skip


def test_ct():
    config = paper("ct")
    net = tr.network(config)
    assert net.sizes == layers(512, 256, 256, 256, 256, 1)
    assert (net.activation, net.output, net.output_shift) == ("relu", "sigmoid", 0.0)
    assert net.coords == "unit_xy"
    B, phi = net.encoding.B, net.encoding.phi  # [2,512]: sines, then cosines, of one matrix
    assert torch.equal(B[:, :256], B[:, 256:]) and not net.encoding.include_input
    assert phi[:256].eq(0).all() and (phi[256:] - torch.pi / 2).abs().max() < 1e-6
    assert abs(float(B[:, :256].std()) - 30) < 5 * 30 / (2 * 512) ** 0.5
    assert values(config).items() >= {
        "kind": "ct", "size": 256, "angles": 20, "spacing": "random", "arc": 180.0, "photons": None,
        "algorithm": "reptile", "inner_steps": 12, "inner_lr": 10.0, "rule": "sgd",
        "per_step": None, "tasks": 1, "lr": 5e-5, "clip": None, "iterations": 100_000,
        "test_counts": (1, 2, 4, 8), "test_steps": 1000,
    }.items()  # fmt: skip


def ladder(net):
    """The frequencies of a network's encoding, and that it is sines of x, y, z, then cosines."""
    B, phi = net.encoding.B.view(3, -1, 2, 3), net.encoding.phi.view(-1, 2, 3)
    assert torch.equal(B[:, :, 0], B[:, :, 1]) and not net.encoding.include_input
    assert phi[:, 0].eq(0).all() and (phi[:, 1] - torch.pi / 2).abs().max() < 1e-6
    own = torch.stack([B[k, :, 0, k] for k in range(3)])
    assert B[:, :, 0].count_nonzero() == own.numel() and torch.equal(own[0], own[2])
    return own[0]


@pytest.mark.parametrize("name", ["shapenet", "phototourism"])
def test_the_radiance_network(name):
    net = tr.network(paper(name))
    assert net.sizes == layers(120, 256, 256, 256, 256, 256, 4)
    assert (net.activation, net.output, net.output_shift) == ("relu", "linear", 0.0)
    assert net.coords == "world"
    torch.testing.assert_close(ladder(net), 2 ** torch.linspace(0, 8, 20), rtol=1e-6, atol=0)


def test_shapenet():
    config = paper("shapenet")
    assert values(config).items() >= {
        "kind": "views", "size": 128, "near": 2.0, "far": 6.0, "learn_views": 25, "samples": 128,
        "last_interval": 1e-3, "white_background": True, "density": "relu", "algorithm": "reptile",
        "inner_steps": 32, "inner_lr": 0.5, "rule": "sgd", "per_step": 128, "tasks": 1, "lr": 5e-4,
        "clip": None, "iterations": 100_000, "test_counts": (1, 25), "test_steps": 1000,
        "test_per_step": 64,
    }.items()  # fmt: skip


def test_phototourism():
    config = paper("phototourism")
    held = values(config)
    assert held.items() >= {
        "kind": "phototourism", "shrink": 1, "near_factor": 0.9, "far_factor": 1.2, "samples": 128,
        "last_interval": 1e10, "density": "relu", "algorithm": "reptile", "inner_steps": 64,
        "inner_lr": 1.0, "rule": "sgd", "per_step": 64, "tasks": 1, "lr": 5e-4, "clip": None,
        "iterations": 150_000, "test_counts": (), "test_steps": 256, "test_per_step": None,
    }.items()  # fmt: skip
    assert [v for k, v in held.items() if k.endswith("scale") and k != "feature_scale"] == [0.05]


def test_sdf_of_metasdf():
    config = paper("sdf")
    net = tr.network(config)
    assert net.sizes == layers(3, *[512] * 8, 1) and net.encoding is None
    assert (net.activation, net.output, net.coords) == ("relu", "linear", "world")
    # its losses are sums over 24 000 points, so 5e-3 there is 120 of their mean
    assert values(config).items() >= {
        "kind": "sdf", "dimensions": 3, "points": 24_000, "loss": "l1", "clamp": None,
        "algorithm": "maml", "order": 2, "inner_steps": 5, "inner_lr": 5e-3 * 24_000,
        "rule": "meta_sgd", "per_step": None, "tasks": 32, "lr": 5e-4, "eikonal": 0.0,
    }.items()  # fmt: skip


def test_two_recipes_are_not_the_papers():
    for name in ("audio", "volumes"):
        with pytest.raises(ValueError, match=f"recipe {name} is not the paper's; .* scale small"):
            paper(name)
    assert {n for n, r in recipes.RECIPES.items() if r.paper is not None} == set(PAPER)


# every recipe


def test_every_kind_has_one_recipe_and_every_recipe_its_kind():
    assert sorted(r.kind for r in recipes.RECIPES.values()) == sorted(KINDS)
    for kind in KINDS:
        assert recipes.RECIPES[recipes.of_kind(kind)].kind == kind


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_small_ones_learn_as_the_papers_do_with_less(name):
    """Same network, algorithm, rates and rays; fewer weights and iterations. Of photos a rate
    of 1 is too much for 10 photos at a quarter of their size (ten times fewer pixels a photo)."""
    config = recipes.configure(name, "small", data="d", out=Path("o"))
    learner = tr._learner(config, tr.network(config))
    made = fm.Reptile if config.algorithm == "reptile" else fm.MAML
    assert isinstance(learner, made) and learner.inner_steps == config.inner_steps
    if name in PAPER:
        whole = paper(name)
        assert (config.network, config.algorithm) == (whole.network, whole.algorithm)
        assert learner.net.num_params * 3 < tr.network(whole).num_params
        assert config.iterations * 10 <= whole.iterations
    if name in ("ct", "shapenet", "phototourism"):
        same = ("inner_steps", "rule", "tasks")
        same += () if name == "phototourism" else ("inner_lr", "per_step")
        assert [getattr(config, n) for n in same] == [getattr(whole, n) for n in same]


def test_what_the_command_line_begins_with_is_the_small_recipe():
    for kind in KINDS:
        config = recipes.default(kind, data="d", out=Path("o"))
        assert kind_of(config.signal) == kind
        small = recipes.configure(recipes.of_kind(kind), "small", data="d", out=Path("o"))
        assert config == small
    plain = tr.Config(data="d", out=Path("o"))
    assert recipes.default("images", data="d", out=Path("o")) == plain


def test_changes_go_where_they_belong():
    config = recipes.configure("ct", data="d", out="o", angles=7, tasks=4, photons=10**4)
    assert (config.signal.angles, config.signal.photons, config.tasks) == (7, 10**4, 4)
    assert config.out == Path("o")
    assert dataclasses.replace(config.signal, angles=20, photons=None) == CT(size=256)
    with pytest.raises(ValueError, match="recipe ct: samples is no option of ct or of training"):
        recipes.configure("ct", data="d", out="o", samples=7)
    with pytest.raises(ValueError, match="ct: angles is 0; accepted is an integer >= 1"):
        recipes.configure("ct", data="d", out="o", angles=0)
    for name, scale in (("cars", "paper"), ("ct", "tiny")):
        said = f"recipe is {name}, scale {scale}; accepted are celeba, ct, .* at scale paper or sm"
        with pytest.raises(ValueError, match=said):
            recipes.configure(name, scale, data="d", out="o")
    with pytest.raises(ValueError, match="the kind of signal is cars; accepted are images, ct"):
        recipes.default("cars", data="d", out="o")


# the command line


@pytest.fixture
def typed(monkeypatch, capsys):
    """The configuration that a command line comes to; or the one line it is refused with."""
    seen = []
    monkeypatch.setattr(cli, "train", seen.append)

    def run(*given):
        seen.clear()
        capsys.readouterr()
        code = main(["train", *map(str, given)])
        said = capsys.readouterr()
        if code:
            assert code == 2 and not seen and said.err.count("\n") == 1, said
            return said.err
        return seen[0]

    return run


def test_a_recipe_on_the_command_line(typed):
    given = ("--data", "d", "--out", "o")
    assert typed("ct", *given) == recipes.default("ct", data="d", out=Path("o"))
    for name in PAPER:
        kind = recipes.RECIPES[name].kind
        assert typed(kind, *given, "--recipe", name) == paper(name)
        small = recipes.configure(name, "small", data="d", out=Path("o"))
        assert typed(kind, *given, f"--recipe={name}", "--scale=small") == small
        assert typed(kind, "--scale", "paper", *given) == paper(name)
    changed = typed("ct", "--recipe", "ct", *given, "--tasks", 4, "--angles", 9, "--photons", 500)
    wanted = recipes.configure("ct", data="d", out="o", tasks=4, angles=9, photons=500)
    assert changed == wanted
    counts = typed("views", "--recipe", "shapenet", *given, "--test-counts", 3, 5)
    assert counts == recipes.configure("shapenet", data="d", out="o", test_counts=(3, 5))


def test_wrong_recipes_on_the_command_line(typed, tmp_path):
    given = ("--data", "d", "--out", tmp_path)
    assert "recipe celeba with ct; accepted is train images" in typed(
        "ct", *given, "--recipe", "celeba"
    )
    assert "recipe is cars, scale paper; accepted are" in typed("ct", *given, "--recipe", "cars")
    assert "scale tiny; accepted are" in typed("ct", *given, "--scale", "tiny")
    assert "--recipe has no value" in typed("ct", *given, "--recipe")
    assert "recipe audio is not the paper's" in typed("audio", *given, "--recipe", "audio")
    assert "--data" in typed("ct", "--recipe", "ct", "--out", tmp_path)
    assert "--angles" in typed("audio", *given, "--angles", 3)  # another kind's


def test_a_recipe_is_refused_with_resume(typed, tmp_path):
    stored = recipes.configure("ct", "small", data="phantoms", out=tmp_path, angles=11)
    (tmp_path / tr.CONFIG).write_text(json.dumps(tr.as_json(stored)))
    resumed = dataclasses.replace(stored, resume=True)
    assert typed("ct", "--resume", "--out", tmp_path) == resumed
    for option in (("--recipe", "ct"), ("--scale", "paper"), ("--recipe=ct",)):
        said = f"{option[0].partition('=')[0]} with --resume; accepted is one of them"
        assert said in typed("ct", "--resume", "--out", tmp_path, *option)
    said = f"{tmp_path}: a run on ct, resumed as images; accepted is train ct"
    assert said in typed("images", "--resume", "--out", tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_options_lie_side_by_side(kind):
    """The signal's and training's, and the two of the command line alone; one set of names."""
    own = {f.name for f in dataclasses.fields(options(kind))}
    common = {f.name for f in dataclasses.fields(tr.Config)} | {"recipe", "scale", "kind"}
    assert not own & common


@pytest.mark.parametrize("kind", KINDS)
def test_help_lists_every_option(kind, capsys):
    assert main(["train", kind, "--help"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    for form in (options(kind), tr.Config):
        for field in dataclasses.fields(form):
            if field.name != "signal":
                flag = field.name.replace("_", "-")
                assert re.search(rf"--{flag}[ ,]", said.out), field.name
    small = recipes.default(kind, data="d", out=Path("o"))
    words = " ".join(said.out.replace("│", " ").split())
    assert f"(default: {small.inner_lr})" in words and "gradient steps on each task, K" in words


# on disk

OTHERS = {
    "images": Images(20, 1, 0.2, 0.3, "(a)", True),
    "ct": CT(32, 7, "even", 120.0, 1000, 3.0, -900.0, 900.0, 50, 0.2, 0.3, "(a)", True),
    "views": Views(32, 1.5, 5.5, 9, 3, 16, 0.01, False, "softplus", 0.2, 0.3, "(a)", True),
    "phototourism": Phototourism(
        3, 0.1, 0.8, 1.3, 16, 0.01, "softplus", None, None, 0.2, 0.3, "(a)", True
    ),
    "sdf": SDF(2, 40, "light", 99, 0.7, 0.02, "l1", 0.05, 0.2, 32, 0.2, 0.3, "(a)", True),
    "audio": Audio(512, 8000, 2, 0.2, 0.3, "(a)", True),
    "volumes": Volumes(8, True, (-100.0, 250.5), 3, 0.2, 0.3, "(a)", True),
}
MORE = {
    "ct": {"network": "fourier", "feature_scale": 7.5, "test_counts": (4, 1)},
    "views": {"network": "frequencies", "max_exponent": 3.5, "test_counts": (2,)},
    "sdf": {"network": "relu", "eikonal": 0.25, "order": 1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_configuration_comes_back_from_json(kind, tmp_path):
    """Every option of the signal has another value than its default."""
    signal = OTHERS[kind]
    for field in dataclasses.fields(signal):
        apart = (kind, field.name) == ("phototourism", "train_photos")  # goes without group
        assert apart or getattr(signal, field.name) != field.default, field.name
    config = tr.Config("d", tmp_path, signal, clip=0.5, test_steps=9, **MORE.get(kind, {}))
    text = json.dumps(tr.as_json(config))
    assert cfg.from_json(json.loads(text), tmp_path) == config
    (tmp_path / tr.CONFIG).write_text(text)
    assert tr.saved_config(tmp_path) == config
    default = recipes.default(kind, data="d", out=tmp_path)
    assert cfg.from_json(json.loads(json.dumps(tr.as_json(default))), tmp_path) == default
    stored = json.loads(text)
    for change in ({"nonsense": 3}, {"kind": "smells"}, {"tasks": 0}):
        (tmp_path / tr.CONFIG).write_text(json.dumps({**stored, **change}))
        with pytest.raises(ValueError, match="not the configuration of a run"):
            tr.saved_config(tmp_path)
