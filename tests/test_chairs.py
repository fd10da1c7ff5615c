"""tasks/chairs.py: the renderer against rays cut with planes, the catalogue's rule, the folder."""

import io
import json
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmeta.tasks import chairs as ch
from fastmeta.tasks import meshes
from fastmeta.tasks.cameras import pinhole

# A cube of edge 2, y up: front (+z) red, all else blue.
CUBE = """mtllib cube.mtl
v -1 -1 -1
v 1 -1 -1
v 1 1 -1
v -1 1 -1
v -1 -1 1
v 1 -1 1
v 1 1 1
v -1 1 1
vt 0 0
vn 0 0 1
usemtl red
f 5/1/1 6/1/1 7/1/1 8/1/1
usemtl blue
f 1 2 3 4
f -8//1 -4//1 -1//1 -5//1
f 2 3 7 6
f 1 2 6 5
f 4 3 7 8
"""
LOOKS = "newmtl red\nKd 0.9 0.1 0.2\nd 1\nnewmtl blue\nKd 0.1 0.2 0.9\n"


def one_line(match, call, *args, error=ValueError, **kwargs):
    with pytest.raises(error, match=match) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)


def library(path, pieces, files, licence="Some licence \\u00a9 2020"):
    """A furniture library; pieces: dicts without numbers."""
    lines = [f"license={licence}", "name=Test"]
    for number, piece in enumerate(pieces, 1):
        piece = {"width": "50", "depth": "50.5", "category": "Kitchen", **piece}
        lines += [f"{key}#{number}={value}" for key, value in piece.items()]
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("PluginFurnitureCatalog.properties", "\n".join(lines).encode("latin-1"))
        for name, content in files.items():
            file.writestr(name, content)
    return path


def cubes(path, count=1, **piece):
    """A library of cubes called Chair."""
    pieces, files = [], {}
    for i in range(count):
        member = f"maker/Cube {i}/cube.obj"
        pieces.append({"name": "Chair", "model": f"/{member}", "creator": "Ann", **piece})
        files |= {member: CUBE, f"maker/Cube {i}/cube.mtl": LOOKS}
    return library(path, pieces, files)


def rays(pose, size, samples=1):
    """Origin [3] and directions [n,n,3] of the samples, by the package's own cameras."""
    focal = size / 2 / math.tan(0.6911112070083618 / 2)
    wide = size * samples  # sample m lies at (m − (samples − 1)/2) / samples
    o, d = pinhole(wide, wide, focal * samples, torch.from_numpy(pose))
    shift = -(samples - 1) / 2 / (focal * samples)
    d = d.numpy() + shift * (pose[:3, 0] - pose[:3, 1])
    return o[0].numpy(), d.reshape(wide, wide, 3)


def lit(normal):
    """The light on a face: sky 1 about l, ground 0.3."""
    light = np.array([0.4, -0.5, 0.77])
    sky = (1 + normal @ light / np.linalg.norm(light)) / 2
    return sky + 0.3 * (1 - sky)


def mesh_of(tmp_path, **piece):
    (model,) = ch.chair_models(cubes(tmp_path / "a.sh3f", **piece))
    return ch.read_model(model)


def boxed(pose, size, samples=1):
    """Hits [n,n] and colours of the cube, by rays cut with its three pairs of planes."""
    o, d = rays(pose, size, samples)
    half = 1.25 / math.sqrt(3)
    a, b = (-half - o) / d, (half - o) / d
    near, far = np.minimum(a, b), np.maximum(a, b)
    hit = near.max(-1) <= far.min(-1)
    axis = near.argmax(-1)
    normal = -np.sign(np.take_along_axis(d, axis[..., None], -1)) * np.eye(3)[axis]
    front = (normal == [0, -1, 0]).all(-1)  # y up, z forward in the file; −y here
    colour = np.where(front[..., None], [0.9, 0.1, 0.2], [0.1, 0.2, 0.9])
    return hit, colour * np.apply_along_axis(lit, -1, normal)[..., None]


@pytest.mark.parametrize("view", range(4))
def test_a_cube_is_where_rays_meet_it(tmp_path, view):
    pose = ch.orbit("cube", 4, seed=3)[view]
    image = meshes.draw(mesh_of(tmp_path), pose, 41, samples=1)
    hit, colour = boxed(pose, 41)
    assert 200 < hit.sum() < 41 * 41 and len(np.unique(colour[hit].round(6), axis=0)) >= 2
    np.testing.assert_array_equal(image[..., 3] > 0, hit)
    difference = np.abs(image[hit][:, :3] - colour[hit] * 255)
    # Rounding to 8 bits everywhere, but where an edge between two faces lies on a ray.
    assert (difference.max(1) > 0.5 + 1e-6).sum() <= 1
    assert not image[~hit].any()


