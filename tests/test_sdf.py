"""tasks/sdf.py, fields.py and surface.py: sources of distances, samples, batches, and what a fitted
network shows."""

import io
import math
import sys

import numpy as np
import pytest
import torch
from helpers import error, rand
from PIL import Image

import fastmeta as fm
from fastmeta import rng
from fastmeta.tasks import sdf, surface
from fastmeta.tasks.fields import Field, mesh_field, signed_distance
from fastmeta.tasks.sdf import SDF, sample
from fastmeta.tasks.surface import trace

FLAT = SDF(dimensions=2)
EPS = float(np.finfo(np.float32).eps)


def one_line(match, call, *args, error=ValueError, **kwargs):
    with pytest.raises(error, match=match) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)


def centres(*shape):
    """[...,D] float64."""
    axes = [(2 * np.arange(n) + 1) / n - 1 for n in shape]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1)


def field(f, *shape, name="field"):
    return Field(torch.from_numpy(f(centres(*shape)).astype(np.float32)), name)


def sphere(radius=0.6):
    return lambda x: np.linalg.norm(x, axis=-1) - radius


def octahedron(radius=0.6, inputs=3):
    """``|x| + |y| + |z| − r`` as a network: relu(x) + relu(−x) + ... ."""
    net = fm.MLP(inputs, 1, 2 * inputs, 2, "relu", coords="world")
    params = torch.zeros(net.num_params)
    (w, _), (out, b) = net.layers(params)
    w[: w.shape[0] // 2], w[w.shape[0] // 2 :] = torch.eye(inputs), -torch.eye(inputs)
    out.fill_(1.0)
    b.fill_(-radius)
    return net, params


# distances of a drawing


def to_segments(inside):
    """Distance to every edge between pixels of two kinds, by projection onto each."""
    H, W = inside.shape
    y, x = (c[..., None] for c in np.moveaxis(centres(H, W), -1, 0))
    i, j = np.nonzero(inside[1:] != inside[:-1])  # horizontal edges: row fixed
    row, left = 2 * (i + 1) / H - 1, 2 * j / W - 1
    flat = np.hypot(y - row, x - x.clip(left, left + 2 / W))
    i, j = np.nonzero(inside[:, 1:] != inside[:, :-1])
    column, top = 2 * (j + 1) / W - 1, 2 * i / H - 1
    upright = np.hypot(x - column, y - y.clip(top, top + 2 / H))
    return np.concatenate([flat, upright], -1).min(-1)


@pytest.mark.parametrize("size", [(2, 2), (1, 7), (16, 16), (13, 21), (40, 9)])
def test_distances_to_the_edges_of_pixels_are_exact(size):
    for seed in range(4):
        inside = np.random.default_rng(seed).random(size) < (0.1, 0.3, 0.5, 0.9)[seed]
        inside[0, 0], inside[-1, -1] = True, False
        got = signed_distance(inside)
        assert got.dtype == np.float32 and ((got < 0) == inside).all()
        np.testing.assert_allclose(np.abs(got), to_segments(inside), rtol=2 * EPS)


def test_a_border_lies_half_way_and_a_disk_is_a_disk():
    edge = np.zeros((8, 8), bool)
    edge[:, :3] = True
    np.testing.assert_array_equal(signed_distance(edge)[5], np.arange(-2.5, 5) * 0.25)
    n = 101
    true = sphere(0.5)(centres(n, n))
    got = signed_distance(true < 0)
    # edges run within a pixel's half diagonal √2/n of the circle, and each is the end of a pixel
    assert np.abs(got - true).max() < math.sqrt(2) / n
    assert np.isinf(signed_distance(edge[:, :3])).all()


# Field


@pytest.mark.parametrize("shape", [(5, 8), (4, 5, 6), (2, 2, 2)])
def test_interpolation_is_multilinear(shape):
    def f(x):
        return 0.1 + x[..., 0] - 0.7 * x[..., 1] + 0.4 * x[..., -1] * x[..., 0] + x.prod(-1)

    made, D = field(f, *shape), len(shape)
    inner = 1 - 1 / np.array(shape)
    x = rand(300, D, seed=1, low=-1.0) * torch.from_numpy(inner)
    true = torch.from_numpy(f(x.numpy()))
    assert (made.at(x) - true).abs().max() < 8 * EPS
    assert (made.at(x.float()) - true).abs().max() < 32 * EPS
    at = torch.from_numpy(centres(*shape)).view(-1, D)
    assert (made.at(at) - made.values.flatten()).abs().max() < 8 * EPS  # first axis first
    beyond = torch.full((1, D), 3.0)
    assert made.at(beyond).item() == made.values.flatten()[-1]
    assert made.at(-beyond).item() == made.values.flatten()[0]


def test_surface_cells_have_a_neighbour_of_the_other_sign():
    for shape in ((7, 6), (5, 4, 6)):
        made = field(lambda x: np.random.default_rng(1).normal(size=x.shape[:-1]) + 1, *shape)
        inside = (made.values < 0).numpy()
        wanted = []
        for index in np.ndindex(shape):
            for axis in range(len(shape)):
                for by in (-1, 1):
                    other = list(index)
                    other[axis] += by
                    if 0 <= other[axis] < shape[axis] and inside[tuple(other)] != inside[index]:
                        wanted.append((2 * np.array(index) + 1) / np.array(shape) - 1)
        wanted = np.unique(np.round(wanted, 6), axis=0)
        got = np.unique(np.round(made.surface.numpy(), 6), axis=0)
        assert len(made.surface) == len(wanted) and np.abs(got - wanted).max() < 1e-6


def test_field_refuses():
    values = field(sphere(), 4, 4, 4).values
    one_line("chair goes from 0 to 0, so it has no surface", Field, values * 0, "chair")
    one_line("no surface; accepted are both signs", Field, -values.abs() - 1)
    one_line("chair holds NaN or infinity", Field, values.log(), "chair")
    one_line("holds NaN or infinity", Field, values / 0)
    for bad in (values.double(), values[:, :1], values[None], values[0, 0]):
        one_line(r"is torch.float.*accepted is float32 \[H,W\] or \[D,H,W\]", Field, bad)


# samples


@pytest.mark.parametrize("near", [0.0, 0.3, 1.0])
def test_samples_near_a_plane_and_in_the_box(near):
    made, n, sigma = field(lambda x: x[..., 1], 9, 16, 5), 20_000, 0.05
    x, y = sample(made, n, near, sigma, 3)
    assert x.shape == (n, 3) and x.abs().max() <= 1 and y.shape == (n, 1)
    assert y[:, 0].equal(made.at(x))
    close, far = x[: round(near * n)].double(), x[round(near * n) :].double()
    if len(close):  # cells on either side of 0: uniform in ±h, h = 1/8, plus σ N
        spread = math.sqrt((1 / 8) ** 2 / 3 + sigma**2)
        assert abs(close[:, 1].mean()) < 5 * spread / math.sqrt(len(close))
        # a variance of n draws is off by √(2/n) at most: uniform and normal have kurtosis <= 3
        assert abs(close[:, 1].var() / spread**2 - 1) < 5 * math.sqrt(2 / len(close))
        assert abs(close[:, 0].mean()) < 5 / math.sqrt(3 * len(close))  # anywhere along the plane
    if len(far):
        assert far.mean(0).abs().max() < 5 / math.sqrt(3 * len(far))
        assert (far.var(0) * 3 - 1).abs().max() < 5 * math.sqrt(0.8 / len(far))  # kurtosis 1.8
        cross = (far[:, :1] * far[:, 1:]).mean(0) * 3  # no two axes share a draw
        assert cross.abs().max() < 5 / math.sqrt(len(far))


def test_samples_depend_on_the_seed_alone():
    made = field(sphere(), 8, 8, 8)
    x, _ = sample(made, 50, 0.5, 0.1, 3)
    assert x.equal(sample(made, 50, 0.5, 0.1, 3)[0]) and len(x.unique(dim=0)) == 50
    assert not x.eq(sample(made, 50, 0.5, 0.1, 4)[0]).any()
    drawn = 2 * rng.uniform(torch.tensor([3]), 75, 2, rng.SURFACE).view(25, 3) - 1
    assert not torch.isin(x, drawn).any()  # an inner step draws others, as an eikonal term does


# tasks


def flat_fields(count=3, size=(6, 9)):
    return [field(lambda x, r=r: sphere(r)(x), *size) for r in np.linspace(0.4, 0.8, count)]


def solid_fields(count=3, n=12):
    return [field(lambda x, r=r: sphere(r)(x), n, n, n) for r in np.linspace(0.4, 0.8, count)]


def test_learn_draws_each_field_by_its_seed():
    net = fm.MLP(3, 1, 8, 3, coords="world")
    options = SDF(points=40, near=0.25, sigma=0.02, loss="l1", clamp=0.1)
    fields, seeds = solid_fields(), torch.tensor([5, 6, -(2**62)])
    batch = sdf.learn(fields, options, net, seeds, 7)
    assert (batch.per_step, batch.loss, batch.query) == (7, ("l1", 0.1), None)
    assert batch.seed.equal(seeds)
    for t, seed in enumerate(seeds.tolist()):
        x, y = sample(fields[t], 40, 0.25, 0.02, seed)
        assert batch.x[t].equal(x) and batch.y[t].equal(y)
    assert sdf.learn(fields, SDF(points=5), net, seeds, None).loss == "mse"
    one_line(
        "net goes from 2 to 1 features", sdf.learn, fields, options, fm.MLP(2, 1, 8, 3), seeds, 7
    )
    one_line("accepted is 3 to 1", sdf.learn, fields, options, fm.MLP(3, 4, 8, 3), seeds, 7)


def test_observe_scores_the_whole_grid_of_a_curve():
    net, params = octahedron(0.5, inputs=2)
    fields, seeds = flat_fields(), torch.arange(3)
    batch = sdf.observe(fields, FLAT, net, seeds, None, 4)
    support = sdf.learn(fields, FLAT, net, seeds, 4)
    assert batch.x.equal(support.x) and batch.y.equal(support.y) and batch.per_step == 4
    np.testing.assert_allclose(batch.query.x, centres(6, 9).reshape(-1, 2), atol=EPS)
    values = torch.stack([f.values for f in fields])
    assert batch.query.y.view(3, 6, 9).equal(values)
    loss, _ = fm.loss_grad(net, params, batch.query)  # the query's loss is the metric
    shape = torch.from_numpy(np.abs(centres(6, 9)).sum(-1) - 0.5)
    assert error(loss, (shape - values).abs().mean((1, 2))) < 8 * EPS
    clamped = sdf.observe(fields, SDF(dimensions=2, loss="l1", clamp=0.1), net, seeds).query
    wanted = (shape.clamp(-0.1, 0.1) - values.clamp(-0.1, 0.1)).abs().mean((1, 2))
    assert error(fm.loss_grad(net, params, clamped)[0], wanted) < 32 * EPS
    mixed = [*fields, field(sphere(), 8, 8)]
    one_line("accepted is one shape", sdf.observe, mixed, FLAT, net, torch.arange(4))
    one_line("sdf: count is 3", sdf.observe, fields, FLAT, net, seeds, 3)


def test_observe_scores_the_same_points_of_a_surface_whatever_the_seed():
    net, fields = octahedron()[0], solid_fields()
    query = sdf.observe(fields, SDF(points=10), net, torch.arange(3)).query
    other = sdf.observe(fields, SDF(points=20, near=0.1), net, torch.arange(3) + 9).query
    assert query.x.equal(other.x) and query.y.equal(other.y) and query.x.shape == (3, 8192, 3)
    assert query.loss == "l1" and query.per_step is None
    close = query.y[:, :4096].abs().mean((1, 2)) / query.y[:, 4096:].abs().mean((1, 2))
    assert close.max() < 0.5  # half of them near the surface
    one = sdf.observe(fields[1:2], SDF(), net, torch.tensor([77])).query
    assert one.x[0].equal(query.x[1])


def test_shape():
    assert sdf.shape(SDF()) == (3, 1, "world", False)
    assert sdf.shape(FLAT) == (2, 1, "world", False)
    assert (sdf.COUNTED, sdf.METRIC, sdf.PLANAR) == (None, "mae", False)


# sources


def drawings(n=5, h=9, w=12):
    inside = np.random.default_rng(0).random((n, h, w)) < 0.4
    inside[:, 0, 0], inside[:, -1, -1] = True, False
    return inside


def same(tasks, inside):
    assert len(tasks) == len(inside)
    for i, part in enumerate(inside):
        np.testing.assert_array_equal(tasks[i].values, signed_distance(part))
    return tasks


def test_drawings_from_everywhere(tmp_path):
    inside = drawings()
    for i, part in enumerate(inside):
        Image.fromarray(np.where(part, 0, 255).astype(np.uint8)).save(tmp_path / f"{i}.png")
    assert same(sdf.open_all(tmp_path, FLAT), inside).names[3] == "3.png"
    light = SDF(dimensions=2, ink="light")
    same(sdf.open_all(tmp_path, light), ~inside)
    same(sdf.open_all(inside, light), inside)
    same(sdf.open_all(torch.from_numpy(~inside), FLAT), inside)
    np.savez(tmp_path / "a.npz", images=(~inside * 255).astype(np.uint8))
    same(sdf.open_all(tmp_path / "a.npz", FLAT), inside)
    np.save(tmp_path / "a.npy", inside)
    same(sdf.open_all(tmp_path / "a.npy", light), inside)
    large = sdf.open_all(inside.repeat(4, 1).repeat(4, 2), SDF(dimensions=2, ink="light", size=36))
    assert large[0].values.shape == (36, 36)  # cut about the centre: columns 6 to 42 of 48


def test_packed_drawings(tmp_path):
    inside = drawings()
    bits = np.packbits(inside.reshape(5, -1), axis=1)
    label = np.array(["b/1", "a/1", "b/1", "a/1", "a/2"])
    np.savez(tmp_path / "a.npz", bits=bits, shape=inside.shape, char=label)
    tasks = same(sdf.open_all(tmp_path / "a.npz", FLAT), inside)  # 1 is inside, whatever the ink
    assert tasks.names == ("b/1/0", "a/1/0", "b/1/1", "a/1/1", "a/2/0")
    whole = SDF(dimensions=2, group=r"(.*)/", validation=0.3, test=0.3)
    parts = sdf.open_splits(tmp_path / "a.npz", whole, seed=1)
    assert sorted(sum((p.names for p in parts), ())) == sorted(tasks.names)
    characters = [{n.rsplit("/", 1)[0] for n in p.names} for p in parts]
    assert sum(map(len, characters)) == 3 and all(characters)  # drawings of one stay together
    for change in ({"shape": (5, 9, 11)}, {"bits": bits.astype(int)}, {"shape": (9, 12)}):
        np.savez(tmp_path / "b.npz", **{"bits": bits, "shape": inside.shape, **change})
        one_line("accepted are uint8 .n,", sdf.open_all, tmp_path / "b.npz", FLAT)


def volumes(n=6):
    return np.stack([f.values.numpy() for f in solid_fields(n, 5)])


def test_distances_from_everywhere(tmp_path):
    values = volumes()
    stored = np.round(values * 100).astype(np.int8)
    np.savez(tmp_path / "i8.npz", sdf_i8=stored, scale=np.float32(0.01))
    np.savez(tmp_path / "f.npz", sdf=values.astype(np.float16), names=list("abcdef"))
    np.save(tmp_path / "all.npy", values)
    (tmp_path / "grids").mkdir()
    for name, v in zip("fedcba", values, strict=True):
        np.save(tmp_path / f"grids/{name}.npy", v.astype(np.float64))
    for source, wanted in (
        (tmp_path / "i8.npz", stored * np.float32(0.01)),
        (tmp_path / "f.npz", values.astype(np.float16)),
        (str(tmp_path / "all.npy"), values),
        (tmp_path / "grids", values[::-1]),
        (values, values),
        (torch.from_numpy(values), values),
    ):
        tasks = sdf.open_all(source, SDF())
        assert len(tasks) == 6
        for i in range(6):
            np.testing.assert_array_equal(tasks[i].values, wanted[i].astype(np.float32))
        assert tasks[2] is tasks[2]  # kept
        assert tasks.take([4, 2])[1] is tasks[2]
    assert sdf.open_all(tmp_path / "f.npz", SDF()).names == tuple("abcdef")
    assert sdf.open_all(tmp_path / "grids", SDF()).names[0] == "a.npy"
    plane = sdf.open_all(values[:, 2], FLAT)
    np.testing.assert_array_equal(plane[5].values, values[5, 2])


def test_linked_folders_are_followed_but_not_round_in_circles(tmp_path):
    (tmp_path / "there").mkdir()
    np.save(tmp_path / "there" / "a.npy", volumes()[0])
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "there")
    (tmp_path / "set" / "up").symlink_to(tmp_path)
    assert sdf.open_all(tmp_path / "set", SDF()).names == ("linked/a.npy",)


