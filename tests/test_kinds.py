"""A miniature of every kind of signal through the command line: train, eval, fit, render, resume,
and what is refused. The signals are made here, of a few formulas."""

import csv
import dataclasses
import json
import math
import re
import wave
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_train import assert_same, stopped

import fastmeta as fm
from fastmeta import recipes
from fastmeta import train as tr
from fastmeta.apply import show
from fastmeta.checkpoint import load_start, load_tensors
from fastmeta.cli import main
from fastmeta.meta import baselines
from fastmeta.tasks import cameras, images, module, sdf, views

# Signals, each a function of few numbers, so that a start can be learned in seconds.


def draws(count, *, seed=0):
    return np.random.default_rng(seed).random((count, 8))


def spheres(root, objects=6, known=4, size=(10, 12)):
    """Coloured balls on white, RGBA, in the layout of the paper's ShapeNet data; 2 views more than
    ``known``."""
    angle, (H, W) = 0.7, size
    poses = cameras.orbit(known + 2, 4.0, 0.4)
    focal = W / 2 / math.tan(angle / 2)
    for k, u in enumerate(draws(objects)):
        folder, frames = root / f"ball{k}", []
        folder.mkdir(parents=True)
        for v, pose in enumerate(poses):
            o, d = (r.double() for r in cameras.pinhole(H, W, focal, pose))
            d = d / d.norm(dim=-1, keepdim=True)
            along = -(o * d).sum(-1)
            gap = ((o + along[:, None] * d).norm(dim=-1) - (0.8 + 0.3 * u[3])).view(H, W)
            rgba = np.empty((H, W, 4))
            rgba[..., :3] = 0.1 + 0.3 * u[:3]
            rgba[..., 3] = (0.5 - gap * 4).clamp(0, 1)
            Image.fromarray((rgba * 255).round().astype(np.uint8)).save(folder / f"r_{v}.png")
            frames.append({"file_path": f"./r_{v}", "transform_matrix": pose.tolist()})
        content = {"camera_angle_x": angle, "frames": frames}
        (folder / "transforms.json").write_text(json.dumps(content))
    return root


def facade(root, photos=6, size=(8, 12)):
    """Photos of a striped wall at z = 0 in several lights, from cameras 20 to 24 before it."""
    (root / "dense" / "images").mkdir(parents=True)
    (H, W), f, poses, kinvs = size, 10.0, [], []
    kinv = torch.tensor([[1 / f, 0, -W / 2 / f], [0, -1 / f, H / 2 / f], [0, 0, -1]])
    for k, u in enumerate(draws(photos, seed=1)):
        pose = torch.eye(4)
        pose[:3, 3] = torch.tensor([4 * u[0] - 2, 4 * u[1] - 2, 20 + 4 * u[2]])
        o, d = cameras.rays_from_kinv(H, W, kinv, pose)
        hit = o + (-o[:, 2:] / d[:, 2:]) * d
        stripes = 0.5 + 0.3 * torch.sin(hit[:, :1] * 0.4)
        light = torch.tensor([0.7, 0.6 + 0.3 * u[3], 0.5 + 0.4 * u[4]])
        pixels = (stripes * light).view(H, W, 3).mul(255).round().byte().numpy()
        Image.fromarray(pixels).save(root / "dense" / "images" / f"{k}.png")
        poses.append(pose.numpy())
        kinvs.append(kinv.numpy())
    np.save(root / "c2w_mats.npy", np.stack(poses))
    np.save(root / "kinv_mats.npy", np.stack(kinvs))
    np.save(root / "bds.npy", np.full((photos, 2), (15.0, 30.0)))
    return root


def balls(path, count=10, side=12, dimensions=3):
    """Distances to circles or spheres, [n,side,...]."""
    axis = (2 * np.arange(side) + 1) / side - 1
    where = np.stack(np.meshgrid(*[axis] * dimensions, indexing="ij"), -1)
    u = draws(count, seed=2)
    found = [
        np.linalg.norm(where - 0.3 * (v[:dimensions] - 0.5), axis=-1) - (0.35 + 0.3 * v[3])
        for v in u
    ]
    np.savez(path, sdf=np.stack(found).astype(np.float32), names=[f"ball{k}" for k in range(count)])
    return path