def test_alpha_is_the_share_of_rays_that_hit(tmp_path):
    pose = ch.orbit("cube", 1, seed=5)[0]
    image = meshes.draw(mesh_of(tmp_path), pose, 20, samples=4)
    hit, colour = boxed(pose, 20, samples=4)
    blocks = hit.reshape(20, 4, 20, 4).mean((1, 3))
    assert ((blocks > 0) & (blocks < 1)).sum() > 20
    np.testing.assert_array_equal(image[..., 3], np.floor(blocks * 255 + 0.5))
    paint = (colour * hit[..., None]).reshape(20, 4, 20, 4, 3).mean((1, 3))
    wanted = paint / np.maximum(blocks, 1e-9)[..., None]
    assert np.abs(image[..., :3] - wanted * 255)[blocks > 0].max() < 0.5 + 1e-6  # not premultiplied


def plane(text, look="newmtl m\nKd 1 1 1\n", **files):
    content = {"a.mtl": look.encode(), **files}
    return meshes.read_obj("mtllib a.mtl\nusemtl m\n" + text, content.get)


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


SQUARE = (
    "v -1 -1 0\nv 1 -1 0\nv 1 1 0\nv -1 1 0\nvt 0 0\nvt 2 0\nvt 2 1\nvt 0 1\nf 1/1 2/2 3/3 4/4\n"
)


def test_textures_lie_in_perspective_and_have_holes():
    texels = np.random.default_rng(0).integers(0, 256, (8, 16, 4), dtype=np.uint8)
    texels[..., 3] = np.where(np.indices((8, 16)).sum(0) % 3, 255, 100)
    look = "newmtl m\nKd 1 0.5 1\nmap_Kd t.png\n"
    mesh = plane(SQUARE, look, **{"t.png": png(texels)})
    pose = ch.orbit("x", 30, seed=1)[np.argmin(np.abs(ch.orbit("x", 30, seed=1)[:, 2, 3] - 1))]
    image = meshes.draw(mesh, pose, 61, samples=1)  # odd: no ray meets the corner of four texels
    o, d = rays(pose, 61)
    at = o + d * (-o[2] / d[..., 2])[..., None]  # on z = 0
    u, v = at[..., 0] + 1, (at[..., 1] + 1) / 2  # u from 0 to 2: repeated
    on = (np.abs(at[..., :2]) <= 1).all(-1) & (d[..., 2] * o[2] < 0)
    column, row = (u % 1 * 16).astype(int) % 16, ((1 - v) * 8).astype(int).clip(0, 7)
    texel = texels[row, column] / 255
    seen = on & (texel[..., 3] > 0.5)
    np.testing.assert_array_equal(image[..., 3] > 0, seen)
    colour = texel[..., :3] * [1, 0.5, 1] * lit(np.array([0, 0, np.sign(o[2])]))
    wrong = np.abs(image[..., :3] - colour * 255).max(-1)[seen] > 0.5 + 1e-6
    assert seen.sum() > 300 and wrong.sum() == 0


@pytest.mark.parametrize("candidates", [1, 1 << 20])
def test_the_nearest_of_crossing_surfaces_is_seen(monkeypatch, candidates):
    monkeypatch.setattr(meshes, "_CANDIDATES", candidates)
    red = "v -1 -1 -.5\nv 1 -1 -.5\nv 1 1 .5\nv -1 1 .5\nf 1 2 3 4\n"  # z = y / 2
    text = red + "usemtl b\nv -1 -1 .2\nv 1 -1 .2\nv 1 1 .2\nv -1 1 .2\nf 5 6 7 8\n"
    mesh = plane(text, "newmtl m\nKd 1 0 0\nnewmtl b\nKd 0 0 1\n")
    for pose in ch.orbit("y", 3, seed=2):
        image = meshes.draw(mesh, pose, 50, samples=1)
        o, d = rays(pose, 50)
        t1 = (o[1] / 2 - o[2]) / (d[..., 2] - d[..., 1] / 2)
        t2 = (0.2 - o[2]) / d[..., 2]
        times = []
        for t in (t1, t2):
            at = o + d * t[..., None]
            times.append(np.where((np.abs(at[..., :2]) <= 1).all(-1) & (t > 0), t, np.inf))
        first = np.where(times[0] < times[1], 0, 2)
        hit = np.isfinite(np.minimum(*times))
        assert {0, 2} == set(first[hit])
        np.testing.assert_array_equal(image[..., 3] > 0, hit)
        np.testing.assert_array_equal(image[..., :3].argmax(-1)[hit], first[hit])


