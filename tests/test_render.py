"""apply/show.py and viz.py: what `fastmeta render` draws, read back from the files."""

import importlib
import math
import re
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_kinds import CASES, FILES, MADE

import fastmeta as fm
from fastmeta import train as tr
from fastmeta import viz
from fastmeta.apply import Render, render
from fastmeta.apply.show import file_stem
from fastmeta.checkpoint import load_tensors, save_tensors
from fastmeta.cli import main
from fastmeta.tasks import cameras, images, module, phototourism, views

show = importlib.import_module("fastmeta.apply.show")

STEP = 0.5 / 255 + 1e-5  # of an 8-bit channel, and rounding of the network


@pytest.fixture(scope="session")
def fits(tmp_path_factory):
    """``fits(case)``: the folder that fit wrote of a start that has seen one step, and data."""
    made = {}

    def make(case):
        if case in made:
            return made[case]
        kind, data, given = CASES[case]
        folder = tmp_path_factory.mktemp(f"render-{case}")
        source = MADE.get(case) or str(data(folder / FILES.get(case, "data")))
        small = ["--width", "24", "--depth", "3", "--device", "cpu", "--iterations", "30"]
        out = ["--out", str(folder / "run"), "--validate-tasks", "1"]
        assert main(["train", kind, "--data", source, *given, *small, *out]) == 0
        if case in MADE:
            pixels = tr.open_data(tr.saved_config(folder / "run"))[2]
            source = str(folder / "new.npy")
            np.save(source, torch.stack([pixels[i] for i in range(2)]).numpy())
        fit = ["--data", source, "--out", str(folder / "fits"), "--steps", "5"]
        assert main(["fit", str(folder / "run"), *fit]) == 0
        made[case] = folder / "fits"
        return made[case]

    return make


def opened(folder):
    return show.open_fits(folder, torch.device("cpu"))


def drawn(folder, out, **options):
    """{name: path} of what was written."""
    moving = "to" in options or opened(folder).kind in ("views", "sdf")
    given = {"device": "cpu", **({"video": "gif", "frames": 3} if moving else {}), **options}
    paths = render(Render(folder, out, **given))
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in paths)
    return {path.name: path for path in paths}


def pixels(path):
    with Image.open(path) as image:
        values = torch.from_numpy(np.array(image)).float() / 255
    return values if values.dim() == 3 else values[..., None]


def gif(path):
    """(frames [n,H,W,3], milliseconds of each)."""
    with Image.open(path) as image:
        frames, times = [], []
        for k in range(image.n_frames):
            image.seek(k)
            frames.append(torch.from_numpy(np.array(image.convert("RGB"))).float() / 255)
            times.append(image.info["duration"])
        assert image.info.get("loop") == 0
    return torch.stack(frames), times


# planes, sounds, volumes: another resolution is the network on another grid


@pytest.mark.parametrize("case, coords", [("images", "unit"), ("ct", "unit_xy")])
def test_a_plane_at_another_resolution(case, coords, fits, tmp_path):
    found = opened(fits(case))
    for size in (None, 29):
        n = size or found.tasks[1]["size"][0]
        made = drawn(fits(case), tmp_path / str(n), size=size, name=found.names[1])
        assert list(made) == [f"{found.names[1]}-{n}.png"]
        i, j = torch.meshgrid(torch.arange(n) / n, torch.arange(n) / n, indexing="ij")
        x = torch.stack((i, j) if coords == "unit" else (j, i), -1).view(-1, 2)
        y = fm.mlp(found.net, found.params[1], x).view(n, n, -1).clamp(0, 1)
        assert (pixels(made[f"{found.names[1]}-{n}.png"]) - y).abs().max() <= STEP
        assert float(y.std()) > 0.01


def test_a_picture_keeps_its_aspect_ratio(fits, tmp_path):
    """Of native size, 6 x 9: 12 high it is 18 wide."""
    viz.save_png(tmp_path / "wide.png", torch.rand(6, 9, 3))
    run = fits("images").parent / "run"
    fit = ["--data", str(tmp_path / "wide.png"), "--size", "native", "--out", str(tmp_path / "f")]
    assert main(["fit", str(run), *fit]) == 0
    made = drawn(tmp_path / "f", tmp_path / "o", size=12)
    found, x = opened(tmp_path / "f"), images.grid(12, 18)
    y = fm.mlp(found.net, found.params[0], x).view(12, 18, 3).clamp(0, 1)
    assert (pixels(made["wide-12.png"]) - y).abs().max() <= STEP


