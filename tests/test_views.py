"""tasks/cameras.py and tasks/views.py: rays and poses, what is read from where, and the batches."""

import json
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import fastmeta as fm
from fastmeta import rng
from fastmeta.reference import ray_times
from fastmeta.tasks import cameras, views
from fastmeta.tasks.views import Views

NET = fm.nerf_mlp(width=8, depth=3, frequencies=3, max_exponent=2.0)
ANGLE = 0.7


def one_line(match, call, *args, error=ValueError, **kwargs):
    with pytest.raises(error, match=match) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_object(folder, pixels, poses, *, file="transforms.json", path="./r_{}", start=0):
    """Views [V,H,W,C] and their transforms in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    frames = []
    for n, (view, pose) in enumerate(zip(pixels, poses, strict=True), start):
        name = path.format(n)
        image = folder / (name if name.endswith(".png") else f"{name}.png")
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(view).save(image)
        frames.append({"file_path": name, "transform_matrix": pose.tolist()})
    content = {"camera_angle_x": ANGLE, "frames": frames}
    (folder / file).write_text(json.dumps(content))


@pytest.fixture
def small(tmp_path):
    """Four objects of 5 views, 6 x 8 pixels; 3 views are learnt from."""
    poses = cameras.orbit(5, 4.0, 0.4)
    for n, name in enumerate("abcd"):
        write_object(tmp_path / name, noise(5, 6, 8, 4, seed=n), poses)
    return tmp_path


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


FEW = Views(learn_views=3, samples=4)


# rays


def test_rays_are_those_of_the_notebooks_formulas():
    pose = cameras.orbit(3, 4.0, 0.5)[1].double()
    H, W, f = 3, 5, 4.2
    o, d = cameras.pinhole(H, W, f, pose)
    kinv = torch.tensor([[0.3, 0.02, -1.0], [0, -0.4, 0.7], [0, 0, -1]], dtype=torch.float64)
    o2, d2 = cameras.rays_from_kinv(H, W, kinv, pose)
    for j in range(H):
        for i in range(W):
            local = np.array([(i - W / 2) / f, -(j - H / 2) / f, -1.0])
            wanted = pose[:3, :3].numpy() @ local
            np.testing.assert_allclose(d[j * W + i], wanted, rtol=0, atol=1e-15)
            wanted = pose[:3, :3].numpy() @ (kinv.numpy() @ np.array([i, j, 1.0]))
            np.testing.assert_allclose(d2[j * W + i], wanted, rtol=0, atol=1e-15)
    for origins in (o, o2):
        assert origins.equal(pose[:3, 3].expand(H * W, 3))
    many = cameras.pinhole(H, W, f, torch.stack([pose, pose @ pose]))
    assert many[0].shape == (2, H * W, 3) and many[1][0].equal(d)


def test_the_two_kinds_of_rays_meet():
    """A pinhole's own K⁻¹ gives a pinhole's rays."""
    H, W, f = 4, 6, 5.0
    kinv = torch.tensor([[1 / f, 0, -W / 2 / f], [0, -1 / f, H / 2 / f], [0, 0, -1]])
    pose = cameras.orbit(1, 2.0, -0.3, start=1.0)[0]
    a, b = cameras.pinhole(H, W, f, pose)[1], cameras.rays_from_kinv(H, W, kinv, pose)[1]
    assert (a - b).abs().max() < 4 * torch.finfo(torch.float32).eps  # |d| < 2, three products


def test_rays_refused():
    pose = torch.eye(4)
    for focal in (0.0, -1.0, math.nan, math.inf):
        one_line("pinhole: focal is .*; accepted", cameras.pinhole, 2, 2, focal, pose)
    one_line("pinhole: 0 x 2 pixels", cameras.pinhole, 0, 2, 1.0, pose)
    one_line(r"pinhole: .*\(3, 4\)", cameras.pinhole, 2, 2, 1.0, pose[:3])
    one_line(r"kinv has shape \(2, 2\)", cameras.rays_from_kinv, 2, 2, torch.eye(2), pose)


def test_an_orbit_looks_at_the_origin():
    poses = cameras.orbit(8, 3.0, 0.6, start=0.2).double()
    turns, centres = poses[:, :3, :3], poses[:, :3, 3]
    eps = torch.finfo(torch.float32).eps
    assert (turns.mT @ turns - torch.eye(3)).abs().max() < 4 * eps
    assert (torch.linalg.det(turns) - 1).abs().max() < 6 * eps
    assert (turns[:, :, 2] * 3 - centres).abs().max() < 6 * eps  # backward is away from the origin
    assert turns[:, 2, 0].eq(0).all() and turns[:, 2, 1].gt(0).all()  # level, the right way up
    assert (centres[:, 2] - 3 * math.sin(0.6)).abs().max() < 3 * eps
    angle = torch.atan2(centres[:, 1], centres[:, 0])
    wanted = torch.remainder(0.2 + torch.arange(8) * math.pi / 4, 2 * math.pi)
    assert (torch.remainder(angle, 2 * math.pi) - wanted).abs().max() < 8 * eps
    for change in ({"count": 0}, {"radius": 0.0}, {"elevation": 1.6}, {"turn": math.nan}):
        arguments = {"count": 2, "radius": 1.0, "elevation": 0.0, **change}
        one_line("orbit: .* accepted are count >= 1", cameras.orbit, **arguments)


def test_between_turns_evenly_about_one_axis():
    first, last = cameras.orbit(6, 4.0, 0.0)[:2]  # 60° apart about z, so φ is even in between
    path = cameras.between(first, last, 5).double()
    assert (path[0] - first).abs().max() < 1e-6 and (path[-1] - last).abs().max() < 1e-6
    for n, pose in enumerate(path):
        phi = n / 4 * math.pi / 3
        back = torch.tensor([math.cos(phi), math.sin(phi), 0.0], dtype=torch.float64)
        assert (pose[:3, 2] - back).abs().max() < 1e-6  # float32 poses, angles to 1e-7
        centre = first[:3, 3] + n / 4 * (last[:3, 3] - first[:3, 3])
        assert (pose[:3, 3] - centre).abs().max() < 2e-6
    one_line("between: count is 1", cameras.between, first, last, 1)
    one_line("between: pose 1 is no camera", cameras.between, first, 2 * last, 3)


def test_what_is_no_pose():
    good = cameras.orbit(3, 4.0, 0.4)
    assert cameras.check_poses("x", good.tolist()).equal(good)

    def changed(row, column, value):
        poses = good.clone()
        poses[1, row, column] = value
        return poses

    one_line("x: pose 1 holds NaN", cameras.check_poses, "x", changed(0, 3, math.nan))
    one_line("x: pose 1 holds NaN or inf", cameras.check_poses, "x", changed(2, 2, math.inf))
    one_line("x: pose 1 is no camera-to-world", cameras.check_poses, "x", changed(0, 0, 0.9))
    one_line("x: pose 1 is no camera-to-world", cameras.check_poses, "x", changed(3, 0, 1.0))
    mirrored = good * torch.tensor([-1.0, 1, 1, 1])
    one_line("x: pose 0 is no camera-to-world", cameras.check_poses, "x", mirrored)
    one_line(r"have shape \(3, 3, 4\)", cameras.check_poses, "x", good[:, :3])
    one_line(r"have shape \(0,\)", cameras.check_poses, "x", [])
    one_line("are no numbers", cameras.check_poses, "x", [[[1], [1, 2]]])
    one_line("are no numbers", cameras.check_poses, "x", [{"a": 1}])
    kinv = torch.tensor([[1e-4, 0, -0.5], [0, -1e-4, 0.5], [0, 0, -1]])  # 10 000 pixels
    assert cameras.check_kinv("x", kinv[None])[0].equal(kinv)
    one_line("x: kinv 0 is singular", cameras.check_kinv, "x", kinv[None] * torch.eye(3)[0])
    one_line("x: kinv 0 holds NaN", cameras.check_kinv, "x", kinv[None] * math.nan)


# options


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"near": 6.0}, "near is 6.0, far is 6.0; accepted are finite numbers, 0 <= near < far"),
        ({"near": -1.0}, "near is -1.0"),
        ({"far": math.inf}, "far is inf"),
        ({"near": math.nan}, "near is nan"),
        ({"size": 0}, "size is 0; accepted is an integer >= 1"),
        ({"learn_views": 0}, "learn_views is 0"),
        ({"held_out_views": 0}, "held_out_views is 0"),
        ({"samples": 1}, "samples is 1; accepted is an integer >= 2"),
        ({"last_interval": 0.0}, "last_interval is 0.0"),
        ({"density": "exp"}, "density is 'exp'; accepted are relu, softplus"),
    ],
)
def test_options_refused(change, match):
    one_line(f"^views: .*{match}", Views, **change)


# reading


def test_a_folder_of_objects(small):
    tasks = views.open_all(small, FEW)
    assert tasks.names == ("a", "b", "c", "d")
    scene = tasks[1]
    raw = noise(5, 6, 8, 4, seed=1).astype(np.float64) / 255
    white = raw[..., :3] * raw[..., 3:] + 1 - raw[..., 3:]
    np.testing.assert_allclose(scene.images, white, rtol=0, atol=3e-7)  # three float32 roundings
    assert scene.poses.equal(cameras.orbit(5, 4.0, 0.4))
    assert scene.focal == pytest.approx(4 / math.tan(ANGLE / 2), rel=1e-12)
    assert (scene.near, scene.far, scene.learn) == (2.0, 6.0, 3)
    scene.images.zero_()
    assert tasks[1].images.max() > 0  # what is handed out is a copy
    taken = tasks.take([3, 1])
    assert taken.names == ("d", "b") and taken[1].images.equal(tasks[1].images)


def test_held_out_views_beyond_those_asked_for_are_never_read(small):
    (small / "a" / "r_4.png").unlink()
    scene = views.open_all(small, replace(FEW, held_out_views=1))[0]
    assert len(scene.images) == len(scene.poses) == 4
    one_line("a/r_4.png cannot be opened", views.open_all(small, FEW).read, 0, error=OSError)


def test_views_are_resized_with_their_rays(tmp_path):
    pixels = np.zeros((2, 8, 16, 4), np.uint8)
    pixels[:, :, :8] = (255, 0, 0, 255)
    pixels[:, :, 8:] = (0, 0, 255, 0)  # a colour that must not leak: alpha is 0
    write_object(tmp_path / "a", pixels, cameras.orbit(2, 4.0, 0.4))
    scene = views.open_all(tmp_path, Views(size=4, learn_views=1))[0]
    assert scene.images.shape == (2, 2, 4, 3)
    assert scene.images[..., 2].sub(scene.images[..., 1]).abs().max() <= 1 / 255  # white or red
    assert scene.images[0, 0, 0].tolist() == [1, 0, 0] and scene.images[0, 0, 3].eq(1).all()
    big = views.open_all(tmp_path, Views(learn_views=1))[0]
    assert scene.focal == pytest.approx(big.focal / 4)
    wide, narrow = (
        cameras.pinhole(*s.images.shape[1:3], s.focal, s.poses[0]) for s in (big, scene)
    )
    kept = wide[1].view(8, 16, 3)[::4, ::4].reshape(-1, 3)  # pixel i of the small is 4 i of the big
    assert (narrow[1] - kept).abs().max() < 1e-6


def test_a_scene_with_its_own_views_to_learn_from(tmp_path):
    poses, pixels = cameras.orbit(6, 4.0, 0.4), noise(6, 4, 4, 4)
    spans = {"train": (0, 3), "val": (3, 4), "test": (4, 6)}
    for part, (at, end) in spans.items():
        write_object(
            tmp_path / "lego",
            pixels[at:end],
            poses[at:end],
            file=f"transforms_{part}.json",
            path=f"./{part}/r_{{}}",
        )
    for source in (tmp_path, tmp_path / "lego"):
        tasks = views.open_all(source, Views())
        assert tasks.names == ("lego",)
        scene = tasks[0]
        assert scene.learn == 3 and scene.poses.equal(poses)
        assert scene.images[..., 0].shape == (6, 4, 4)
        whole = views.open_all(source, Views(held_out_views=1))[0]
        assert len(whole.images) == 4 and whole.images.equal(scene.images[:4])
    edit(tmp_path / "lego/transforms_val.json", lambda c: c.update(camera_angle_x=0.8))
    one_line("lego has camera_angle_x 0.7, 0.8, 0.7; .* must agree", views.open_all, tmp_path, FEW)


def save_npz(path, n=5, **change):
    arrays = {
        "images": noise(n, 4, 4, 6, 3),
        "poses": cameras.orbit(4, 4.0, 0.4).expand(n, 4, 4, 4).numpy(),
        "camera_angle_x": ANGLE,
        **change,
    }
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def test_npz(tmp_path):
    names = [f"o{n}" for n in range(5)]
    angles = np.linspace(0.5, 0.9, 5)
    path = save_npz(tmp_path / "a.npz", names=names, camera_angle_x=angles)
    tasks = views.open_all(path, FEW)
    assert tasks.names == tuple(names)
    np.testing.assert_array_equal(
        tasks[2].images, noise(5, 4, 4, 6, 3)[2].astype(np.float32) / np.float32(255)
    )
    assert tasks[2].focal == pytest.approx(3 / math.tan(0.7 / 2))
    assert views.open_all(save_npz(tmp_path / "b.npz"), FEW).names == ("0", "1", "2", "3", "4")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"poses": None}, "lacks poses; accepted are"),
        ({"images": noise(5, 4, 4, 6)}, r"images in .* is uint8 \(5, 4, 4, 6\); accepted is uint8"),
        ({"images": np.zeros((5, 4, 4, 6, 3))}, "is float64"),
        ({"poses": np.zeros((4, 4, 4, 4))}, r"poses in .* goes with \(4, 4\) objects"),
        ({"poses": np.zeros((5, 4, 4, 4))}, "0: pose 0 is no camera-to-world matrix"),
        ({"camera_angle_x": np.ones(3)}, r"camera_angle_x in .* goes with \(3,\)"),
        ({"camera_angle_x": 4.0}, "camera_angle_x of 0 is .*4.0.*; accepted are radians"),
        ({"names": ["a"]}, r"names in .* goes with \(1,\)"),
        ({"names": np.array([None] * 5)}, "names in .* is pickled"),
        ({"n_train": 6}, "n_train is 6, n_val 0 .*together at most 5"),
        ({"n_train": 2.5}, "n_train is 2.5"),
        ({"n_train": 4, "n_val": -1}, "n_val -1"),
    ],
)
def test_npz_refused(tmp_path, change, match):
    path = save_npz(tmp_path / "bad.npz", **change)
    one_line(f"^views: .*{match}", views.open_all, path, FEW)


def test_broken_sources(small, tmp_path):
    one_line("source is a list; accepted are", views.open_all, [], FEW)
    one_line("gone does not exist", views.open_all, tmp_path / "gone", FEW, error=OSError)
    (tmp_path / "empty").mkdir()
    one_line(
        "empty holds no object; accepted are a folder", views.open_all, tmp_path / "empty", FEW
    )
    whole = save_npz(tmp_path / "empty/set.npz").read_bytes()
    one_line("set.npz in it can be given", views.open_all, tmp_path / "empty", FEW)
    one_line("neither a folder nor", views.open_all, tmp_path / "a/r_0.png", FEW)
    for content in (b"", whole[: len(whole) // 2]):
        (tmp_path / "x.npz").write_bytes(content)
        one_line("x.npz is no readable .npz", views.open_all, tmp_path / "x.npz", FEW)
    flipped = bytearray(save_npz(tmp_path / "large.npz", n=200).read_bytes())
    flipped[30_000] ^= 255  # in the pixels, which a checksum covers
    (tmp_path / "x.npz").write_bytes(flipped)
    one_line("x.npz is damaged", views.open_all, tmp_path / "x.npz", FEW)


def bad_pose(content):
    content["frames"][1]["transform_matrix"][0][0] = math.nan


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (bad_pose, "c: pose 1 holds NaN"),
        (lambda c: c["frames"][2]["transform_matrix"].pop(), "c: the pose matrices are no numbers"),
        (lambda c: c.update(frames=[]), "c: the pose matrices have shape"),
        (lambda c: c.pop("frames"), "c/transforms.json lacks what it needs .*frames"),
        (lambda c: c["frames"][0].pop("file_path"), "c/transforms.json lacks .*file_path"),
        (lambda c: c.update(frames=3), "c/transforms.json lacks what it needs"),
        (lambda c: c.update(camera_angle_x="wide"), "camera_angle_x of c is 'wide'"),
        (lambda c: c.update(camera_angle_x=math.nan), "camera_angle_x of c is nan"),
        (lambda c: c["frames"].pop() and c["frames"].pop(), "c has 3 views, 3 of them are to be"),
    ],
)
def test_transforms_that_are_wrong(small, change, match):
    edit(small / "c" / "transforms.json", change)
    one_line(f"^views: .*{match}", views.open_all, small, FEW)
    assert left_out(small, match) == ("a", "b", "d")


def left_out(root, match, **change):
    """Names of what is kept with skip_bad; exactly one warning, which names what is not."""
    with pytest.warns(UserWarning, match=match) as caught:
        tasks = views.open_all(root, replace(FEW, skip_bad=True, **change))
    assert len(caught) == 1 and "1 of 4 left out" in str(caught[0].message)
    assert all(len(tasks[n].images) == 5 for n in range(len(tasks)))
    return tasks.names


@pytest.mark.parametrize(
    "path",
    ["../b/r_0", "../../x", "/etc/passwd", "a/../../x", "", ".", "..", "C:/x", "a\\..\\x", 3],
)
def test_paths_that_leave_the_folder_are_refused(small, path):
    edit(small / "c" / "transforms.json", lambda c: c["frames"][0].update(file_path=path))
    if path == ".":  # the folder itself: a hidden ".png" in it, which is not there
        tasks = views.open_all(small, FEW)
        one_line("c/..png cannot be opened", tasks.read, 2, error=OSError)
        return
    one_line("c/transforms.json has file_path .* outside its folder", views.open_all, small, FEW)


def test_damaged_json(small):
    file = small / "c" / "transforms.json"
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"\xff\xfe", b"[" * 100_000):
        file.write_bytes(content)
        match = "c/transforms.json is no readable JSON"
        one_line(f"^views: {match}", views.open_all, small, FEW)
    file.unlink()
    match = "c/transforms.json is absent"
    one_line(f"^views: {match}", views.open_all, small, FEW, error=OSError)
    assert left_out(small, match) == ("a", "b", "d")


def test_a_damaged_image_is_named_when_it_is_read_and_left_out_on_demand(small):
    file = small / "c" / "r_3.png"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * 2 // 3])
    tasks = views.open_all(small, FEW)  # the other objects can be used
    assert tasks[3].images.shape == (5, 6, 8, 3)
    one_line("c/r_3.png is truncated or not an image", tasks.read, 2, error=OSError)
    assert left_out(small, "c/r_3.png is truncated") == ("a", "b", "d")
    for name in "abd":
        (small / name / "r_0.png").unlink()
    with pytest.warns(UserWarning, match="4 of 4"):
        one_line("none of the 4 objects", views.open_all, small, replace(FEW, skip_bad=True))


def test_views_of_different_sizes(small):
    Image.fromarray(noise(7, 8, 4)).save(small / "c" / "r_3.png")
    match = r"view 3 of c is \(7, 8\), view 0 is \(6, 8\) \(height, width\); all views"
    one_line(match, views.open_all(small, FEW).read, 2)
    assert left_out(small, match) == ("a", "b", "d")
    Image.fromarray(noise(6, 8).astype(np.uint16) * 99).save(small / "c" / "r_3.png")
    one_line("c/r_3.png .*mode I", views.open_all(small, FEW).read, 2, error=OSError)


def test_too_few_views(small):
    one_line("a has 5 views, 5 of them", views.open_all, small, Views(learn_views=5))


# parts


def names(parts):
    return [part.names for part in parts]


def test_parts_by_a_splits_file(small):
    file = small / "chair_splits.json"
    file.write_text(json.dumps({"train": ["d", "a"], "val": ["c"], "test": ["b"]}))
    assert names(views.open_splits(small, FEW)) == [("a", "d"), ("c",), ("b",)]
    file.write_text(json.dumps({"train": ["a", "b", "d"], "val": ["c"], "test": []}))
    train, validation, test = names(views.open_splits(small, FEW))
    assert test == ("c",) and len(validation) == 1  # the given objects are reported
    assert sorted(train + validation) == ["a", "b", "d"]
    file.write_text(json.dumps({"train": ["a", "b"], "test": ["c"]}))
    parts = names(views.open_splits(small, FEW))
    assert [len(part) for part in parts] == [1, 1, 1] and parts[2] == ("c",)  # d is in no part
    file.write_text(json.dumps({"train": ["a", "x"]}))
    one_line("chair_splits.json names 'x'", views.open_splits, small, FEW)
    with pytest.warns(UserWarning, match="names 1 objects that are not there: x"):
        views.open_splits(small, replace(FEW, skip_bad=True))
    for content in ([], {}, {"train": "abc"}, {"train": [1]}):
        file.write_text(json.dumps(content))
        one_line("chair_splits.json lists no objects", views.open_splits, small, FEW)
    file.write_text("{")
    one_line("chair_splits.json is no readable JSON", views.open_splits, small, FEW)
    (small / "car_splits.json").write_text("{}")
    one_line("holds 2 splits files", views.open_splits, small, FEW)


def test_parts_without_a_splits_file(small):
    parts = names(views.open_splits(small, FEW, 3))
    assert sorted(sum(parts, ())) == list("abcd") and all(parts)
    assert parts == names(views.open_splits(small, FEW, 3))


def test_parts_of_an_npz(tmp_path):
    path = save_npz(tmp_path / "a.npz", n=6, n_train=3, n_val=1)
    assert names(views.open_splits(path, FEW)) == [("0", "1", "2"), ("3",), ("4", "5")]
    path = save_npz(tmp_path / "b.npz", n=6, n_train=4, n_val=2)
    train, validation, test = names(views.open_splits(path, FEW))
    assert test == ("4", "5") and len(validation) == 1 and len(train) == 3
    train, validation, test = names(views.open_splits(path, replace(FEW, validation=0.0)))
    assert (len(train), validation, test) == (4, (), ("4", "5"))


# batches


def scenes(*sizes, views_=4, learn=3):
    poses = cameras.orbit(views_, 4.0, 0.4)
    return [
        views.Scene(
            torch.rand(views_, h, w, 3, generator=torch.Generator().manual_seed(n)),
            poses.roll(n, 0),
            10.0,
            2.0 + n,
            6.0 + n,
            learn,
        )
        for n, (h, w) in enumerate(sizes)
    ]


SEEDS = rng.task_seeds(1, 2, 2)


def test_a_task_sees_every_ray_of_its_views():
    items = scenes((3, 5), (4, 4))
    batch = views.learn(items, FEW, NET, SEEDS, 7)
    assert (batch.points, batch.per_step, batch.measure) == (48, 7, views.march(FEW))
    assert batch.seed is SEEDS and batch.query is None and batch.counts.tolist() == [45, 48]
    for t, item in enumerate(items):
        at = 0
        for v in range(3):
            o, d = cameras.pinhole(*item.images.shape[1:3], item.focal, item.poses[v])
            span = slice(at, at := at + len(o))
            assert batch.x.origins[t, span].equal(o) and batch.x.directions[t, span].equal(d)
            assert batch.y[t, span].equal(item.images[v].view(-1, 3))
    assert batch.x.bounds[0].tolist() == [2, 3] and batch.x.bounds[1].tolist() == [6, 7]
    assert batch.x.directions[0, 45:].norm(dim=1).eq(1).all()
    assert views.learn(items[:1] * 2, FEW, NET, SEEDS, None).counts is None
    theta = NET.init(2, generator=torch.Generator().manual_seed(0))
    whole = views.learn(items, FEW, NET, SEEDS)
    losses = fm.loss_grad(NET, theta, whole)[
        0
    ]  # padding must not count, jitter as fm.render has it
    alone = views.learn(items[:1], FEW, NET, SEEDS[:1])
    rgb = fm.render(NET, theta[:1], alone.x, views.march(FEW), seed=SEEDS[:1])[0]
    assert losses[0].item() == pytest.approx(((rgb - alone.y) ** 2).mean().item(), rel=1e-5)


def test_at_test_some_views_are_seen_and_the_others_are_the_query():
    items = scenes((2, 3), (2, 3), views_=9, learn=7)
    chosen = []
    for count in (1, 3, 7):
        batch = views.observe(items, FEW, NET, SEEDS, count, 5)
        assert (batch.points, batch.per_step) == (6 * count, 5) and batch.seed is SEEDS
        found = []
        for t, item in enumerate(items):
            views_seen = batch.y[t].view(count, 2, 3, 3)
            where = [(item.images == v).flatten(1).all(1).nonzero().item() for v in views_seen]
            assert where == sorted(set(where)) and max(where) < 7
            rays = cameras.pinhole(2, 3, item.focal, item.poses[where])
            assert batch.x.directions[t].equal(rays[1].flatten(0, 1))
            found.append(set(where))
        chosen.append(found)
        query = batch.query
        assert query.seed is None and query.per_step is None and query.points == 12
        assert query.y[1].equal(items[1].images[7:].view(-1, 3))
        assert query.x.origins[0, 6:].equal(items[0].poses[8, :3, 3].expand(6, 3))
    for t in range(2):
        assert chosen[0][t] < chosen[1][t] < chosen[2][t]  # fewer are among more
    assert views.observe(items, FEW, NET, SEEDS).y.equal(batch.y)
    alone = views.observe(items[1:], FEW, NET, SEEDS[1:], 3)
    whole = views.observe(items, FEW, NET, SEEDS, 3)
    assert alone.y[0].equal(whole.y[1])  # whatever it is batched with
    for count in (0, 8):
        one_line(f"views: count is {count}; accepted are 1 to 7", views.observe, items, FEW, NET,
                 SEEDS, count)  # fmt: skip


def test_every_view_is_drawn_equally_often():
    items, n = scenes((1, 1), views_=6, learn=5), 400
    seeds = rng.task_seeds(3, 0, n)
    drawn = views.observe(items * n, FEW, NET, seeds, 1).y[:, 0, 0]
    counts = (drawn[:, None] == items[0].images[:5, 0, 0, 0]).sum(0)
    sigma = math.sqrt(n * 0.2 * 0.8)
    assert counts.sum() == n and (counts - n / 5).abs().max() < 4 * sigma


# pictures


def test_a_view_is_rendered_in_parts(monkeypatch):
    theta = NET.init(2, generator=torch.Generator().manual_seed(0))
    item, options = scenes((5, 7))[0], replace(FEW, samples=6)
    march = views.march(options)
    o, d = cameras.pinhole(5, 7, item.focal, item.poses[3])
    rays = fm.Rays(o[None], d[None], 2.0, 6.0)
    whole = fm.render(NET, theta[:1], rays, march)
    for points in (1, 6 * 8, 2**17):  # one ray at a time, a tail, all at once
        monkeypatch.setattr(cameras, "_POINTS", points)
        got = views.render_view(NET, theta[0], item.poses[3], 5, 7, item.focal, 2.0, 6.0, march)
        for a, b in zip(got, whole, strict=True):
            eps = torch.finfo(a.dtype).eps
            assert (a.flatten(0, 1) - b[0]).abs().max() < 64 * eps  # depth reaches 6
    shown = views.picture(NET, theta[0].requires_grad_(), item, options)
    assert shown.equal(got[0].clamp(0, 1)) and not shown.requires_grad
    assert views.truth(item, options).equal(item.images[3])
    two = fm.Rays(o.expand(2, -1, 3), d.expand(2, -1, 3), torch.tensor([2.0, 3.0]), 6.0)
    monkeypatch.setattr(cameras, "_POINTS", 100)
    got = cameras.render_rays(NET, theta, two, march)[1]
    wanted = fm.render(NET, theta, two, march)[1]
    assert (got - wanted).abs().max() < 64 * torch.finfo(torch.float32).eps


def test_alive_is_the_share_of_samples_with_density():
    item = scenes((6, 6))[0]
    batch = views.learn([item], FEW, NET, SEEDS[:1])
    theta = NET.init(1, generator=torch.Generator().manual_seed(3))
    t = ray_times(batch.x, views.march(FEW), None, 0)
    x = batch.x.origins[:, :, None] + t[..., None] * batch.x.directions[:, :, None]
    wanted = (fm.mlp(NET, theta, x.flatten(1, 2))[..., 3] > 0).double().mean().item()
    assert 0.05 < wanted < 0.95
    march = views.march(FEW)
    assert views.alive(NET, theta, batch, march) == pytest.approx(wanted)
    assert views.alive(NET, theta[0], batch.x, march) == pytest.approx(wanted)
    few = views.alive(NET, theta, batch, march, most=54)  # every second of 108 rays
    assert few == pytest.approx(wanted, abs=0.15) and few != wanted
    dead = theta.clone()
    weight, bias = NET.layers(dead)[-1]
    weight[:, 3], bias[:, 3] = 0.0, -1.0
    assert views.alive(NET, dead, batch, march) == 0
    assert fm.loss_grad(NET, dead, batch)[1].eq(0).all()  # and nothing could change it
    soft = fm.March(4, density="softplus")
    assert views.alive(NET, dead, batch, soft) == 1
    padded = views.learn([item, scenes((2, 2))[0]], FEW, NET, SEEDS)
    padded.x.origins[1, 12:] = math.nan  # padding is not looked at
    assert 0 <= views.alive(NET, theta, padded, march) <= 1
    points = fm.Batch(torch.zeros(1, 1, 2), torch.zeros(1, 1, 1))
    one_line("alive: the batch has points", views.alive, NET, theta, points, march)


def test_reptile_takes_the_batch_and_maml_the_query():
    items = scenes((4, 4), (3, 4))
    init = NET.init(generator=torch.Generator().manual_seed(0))[0]
    learnt, seen = (
        views.learn(items, FEW, NET, SEEDS, 6),
        views.observe(items, FEW, NET, SEEDS, 2, 6),
    )
    assert views.alive(NET, init, learnt, learnt.measure) > 0.1  # else there is nothing to learn
    reptile = fm.Reptile(NET, 2, 0.1, init=init)
    reptile(learnt).backward()
    ended = fm.adapt(NET, init, learnt, 2, 0.1).params.mean(0)
    assert reptile.init.grad.norm() > 0
    torch.testing.assert_close(reptile.init.grad, init - ended, rtol=0, atol=1e-7)
    maml = fm.MAML(NET, 2, 0.1, order=1, init=init)
    maml(seen).backward()
    theta = fm.adapt(NET, init, seen, 2, 0.1).params
    wanted = fm.loss_grad(NET, theta, seen.query, step=2)[1].mean(0)
    assert wanted.norm() > 0
    torch.testing.assert_close(maml.init.grad, wanted, rtol=1e-4, atol=1e-6)


# real data


def test_the_two_layouts_of_the_chairs_agree(data_path):
    folder = views.open_all(data_path("chairs/learnit_layout_128"), Views(size=64))
    arrays = views.open_all(data_path("chairs/chairs_64.npz"), Views())
    assert len(folder) == 12 and len(arrays) == 48
    for name in folder.names[:3]:
        a, b = folder[folder.names.index(name)], arrays[arrays.names.index(name)]
        assert (a.poses - b.poses).abs().max() < 1e-6 and a.focal == pytest.approx(b.focal)
        near = (a.images - b.images).abs().mean()  # rendered twice, at 128 and at 64
        for axis in (1, 2):
            assert near < 0.5 * (a.images - b.images.roll(1, axis)).abs().mean()  # not a pixel off
    parts = views.open_splits(data_path("chairs/learnit_layout_128"), Views())
    assert [len(part) for part in parts] == [7, 1, 4] and parts[2].names[0] == "bs-cc-0_deckchair"
    parts = views.open_splits(data_path("chairs/chairs_64.npz"), Views())
    assert len(parts[0]) + len(parts[1]) == 44 and parts[2].names == arrays.names[44:]


def test_rays_past_the_chair_see_white(data_path):
    """Distance fields of the same chairs, 1.25 times smaller: a ray that stays 0.06 away from the
    surface shows the background, and only with the right handedness."""
    arrays = views.open_all(data_path("chairs/chairs_64.npz"), Views())
    with np.load(data_path("sdf_chairs/sdf_chairs_64.npz"), allow_pickle=False) as file:
        number = file["names"].tolist().index("bs-cc-by_classseat")  # left is not as right
        field = torch.from_numpy(file["sdf_i8"][number].astype(np.float32)) * float(file["scale"])
    scene = arrays[number]

    def white(mirror):
        shown = []
        for view in range(0, 30, 6):
            o, d = cameras.pinhole(64, 64, scene.focal, scene.poses[view])
            t = torch.linspace(2.5, 5.5, 128)[:, None]
            x = (o[:, None] + t * d[:, None]) * torch.tensor(mirror) / 1.25  # [R,S,3]
            cell = ((x + 1) * 32 - 0.5).round().long()
            inside = ((cell >= 0) & (cell < 64)).all(-1)
            i, j, k = cell.clamp(0, 63).unbind(-1)
            past = torch.where(inside, field[i, j, k], 1.0).amin(1) > 0.06  # [R]
            shown.append(scene.images[view].view(-1, 3)[past].amin(1) > 0.5)
        return torch.cat(shown).float().mean()

    assert white([1.0, 1, 1]) > 0.999
    assert white([-1.0, 1, 1]) < 0.98 and white([1.0, -1, 1]) < 0.99


def test_a_few_steps_learn_a_chair(data_path):
    options = Views(size=16, samples=24)
    tasks = views.open_all(data_path("chairs/chairs_64.npz"), options)
    net = fm.nerf_mlp(width=32, depth=4, frequencies=8, max_exponent=4.0)
    theta = net.init(1, generator=torch.Generator().manual_seed(0))[0]
    batch = views.observe([tasks[0]], options, net, SEEDS[:1], None, 64)
    fitted = fm.adapt(net, theta, batch, 300, 1e-3, rule="adam").params
    assert views.alive(net, fitted, batch, views.march(options)) > 0
    shown, wanted = views.picture(net, fitted[0], tasks[0], options), tasks[0].images[25]
    error = ((shown - wanted) ** 2).mean()
    blank = ((wanted.mean((0, 1)) - wanted) ** 2).mean()  # the best picture of one colour
    assert error < 0.5 * blank  # a view that was never seen


def test_the_learnt_chairs_raise_no_warning(data_path):
    with warnings.catch_warnings(record=True) as caught:
        views.open_all(
            data_path("chairs/chairs_64.npz"), Views(skip_bad=True, held_out_views=1, size=8)
        )
    assert not caught