def test_both_sides_of_a_sheet_are_lit_by_what_they_face():
    mesh = plane(SQUARE)
    pose = np.eye(4)
    pose[2, 3] = 4
    above = meshes.draw(mesh, pose, 9)[4, 4, 0]
    pose[:3] = np.diag([1, -1, -1, 1])[:3]
    pose[2, 3] = -4
    below = meshes.draw(mesh, pose, 9)[4, 4, 0]
    wanted = [round(255 * lit(np.array([0, 0, s]))) for s in (1, -1)]
    assert [above, below] == wanted and above > 2 * below


# files


def test_read_obj():
    mesh = plane("v 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1 0.5\nvt .25 .5 0\nf 1 2 3\nf -1/1 1/1 2/1\n")
    assert mesh.corners.tolist() == [
        [[0, 0, 0], [1, 0, 0], [0, 1, 0]],
        [[0, 0, 1], [0, 0, 0], [1, 0, 0]],
    ]
    assert mesh.uv[0].tolist() == [[0, 0]] * 3 and mesh.uv[1].tolist() == [[0.25, 0.5]] * 3
    pentagon = "".join(f"v {math.cos(k)} {math.sin(k)} 0\n" for k in range(5)) + "f 1 2 3 4 5\n"
    assert len(plane(pentagon).corners) == 3
    glass = "newmtl glass\nKd 1 1 1\nd 0.2\nnewmtl m\nKd .5 .5 .5\nmap_Kd gone.png\n"
    triangle = "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n"
    mesh = plane(triangle + "usemtl glass\nf 3 2 1\nusemtl unknown\nf 1 3 2\n", glass)
    assert mesh.colours.tolist() == [[0.5] * 3, [0.8] * 3]  # glass is left out, unknown is grey
    assert mesh.texture.tolist() == [-1, -1]  # an absent picture: the plain colour
    for bad in ("v 0 0 a\n", triangle + "f 1 2 4\n", triangle + "f 0 1 2\n", "v 0 0 0\n"):
        with pytest.raises((ValueError, IndexError)):
            plane(bad)


def test_a_model_is_turned_centred_and_scaled(tmp_path):
    text = "v 10 0 0\nv 12 0 0\nv 10 4 0\nv 10 0 1\nf 1 2 3\nf 1 2 4\n"  # x 2, y (up) 4, z 1
    corner = np.array([[-1, 0.5, -2], [1, 0.5, -2], [-1, 0.5, 2]])  # (x, −z, y) about the middle
    radius = np.linalg.norm(corner[0])
    for rotation, turn in ((None, np.eye(3)), ("0 0 1 0 1 0 -1 0 0", None)):
        piece = {"name": "Chair", "model": "/a/b.obj"}
        if rotation:
            piece["modelRotation"] = rotation  # (x, y, z) -> (z, y, −x): a quarter turn about up
            turn = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1.0]])
        path = library(tmp_path / "a.sh3f", [piece], {"a/b.obj": text})
        mesh = ch.read_model(ch.chair_models(path)[0])
        wanted = corner @ turn.T / radius * 1.25
        np.testing.assert_allclose(mesh.corners[0], wanted, atol=1e-12)
        assert np.linalg.norm(mesh.corners, axis=2).max() == pytest.approx(1.25)


def test_the_catalogue_s_rule(tmp_path):
    chairs = {"Chair": 50, "Bar stool": 50, "Modern armchair": 150, "Class seat": 50, "Chairs": 9}
    others = {"Deck chair": 208, "Table": 50, "Chairlift": 50, "Seat Leon": 419.5, "Toadstool": 9}
    names = {**chairs, **others}
    pieces = [
        {"name": name, "model": f"/m/{i} {name}/x.obj", "depth": str(deep), "creator": "Zo\\u00eb"}
        for i, (name, deep) in enumerate(names.items())
    ]
    pieces.append({"name": "Chair", "model": "/m/other/x.dae"})
    library(tmp_path / "b.sh3f", pieces, {})
    library(tmp_path / "a.sh3f", [{"name": "Stool", "model": "/a/x.obj"}], {}, "Free")
    found = ch.chair_models(tmp_path)
    assert {m.title for m in found} == {*chairs, "Stool"} and len(found) == 6
    assert [m.name for m in found][:2] == ["a", "m_0_chair"]
    assert found[1].author == "Zoë" and found[1].licence == "Some licence © 2020"
    assert found[0].author == "not stated" and found[0].licence == "Free"
    assert found[0].source == "a.sh3f:/a/x.obj" and found[0].rotation is None
    assert len(ch.chair_models(tmp_path / "a.sh3f")) == 1