@pytest.mark.parametrize("size", [None, 1000])
def test_a_sound(size, fits, tmp_path):
    found, n = opened(fits("audio")), size or 256
    name = found.names[2]
    made = drawn(fits("audio"), tmp_path / "o", size=size, name=name)
    ((_, path),) = made.items()
    with wave.open(str(path)) as file:
        assert file.getparams()[:4] == (1, 2, round(8000 * n / 256), n)
        heard = np.frombuffer(file.readframes(n), "<i2") / 2**15
    x = (torch.arange(n) / n)[:, None]
    y = fm.mlp(found.net, found.params[2], x)[:, 0].clamp(-1, 1 - 2**-15)
    assert np.abs(heard - y.numpy()).max() <= 0.5 / 2**15 + 1e-6
    assert float(y.abs().max()) > 0.01


@pytest.mark.parametrize("size", [None, 9])
def test_a_volume(size, fits, tmp_path):
    found, n = opened(fits("volumes")), size or 6
    made = drawn(fits("volumes"), tmp_path / "o", size=size, name=found.names[3])
    ((name, path),) = made.items()
    assert name == f"{found.names[3]}-{n}.npy"
    values = np.load(path, allow_pickle=False)
    axes = torch.meshgrid(*[torch.arange(n) / n] * 3, indexing="ij")
    y = fm.mlp(found.net, found.params[3], torch.stack(axes, -1).view(-1, 3)).view(n, n, n, 1)
    assert values.dtype == np.float32 and values.shape == (n, n, n, 1)
    assert np.abs(values - y.numpy()).max() <= 1e-6


# objects


def viewed(found, at, pose, height=None):
    """(rgb, depth, opacity) of a fitted object by ``views.render_view``."""
    task = found.tasks[at]
    H, W = task["size"]
    h = height or H
    march = views.march(found.signal)
    size, bounds = (h, round(W * h / H)), (task["near"], task["far"])
    focal = task["focal"] * h / H
    return views.render_view(found.net, found.params[at], pose, *size, focal, *bounds, march)


def test_an_orbit_of_an_object(fits, tmp_path):
    """Frames as render_view has them, in a gif's 256 colours; depth and opacity of the first."""
    found = opened(fits("views"))
    options = {"frames": 5, "fps": 10.0, "elevation": 30.0, "name": "ball2"}
    made = drawn(fits("views"), tmp_path / "o", **options)
    assert sorted(made) == [
        f"ball2-{p}" for p in ("depth.png", "opacity.png", "orbit.gif", "rgb.png")
    ]
    frames, times = gif(made["ball2-orbit.gif"])
    assert len(frames) == 5 and times == [100] * 5
    poses = cameras.orbit(5, 4.0, math.radians(30))
    for frame, pose in zip(frames, poses, strict=True):
        rgb = viewed(found, 2, pose)[0].clamp(0, 1)
        assert (frame - rgb).abs().max() <= STEP  # 120 pixels: a palette holds all colours
    rgb, depth, acc = viewed(found, 2, poses[0])
    assert (pixels(made["ball2-rgb.png"]) - rgb.clamp(0, 1)).abs().max() <= STEP
    assert (pixels(made["ball2-opacity.png"])[..., 0] - acc.clamp(0, 1)).abs().max() <= STEP
    assert float(acc.max() - acc.min()) > 0.2
    viridis = importlib.import_module("matplotlib").colormaps["viridis"]
    share = ((depth / acc.clamp(min=1e-6) - 2) / 4).clamp(0, 1)
    colour = torch.from_numpy(viridis(share.numpy())[..., :3]).float()
    wanted = colour * acc[..., None] + 1 - acc[..., None]
    difference = (pixels(made["ball2-depth.png"]) - wanted).abs().amax(-1)
    assert difference.max() <= 0.02  # one of the colour map's 256 steps
    assert (difference > STEP).float().mean() < 0.05