def test_a_npz_that_brings_its_split(tmp_path):
    values, names = volumes(), list("abcdef")
    np.savez(tmp_path / "a.npz", sdf=values, names=names, n_train=4, n_val=2)
    train, check, test = sdf.open_splits(tmp_path / "a.npz", SDF(validation=0.3, test=0.5))
    assert test.names == ("e", "f")  # its own held-out ones, whatever the share
    assert len(check) >= 1 and sorted(train.names + check.names) == names[:4]
    np.testing.assert_array_equal(test[1].values, values[5])
    np.savez(tmp_path / "b.npz", sdf=values, n_train=4, n_val=1)
    one_line("n_train is 4 and n_val 1 of 6 fields", sdf.open_all, tmp_path / "b.npz", SDF())
    np.savez(tmp_path / "c.npz", sdf=values, names=names)  # no split: by a hash of the names
    parts = sdf.open_splits(tmp_path / "c.npz", SDF(), seed=2)
    assert [len(p) > 0 for p in parts] == [True] * 3


def test_folders_that_are_a_split(tmp_path):
    for n, name in enumerate(("train/a", "train/b", "train/c", "test/d", "other/e")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.save(tmp_path / f"{name}.npy", volumes()[n])
    train, check, test = sdf.open_splits(tmp_path, SDF())
    assert test.names == ("test/d.npy",) and len(train) + len(check) == 3


def test_sources_refused(tmp_path):
    values = volumes()
    one_line(
        "does not exist; accepted are images", sdf.open_all, tmp_path / "x", SDF(), error=OSError
    )
    one_line("source is a int; accepted are images", sdf.open_all, 3, SDF())
    one_line(r"has shape \(5, 5\); accepted are", sdf.open_all, values[0, 0], FLAT)
    one_line("has 3 dimensions, option dimensions is 2", sdf.open_all, values, FLAT)
    one_line("a source of images has 2 dimensions, option", sdf.open_all, drawings(), SDF())
    blank = sdf.open_all(np.ones((2, 5, 5), bool), FLAT)
    one_line("sdf: 1 has every pixel outside at the threshold", blank.__getitem__, 1)
    np.savez(tmp_path / "a.npz", sdf=values.astype(object))
    one_line("sdf in .* is pickled", sdf.open_all, tmp_path / "a.npz", SDF())
    np.savez(tmp_path / "a.npz", sdf=values, names=["a"])
    one_line("accepted are 6 strings", sdf.open_all, tmp_path / "a.npz", SDF())
    for scale in ({}, {"scale": 0.0}, {"scale": [1.0]}, {"scale": math.nan}):
        np.savez(tmp_path / "a.npz", sdf_i8=values.astype(np.int8), **scale)
        one_line("accepted with sdf_i8 is a number", sdf.open_all, tmp_path / "a.npz", SDF())
    np.savez(tmp_path / "a.npz", sdf=values.astype(complex))
    one_line("holds complex128", sdf.open_all, tmp_path / "a.npz", SDF())
    (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:300])
    one_line("b.npz is no readable .npz", sdf.open_all, tmp_path / "b.npz", SDF())
    (tmp_path / "b.npy").write_bytes(b"no array")
    one_line("b.npy is no readable .npy", sdf.open_all, tmp_path / "b.npy", SDF())
    np.save(tmp_path / "b.npy", values[0].astype(int))
    one_line("accepted in a folder are floats", sdf.open_all(tmp_path, SDF()).__getitem__, 0)
    np.save(tmp_path / "b.npy", values[0, 0])
    one_line("b.npy has 2 dimensions", sdf.open_all(tmp_path, SDF()).__getitem__, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"dimensions": 4},
        {"ink": "red"},
        {"loss": "l2"},
        {"points": 0},
        {"size": 0},
        {"resolution": 4},
        {"near": 1.5},
        {"near": math.nan},
        {"sigma": -1.0},
        {"sigma": math.inf},
        {"margin": 1.0},
        {"clamp": 0.1},
        {"loss": "l1", "clamp": 0.0},
        {"loss": "l1", "clamp": math.nan},
    ],
    ids=str,
)
def test_options_refused(wrong):
    one_line(f"^sdf: {list(wrong)[-1]} is .*; accepted ", SDF, **wrong)


