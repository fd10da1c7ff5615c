"""tasks/phototourism.py: photos with cameras, read, scaled, reduced, split in halves, rendered."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import fastmeta as fm
from fastmeta import rng
from fastmeta.tasks import cameras, phototourism
from fastmeta.tasks.phototourism import Photo, Phototourism

NET = fm.nerf_mlp(width=8, depth=3, frequencies=3, max_exponent=2.0)
SEEDS = rng.task_seeds(1, 2, 2)
EPS = torch.finfo(torch.float32).eps
SIZES = ((6, 9), (9, 6), (8, 8), (7, 5))


def one_line(match, call, *args, error=ValueError, **kwargs):
    with pytest.raises(error, match=match) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)


def pixels(number):
    return np.random.default_rng(number).integers(0, 256, (*SIZES[number], 3), dtype=np.uint8)


def kinv(height, width, focal):
    return np.array(
        [[1 / focal, 0, -(width - 1) / 2 / focal], [0, -1 / focal, (height - 1) / 2 / focal],
         [0, 0, -1]]
    )  # fmt: skip


ARRAYS = {
    "c2w_mats": cameras.orbit(4, 8.0, 0.2).numpy(),
    "kinv_mats": np.stack([kinv(*size, 10.0 + n) for n, size in enumerate(SIZES)]),
    "bds": np.array([[4.0, 9.0], [5.0, 12.0], [3.0, 8.0], [4.0, 5.0]]),
    "res_mats": np.array(SIZES, np.float32),
}


@pytest.fixture
def landmark(tmp_path):
    """Four photos of different sizes."""
    (tmp_path / "dense/images").mkdir(parents=True)
    for number, name in enumerate("abcd"):
        Image.fromarray(pixels(number)).save(tmp_path / f"dense/images/{name}.png")
    (tmp_path / "dense/images/notes.txt").write_text("no image")
    for name, array in ARRAYS.items():
        np.save(tmp_path / f"{name}.npy", array)
    return tmp_path


def change_array(root, name, change):
    array = np.load(root / f"{name}.npy")
    changed = change(array)
    np.save(root / f"{name}.npy", array if changed is None else changed)


FEW = Phototourism(samples=4)


# options and reading


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"shrink": 0}, "shrink is 0; accepted is an integer >= 1"),
        ({"picture_size": 0}, "picture_size is 0"),
        ({"train_photos": 0}, "train_photos is 0"),
        ({"samples": 1}, "samples is 1; accepted is an integer >= 2"),
        ({"world_scale": 0.0}, "world_scale is 0.0; accepted is a finite number above 0"),
        ({"near_factor": math.nan}, "near_factor is nan"),
        ({"far_factor": math.inf}, "far_factor is inf"),
        ({"last_interval": -1.0}, "last_interval is -1.0"),
        ({"density": "exp"}, "density is 'exp'; accepted are relu, softplus"),
    ],
)
def test_options_refused(change, match):
    one_line(f"^phototourism: {match}", Phototourism, **change)


def test_photos_are_read_and_their_world_is_scaled(landmark):
    photos = phototourism.open_all(landmark, FEW)
    assert photos.names == ("a.png", "b.png", "c.png", "d.png")
    for n, photo in enumerate([photos[n] for n in range(4)]):
        wanted = pixels(n).astype(np.float32) / np.float32(255)
        np.testing.assert_array_equal(photo.image, wanted)
        pose = ARRAYS["c2w_mats"][n].copy()
        pose[:3, 3] *= np.float32(0.05)
        np.testing.assert_allclose(photo.pose, pose, rtol=EPS)
        np.testing.assert_allclose(photo.kinv, ARRAYS["kinv_mats"][n], rtol=EPS)
        near, far = ARRAYS["bds"][n] * (0.9 * 0.05, 1.2 * 0.05)
        assert (photo.near, photo.far) == pytest.approx((near, far))
    photos[0].image.zero_()
    photos[0].pose.zero_()
    assert photos[0].image.max() > 0 and photos[0].pose[3, 3] == 1  # copies are handed out
    (landmark / "res_mats.npy").unlink()
    assert len(phototourism.open_all(landmark, FEW)) == 4


def test_reduced_photos_keep_their_rays(landmark):
    whole = phototourism.open_all(landmark, FEW)[0]
    small = phototourism.open_all(landmark, replace(FEW, shrink=2))[0]
    assert small.image.shape == (3, 4, 3)  # of 6 x 9: the last column is left out
    blocks = whole.image[:, :8].reshape(3, 2, 4, 2, 3).mean((1, 3))
    assert (small.image - blocks).abs().max() <= 0.5 / 255 + EPS  # Pillow rounds to 8 bits
    o, d = cameras.rays_from_kinv(6, 9, whole.kinv, whole.pose)
    mean = d.view(6, 9, 3)[:, :8].reshape(3, 2, 4, 2, 3).mean((1, 3)).view(-1, 3)
    o2, d2 = cameras.rays_from_kinv(3, 4, small.kinv, small.pose)
    assert o2.equal(o[:12]) and (d2 - mean).abs().max() < 8 * EPS


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        (
            "c2w_mats",
            lambda a: a[:3],
            r"c2w_mats.npy is float32 \(3, 4, 4\); accepted for 4 images",
        ),
        (
            "kinv_mats",
            lambda a: a[:, :2],
            r"kinv_mats.npy is .* accepted for 4 images is \(4, 3, 3\)",
        ),
        ("bds", lambda a: np.tile(a, (2, 1)), r"bds.npy is .* accepted for 4 images is \(4, 2\)"),
        ("res_mats", lambda a: a[0], "res_mats.npy is"),
        ("bds", lambda a: a.astype(str), "bds.npy is <U"),
    ],
)
def test_arrays_of_other_lengths(landmark, name, change, match):
    change_array(landmark, name, change)
    for skip in (False, True):  # then it is unknown which row belongs to which photo
        options = replace(FEW, skip_bad=skip)
        one_line(f"^phototourism: .*{match}", phototourism.open_all, landmark, options)


def set_at(*index, value):
    def change(array):
        array[index] = value

    return change


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("c2w_mats", set_at(2, 0, 3, value=np.nan), "c.png: pose 0 holds NaN"),
        ("c2w_mats", set_at(2, 0, 0, value=2.0), "c.png: pose 0 is no camera-to-world"),
        ("kinv_mats", set_at(2, 0, 0, value=0.0), "c.png: kinv 0 is singular"),
        ("kinv_mats", set_at(2, 0, 0, value=np.inf), "c.png: kinv 0 holds NaN or inf"),
        ("bds", set_at(2, value=(9.0, 4.0)), "c.png: near is 0.405, far is 0.24 .* 0 < near < far"),
        ("bds", set_at(2, value=(0.0, 4.0)), "c.png: near is 0, far"),
        ("bds", set_at(2, 0, value=np.nan), "c.png: near is nan"),
    ],
)
def test_cameras_that_are_wrong(landmark, name, change, match):
    change_array(landmark, name, change)
    one_line(f"^phototourism: {match}", phototourism.open_all, landmark, FEW)
    assert left_out(landmark, match) == ("a.png", "b.png", "d.png")


def left_out(root, match):
    """Names of what is kept with skip_bad; exactly one warning, which names what is not."""
    with pytest.warns(UserWarning, match=match) as caught:
        photos = phototourism.open_all(root, replace(FEW, skip_bad=True))
    assert len(caught) == 1 and "1 of 4 left out" in str(caught[0].message)
    assert photos[2].image.shape == (*SIZES[3], 3) and photos[2].near == pytest.approx(0.18)
    return photos.names


def test_photos_that_are_damaged_or_of_another_size(landmark):
    file = landmark / "dense/images/c.png"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * 2 // 3])
    photos = phototourism.open_all(landmark, FEW)
    assert photos[3].image.shape == (7, 5, 3)
    one_line("c.png is truncated or not an image", photos.read, 2, error=OSError)
    assert left_out(landmark, "c.png is truncated") == ("a.png", "b.png", "d.png")
    Image.fromarray(pixels(0)).save(file)
    match = "c.png has 6 x 9 pixels, res_mats.npy says 8 x 8"
    one_line(f"^phototourism: {match}", phototourism.open_all(landmark, FEW).read, 2)
    assert left_out(landmark, match) == ("a.png", "b.png", "d.png")
    small = phototourism.open_all(landmark, replace(FEW, shrink=6))
    assert small[0].image.shape == (1, 1, 3)
    one_line("d.png has 7 x 5 pixels, shrink is 6", small.read, 3)


def test_broken_sources(landmark, tmp_path):
    one_line("source is a int; accepted", phototourism.open_all, 3, FEW)
    one_line("images is no folder", phototourism.open_all, tmp_path / "gone", FEW, error=OSError)
    for content in (b"", b"\x93NUMPY", (landmark / "bds.npy").read_bytes()[:-8]):
        (landmark / "bds.npy").write_bytes(content)
        one_line("bds.npy is no readable .npy", phototourism.open_all, landmark, FEW)
    np.save(landmark / "bds.npy", np.array([[{}]] * 4))
    one_line("bds.npy is no readable .npy", phototourism.open_all, landmark, FEW)
    (landmark / "bds.npy").unlink()
    one_line("bds.npy is absent; accepted", phototourism.open_all, landmark, FEW, error=OSError)
    for file in (landmark / "dense/images").glob("*.png"):
        file.unlink()
    one_line("images holds no image", phototourism.open_all, landmark, FEW)


def names(parts):
    return ["".join(name[0] for name in part.names) for part in parts]


def test_parts(landmark):
    def parts(**change):
        return names(phototourism.open_splits(landmark, replace(FEW, **change)))

    assert parts(train_photos=2) == ["ab", "c", "d"]
    assert parts(train_photos=1, validation=0.1, test=0.2) == ["a", "b", "cd"]
    assert parts(train_photos=1, validation=0.0) == ["a", "", "bcd"]
    assert parts(train_photos=4) == ["abcd", "", ""]
    assert parts(train_photos=2, validation=0.0, test=0.0) == ["ab", "", "cd"]
    one_line("train_photos is 5 of 4", parts, train_photos=5)
    by_hash = parts()
    assert sorted("".join(by_hash)) == list("abcd") and all(by_hash)


# batches and pictures


def photos(*sizes):
    generator = torch.Generator().manual_seed(0)
    poses = cameras.orbit(max(2, len(sizes)), 0.5, 0.2)
    return [
        Photo(
            torch.rand(h, w, 3, generator=generator),
            poses[n],
            torch.from_numpy(kinv(h, w, 8.0)).float(),
            0.2 + n / 10,
            0.7 + n / 10,
        )
        for n, (h, w) in enumerate(sizes)
    ]


def test_a_task_sees_every_pixel():
    items = photos((3, 4), (2, 3))
    batch = phototourism.learn(items, FEW, NET, SEEDS, 5)
    assert (batch.per_step, batch.counts.tolist()) == (5, [12, 6]) and batch.seed is SEEDS
    assert batch.measure == fm.March(4, 1e10, False)
    for t, item in enumerate(items):
        h, w = item.image.shape[:2]
        for n in range(h * w):
            wanted = item.pose[:3, :3] @ (item.kinv @ torch.tensor([n % w, n // w, 1.0]))
            assert (batch.x.directions[t, n] - wanted).abs().max() < 4 * EPS
            assert batch.y[t, n].equal(item.image[n // w, n % w])
        assert batch.x.origins[t, : h * w].equal(item.pose[:3, 3].expand(h * w, 3))
    near, far = batch.x.bounds
    assert near.tolist() == pytest.approx([0.2, 0.3]) and far.tolist() == pytest.approx([0.7, 0.8])


def test_the_left_half_is_seen_and_the_right_half_is_the_query():
    items = photos((5, 8), (4, 7))
    batch = phototourism.observe(items, FEW, NET, SEEDS, None, 5)
    query = batch.query
    assert batch.counts.tolist() == [6, 4] and query.counts.tolist() == [6, 4]
    assert query.seed is None and query.per_step is None and batch.per_step == 5
    for t, (columns, rest) in enumerate([((0, 2), (4, 6)), ((0, 2), (3, 5))]):
        item, rows = items[t], range(0, items[t].image.shape[0], 2)
        rays = cameras.rays_from_kinv(*item.image.shape[:2], item.kinv, item.pose)[1]
        rays = rays.view(*item.image.shape)
        for part, chosen in ((batch, columns), (query, rest[:2])):
            places = [(j, i) for j in rows for i in chosen]
            for n, (j, i) in enumerate(places):
                assert part.y[t, n].equal(item.image[j, i])
                assert part.x.directions[t, n].equal(rays[j, i])
    odd = phototourism.observe(photos((1, 3)), FEW, NET, SEEDS[:1])
    assert (odd.points, odd.query.points) == (1, 1)
    one_line("phototourism: count is 3", phototourism.observe, items, FEW, NET, SEEDS, 3)
    one_line("1 pixel wide", phototourism.observe, photos((4, 1)), FEW, NET, SEEDS[:1])
    soft = phototourism.observe(items, replace(FEW, density="softplus"), NET, SEEDS, None, 5)
    maml = fm.MAML(NET, 2, 0.1)  # some random starts have no density above 0 with relu
    maml(soft).backward()
    assert maml.init.grad.norm() > 0


def test_pictures_are_of_the_size_asked_for_and_truth_agrees():
    theta = NET.init(1, generator=torch.Generator().manual_seed(0))[0]
    item = photos((7, 10))[0]
    smooth = replace(FEW, density="softplus", last_interval=0.1)
    whole = replace(smooth, picture_size=None)
    assert phototourism.truth(item, whole).equal(item.image)
    assert phototourism.truth(item, replace(smooth, picture_size=10)).equal(item.image)
    o, d = cameras.rays_from_kinv(7, 10, item.kinv, item.pose)
    rays = fm.Rays(o[None], d[None], item.near, item.far)
    wanted = fm.render(NET, theta[None], rays, phototourism.march(whole))[0].view(7, 10, 3)
    shown = phototourism.picture(NET, theta, item, whole)
    assert (shown - wanted).abs().max() < 16 * EPS
    half = replace(smooth, picture_size=5)
    small = phototourism.truth(item, half)
    assert (small - item.image[:6].reshape(3, 2, 5, 2, 3).mean((1, 3))).abs().max() < 2 * EPS
    shown = phototourism.picture(NET, theta, item, half)
    middle = d.view(7, 10, 3)[:6].reshape(3, 2, 5, 2, 3).mean((1, 3)).view(1, 15, 3)
    rays = fm.Rays(o[None, :15], middle, item.near, item.far)
    wanted = fm.render(NET, theta[None], rays, phototourism.march(half))[0].view(3, 5, 3)
    assert (shown - wanted).abs().max() < 64 * EPS  # rays 4 EPS apart through frequencies up to 4
    assert phototourism.truth(item, replace(FEW, picture_size=1)).shape == (1, 1, 3)


def test_blend_goes_from_one_to_the_other():
    a, b = NET.init(2, generator=torch.Generator().manual_seed(0))
    mixed = phototourism.blend(a, b, 5)
    assert mixed[0].equal(a) and mixed[4].equal(b)
    assert (mixed[1].double() - (0.75 * a.double() + 0.25 * b.double())).abs().max() < EPS
    for bad in ((a, b[:-1], 3), (a, b, 1), (a[None], b[None], 3)):
        one_line("blend: weights are .*; accepted are", phototourism.blend, *bad)


# real data


@pytest.fixture(scope="module")
def church(data_path):
    """(photos by shrink, stored points [n,3] in the scaled world)."""
    root = data_path("sacre_coeur")
    points = torch.from_numpy(np.load(root / "points3d.npy", allow_pickle=False)).double() * 0.05
    opened = {s: phototourism.open_all(root, Phototourism(shrink=s)) for s in (1, 2, 3)}
    return {s: [photos[n] for n in range(10)] for s, photos in opened.items()}, points


def seen_at(photo, points):
    """Pixels (column, row) [n,2] of points in front of the camera, and depths [n], by K and the
    inverse pose: the way of COLMAP."""
    world = torch.linalg.inv(photo.pose.double())
    local = points @ world[:3, :3].T + world[:3, 3]
    projected = local @ torch.linalg.inv(photo.kinv.double()).T
    return projected[:, :2] / projected[:, 2:], -local[:, 2]


def test_rays_pass_the_stored_points(church):
    """A point's nearest pixel has a ray that passes it within that pixel: half a pixel either way,
    and most lie within the bounds, which are those of the points found in each photo."""
    opened, points = church
    for shrink in (1, 3):
        for photo in opened[shrink]:
            H, W = photo.image.shape[:2]
            uv, depth = seen_at(photo, points)
            pixel = uv.round().long()
            ok = (depth > 0) & (pixel >= 0).all(1) & (pixel < torch.tensor([W, H])).all(1)
            assert ok.sum() > 1000
            o, d = cameras.rays_from_kinv(H, W, photo.kinv, photo.pose)
            ray = pixel[ok, 1] * W + pixel[ok, 0]
            o, d = o[ray].double(), d[ray].double()
            miss = points[ok] - (o + depth[ok, None] * d)  # at t = depth along the optical axis
            size = photo.kinv[:2, :2].double().diagonal().abs()  # of a pixel at depth 1
            aside = (miss @ photo.pose[:3, :3].double())[:, :2] / depth[ok, None] / size
            assert (miss @ photo.pose[:3, 2].double()).abs().max() < 1e-5
            assert aside.abs().max() < 0.5 + 1e-3  # float32 rays: 1e-7 of 600 pixels
            within = (depth[ok] > photo.near) & (depth[ok] < photo.far)
            assert within.double().mean() > 0.85


def test_photos_agree_about_the_stored_points(church):
    """Grey values of the points, seen in two photos, correlate; less so when the poses are those of
    pixels a little aside. Light, scale and visibility differ, so nothing near 1 is expected."""
    opened, points = church

    def median(shrink, aside=(0, 0)):
        greys, visible = [], []
        for photo in opened[shrink]:
            H, W = photo.image.shape[:2]
            uv, depth = seen_at(photo, points)
            i, j = (uv + torch.tensor(aside)).round().long().unbind(1)
            visible.append((depth > 0) & (i >= 0) & (j >= 0) & (i < W) & (j < H))
            greys.append(photo.image.mean(-1)[j.clamp(0, H - 1), i.clamp(0, W - 1)])
        found = []
        for a in range(10):
            for b in range(a):
                both = visible[a] & visible[b]
                found.append(
                    float(torch.corrcoef(torch.stack([greys[a], greys[b]])[:, both])[0, 1])
                )
        return float(np.median(found))

    assert median(1) > 0.4
    for aside in ((8, 0), (-8, 0), (0, 8), (0, -8)):
        assert median(1, aside) < 0.75 * median(1)
    assert median(2) > 0.35


def test_a_photo_is_learnt(church):
    opened, _ = church
    options = Phototourism(samples=24)
    photo = phototourism._small(opened[3][0], 64)
    net = fm.nerf_mlp(width=32, depth=4, frequencies=10, max_exponent=6.0)
    theta = net.init(1, generator=torch.Generator().manual_seed(0))[0]
    batch = phototourism.learn([photo], options, net, SEEDS[:1], 128)
    fitted = fm.adapt(net, theta, batch, 300, 2e-3, rule="adam").params[0]
    shown, wanted = phototourism.picture(net, fitted, photo, options), photo.image
    blank = ((wanted.mean((0, 1)) - wanted) ** 2).mean()  # the best picture of one colour
    assert ((shown - wanted) ** 2).mean() < 0.3 * blank


def test_a_group_with_parts_by_count_is_refused():
    with pytest.raises(ValueError, match="group is .* with train_photos, where it has no effect"):
        Phototourism(train_photos=7, group="(a)")