def test_an_object_at_another_size(fits, tmp_path):
    found = opened(fits("views"))
    made = drawn(fits("views"), tmp_path / "o", size=17, frames=1)
    rgb = viewed(found, 0, cameras.orbit(1, 4.0, math.radians(25))[0], 17)[0]
    assert (pixels(made["ball0-rgb.png"]) - rgb.clamp(0, 1)).abs().max() <= STEP


def test_a_video_from_one_object_to_another(fits, tmp_path):
    found = opened(fits("views"))
    made = drawn(fits("views"), tmp_path / "o", name="ball1", to="ball4", frames=3)
    frames, _ = gif(made["ball1-to-ball4.gif"])
    pose = torch.tensor(found.tasks[1]["pose"])
    weights = (found.params[1], (found.params[1] + found.params[4]) / 2, found.params[4])
    for frame, theta in zip(frames, weights, strict=True):
        own = found._replace(params=theta[None].expand(5, -1))
        rgb = viewed(own, 1, pose)[0].clamp(0, 1)
        assert (frame - rgb).abs().max() <= STEP


# photos


def photo(found, camera, theta, pose=None):
    task = found.tasks[camera]
    H, W = task["size"]
    pose = torch.tensor(task["pose"]) if pose is None else pose
    o, d = cameras.rays_from_kinv(H, W, torch.tensor(task["kinv"]), pose)
    rays = fm.Rays(o[None], d[None], task["near"], task["far"])
    march = phototourism.march(found.signal)
    return fm.render(found.net, theta[None], rays, march)[0].view(H, W, 3).clamp(0, 1)


def test_a_photos_appearance_from_every_camera(fits, tmp_path):
    found = opened(fits("phototourism"))
    made = drawn(fits("phototourism"), tmp_path / "o", name="2.png")
    assert sorted(made) == [f"2-from-{k}.png" for k in range(6)]
    for k in range(6):
        wanted = photo(found, k, found.params[2])
        assert (pixels(made[f"2-from-{k}.png"]) - wanted).abs().max() <= STEP
    assert (pixels(made["2-from-0.png"]) - pixels(made["2-from-5.png"])).abs().max() > 0.02


def test_a_photo_twice_as_high_has_the_same_rays(fits, tmp_path):
    """Every second row and column of 16 x 24 pixels are those of 8 x 12."""
    found = opened(fits("phototourism"))
    made = drawn(fits("phototourism"), tmp_path / "o", size=16)
    large = pixels(made["0-from-3.png"])
    assert large.shape == (16, 24, 3)
    assert (large[::2, ::2] - photo(found, 3, found.params[0])).abs().max() <= STEP + 1e-5


def test_a_video_from_one_photo_to_another(fits, tmp_path):
    """First and last frames are those of the two networks by their own cameras."""
    found = opened(fits("phototourism"))
    made = drawn(fits("phototourism"), tmp_path / "o", name="1.png", to="4.png", frames=5)
    frames, _ = gif(made["1-to-4.gif"])
    assert len(frames) == 5
    a, b = (torch.tensor(found.tasks[k]["pose"]) for k in (1, 4))
    middle = (a + b) / 2  # both look straight ahead
    theta = (found.params[1] + found.params[4]) / 2
    for k, wanted in (
        (0, photo(found, 1, found.params[1])),
        (2, photo(found, 1, theta, middle)),
        (4, photo(found, 1, found.params[4], b)),
    ):
        assert (frames[k] - wanted).abs().max() <= STEP
    still = photo(found, 1, found.params[4])  # the second's weights by the first's camera
    assert (frames[4] - still).abs().max() > 4 * STEP


# fields


def read_ply(path):
    head, _, body = path.read_bytes().partition(b"end_header\n")
    lines = head.decode().splitlines()
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    count = {line.split()[1]: int(line.split()[2]) for line in lines if line.startswith("element")}
    vertices = np.frombuffer(body, "<f4", 3 * count["vertex"]).reshape(-1, 3)
    faces = np.frombuffer(body[vertices.nbytes :], [("n", "u1"), ("v", "<i4", 3)])
    assert len(faces) == count["face"] and (faces["n"] == 3).all()
    return vertices, faces["v"]