def test_catalogue_errors(tmp_path):
    one_line(
        r"holds no furniture \(.sh3f\); Debian's package sweethome3d-furniture brings it .*--data",
        ch.chair_models,
        tmp_path,
        error=FileNotFoundError,
    )
    one_line("holds no furniture", ch.chair_models, tmp_path / "gone", error=FileNotFoundError)
    path = tmp_path / "a.sh3f"
    path.write_bytes(b"not a zip")
    one_line("a.sh3f cannot be read", ch.chair_models, path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x", "y")
    one_line("has no PluginFurnitureCatalog.properties", ch.chair_models, path)
    library(path, [{"name": "Chair", "model": "/a.obj", "width": "wide"}], {})
    one_line("piece 1 in .*a.sh3f is damaged", ch.chair_models, path)
    library(path, [{"name": "Table", "model": "/a.obj"}], {})
    one_line("list no chair", ch.chair_models, path)


# the folder


def check_poses(poses, low, high):
    """Camera-to-world matrices that look at the origin from radius 4, level, up is z."""
    centre, back = poses[:, :3, 3], poses[:, :3, 2]
    azimuth = np.arctan2(centre[:, 1], centre[:, 0])
    right = np.stack([-np.sin(azimuth), np.cos(azimuth), 0 * azimuth], 1)
    np.testing.assert_allclose(centre, 4 * back, atol=1e-5)
    np.testing.assert_allclose(poses[:, :3, 0], right, atol=1e-5)
    np.testing.assert_allclose(np.linalg.det(poses[:, :3, :3]), 1, atol=1e-5)
    assert (poses[:, 2, 1] > 0).all() and (poses[:, 3] == [0, 0, 0, 1]).all()
    assert low <= centre[:, 2].min() and centre[:, 2].max() <= high


def test_orbit():
    poses = ch.orbit("a", 4000, seed=0)
    check_poses(poses, -1, 3.8)
    z, azimuth = poses[:, 2, 3], np.arctan2(poses[:, 1, 3], poses[:, 0, 3])
    for values, low, high in ((z, -1, 3.8), (azimuth, -math.pi, math.pi)):
        share = np.histogram(values, 8, (low, high))[0] / 4000
        assert np.abs(share - 1 / 8).max() < 5 * math.sqrt(1 / 8 * 7 / 8 / 4000)  # five sigma
    assert (ch.orbit("a", 7, seed=0) == poses[:7]).all()  # a view does not depend on the others
    for other in (ch.orbit("b", 7, seed=0), ch.orbit("a", 7, seed=1)):
        assert np.linalg.norm(other[:, :3, 3] - poses[:7, :3, 3], axis=1).min() > 1e-3


def test_the_cameras_are_those_of_real_data(data_path):
    with np.load(data_path("chairs/chairs_64.npz")) as file:
        assert float(file["camera_angle_x"]) == meshes.CAMERA_ANGLE_X
        check_poses(file["poses"].reshape(-1, 4, 4).astype(float), -1, 3.8)


def test_a_folder_of_chairs(tmp_path):
    path = cubes(tmp_path / "a.sh3f", 5)
    out = ch.make_chairs(tmp_path / "new" / "chairs", source=path, size=16, views=2, seed=4)
    names = [f"maker_cube_{i}" for i in range(5)]
    parts = json.loads((out / "chair_splits.json").read_text())
    assert sorted(sum(parts.values(), [])) == names and all(parts[k] for k in ("train", "val"))
    assert [p.name for p in out.parent.iterdir()] == ["chairs"]  # nothing is left beside it
    for name in names:
        data = json.loads((out / name / "transforms.json").read_text())
        assert data["camera_angle_x"] == meshes.CAMERA_ANGLE_X
        assert [f["file_path"] for f in data["frames"]] == ["./r_000", "./r_001"]
        poses = np.array([f["transform_matrix"] for f in data["frames"]])
        assert (poses == ch.orbit(name, 2, 4)).all()
        with Image.open(out / name / "r_001.png") as file:
            image = np.asarray(file)
        (model,) = (m for m in ch.chair_models(path) if m.name == name)
        np.testing.assert_array_equal(image, meshes.draw(ch.read_model(model), poses[1], 16))
    rows = (out / "ATTRIBUTION.tsv").read_text(encoding="utf-8").splitlines()
    source = "a.sh3f:/maker/Cube 0/cube.obj"
    assert rows[1].split("\t") == [names[0], "Chair", "Ann", "Some licence © 2020", source]
    assert len(rows) == 6


def test_other_chairs_change_neither_views_nor_split(tmp_path):
    few = ch.make_chairs(tmp_path / "few", source=cubes(tmp_path / "a.sh3f", 3), size=8, views=2)
    more = ch.make_chairs(tmp_path / "more", source=cubes(tmp_path / "b.sh3f", 4), size=8, views=1)
    for i in range(3):
        file = Path(f"maker_cube_{i}", "r_000.png")
        assert (few / file).read_bytes() == (more / file).read_bytes()


def test_nothing_is_left_of_a_failure(tmp_path):
    path = cubes(tmp_path / "a.sh3f", 2)
    with zipfile.ZipFile(path) as file:
        content = {name: file.read(name) for name in file.namelist()}
    for bad, match in ((b"v 1 x 2\n", "is damaged"), (b"v 0 0 0\nf 1 1 1\n", "no extent")):
        with zipfile.ZipFile(path, "w") as file:
            for name, old in content.items():
                file.writestr(name, bad if name.endswith("1/cube.obj") else old)
        one_line(
            f"a.sh3f:/maker/Cube 1/cube.obj is damaged.*{match}|{match}",
            ch.make_chairs, tmp_path / "out", source=path, size=8, views=1,
        )  # fmt: skip
        assert [p.name for p in tmp_path.iterdir()] == ["a.sh3f"]
    library(path, [{"name": "Chair", "model": "/a.obj"}], {})
    one_line("a.sh3f:/a.obj is missing", ch.make_chairs, tmp_path / "out", source=path)
    (tmp_path / "file").write_text("")
    cubes(path)
    below = tmp_path / "file" / "out"
    one_line("out cannot be written", ch.make_chairs, below, source=path, error=OSError)
    one_line("file exists", ch.make_chairs, tmp_path / "file", source=path, error=FileExistsError)
    for change in ({"size": 0}, {"views": 0}, {"size": 4.5}):
        one_line("accepted are integers from 1", ch.make_chairs, tmp_path / "o", **change)


def test_the_cache_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(ch, "MODELS", tmp_path / "none")
    one_line("sweethome3d-furniture", ch.chairs_folder, error=FileNotFoundError)
    monkeypatch.setattr(ch, "MODELS", cubes(tmp_path / "a.sh3f"))
    folder = ch.chairs_folder()
    assert folder == tmp_path / "fastmeta" / "chairs-64"
    made = folder / "maker_cube_0" / "r_029.png"
    with Image.open(made) as image:
        assert image.size == (64, 64)
    written = made.stat().st_mtime_ns
    assert ch.chairs_folder() == folder and made.stat().st_mtime_ns == written
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the specification: to be ignored
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert ch.chairs_folder() == tmp_path / "home" / ".cache" / "fastmeta" / "chairs-64"


def test_the_installed_models_look_like_the_real_data(data_path):
    if not list(ch.MODELS.glob("*.sh3f")):
        pytest.skip(f"the furniture models are absent (Debian's package {ch.PACKAGE})")
    with np.load(data_path("chairs/chairs_64.npz")) as file:
        images, poses, names = file["images"][..., 3] / 255, file["poses"], file["names"].tolist()
    models = {m.name.replace("blendswap", "bs"): m for m in ch.chair_models()}
    assert len(models) == 61 and set(names) <= set(models)
    for k in range(5, len(names), 5):  # not the first, whose cane was drawn otherwise there
        alpha = meshes.draw(ch.read_model(models[names[k]]), poses[k, 0].astype(float), 64)[..., 3]
        alpha, real = alpha / 255, images[k, 0]
        assert alpha.sum() == pytest.approx(real.sum(), rel=0.01)  # 0.4 % at most was seen
        for axis in (0, 1):  # real pixels' middles lie at (i + ½, j + ½), ours at (i, j)
            ours, theirs = ((a.sum(axis) * np.arange(64)).sum() / a.sum() for a in (alpha, real))
            assert ours - theirs == pytest.approx(0.5, abs=0.15)  # 0.11 at most was seen