# meshes


def test_meshes_without_trimesh(tmp_path, monkeypatch):
    (tmp_path / "a.obj").write_text("v 0 0 0\n")
    tasks = sdf.open_all(tmp_path, SDF())
    assert tasks.names == ("a.obj",)
    for name in ("trimesh", "rtree"):
        monkeypatch.setitem(sys.modules, name, None)
        one_line("a.obj is a mesh.*pip install trimesh", tasks.__getitem__, 0, error=ImportError)
    one_line("a source of meshes has 3 dimensions", sdf.open_all, tmp_path, FLAT)


def test_a_box_as_a_mesh(tmp_path):
    trimesh = pytest.importorskip("trimesh")
    pytest.importorskip("rtree")
    options = SDF(resolution=24, margin=0.2)
    box = trimesh.creation.box((1, 2, 0.5))
    box.apply_translation((5, -3, 1))
    q = np.abs(centres(24, 24, 24)) - np.array([0.4, 0.8, 0.2])
    true = np.linalg.norm(np.maximum(q, 0), axis=-1) + np.minimum(q.max(-1), 0)
    for ending in ("obj", "ply", "stl", "off", "glb"):
        box.export(tmp_path / f"a.{ending}")
        got = sdf.open_all(tmp_path / f"a.{ending}", options)[0].values.numpy()
        assert ((got < 0) == (true < 0)).all()
        h, near = 2 / 24, np.abs(true) < 3 * 2 / 24
        assert np.abs(got - true)[near].max() < 1e-6  # exact, to the file's float32
        over = (np.abs(got) - np.abs(true))[~near]
        assert over.min() > -1e-6 and over.max() < h**2 / (6 * 3 * h) + 1e-6