def read_obj(path):
    words = [line.split() for line in path.read_text().splitlines()]
    vertices = np.array([w[1:] for w in words if w[0] == "v"], float)
    return vertices, np.array([w[1:] for w in words if w[0] == "f"], int) - 1


def test_a_surface(fits, tmp_path):
    """Vertices lie on the zero set, faces look outward, both files say the same."""
    found = opened(fits("sdf"))
    name, theta = found.names[1], found.params[1]
    made = drawn(fits("sdf"), tmp_path / "o", name=name, resolution=24, size=16, elevation=10.0)
    assert sorted(made) == [f"{name}-turn.gif", f"{name}.obj", f"{name}.ply"]
    (v, f), (v2, f2) = read_ply(made[f"{name}.ply"]), read_obj(made[f"{name}.obj"])
    assert np.abs(v - v2).max() <= 0.5e-6 + 1e-7 and (f == f2).all() and len(f) > 50
    cell = 2 / 23
    x = torch.from_numpy(v.copy()).requires_grad_()
    values = fm.mlp(found.net, theta, x)
    (slope,) = torch.autograd.grad(values.sum(), x)
    steepest = float(slope.norm(dim=-1).max())
    assert values.abs().max() < cell * max(1.0, steepest)
    assert float(values.detach().abs().mean()) < 0.1 * cell
    corners = torch.from_numpy(v[f])
    normals = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    outward = (normals * slope[torch.from_numpy(f[:, 0].astype(np.int64))]).sum(-1)
    assert (outward > 0).float().mean() > 0.95
    frames, _ = gif(made[f"{name}-turn.gif"])
    for k, frame in enumerate(frames):
        view = (2 * math.pi * k / 3, math.radians(10))
        shown = module("sdf").picture(
            found.net, theta, opened_item("sdf", fits, 1), found.signal, view=view, size=16
        )
        assert (frame - shown).abs().max() <= 2e-3 + STEP  # rays that meet an edge, 16 halvings
    assert frames.min() < 0.9  # something is there


def opened_item(case, fits, at):
    config = tr.saved_config(fits(case).parent / "run")
    return module(CASES[case][0]).open_all(config.data, config.signal)[at]


def test_a_field_without_a_surface_has_no_mesh(fits, tmp_path):
    tensors, meta = load_tensors(fits("sdf") / show.FITS)
    net = opened(fits("sdf")).net
    net.layers(tensors["params"])[-1][1][:] = 9.0  # positive everywhere
    (tmp_path / "f").mkdir()
    save_tensors(tmp_path / "f" / show.FITS, tensors, meta)
    made = drawn(tmp_path / "f", tmp_path / "o", resolution=8, size=8)
    assert [name.rpartition(".")[2] for name in made] == ["gif"]
    assert gif(next(iter(made.values())))[0].min() == 1.0  # white


def test_a_curve_at_another_resolution(fits, tmp_path):
    data, run = fits("curves").parent / "set.npz", fits("curves").parent / "run"
    fit = ["--data", str(data), "--out", str(tmp_path / "f"), "--names", "ball0", "--steps", "60"]
    assert main(["fit", str(run), *fit, "--rule", "adam", "--lr", "0.01"]) == 0
    found, name = opened(tmp_path / "f"), "ball0"
    made = drawn(tmp_path / "f", tmp_path / "o", size=25)
    assert list(made) == [f"{name}-25.png"]
    x = (2 * torch.arange(25) + 1) / 25 - 1
    where = torch.stack(torch.meshgrid(x, x, indexing="ij"), -1).view(-1, 2)
    values = fm.mlp(found.net, found.params[0], where).view(25, 25)
    shown = pixels(made[f"{name}-25.png"])
    clear = values.abs() > 0.1  # beyond the lines about the curve
    blue = shown[..., 2] > shown[..., 0]
    assert (blue == (values < 0))[clear].all() and clear.any() and (values < -0.1).any()


# videos