def tones(root, count=8, length=256, rate=8000):
    """Two partials of a tone, 16 bits."""
    root.mkdir(parents=True)
    t = np.arange(length) / length
    for k, u in enumerate(draws(count, seed=3)):
        y = (0.2 + 0.2 * u[0]) * np.sin(2 * np.pi * 3 * t) + 0.3 * u[1] * np.sin(2 * np.pi * 5 * t)
        with wave.open(str(root / f"{k}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes((y * 2**15).round().astype("<i2").tobytes())
    return root


def clouds(path, count=10, side=6):
    """Smooth bumps in [0,1]."""
    axis = np.arange(side) / side
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    found = [
        0.3 + 0.3 * v[0] * np.sin(3 * z + y) + 0.3 * v[1] * np.cos(4 * x) for v in draws(count)
    ]
    np.savez(path, volumes=np.stack(found).clip(0, 1).astype(np.float32))
    return path


WIDTH = ["--width", "32", "--depth", "3", "--device", "cpu", "--validate-tasks", "3"]
SHARES = ["--validation", "0.25", "--test", "0.25"]
SOLID = ["--density", "softplus", "--samples", "8", "--frequencies", "4", "--max-exponent", "2"]
POINTS = ["--points", "300", "--algorithm", "maml", "--inner-lr", "0.1", "--clip", "1"]
# case -> (kind, what data it learns from, arguments of train)
CASES = {
    "images": (
        "images",
        None,
        ["--size", "12", "--w0", "30", "--lr", "1e-3", "--inner-lr", "0.01"],
    ),
    "ct": (
        "ct",
        None,
        ["--size", "16", "--angles", "8", "--features", "16", "--feature-scale", "6"]
        + ["--phantoms", "60", "--inner-steps", "6", "--lr", "2e-3", "--tasks", "2"]
        + ["--test-counts", "5", "1", "--test-steps", "6"],
    ),
    "views": (
        "views",
        spheres,
        [
            *SHARES,
            *SOLID,
            "--learn-views",
            "4",
            "--size",
            "12",
            "--inner-steps",
            "8",
            "--tasks",
            "2",
        ]
        + ["--per-step", "48", "--lr", "5e-3", "--test-counts", "3", "1", "--test-steps", "8"],
    ),
    "phototourism": (
        "phototourism",
        facade,
        [*SHARES, *SOLID, "--shrink", "1", "--inner-steps", "8", "--tasks", "2"]
        + ["--per-step", "32", "--lr", "5e-3", "--test-steps", "8"],
    ),
    "sdf": (
        "sdf",
        balls,
        [*SHARES, *POINTS, "--loss", "l1", "--clamp", "0.1", "--rule", "sgd", "--lr", "5e-3"]
        + ["--inner-steps", "4", "--test-steps", "4", "--per-step", "200"],
    ),
    "curves": (
        "sdf",
        lambda path: balls(path, dimensions=2),
        [*SHARES, *POINTS, "--dimensions", "2", "--loss", "mse", "--clamp", "None", "--lr", "2e-3"]
        + ["--rule", "meta_sgd", "--inner-steps", "3", "--test-steps", "3", "--per-step", "100"],
    ),
    "audio": (
        "audio",
        tones,
        [*SHARES, "--length", "256", "--rate", "8000", "--w0", "30", "--lr", "2e-3"]
        + ["--inner-lr", "0.01"],
    ),
    "volumes": (
        "volumes",
        clouds,
        [*SHARES, "--size", "6", "--w0", "10", "--lr", "2e-3", "--inner-lr", "0.01"],
    ),
}
FILES = {"sdf": "set.npz", "curves": "set.npz", "volumes": "set.npz"}
MADE = {"images": "text", "ct": "phantoms"}


def learned(case, folder, *more):
    """A start learned in a folder: its data, the run, and the arguments it came from."""
    kind, make, given = CASES[case]
    data = MADE.get(case) or str(make(folder / FILES.get(case, "data")))
    given = [kind, "--data", data, *WIDTH, *given, "--iterations", "40", "--validate-every", "20"]
    out = folder / "run"
    assert main(["train", *given, "--out", str(out), *more]) == 0
    return SimpleNamespace(kind=kind, data=data, run=out, given=given, case=case)


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """``start(case)``: a start of that case, learned once."""
    made = {}

    def make(case):
        if case not in made:
            made[case] = learned(case, tmp_path_factory.mktemp(case))
        return made[case]

    return make


def table(out, name="table.csv"):
    with open(out / name, newline="") as file:
        return list(csv.DictReader(file))


# what a fitted network says of a task, and what it should, without tasks/ and meta/evaluate.py


def rays_of(item, case):
    """(origins, directions, colours) of the rays that a task is scored on."""
    if case == "views":
        H, W = item.images.shape[1:3]
        o, d = cameras.pinhole(H, W, item.focal, item.poses[item.learn :])
        return o.flatten(0, 1), d.flatten(0, 1), item.images[item.learn :].reshape(-1, 3)
    H, W, _ = item.image.shape
    o, d = (v.view(H, W, 3) for v in cameras.rays_from_kinv(H, W, item.kinv, item.pose))
    half = (slice(None, None, 2), slice(W // 2, None, 2))
    return (v[half].reshape(-1, 3) for v in (o, d, item.image))


def error(case, net, theta, item, config):
    """Mean square, or of distances absolute, error of weights [P] on a task."""
    if case in ("views", "phototourism"):
        o, d, colours = rays_of(item, case)
        signal, white = config.signal, case == "views"
        march = fm.March(signal.samples, signal.last_interval, white, signal.density)
        rays = fm.Rays(o[None], d[None], item.near, item.far)
        shown = fm.render(net, theta[None], rays, march)[0][0].clamp(0, 1)
        return float(((shown - colours) ** 2).mean())
    if case in ("sdf", "curves"):
        if case == "sdf":
            x, wanted = sdf.sample(item, 8192, 0.5, 0.05, -1)
        else:
            n = len(item.values)
            x, wanted = images.grid(n, n, "centers"), item.values.reshape(-1, 1)
        clip = config.signal.clamp or math.inf
        found, wanted = (v.clamp(-clip, clip) for v in (fm.mlp(net, theta, x), wanted))
        return float((found - wanted).abs().mean())
    sizes = item.shape[:-1]
    axes = torch.meshgrid(*[torch.arange(n) / n for n in sizes], indexing="ij")
    x = torch.stack(axes[::-1] if case == "ct" else axes, -1).view(-1, len(sizes))
    return float(((fm.mlp(net, theta, x) - item.reshape(len(x), -1)) ** 2).mean())


def weights_after(case, run, item, number, count, steps, init=None, seed=0):
    """Weights [P] of task ``number`` after some steps: its batch is what ``observe`` gives."""
    config, (net, own, extra, _) = tr.saved_config(run), load_start(run / tr.BEST)
    seeds = fm.rng.task_seeds(seed, 2**32 - 1, number + 1)[number:]
    drawn = config.per_step if config.test_per_step is None else config.test_per_step
    kind = module(CASES[case][0])
    batch = kind.observe([item], config.signal, net, seeds, count=count, per_step=drawn)
    rule, lr = config.rule, extra.get("inner_lr", config.inner_lr)
    theta = fm.adapt(net, own if init is None else init, batch, steps, lr, rule=rule).params[0]
    return net, theta, config


COLUMNS = {
    "images": ["psnr_0", "psnr_1", "psnr_2", "psnr_3"],
    "ct": ["psnr_1", "psnr_5"],
    "views": ["psnr_1", "psnr_3"],
    "phototourism": ["psnr_0", "psnr_1", "psnr_2", "psnr_5", "psnr_8"],
    "sdf": ["mae_0", "mae_1", "mae_2", "mae_3", "mae_4"],
    "curves": ["mae_0", "mae_1", "mae_2", "mae_3"],
    "audio": ["psnr_0", "psnr_1", "psnr_2"],
    "volumes": ["psnr_0", "psnr_1", "psnr_2"],
}


@pytest.mark.parametrize("case", CASES)
def test_a_start_is_learned_and_evaluated(case, start, tmp_path):
    """Better than a standard one, and by the numbers of a few lines of torch."""
    made = start(case)
    config = tr.saved_config(made.run)
    test = tr.open_data(config)[2]
    n = min(3, len(test))
    out = tmp_path / "eval"
    few = ["--count", str(n), "--tune-tasks", "2", "--starts", "standard", "--pictures", "1"]
    few += ["--steps", "3"] if case == "images" else []
    assert main(["eval", str(made.run), *few, "--out", str(out)]) == 0
    rows = {row["start"]: row for row in table(out)}
    assert list(rows) == [config.algorithm, "standard"]
    shown = [k for k in rows[config.algorithm] if re.match("psnr|mae", k)]
    assert shown == COLUMNS[case]
    assert ("ssim" in rows["standard"]) == (case in ("images", "ct"))
    columns = [int(k.split("_")[1]) for k in shown]
    counted = config.test_counts != ()
    for name, column in zip(shown, columns, strict=True):
        count, steps = (column, config.test_steps) if counted else (None, column)
        errors = []
        for t in range(n):
            net, theta, _ = weights_after(case, made.run, test[t], t, count, steps)
            errors.append(error(case, net, theta, test[t], config))
        wanted = 1000 * np.mean(errors) if name[0] == "m" else -10 * np.mean(np.log10(errors))
        assert float(rows[config.algorithm][name]) == pytest.approx(wanted, abs=0.02), name
    # the same steps from a standard start reach less
    own, plain = [], []
    for t in range(n):
        arguments = (test[t], t, columns[-1] if counted else None)
        steps = config.test_steps if counted else columns[-1]
        net, theta, _ = weights_after(case, made.run, *arguments, steps)
        init = baselines.standard(net, seed=1)
        own.append(error(case, net, theta, test[t], config))
        theta = weights_after(case, made.run, *arguments, steps, init)[1]
        plain.append(error(case, net, theta, test[t], config))
    assert np.mean(own) < 0.7 * np.mean(plain), (own, plain)


def held_out(case, start, folder):
    """What ``fit`` is given for a case: data of the same kind, some of it new."""
    made = start(case)
    if case in MADE:
        pixels = tr.open_data(tr.saved_config(made.run))[2]
        np.save(folder / "new.npy", torch.stack([pixels[i] for i in range(2)]).numpy())
        return made, str(folder / "new.npy")
    return made, made.data


ENDINGS = {"sdf": ".ply", "audio": ".wav", "volumes": ".npy"}


@pytest.mark.parametrize("case", CASES)
def test_fit_writes_what_each_network_shows(case, start, tmp_path):
    """Weights, scores and files, by hand."""
    made, data = held_out(case, start, tmp_path)
    config, out = tr.saved_config(made.run), tmp_path / "fits"
    given = ["--data", data, "--out", str(out), "--steps", "3", "--seed", "5"]
    given += ["--mask", "left"] if case == "phototourism" else []
    assert main(["fit", str(made.run), *given]) == 0
    tensors, meta = load_tensors(out / show.FITS)
    kind, tasks = module(made.kind), module(made.kind).open_all(data, config.signal)
    assert tuple(meta["name"]) == tasks.names and len(tensors["params"]) == len(tasks)
    count = config.test_counts[0] if config.test_counts else None
    rows = table(out, "scores.csv")
    for t, row in enumerate(rows):
        seeds = fm.rng.task_seeds(5, t, 1)
        drawn = config.per_step if config.test_per_step is None else config.test_per_step
        net, init, extra, _ = load_start(made.run / tr.BEST)
        batch = kind.observe([tasks[t]], config.signal, net, seeds, count=count, per_step=drawn)
        lr = extra.get("inner_lr", config.inner_lr)
        ended = fm.adapt(net, init, batch, 3, lr, rule=config.rule)
        torch.testing.assert_close(tensors["params"][t], ended.params[0], rtol=0, atol=2e-5)
        name = "loss" if case == "sdf" else "psnr"
        for k in range(3):
            loss = float(ended.losses[k, 0])
            wanted = loss if name == "loss" else -10 * math.log10(loss)
            assert float(row[f"{name}_{k}"]) == pytest.approx(wanted, abs=2e-3)
        after = error(case, net, ended.params[0], tasks[t], config)
        if case in ("sdf", "curves"):
            assert float(row["mae_unseen"]) == pytest.approx(after, abs=1e-4)
        elif "psnr_unseen" in row:
            assert float(row["psnr_unseen"]) == pytest.approx(-10 * math.log10(after), abs=0.01)
        elif "psnr_whole" in row:
            assert float(row["psnr_whole"]) == pytest.approx(-10 * math.log10(after), abs=0.01)
        assert (out / row["picture"]).suffix == ENDINGS.get(case, ".png")
        assert ("psnr_unseen" in row) == (case in ("views", "phototourism"))
        assert ("psnr_whole" in row) == (case == "ct")
    if case in ("images", "ct", "views", "phototourism", "curves"):
        shown = kind.picture(net, tensors["params"][-1], tasks[len(tasks) - 1], config.signal)
        with Image.open(out / rows[-1]["picture"]) as image:
            pixels = torch.from_numpy(np.array(image)).view(shown.shape) / 255
        assert (pixels - shown.clamp(0, 1)).abs().max() <= 0.5 / 255 + 1e-4


def test_a_photo_is_fitted_as_a_whole_unless_its_left_half_is_asked_for(start, tmp_path):
    made = start("phototourism")
    config, out = tr.saved_config(made.run), tmp_path / "fits"
    given = ["--data", made.data, "--out", str(out), "--steps", "3", "--seed", "5"]
    assert main(["fit", str(made.run), *given]) == 0
    kind, tasks = module(made.kind), module(made.kind).open_all(made.data, config.signal)
    net, init, _, _ = load_start(made.run / tr.BEST)
    seeds = fm.rng.task_seeds(5, 1, 1)
    batch = kind.learn([tasks[1]], config.signal, net, seeds, config.per_step)
    assert batch.points == tasks[1].image[..., 0].numel()
    ended = fm.adapt(net, init, batch, 3, config.inner_lr, rule=config.rule)
    weights = load_tensors(out / show.FITS)[0]["params"]
    torch.testing.assert_close(weights[1], ended.params[0], rtol=0, atol=2e-5)
    assert "psnr_unseen" not in table(out, "scores.csv")[1]
    assert main(["fit", str(made.run), *given, "--mask", "top"]) == 2


def test_fit_takes_only_the_names_asked_for(start, tmp_path, capsys):
    made = start("audio")
    given = ["fit", str(made.run), "--data", made.data, "--out", str(tmp_path / "fits")]
    assert main([*given, "--names", "3.wav#0", "5.wav#0"]) == 0
    assert [row["name"] for row in table(tmp_path / "fits", "scores.csv")] == ["3.wav#0", "5.wav#0"]
    assert main([*given, "--names", "9.wav#0"]) == 2
    assert "names has 9.wav#0; accepted are names in the data: 0.wav#0" in capsys.readouterr().err


def test_fit_from_other_numbers_of_views(start, tmp_path):
    """Fewer views are among more, and each number leads elsewhere."""
    made, ends = start("views"), {}
    for count in (1, 4):
        out = tmp_path / str(count)
        given = ["--data", made.data, "--out", str(out), "--names", "ball0", "--count", str(count)]
        assert main(["fit", str(made.run), *given, "--steps", "2", "--per-step", "20"]) == 0
        ends[count] = load_tensors(out / show.FITS)[0]["params"][0]
        config, (net, init, _, _) = tr.saved_config(made.run), load_start(made.run / tr.BEST)
        item = views.open_all(made.data, config.signal)[0]
        seeds = fm.rng.task_seeds(0, 0, 1)
        batch = views.observe([item], config.signal, net, seeds, count=count, per_step=20)
        theta = fm.adapt(net, init, batch, 2, config.inner_lr).params[0]
        torch.testing.assert_close(ends[count], theta, rtol=0, atol=1e-6)
    assert (ends[1] - ends[4]).abs().max() > 1e-4


# resuming


@pytest.mark.parametrize(
    "case, more",
    [
        ("ct", ["--photons", "5000"]),
        ("views", []),
        ("phototourism", []),
        ("sdf", ["--algorithm", "reptile", "--eikonal", "0.1"]),
        ("curves", []),
        ("audio", ["--per-step", "50"]),
    ],
)
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(case, more, tmp_path, monkeypatch):
    """Bit for bit: angles, photons, views, rays, jitter and points are functions of the step."""
    few = ["--iterations", "8", "--validate-every", "3", "--save-every", "2", *more]
    whole = learned(case, tmp_path, *few)
    config = tr.saved_config(whole.run)
    options = dataclasses.replace(config, out=tmp_path / "parts")
    stopped(monkeypatch, options, 3)
    assert main(["train", whole.kind, "--resume", "--out", str(options.out)]) == 0
    assert_same(options.out, whole.run)
    assert len(table(whole.run, tr.TABLE)) >= 3


def test_tasks_at_test_are_seen_the_same_in_any_chunks(start):
    for case, count in (("ct", 5), ("views", 3), ("curves", None)):
        made = start(case)
        config, net = tr.saved_config(made.run), load_start(made.run / tr.BEST)[0]
        tasks = tr.open_data(config)[0].take(range(3))
        whole, *none = tr.seen_at_test(config, tasks, net, count, chunk=3)
        pieces = list(tr.seen_at_test(config, tasks, net, count, chunk=2))
        assert not none and [batch.tasks for batch in pieces] == [2, 1]
        assert torch.equal(torch.cat([batch.y for batch in pieces]), whole.y)
        assert not torch.equal(whole.y[0], whole.y[1])
        if whole.seed is not None:
            assert torch.equal(torch.cat([batch.seed for batch in pieces]), whole.seed)


def test_training_says_when_no_density_is_alive(tmp_path, monkeypatch):
    """The last bias of the density at −50: ReLU makes nothing of it."""

    def dead(net, seed):
        init = baselines.standard(net, seed=seed)
        net.layers(init[None])[-1][1][0, 3] = -50.0
        return init

    monkeypatch.setattr(tr, "standard", dead)
    more = ["--density", "relu", "--iterations", "1"]
    with pytest.warns(UserWarning, match="outer step 1: no density is above 0 on the rays of"):
        learned("views", tmp_path, *more)


# options without effect, and data that cannot be read

IDLE = [
    ("ct", ["--attenuation", "2"], "attenuation is 2.0 with no photons"),
    ("ct", ["--group", "(a)"], "group is '(a)' with data phantoms"),
    ("ct", ["--w0", "30"], "w0 is 30.0 with network fourier"),
    ("ct", ["--per-step", "9"], "ct: per_step is 9; accepted is none"),
    ("ct", ["--order", "1"], "order is 1 with algorithm reptile"),
    ("ct", ["--eikonal", "0.1"], "eikonal is 0.1 with ct"),
    ("sdf", ["--clamp", "0.1", "--loss", "mse"], "clamp is 0.1 with loss mse"),
    ("sdf", ["--test-counts", "3"], "test_counts is (3,) with sdf, where nothing is counted"),
    ("sdf", ["--eikonal", "0.1"], "eikonal with order 2 would need a third derivative"),
    ("sdf", ["--features", "9"], "features is 9 with network relu"),
    ("audio", ["--features", "9"], "features is 9 with network siren"),
]


@pytest.mark.parametrize("kind, given, said", IDLE)
def test_options_without_effect_are_refused(kind, given, said, tmp_path, capsys):
    data = {"ct": lambda path: "phantoms", "sdf": balls, "audio": tones}[kind]
    source = str(data(tmp_path / FILES.get(kind, "data")))
    shape = ["--size", "16"] if kind == "ct" else []
    out = tmp_path / "run"
    small = ["--out", str(out), "--width", "8", "--depth", "2", *shape]
    assert main(["train", kind, "--data", source, *small, *given]) == 2
    line = capsys.readouterr().err
    assert said in line and line.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("kind", ["ct", "views"])
def test_a_counted_kind_needs_counts(kind, tmp_path):
    with pytest.raises(ValueError, match=f"test_counts is empty; {kind} needs numbers of"):
        recipes.configure(recipes.of_kind(kind), data="d", out=tmp_path, test_counts=())


def test_options_of_fit_without_effect_are_refused(start, tmp_path, capsys):
    def refused(case, given, said):
        made = start(case)
        data = made.data if case != "ct" else "phantoms"
        command = ["fit", str(made.run), "--data", data, "--out", str(tmp_path / "fits")]
        assert main([*command, *given]) == 2
        line = capsys.readouterr().err
        assert said in line and line.count("\n") == 1, line

    refused("ct", ["--mask", "left"], "mask is 'left' with ct, where it has no effect")
    refused("sdf", ["--size", "native"], "size is 'native' with sdf, where it has no effect")
    refused("audio", ["--size", "9"], "size is 9 with audio; accepted is without")
    refused("audio", ["--count", "2"], "count is 2 with audio, where nothing is counted")
    refused("views", ["--count", "5"], "views: count is 5; accepted are 1 to 4 views")
    refused("ct", ["--per-step", "3"], "ct: per_step is 3; accepted is none")
    assert not (tmp_path / "fits").exists()


def test_eval_of_other_kinds_of_task_is_refused(start, tmp_path, capsys):
    also = ["--also", str(start("views").run), "--out", str(tmp_path / "eval")]
    assert main(["eval", str(start("sdf").run), *also]) == 2
    assert "accepted in one table are runs on the same kind of task" in capsys.readouterr().err
    assert main(["eval", str(start("sdf").run), "--counts", "3"]) == 2
    assert "counts is (3,) with sdf, where nothing is counted" in capsys.readouterr().err
    assert main(["eval", str(start("views").run), "--counts", "9"]) == 2
    assert "count is 9; accepted are 1 to 4 views" in capsys.readouterr().err


@pytest.fixture
def hundred(tmp_path):
    """A hundred pictures; number 50 is cut short."""
    folder = tmp_path / "photos"
    folder.mkdir()
    noise = np.random.default_rng(0)
    for k in range(100):
        pixels = noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k:03}.png")
    whole = (folder / "050.png").read_bytes()
    (folder / "050.png").write_bytes(whole[: len(whole) // 2])
    return folder


def photos(hundred, *more):
    few = ["--size", "8", "--width", "8", "--depth", "2", "--w0", "30", "--iterations", "40"]
    out = hundred.parent / "run"
    given = ["--data", str(hundred), "--out", str(out), "--device", "cpu", *few, *more]
    return main(["train", "images", *given]), out


@pytest.mark.parametrize("damage", ["cut", "not a picture"])
def test_bad_pictures_are_left_out_where_that_is_asked_for(damage, hundred, capsys, tmp_path):
    if damage == "not a picture":
        (hundred / "050.png").write_bytes(b"GIF?" * 9)
    with pytest.warns(UserWarning, match=r"1 of 100 left out: .*050\.png is truncated"):
        code, out = photos(hundred, "--skip-bad")
    assert code == 0 and load_start(out / tr.LAST)[3]["step"] == 40
    with pytest.warns(UserWarning, match=r"1 of 100 left out"):
        parts = tr.open_data(tr.saved_config(out))
    names = sorted(name for part in parts for name in part.names)
    assert names == [f"{k:03}.png" for k in range(100) if k != 50]
    capsys.readouterr()
    fits = ["fit", str(out), "--data", str(hundred), "--out", str(tmp_path / "fits")]
    assert main(fits) == 2
    assert "050.png is truncated or not an image" in capsys.readouterr().err
    with pytest.warns(UserWarning, match=r"1 of 100 left out"):
        assert main([*fits, "--skip-bad"]) == 0
    assert [r["name"] for r in table(tmp_path / "fits", "scores.csv")] == names


def test_without_that_the_run_stops_and_names_it(hundred, capsys):
    code, out = photos(hundred, "--validation", "0.05", "--test", "0")
    said = capsys.readouterr().err
    assert code == 2 and said.count("\n") == 1
    assert "050.png is truncated or not an image" in said and "Pillow" in said
    assert not (out / tr.BEST).exists()


@pytest.mark.parametrize("case", ["views", "phototourism", "sdf", "audio", "volumes"])
def test_bad_items_of_every_kind_are_left_out(case, tmp_path, capsys):
    kind, make, given = CASES[case]
    if case in ("sdf", "volumes"):
        folder = tmp_path / "data"
        folder.mkdir()
        side = {"sdf": 12, "volumes": 6}[case]
        source = np.load(make(tmp_path / "set.npz"))[{"sdf": "sdf", "volumes": "volumes"}[case]]
        for k, values in enumerate(source):
            np.save(folder / f"{k}.npy", values)
        assert source.shape[1:] == (side,) * 3
        bad, name = folder / "1.npy", "1.npy"
    else:
        folder = make(tmp_path / "data")
        places = {"views": "ball1/r_2.png", "phototourism": "dense/images/1.png", "audio": "1.wav"}
        bad, name = folder / places[case], places[case].rpartition("/")[2]
    bad.write_bytes(bad.read_bytes()[: bad.stat().st_size // 2])
    out = ["--out", str(tmp_path / "run"), "--iterations", "20", "--test", "0"]  # all are read
    train = ["train", kind, "--data", str(folder), *WIDTH, *given, *out]
    assert main(train) == 2
    line = capsys.readouterr().err
    assert name in line and line.count("\n") == 1
    with pytest.warns(UserWarning, match=f"left out: .*{re.escape(name)}"):
        assert main([*train, "--skip-bad"]) == 0