def test_meshes_refused(tmp_path):
    trimesh = pytest.importorskip("trimesh")
    pytest.importorskip("rtree")
    box = trimesh.creation.box((1, 2, 0.5))
    box.update_faces(np.arange(12) != 0)
    box.update_faces(np.arange(11) > 5)
    box.export(tmp_path / "open.ply")
    with pytest.warns(UserWarning, match="open.ply is not watertight"):
        mesh_field(tmp_path / "open.ply", SDF(resolution=8))
    (tmp_path / "empty.obj").write_text("v 0 0 0\nv 1 0 0\n")
    read = sdf.open_all(tmp_path / "empty.obj", SDF()).__getitem__
    one_line("empty.obj (holds no triangles|cannot be read)", read, 0)
    (tmp_path / "bad.ply").write_bytes(b"ply\nnonsense")
    one_line("bad.ply cannot be read", sdf.open_all(tmp_path / "bad.ply", SDF()).__getitem__, 0)


# what a field looks like


def aimed(n=400, seed=0):
    """Rays from outside the box to points about the origin."""
    eye = torch.nn.functional.normalize(rand(n, 3, seed=seed, low=-1.0), dim=-1) * 3
    d = torch.nn.functional.normalize(rand(n, 3, seed=seed + 1, low=-1.0) - eye, dim=-1)
    return eye, d