def decoded(path):
    """(frames [n,H,W,3], what ffmpeg says of the file)."""
    program = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    command = [program, "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    ended = subprocess.run(command, capture_output=True, check=True, timeout=60)
    said = ended.stderr.decode()
    W, H = map(int, re.search(r"Video: .*?, (\d+)x(\d+)", said).groups())
    return torch.frombuffer(bytearray(ended.stdout), dtype=torch.uint8).view(
        -1, H, W, 3
    ) / 255, said


def test_an_mp4_read_back(tmp_path):
    """Frames, an even size, colours within what the codec loses."""
    pytest.importorskip("imageio_ffmpeg")
    colours = torch.tensor([[0.9, 0.2, 0.1], [0.1, 0.8, 0.3], [0.2, 0.3, 0.9], [0.5, 0.5, 0.5]])
    viz.save_video(tmp_path / "v.mp4", [c.expand(33, 47, 3) for c in colours], 8.0)
    read, said = decoded(tmp_path / "v.mp4")
    assert read.shape == (4, 34, 48, 3)  # made even by a white edge
    for colour, frame in zip(colours, read, strict=True):
        assert (frame[4:28, 4:40] - colour).abs().mean() < 0.04  # chroma halved, 8 bits of 219
    assert read[:, -1].mean() > 0.8
    assert "Video: h264" in said and "8 fps" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["v.mp4"]


def test_both_videos_of_an_object(fits, tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    made = drawn(fits("views"), tmp_path / "o", video="both", frames=4, size=20)
    frames, _ = gif(made["ball0-orbit.gif"])
    read, _ = decoded(made["ball0-orbit.mp4"])
    assert read.shape == frames.shape and (read - frames).abs().mean() < 0.06


def test_without_ffmpeg(fits, tmp_path, monkeypatch, capsys):
    """An mp4 asked for says what is missing; of both, the gif is there all the same."""
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ImportError, match="an .mp4 needs imageio-ffmpeg, pip install imageio-ff"):
        viz.save_video(tmp_path / "v.mp4", [torch.zeros(4, 4, 3)])
    assert not list(tmp_path.iterdir())
    given = ["render", str(fits("views")), "--frames", "2", "--device", "cpu"]
    assert main([*given, "--out", str(tmp_path / "mp4"), "--video", "mp4"]) == 2
    assert "imageio-ffmpeg" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="ball0-orbit.mp4 left out: save_video: an .mp4 needs"):
        assert main([*given, "--out", str(tmp_path / "both")]) == 0
    assert "orbit.mp4" not in capsys.readouterr().out
    assert len(gif(tmp_path / "both" / "ball0-orbit.gif")[0]) == 2


def test_videos_refused(tmp_path):
    frame = torch.zeros(4, 4, 3)
    for path, frames, fps in (
        ("a.gif", [], 24.0),
        ("a.avi", [frame], 24.0),
        ("a.gif", [frame], 0.0),
    ):
        with pytest.raises(ValueError, match="save_video: .*; accepted are frames, .gif or .mp4"):
            viz.save_video(tmp_path / path, frames, fps)
    assert not list(tmp_path.iterdir())


# what is refused


@pytest.fixture
def bad(capsys):
    def check(given, *words):
        capsys.readouterr()
        assert main(["render", *map(str, given)]) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1, said
        for word in words:
            assert word in said.err, said.err

    return check


def test_what_render_refuses(fits, bad, tmp_path):
    out = ["--out", tmp_path / "o", "--video", "gif"]
    sound, scene = fits("audio"), fits("views")
    bad([scene, *out, "--name", "chair"], "name is chair; accepted are the fitted ones: ball0, bal")
    bad([scene, *out, "--to", "chair"], "name is chair; accepted are the fitted ones")
    bad([sound, *out, "--to", "1.wav#0"], "to is 1.wav#0 with audio; accepted with what can be")
    bad([scene, *out, "--size", "0"], "size is 0; accepted is an integer >= 1")
    bad([scene, *out, "--frames", "0"], "frames is 0; accepted is an integer >= 1")
    bad([scene, *out, "--resolution", "3"], "resolution is 3; accepted is an integer >= 4")
    bad([scene, *out, "--elevation", "90"], "elevation")
    bad([scene, *out, "--fps", "0"], "fps")
    bad([scene, *out, "--device", "nonsense"], "'nonsense'", "accepted are auto, cpu, cuda")
    bad([scene, *out, "--bogus", "1"], "--bogus")
    bad(out, "--fits")
    (tmp_path / "file").write_text("mine")
    bad([scene, "--out", tmp_path / "file" / "o"], "the output folder cannot be made")