@pytest.mark.parametrize("scale", [1.0, 3.0, 0.05, 100.0])
def test_trace_finds_a_sphere_whatever_the_slope(scale):
    o, d = aimed()
    along, r = -(o * d).sum(-1), 0.6
    gap = (o + along[:, None] * d).norm(dim=-1)
    t, hit = trace(lambda x: scale * (x.norm(dim=-1) - r), o, d)
    # inside for less than the longest step of 0.1: a graze may be stepped over, and only that
    clear = gap < math.sqrt(r**2 - 0.05**2)
    assert hit[clear].all() and not hit[gap > r].any()
    if scale <= 1:
        assert hit[gap < math.sqrt(r**2 - 0.005**2)].all()
    entry = along - (r**2 - gap**2).clamp(min=0).sqrt()
    assert (t - entry)[hit].abs().max() < 0.1 / 2**16 + 1e-12  # halved 16 times


def test_trace_in_awkward_places():
    o = torch.tensor([[0.0, 0.0, 3.0], [0.0, 0.0, 3.0], [0.0, 0.0, 0.0], [2.0, 1.0, 0.0]])
    d = torch.tensor([[0.0, 0.0, -1.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])
    t, hit = trace(lambda x: x.norm(dim=-1) - 0.5, o, d)
    assert hit.tolist() == [True, False, True, False]
    assert t[0].item() == pytest.approx(2.5, abs=1e-5) and t[2] == 0  # the eye is inside
    t, hit = trace(lambda x: x[:, 2] - 5, o[:1], d[:1])  # all inside: where the ray enters the box
    assert hit.all() and t.item() == pytest.approx(2.0)
    assert not trace(lambda x: x[:, 0] * math.nan, o, d)[1].any()
    t, hit = trace(lambda x: x.norm(dim=-1) - 1.5, o[:1], d[:1], bound=2.0)
    assert t.item() == pytest.approx(1.5, abs=1e-5)


def test_look_is_a_pose():
    for azimuth, elevation in ((0.3, 0.2), (-2.0, -1.0), (1.0, math.pi / 2)):
        pose = surface.look(azimuth, elevation, 2.0)
        right, up, back = pose[:3, :3].T
        assert error(pose[:3, :3].T @ pose[:3, :3], torch.eye(3)) < 1e-12
        assert torch.linalg.det(pose[:3, :3]).item() == pytest.approx(1)
        assert error(pose[:3, 3], 2 * back) < 1e-12 and right[2] == 0 and up[2] > -1e-12
    assert surface.look(0.0, 0.0)[:3].tolist() == [[0, 0, 1, 3.2], [1, 0, 0, 0], [0, 1, 0, 0]]


def test_the_picture_of_a_plane_has_one_colour():
    net = fm.MLP(3, 1, 3, 2, "none", coords="world")
    params = torch.zeros(net.num_params)
    (w, _), (out, _) = net.layers(params)
    w.copy_(torch.eye(3))
    out.copy_(torch.tensor([[0.0, 0.0, 4.0]]))  # f = 4 z: not a distance
    for view in ((0.5, 0.7), surface.look(0.5, 0.7).float()):
        image = surface.shaded(net, params, view, 33)
        pose = surface.look(0.5, 0.7)
        light = pose[:3, :3] @ torch.tensor([-0.5, 0.7, 1.0], dtype=torch.float64)
        shade = 0.3 + 0.9 * float(light[2] / light.norm())
        wanted = torch.tensor([0.62, 0.70, 0.82]) * shade
        # the box ends at z = -1: below the plane rays enter it from the side, on a wall
        assert (image[16, 16] - wanted.clamp(max=1)).abs().max() < 1e-5
        assert image[0, 0].equal(torch.ones(3))


def test_the_outline_of_a_ball_from_grid_and_network():
    options, size = SDF(), 64
    ball = field(sphere(0.6), 48, 48, 48)
    image = sdf.truth(ball, options, size=size)
    hit = (image != 1).any(-1)
    sine = 0.6 / 3.2  # the cone of a ball of radius r at distance R: tan = r / √(R² − r²)
    radius = math.tan(math.asin(sine)) / 0.42 * size / 2
    row, column = torch.meshgrid(*[torch.arange(size) + 0.5 - size / 2] * 2, indexing="ij")
    off = torch.hypot(row, column)
    assert hit[off < radius - 1].all() and not hit[off > radius + 1].any()
    assert image[25, 29].mean() > image[39, 37].mean() + 0.1  # lit from above
    top = sdf.truth(field(lambda x: sphere(0.3)(x - [0, 0, 0.5]), 48, 48, 48), options, size=size)
    assert (top[:32] != 1).sum() > 3 * (top[32:] != 1).sum()  # z is up
    net, params = octahedron()
    grid = field(lambda x: np.abs(x).sum(-1) - 0.6, 65, 65, 65)
    both = sdf.picture(net, params, grid, options, size=size), sdf.truth(grid, options, size=size)
    assert (both[0] - both[1]).abs().amax(-1).gt(0.05).float().mean() < 0.02  # edges are rounder
    one_line("view has shape", surface.shaded, net, params, torch.eye(3))
    empty = params.clone()
    empty[-1] = 5.0
    assert surface.shaded(net, empty, size=8).eq(1).all()


def test_a_curve_as_a_picture():
    n = 64
    circle = field(sphere(0.5), n, n)
    image = sdf.truth(circle, FLAT)
    assert image.shape == (n, n, 3) and image.min() >= 0 and image.max() <= 1
    assert image[n // 2, n // 2, 2] > image[n // 2, n // 2, 0]  # blue inside
    assert image[0, 0, 0] > image[0, 0, 2]
    on = circle.values.abs() < 0.25 / n
    assert image[on].min() > 0.75 and image[(circle.values.abs() > 2.5 / n)].min() < 0.6
    net, params = octahedron(0.5, inputs=2)
    rhombus = field(lambda x: np.abs(x).sum(-1) - 0.5, 7, 9)
    got = sdf.picture(net, params, rhombus, FLAT)
    assert (got - sdf.truth(rhombus, FLAT)).abs().max() < 1e-5


# results


def volume(vertices, faces):
    """Above 0 where faces turn outward."""
    a, b, c = (vertices.double()[faces[:, k]] for k in range(3))
    return ((a * torch.linalg.cross(b, c)).sum() / 6).item()


def test_marching_cubes_of_an_octahedron():
    net, params = octahedron(0.6)
    vertices, faces = surface.mesh(net, params, 41)
    assert vertices.dtype == torch.float32 and faces.dtype == torch.int64
    assert (vertices.abs().sum(1) - 0.6).abs().max() < 1e-5  # 0.6 and 0 are on the grid: linear
    assert volume(vertices, faces) == pytest.approx(4 / 3 * 0.6**3, rel=1e-4)
    edges = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    assert len(edges.unique(dim=0)) == len(edges)  # watertight: each edge once in each direction
    assert edges.flip(1).unique(dim=0).equal(edges.unique(dim=0))
    wide, _ = surface.mesh(net, params.double(), 21, bound=3.0)
    assert (wide.abs().sum(1) - 0.6).abs().max() < 0.3 + 1e-6
    one_line(
        "goes from -0.6 to -0.15 in the box, so there is no", surface.mesh, net, params, 9, 0.15
    )
    one_line("net goes from 2 to 1 features", surface.mesh, *octahedron(inputs=2))
    one_line("resolution is 1, bound 1.0", surface.mesh, net, params, 1)
    one_line("accepted are resolution >= 2 and bound > 0", surface.mesh, net, params, 9, math.inf)


def parsed_ply(data):
    head, body = data.split(b"end_header\n", 1)
    lines = head.decode().split("\n")
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    counts = [int(line.split()[-1]) for line in lines if line.startswith("element")]
    v = np.frombuffer(body, "<f4", 3 * counts[0]).reshape(-1, 3)
    rows = np.frombuffer(body, np.uint8, offset=v.nbytes).reshape(counts[1], 13)
    assert (rows[:, 0] == 3).all()
    return v, rows[:, 1:].copy().view("<i4")


def test_mesh_files():
    vertices, faces = surface.mesh(*octahedron(), 15)
    v, f = parsed_ply(surface.mesh_bytes(vertices, faces, "ply"))
    np.testing.assert_array_equal(v, vertices)
    np.testing.assert_array_equal(f, faces)
    lines = [
        line.split() for line in surface.mesh_bytes(vertices, faces, "obj").decode().splitlines()
    ]
    v = np.array([line[1:] for line in lines if line[0] == "v"], float)
    np.testing.assert_allclose(v, vertices, atol=5.1e-7)
    f = np.array([line[1:] for line in lines if line[0] == "f"], int)
    np.testing.assert_array_equal(f - 1, faces)
    one_line("kind is 'stl'; accepted are ply and obj", surface.mesh_bytes, vertices, faces, "stl")
    for bad in ((vertices[:, :2], faces), (vertices, faces[:, :2]), (vertices / 0, faces)):
        one_line("accepted are finite", surface.mesh_bytes, *bad, "ply")
    one_line("accepted are 0 to 1", surface.mesh_bytes, vertices[:2], faces, "ply")
    one_line("faces go from -1", surface.mesh_bytes, vertices, faces - 1, "ply")


@pytest.mark.parametrize("kind", ["ply", "obj"])
def test_mesh_files_open_elsewhere(kind):
    trimesh = pytest.importorskip("trimesh")
    vertices, faces = surface.mesh(*octahedron(0.617), 40)  # through no sample: no empty triangle
    opened = trimesh.load_mesh(
        io.BytesIO(surface.mesh_bytes(vertices, faces, kind)), file_type=kind
    )
    assert opened.is_watertight and len(opened.faces) == len(faces)
    assert opened.volume == pytest.approx(volume(vertices, faces), rel=1e-4)


def test_iou_counts_cells():
    net, params = octahedron(0.6)
    x = np.abs(centres(10, 10, 10)).sum(-1)
    assert surface.iou(net, params, field(lambda c: np.abs(c).sum(-1) - 0.6, 10, 10, 10)) == 1.0
    small = field(lambda c: np.abs(c).sum(-1) - 0.45, 10, 10, 10)
    assert surface.iou(net, params, small) == pytest.approx((x < 0.45).sum() / (x < 0.6).sum())
    moved = field(lambda c: sphere(0.5)(c - 0.2), 10, 10, 10)
    a, b = x < 0.6, sphere(0.5)(centres(10, 10, 10) - 0.2) < 0
    assert surface.iou(net, params, moved) == pytest.approx((a & b).sum() / (a | b).sum())


# real data


def test_chairs(data_path):
    path = data_path("sdf_chairs/sdf_chairs_64.npz")
    train, check, test = sdf.open_splits(path, SDF())
    with np.load(path) as file:
        assert test.names == tuple(file["names"][44:].tolist())
        np.testing.assert_allclose(test[0].values, file["sdf_i8"][44] / 127 * 0.25, atol=1e-6)
    assert len(train) + len(check) == 44 and len(check) >= 1
    chair = test[3]
    x, y = sample(chair, 4096, 0.5, 0.05, 1)
    assert y.abs().max() <= 0.25 + 1e-6  # clipped
    assert y[:2048].abs().median() < 0.04 < 0.1 < y[2048:].abs().median()
    step = 1e-3 * torch.eye(3)
    slope = torch.stack([chair.at(x + s) - chair.at(x - s) for s in step], 1).norm(dim=1) / 2e-3
    inner = slope[(y[:, 0] < 0.2) & (y[:, 0] > 0.03)]
    assert inner.median().item() == pytest.approx(1, abs=0.05)  # a distance in units of the box
    image = sdf.truth(chair, SDF())
    drawn = (image != 1).any(-1)
    assert 0.02 < drawn.float().mean() < 0.5
    tall = drawn.any(1).sum() / drawn.any(0).sum()
    assert tall > 1.2  # a chair seen with z up


def test_a_chair_is_fitted(data_path):
    tasks = sdf.open_all(data_path("sdf_chairs/sdf_chairs_64.npz"), SDF())
    options = SDF(loss="l1")  # a clamp has no slope where a random start lies beyond it
    encoding = fm.Encoding.frequencies(3, 4, 3.0, include_input=True)
    net = fm.MLP(3, 1, 48, 4, encoding=encoding, coords="world")
    init = net.init(generator=torch.Generator().manual_seed(0))[0]
    batch = sdf.observe([tasks[44]], options, net, torch.tensor([1]), None, 512)
    theta = fm.adapt(net, init, batch, 300, 3e-3, rule="adam").params[0]
    before, after = (fm.loss_grad(net, p, batch.query)[0].item() for p in (init, theta))
    assert after < 0.1 * before and after < 0.015
    assert surface.iou(net, theta, tasks[44]) > 0.4 > 4 * surface.iou(net, init, tasks[44])
    vertices, _ = surface.mesh(net, theta, 48)
    near = tasks[44].at(vertices).abs()
    assert near.median() < 0.02


def test_drawings_of_omniglot(data_path):
    tasks = sdf.open_all(data_path("omniglot/omniglot_105.npz"), FLAT)
    assert len(tasks) == 4840 and tasks.names[0].endswith("character01/0")
    letter = tasks[0].values
    assert letter.shape == (105, 105) and 0.01 < (letter < 0).float().mean() < 0.2  # thin strokes
    assert letter.abs().min().item() == pytest.approx(1 / 105)  # half a pixel
    assert letter[0, 0] > 0.2 and -8 / 105 < letter.min() < -1.9 / 105
    vertical = (letter[1:] - letter[:-1]).abs().max()
    assert vertical <= 2 / 105 + EPS  # a distance changes by no more than one walks


def test_skip_bad_reads_past_headers_that_are_none(tmp_path):
    for i in range(3):
        drawing = np.full((8, 8), 255, np.uint8)
        drawing[2:5, 2 : 4 + i] = 0
        Image.fromarray(drawing).save(tmp_path / f"{i}.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"1 of 4 left out: images: bad\.png"):
        fields = sdf.open_all(tmp_path, SDF(dimensions=2, size=8, skip_bad=True))
    assert fields.names == ("0.png", "1.png", "2.png")


@pytest.mark.parametrize("option", [{"ink": "light"}, {"size": 16}])
def test_options_of_images_are_refused_with_distances(option, tmp_path):
    np.savez(tmp_path / "a.npz", sdf=np.linspace(-1, 1, 2 * 64).reshape(2, 8, 8).astype("f4"))
    (name,) = option
    with pytest.raises(ValueError, match=f"{name} is .* with distances, as .*a.npz holds them"):
        sdf.open_all(tmp_path / "a.npz", SDF(dimensions=2, **option))