def test_folders_that_hold_no_fits(fits, bad, tmp_path):
    out = ["--out", tmp_path / "o"]
    whole = fits("views") / show.FITS
    bad([tmp_path / "absent", *out], "absent")
    (tmp_path / "empty").mkdir()
    bad([tmp_path / "empty", *out], "empty")
    bad([fits("views").parent / "run" / tr.BEST, *out], "holds no fits; accepted is the folder")
    half = tmp_path / "half.safetensors"
    half.write_bytes(whole.read_bytes()[:-100])
    bad([half, *out], "not a complete safetensors file")
    tensors, meta = load_tensors(whole)
    other = tmp_path / "other.safetensors"

    def stored(change, cut=0):
        parts = {k: v[cut:] if k == "params" else v for k, v in tensors.items()}
        save_tensors(other, parts, {**meta, **change})
        return other

    bad([stored({}, cut=1), *out], "damaged, it holds 5 weights, 6 names, 6 tasks")
    bad([stored({"name": meta["name"][1:]}), *out], "damaged, it holds 6 weights, 5 names, 6 tasks")
    bad([stored({"signal": {**meta["signal"], "kind": "smells"}}), *out], "not what fastmeta fit")
    bad([stored({"signal": {**meta["signal"], "size": 0}}), *out], "not what fastmeta fit", "size")
    bad([stored({"kind": "start"}), *out], "holds no fits")
    narrow = {"signal": {k: v for k, v in meta["signal"].items() if k != "kind"}}
    bad([stored(narrow), *out], "not what fastmeta fit writes")


def test_weights_of_another_network_are_refused(fits, bad, tmp_path):
    tensors, meta = load_tensors(fits("images") / show.FITS)
    tensors["params"] = tensors["params"][:, :-1]
    save_tensors(tmp_path / "f.safetensors", tensors, meta)
    bad([tmp_path / "f.safetensors", "--out", tmp_path / "o"], "params")


def test_names_lead_nowhere_else(fits, tmp_path):
    pixels_ = np.random.default_rng(0).random((2, 12, 12, 3), dtype=np.float32)
    np.savez(tmp_path / "set.npz", images=pixels_, names=["../../up", str(tmp_path / "absolute")])
    run = fits("images").parent / "run"
    fit = ["--data", str(tmp_path / "set.npz"), "--out", str(tmp_path / "in" / "fits")]
    assert main(["fit", str(run), *fit]) == 0
    before = {p for p in tmp_path.rglob("*") if "renders" not in p.parts}
    for name in ("../../up", str(tmp_path / "absolute")):
        made = drawn(
            tmp_path / "in" / "fits", tmp_path / "renders" / name.replace("/", ""), name=name
        )
        assert len(made) == 1
    assert {p for p in tmp_path.rglob("*") if "renders" not in p.parts} == before


def test_the_command_line_prints_what_it_wrote(fits, tmp_path, capsys):
    made = fits("ct")  # which prints too
    capsys.readouterr()
    assert main(["render", str(made), "--out", str(tmp_path), "--size", "20"]) == 0
    said = capsys.readouterr().out.split()
    assert said == [str(p) for p in tmp_path.iterdir()] and Path(said[0]).stat().st_size > 0


def test_windows_of_one_sound_are_files_of_their_own():
    names = ("a/hello.wav#0", "a/hello.wav#1", "scan.npy#0,1,2", "c:\\x.png", "plain")
    assert [file_stem(n) for n in names] == [
        "a_hello#0", "a_hello#1", "scan#0,1,2", "c__x", "plain",
    ]  # fmt: skip


def test_options_that_leave_what_is_drawn_as_it_is_are_refused(fits, tmp_path, capsys):
    folder = str(fits("images"))
    given = ["render", folder, "--out", str(tmp_path / "o")]
    assert main([*given, "--frames", "5"]) == 2
    assert "frames is 5 with images, where it has no effect" in capsys.readouterr().err
    assert (
        main(["render", str(fits("views")), "--out", str(tmp_path / "o"), "--resolution", "9"]) == 2
    )
    assert "resolution is 9 with views" in capsys.readouterr().err
