"""tasks/ct.py: phantoms, files, scans, and the batches made of them."""

import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

import fastmeta as fm
from fastmeta import rng
from fastmeta.tasks import ct, dicom, phantoms

NET = fm.fourier_mlp(2, 1, width=8, depth=3, features=4)


def one_line(match, call, *args, error=ValueError, **kwargs):
    with pytest.raises(error, match=match) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)


def stack(images):
    return torch.stack([images[i] for i in range(len(images))])


def seeds(*numbers):
    return torch.tensor(numbers)


def psnr(a, b):
    return -10 * math.log10(float(((a - b) ** 2).mean()))


def lines(image, angles):
    """The mean along parallel lines [A,W], the paper's formula in numpy, pixel by pixel."""
    N = image.shape[0]
    u = np.arange(N) / N - 0.5
    y, x = np.meshgrid(u, u, indexing="ij")
    rows = []
    for a in np.asarray(angles, np.float64):
        column = (x * np.cos(a) - y * np.sin(a) + 0.5) * N
        row = (x * np.sin(a) + y * np.cos(a) + 0.5) * N
        row, column = (np.sign(v) * np.floor(np.abs(v) + 0.5) for v in (row, column))
        inside = (row >= 0) & (row < N) & (column >= 0) & (column < N)
        picked = image[
            np.where(inside, row, 0).astype(int), np.where(inside, column, 0).astype(int)
        ]
        rows.append((picked * inside).mean(0))
    return np.stack(rows)


# Phantoms


def test_a_phantom_depends_on_seed_and_index_alone():
    twelve = stack(phantoms.phantom_images(12, size=24, seed=4))
    assert stack(phantoms.phantom_images(4, size=24, seed=4, first=7)).equal(twelve[7:11])
    assert phantoms.phantom_images(12, size=24, seed=4)[9].equal(twelve[9])
    assert not phantoms.phantom_images(1, size=24, seed=5)[0].equal(twelve[0])
    assert len(twelve.flatten(1).unique(dim=0)) == 12
    assert twelve.min() == 0 and twelve.max() == 1 and twelve.shape == (12, 24, 24, 1)
    assert phantoms.phantom_images(3, size=24, seed=2**70 - 5).names[1] == f"phantom-{2**70 - 5}-1"
    # sizes show the same phantom: boxes of 3 x 3 pixels, whose middle lies a third of a pixel off
    # (samples at i/N), differ at edges only
    small, large = twelve[2, ..., 0], phantoms.phantom_images(3, size=72, seed=4)[2][..., 0]
    centred = torch.roll(large, (1, 1), (0, 1)).view(24, 3, 24, 3).mean((1, 3))
    assert (small - centred).abs().max() < 0.15 and (small - centred).abs().mean() < 0.01


def test_splits_are_disjoint_and_do_not_move():
    parts = phantoms.phantom_splits(16, 40, 10, 10, seed=3)
    assert [len(p) for p in parts] == [40, 10, 10]
    assert len(torch.cat([stack(p) for p in parts]).flatten(1).unique(dim=0)) == 60
    more = phantoms.phantom_splits(16, 80, 20, 5, seed=3)
    assert stack(more[0])[:40].equal(stack(parts[0]))
    assert stack(more[1])[:10].equal(stack(parts[1])) and stack(more[2]).equal(stack(parts[2])[:5])


def test_the_standard_phantom_is_scikit_images():
    from skimage.data import shepp_logan_phantom

    theirs, ours = shepp_logan_phantom(), phantoms.paint(phantoms.ELLIPSES, 400)
    edges = ndimage.maximum_filter(ours, 5) - ndimage.minimum_filter(ours, 5) > 0.02
    # theirs is 8 bits, so 1/255; its pixels lie at (i + 0.5)/N, so edges are half a pixel off
    assert edges.mean() < 0.15 and np.abs(theirs - ours)[~edges].max() < 1 / 255
    # the middle of every range: the head smaller
    zeros = phantoms.jitter(np.zeros(6), np.zeros((10, 6)))
    np.testing.assert_allclose(zeros[:, [0, 5]], phantoms.ELLIPSES[:, [0, 5]])
    np.testing.assert_allclose(zeros[2:, 1:5], 0.95 * phantoms.ELLIPSES[2:, 1:5])


def dense(table, size, times=16):
    """Means over times × times samples in each pixel's box about (2j/N − 1, 1 − 2i/N)."""
    fine = (np.arange(times) + 0.5) / times - 0.5
    u = (2 * (np.arange(size)[:, None] + fine) / size - 1).reshape(-1)
    total = 0
    for value, a, b, x0, y0, degrees in table:
        x, y = u[None, :] - x0, -u[:, None] - y0
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        inside = ((x * c + y * s) / a) ** 2 + ((y * c - x * s) / b) ** 2 <= 1
        total = total + value * inside.reshape(size, times, size, times).mean((1, 3))
    return np.clip(total, 0, 1)


def test_pixels_hold_the_share_that_ellipses_cover():
    # a ramp one pixel wide is off by (√½ − ½)² = 0.043 at most, for a straight edge at 45°, and
    # within √½ of the edge only; two edges, as of the skull's wall, may share a pixel
    for row in range(6):
        draws = np.random.default_rng(row).uniform(-1, 1, (11, 6))
        table = phantoms.jitter(draws[0], draws[1:])
        for size in (33, 64):
            wanted = dense(table, size)
            got = phantoms.paint(table, size)
            assert np.abs(got - wanted).max() < 0.1
            edges = (np.abs(table[:, 0]) * 2 * np.pi * table[:, 1:3].max(1)).sum() * size / 2
            assert np.abs(got - wanted).mean() < 0.043 * edges * math.sqrt(2) / size**2
            one = phantoms.paint(table[4:5] * [5, 1, 1, 1, 1, 1], size)
            assert np.abs(one - dense(table[4:5] * [5, 1, 1, 1, 1, 1], size)).max() < 0.05
    area = (
        (phantoms.ELLIPSES[:, 0] * phantoms.ELLIPSES[:, 1] * phantoms.ELLIPSES[:, 2]).sum()
        * np.pi
        / 4
    )
    assert abs(phantoms.paint(phantoms.ELLIPSES, 96).mean() / area - 1) < 2e-3


def test_ranges_are_those_written_down():
    rows = 4000
    draws = np.random.default_rng(0).uniform(-1, 1, (rows, 11, 6))
    tables = np.stack([phantoms.jitter(d[0], d[1:]) for d in draws])
    factor = tables[:, 2:, 0] / phantoms.ELLIPSES[2:, 0]
    assert 0.5 <= factor.min() < 0.51 and 1.49 < factor.max() <= 1.5
    skull = tables[:, :2, 0] / phantoms.ELLIPSES[:2, 0]
    assert 0.9 <= skull.min() < 0.905 and 1.095 < skull.max() <= 1.1
    axes = tables[:, 0, 1:3] / phantoms.ELLIPSES[0, 1:3]
    assert 0.85 <= axes.min() < 0.86 and 1.04 < axes.max() <= 1.05
    inner = tables[:, 2:, 1:3] / phantoms.ELLIPSES[2:, 1:3] / axes[:, None]
    assert 0.8 <= inner.min() < 0.81 and 1.19 < inner.max() <= 1.2
    tilt = tables[:, 0, 5]
    assert 14.9 < np.abs(tilt).max() <= 15
    assert 19.9 < np.abs(tables[:, 2:, 5] - phantoms.ELLIPSES[2:, 5] - tilt[:, None]).max() <= 20
    # the wall of the skull is never open, and all of it lies in the unit circle
    turn = np.linspace(0, 2 * np.pi, 73)
    for table in tables[:400]:
        x, y = np.stack([table[1, 1] * np.cos(turn), table[1, 2] * np.sin(turn)])
        outer = table[0]
        shift = table[1, 3:5] - outer[3:5]
        c, s = np.cos(np.radians(outer[5])), np.sin(np.radians(outer[5]))
        along = np.array([shift[0] * c + shift[1] * s, shift[1] * c - shift[0] * s])
        reach = ((x + along[0]) / outer[1]) ** 2 + ((y + along[1]) / outer[2]) ** 2
        assert reach.max() < 1
        assert np.hypot(*outer[3:5]) + max(outer[1:3]) < 1


def test_an_ellipse_is_projected_as_the_closed_form_says():
    """``½ ∫ = ρ a b √(A² − s²) / A²``, A² = a² cos² + b² sin²: an orientation, a sign or half a
    pixel that is wrong shows."""
    N, (value, a, b, x0, y0, phi) = 128, (0.7, 0.3, 0.1, 0.35, -0.2, 25.0)
    angles = torch.tensor([0.0, 0.3, 1.0, math.pi / 2, 2.0, 3.0])
    image = torch.from_numpy(phantoms.paint(np.array([[value, a, b, x0, y0, phi]]), N))
    got = fm.project(image[None], angles[None])[0].numpy()
    bins = 2 * np.arange(N) / N - 1
    for row, theta in zip(got, angles.tolist(), strict=True):
        s = bins - (x0 * np.cos(theta) - y0 * np.sin(theta))  # y points up, rows down
        reach = theta + math.radians(phi)
        A2 = (a * np.cos(reach)) ** 2 + (b * np.sin(reach)) ** 2
        # a sample moves by √½ pixel at most to the nearest, an edge is smeared over ± ½
        near = s + 1.21 * 2 / N * np.linspace(-1, 1, 41)[:, None]
        near = value * a * b * np.sqrt(np.maximum(A2 - near**2, 0)) / A2  # [41,W]
        wanted = near[20]
        assert abs(row.sum() - wanted.sum()) < 0.02 * wanted.sum()
        middle = [(bins * w).sum() / w.sum() for w in (row, wanted)]
        assert abs(middle[0] - middle[1]) < 0.1 * 2 / N  # a tenth of a pixel
        ends = 2 * 1.21 * value / N  # and so do the two ends of a line
        assert (row > near.min(0) - ends).all() and (row < near.max(0) + ends).all()


def test_numbers_refused():
    for bad in ({"count": -1}, {"count": 1, "first": -1}, {"count": 1, "first": 2**32}):
        one_line("phantom_images: count is .*; accepted are 0 to", phantoms.phantom_images, **bad)
    one_line(r"size \(7, 7\); accepted are .*, size at least 8", phantoms.phantom_images, 1, size=7)
    one_line(r"size \(8.5, 8.5\); accepted", phantoms.phantom_images, 1, size=8.5)
    one_line(r"at most 2\*\*30 each", phantoms.phantom_splits, 16, 2**30 + 1)


# Angles and photons


def test_angles_lie_in_the_arc():
    keys = rng.task_seeds(3, 0, 500)
    random = ct.draw_angles(keys, 20)
    assert random.min() >= 0 and random.max() < math.pi
    share = [(random < math.pi * q).double().mean() for q in (0.25, 0.5, 0.75)]
    assert (torch.tensor(share) - torch.tensor([0.25, 0.5, 0.75])).abs().max() < 5 * 0.5 / 100
    assert ct.draw_angles(keys, 7).equal(random[:, :7])  # fewer are the first of more
    assert ct.draw_angles(keys[[4, 2]], 20).equal(random[[4, 2]])
    assert len(random.flatten().unique()) > 9900
    limited = ct.draw_angles(keys, 20, arc=60.0)
    torch.testing.assert_close(limited, random / 3)
    even = ct.draw_angles(keys[:2], 4, spacing="even", arc=90.0)
    torch.testing.assert_close(even, torch.tensor([[0, 1, 2, 3]] * 2) * math.pi / 8)


def test_photons_are_poisson_and_belong_to_the_task():
    s = torch.linspace(0, 0.9, 10)[:, None].expand(3, 10, 4000)
    noisy = ct.count_photons(s, seeds(1, -2, 3), photons=1000, attenuation=4.0)
    assert ct.count_photons(s[1:2], seeds(-2), photons=1000, attenuation=4.0).equal(noisy[1:2])
    assert not noisy[0].equal(noisy[1])
    # counts of a bin: mean and variance are both photons · exp(−4 s); 12 000 bins each
    counts = 1000 * torch.exp(-4 * noisy.double())
    rate = 1000 * torch.exp(-4 * s[0, :, 0].double())
    mean, variance = counts.mean((0, 2)), counts.var((0, 2))
    assert ((mean - rate).abs() / (rate / 12000).sqrt()).max() < 4.5
    assert ((variance / rate - 1).abs()).max() < 4.5 * math.sqrt((2 + 1 / 27) / 12000)
    dark = ct.count_photons(torch.full((1, 2, 50), 9.0), seeds(5), photons=20, attenuation=4.0)
    assert dark.unique().tolist() == [pytest.approx(math.log(20) / 4)]  # one photon at least
    bright = ct.count_photons(s, seeds(1, 2, 3), photons=10**14, attenuation=4.0)
    assert (bright - s).abs().max() < 1e-6


# Batches


@pytest.mark.parametrize("size", [16, 17])
def test_learn_projects_each_slice_at_its_angles(size):
    options = ct.CT(size=size, angles=5)
    images = phantoms.phantom_images(3, size=size)
    items, keys = [images[i] for i in range(3)], seeds(11, 12, 13)
    batch = ct.learn(items, options, NET, keys, None)
    assert batch.query is None and batch.y.shape == (3, 5, size)
    for t in range(3):
        wanted = lines(items[t][..., 0].double().numpy(), batch.measure.angles[t].double().numpy())
        np.testing.assert_allclose(batch.y[t].numpy(), wanted, atol=1e-6)
    j, i = np.meshgrid(np.arange(size), np.arange(size))
    np.testing.assert_allclose(batch.x.numpy(), np.stack([j, i], -1).reshape(-1, 2) / size)
    again = ct.learn([items[2]], options, NET, keys[2:], None)
    assert again.y.equal(batch.y[2:]) and again.measure.angles.equal(batch.measure.angles[2:])
    double = ct.learn([item.double() for item in items], options, NET, keys, None)
    assert double.y.dtype == double.x.dtype == torch.float64
    even = ct.learn(items, ct.CT(size=size, angles=4, spacing="even"), NET, keys, None)
    assert even.measure.angles[2].tolist() == pytest.approx([k * math.pi / 4 for k in range(4)])
    noisy = ct.learn(items, ct.CT(size=size, angles=5, photons=50), NET, keys, None)
    wanted = ct.count_photons(batch.y, keys, photons=50, attenuation=4.0)
    assert noisy.y.equal(wanted) and not noisy.y.equal(batch.y)
    last = ct.learn(items[2:], ct.CT(size=size, angles=5, photons=50), NET, keys[2:], None)
    assert last.y.equal(noisy.y[2:])
    thin = ct.CT(size=size, angles=5, photons=50, attenuation=1.0)
    assert not ct.learn(items, thin, NET, keys, None).y.equal(noisy.y)


def test_observe_scores_the_slice():
    options = ct.CT(size=16, arc=40.0)
    images = phantoms.phantom_images(2, size=16)
    items, keys = [images[0], images[1]], seeds(5, 6)
    batch = ct.observe(items, options, NET, keys, 6)
    assert batch.measure.angles.max() < math.radians(40) and batch.y.shape == (2, 6, 16)
    assert batch.query.measure is None and batch.query.x.equal(batch.x)
    assert batch.query.y[1, 5 * 16 + 3].equal(items[1][5, 3])
    assert ct.observe(items, options, NET, keys).y.equal(ct.learn(items, options, NET, keys).y)
    assert ct.observe(items, options, NET, keys).y.shape[1] == 20
    assert ct.truth(items[0], options).equal(items[0])


def test_a_network_is_fitted_on_the_grid_it_is_shown_on():
    """``y = x / 2 + y / 4`` exactly, by weights written down."""
    net = fm.MLP(2, 1, 2, 2, "none", coords="unit_xy")
    params = torch.tensor([1, 0, 0, 1, 0, 0, 0.5, 0.25, 0])
    image = torch.arange(12)[None, :, None] / 24 + torch.arange(12)[:, None, None] / 48
    options = ct.CT(size=12, angles=4)
    shown = ct.picture(net, params, image, options, impl="reference")
    torch.testing.assert_close(shown, image)
    batch = ct.observe([image], options, net, seeds(1))
    loss, grad = fm.loss_grad(net, params, batch)
    assert loss.item() < 1e-12 and fm.loss_grad(net, params, batch.query)[0].item() < 1e-12
    assert (
        fm.loss_grad(net, params, ct.observe([image.transpose(0, 1)], options, net, seeds(1)))[0]
        > 1e-3
    )
    assert ct.shape(options) == (2, 1, "unit_xy", True) and (ct.COUNTED, ct.METRIC) == (
        "angles",
        "psnr",
    )


def test_batches_refuse():
    options = ct.CT(size=16)
    item = phantoms.phantom_images(1, size=16)[0]
    for call in (ct.learn, ct.observe):
        match = "ct: per_step is 64; accepted is none"
        one_line(match, call, [item], options, NET, seeds(1), per_step=64)
        net = fm.siren(2, 3, width=8, depth=3)
        match = "ct: net goes from 2 to 3 features; accepted is 2 to 1"
        one_line(match, call, [item], options, net, seeds(1))
        match = r"slices are \(16, 12, 1\); accepted"
        one_line(match, call, [item[:, :12]], options, NET, seeds(1))
        one_line(r"slices are \(16, 16, 3\)", call, [item.repeat(1, 1, 3)], options, NET, seeds(1))
    for count in (0, 2.0, -1):
        match = f"ct: count is {count}; accepted is an integer >= 1"
        one_line(match, ct.observe, [item], options, NET, seeds(1), count)


def test_options_refuse():
    for bad, match in (
        ({"size": 7}, "ct: size is 7; accepted is an integer >= 8"),
        ({"angles": 0}, "ct: angles is 0; accepted is an integer >= 1"),
        ({"angles": 2.5}, "ct: angles is 2.5"),
        ({"photons": 0}, "ct: photons is 0"),
        ({"phantoms": 0}, "ct: phantoms is 0"),
        ({"spacing": "golden"}, "ct: spacing is 'golden'; accepted are random and even"),
        ({"arc": 0.0}, "ct: arc is 0.0; accepted are degrees > 0, at most 360"),
        ({"arc": math.nan}, "ct: arc is nan"),
        ({"arc": 361.0}, "ct: arc is 361"),
        ({"attenuation": 0.0, "photons": 9}, "ct: attenuation is 0.0; accepted is a number > 0"),
        ({"attenuation": math.inf, "photons": 9}, "ct: attenuation is inf"),
        ({"attenuation": 2.0}, "attenuation is 2.0 with no photons, where it has no effect"),
        ({"hu_low": 40.0, "hu_high": 40.0}, "ct: hu_low is 40.0, hu_high 40.0; accepted"),
        ({"hu_high": math.nan}, "ct: hu_low is -1000.0, hu_high nan"),
        ({"validation": -0.1}, "ct: validation is -0.1"),
        ({"validation": 0.6, "test": 0.5}, "ct: validation is 0.6, test 0.5; accepted are shares"),
    ):
        one_line(match, ct.CT, **bad)


# Filtered back-projection


def test_back_projection_lines_up():
    from skimage.registration import phase_cross_correlation

    images = stack(phantoms.phantom_images(3, size=64, seed=2))[..., 0]
    for spacing, keys in (("even", seeds(1, 2, 3)), ("random", seeds(1, 2, 3))):
        angles = ct.draw_angles(keys, 180, spacing=spacing)
        back = ct.fbp(fm.project(images, angles), angles)
        for image, found in zip(images, back, strict=True):
            if spacing == "even":
                assert psnr(found, image) > 25
            shift = phase_cross_correlation(image.numpy(), found.numpy(), upsample_factor=20)[0]
            assert np.abs(shift).max() <= 0.1  # pixels
    few = ct.draw_angles(seeds(1, 2, 3), 10, spacing="even")
    assert psnr(ct.fbp(fm.project(images, few), few), images) < 20  # what the network is up against


# Files


def test_folders_and_arrays_of_images(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (10, 16, 16), dtype=np.uint8)
    (tmp_path / "png").mkdir()
    for n, p in enumerate(pixels):
        Image.fromarray(p).save(tmp_path / f"png/p{n // 2}_{n}.png")
    np.save(tmp_path / "a.npy", pixels)
    np.savez(tmp_path / "a.npz", slices=pixels)
    wanted = torch.from_numpy(pixels / np.float32(255))[..., None]
    options = ct.CT(size=16, group=r"p(\d)_")
    parts = ct.open_splits(tmp_path / "png", options, 1)
    people = [{name[:2] for name in part.names} for part in parts]
    assert sum(map(len, people)) == 5 and sum(map(len, parts)) == 10 and all(map(len, parts))
    for source in ("png", "a.npy", "a.npz"):
        assert stack(ct.open_all(str(tmp_path / source), options)).equal(wanted)
    assert stack(ct.open_all(pixels, options)).equal(wanted)
    assert ct.open_splits(pixels, ct.CT(size=8))[0][0].shape == (8, 8, 1)
    one_line("does not exist", ct.open_all, tmp_path / "none", options, error=FileNotFoundError)


def test_options_without_effect_are_refused(tmp_path):
    images = np.zeros((4, 8, 8), np.uint8)
    path = tmp_path / "s.npz"
    np.savez(path, sinogram=np.zeros((6, 3, 8)), angles=np.zeros(3))
    for source, change in (
        ("phantoms", {"hu_low": 0.0}),
        ("phantoms", {"hu_high": 10.0}),
        ("phantoms", {"validation": 0.2}),
        ("phantoms", {"test": 0.2}),
        ("phantoms", {"group": "(.)"}),
        (images, {"phantoms": 5}),
        (images, {"hu_low": 0.0}),
        (path, {"phantoms": 5}),
        (path, {"arc": 90.0}),
        (path, {"photons": 90}),
        (path, {"hu_high": 10.0}),
    ):
        name = next(iter(change))
        match = f"^{name} is .* with data .*, where it has no effect; accepted is without"
        one_line(match, ct.open_splits, source, ct.CT(size=8, **change))
        ct.open_all(source, ct.CT(size=8, **change))  # as it came from training on other data
    assert [len(p) for p in ct.open_splits("phantoms", ct.CT(phantoms=7, size=8))] == [7, 200, 200]
    assert ct.open_splits("phantoms", ct.CT(size=8), 9)[0].names[3] == "phantom-9-3"
    held = ct.open_all("phantoms", ct.CT(size=8))
    assert held.names == ct.open_splits("phantoms", ct.CT(size=8), 0)[2].names


# Scans


def test_scans_are_seen_through_their_own_angles(tmp_path):
    rows = np.random.default_rng(0)
    sinogram, angles = rows.random((5, 12, 16)), rows.random((5, 12)) * np.pi
    np.savez(tmp_path / "s.npz", sinogram=sinogram, angles=angles, names=list("abcde"))
    options = ct.CT(size=16, angles=4)
    scans = ct.open_all(tmp_path / "s.npz", options)
    assert scans.names == tuple("abcde") and ct.truth(scans[0], options) is None
    items = [scans[3], scans[1]]
    whole = ct.observe(items, options, NET, seeds(1, 2))
    assert whole.query is None
    np.testing.assert_array_equal(whole.y.numpy(), sinogram[[3, 1]].astype(np.float32))
    np.testing.assert_array_equal(whole.measure.angles.numpy(), angles[[3, 1]].astype(np.float32))
    third = ct.observe(items, options, NET, seeds(1, 2), 4)
    assert third.y.equal(whole.y[:, ::3]) and third.measure.angles[1].equal(
        whole.measure.angles[1, ::3]
    )
    drawn = ct.learn(items, options, NET, seeds(1, 2))
    for t in range(2):
        own = [whole.measure.angles[t].tolist().index(a) for a in drawn.measure.angles[t].tolist()]
        assert own == sorted(set(own)) and len(own) == 4  # four different ones, in their order
        assert drawn.y[t].equal(whole.y[t, own])
    assert not ct.learn(items, options, NET, seeds(7, 2)).y[0].equal(drawn.y[0])
    assert ct.learn(items, options, NET, seeds(7, 2)).y[1].equal(drawn.y[1])
    even = ct.CT(size=16, angles=4, spacing="even")
    assert ct.learn(items, even, NET, seeds(1, 2)).y.equal(third.y)
    match = "ct: 13 angles of a scan that has 12; accepted are 1 to 12"
    one_line(match, ct.observe, items, options, NET, seeds(1, 2), 13)
    assert ct.picture(NET, NET.init()[0], items[0], options).shape == (16, 16, 1)
    assert sum(map(len, ct.open_splits(tmp_path / "s.npz", options))) == 5
    np.savez(tmp_path / "one.npz", sinogram=sinogram[2], angles=angles[2])
    one = ct.open_all(tmp_path / "one.npz", options)
    assert len(one) == 1 and one[0].sinogram.equal(scans[2].sinogram)
    np.savez(tmp_path / "shared.npz", sinogram=sinogram, angles=angles[2])
    shared = ct.open_all(tmp_path / "shared.npz", options)
    assert shared[4].angles.equal(scans[2].angles) and shared[4].sinogram.equal(scans[4].sinogram)


def test_scans_refuse(tmp_path):
    path, options = tmp_path / "s.npz", ct.CT(size=8)
    good = {"sinogram": np.zeros((2, 3, 8)), "angles": np.zeros((2, 3))}
    for change, match in (
        ({"sinogram": np.zeros(8)}, r"sinogram in .*s.npz has shape \(8,\); accepted are"),
        ({"sinogram": np.zeros((0, 3, 8))}, "none empty"),
        ({"sinogram": np.full((2, 3, 8), np.nan)}, "sinogram in .* or holds NaN or infinity"),
        ({"sinogram": np.zeros((2, 3, 8), complex)}, "sinogram in .*s.npz is complex128"),
        ({"sinogram": np.zeros((2, 3, 9))}, "ct: size is 8; accepted for the scans .* width 9"),
        ({"angles": np.zeros(4)}, r"angles in .*\(4,\); accepted .* are \(3,\) and \(2, 3\)"),
        ({"angles": np.full(3, np.inf)}, "angles in .* or holds NaN or infinity"),
        ({"angles": np.array([0.0, 90, 179])}, "angles in .* reach 179; accepted are radians"),
        ({"angles": np.array([{}, {}, {}])}, "s.npz is no readable .npz of plain arrays"),
        ({"names": np.array(["a"])}, r"names in .* is \(1,\); accepted are 2 names"),
    ):
        np.savez(path, **{**good, **change})
        one_line(match, ct.open_all, path, options)
    np.savez(path, sinogram=good["sinogram"])
    one_line("s.npz holds no array called 'angles'; accepted", ct.open_all, path, options)
    np.savez(path, **good)
    path.write_bytes(path.read_bytes()[:-200])
    one_line("s.npz is no readable .npz", ct.open_all, path, options)


# DICOM


def write_slice(path, stored, **tags):
    """A CT slice as a scanner writes it: int16, explicit little endian."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    meta.TransferSyntaxUID = tags.pop("syntax", ExplicitVRLittleEndian)
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID = meta.MediaStorageSOPClassUID
    data.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    if stored is not None:
        data.Rows, data.Columns = stored.shape
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
        data.PixelRepresentation, data.PixelData = 1, stored.astype("<i2").tobytes()
        data.RescaleSlope, data.RescaleIntercept = "2", "-1024"
        data.ImageType, data.SeriesInstanceUID = ["ORIGINAL", "PRIMARY", "AXIAL"], "1.2"
    for name, value in tags.items():
        setattr(data, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)


def test_dicom_slices_are_windowed_and_sorted_along_the_normal(tmp_path):
    pytest.importorskip("pydicom")
    stored = np.random.default_rng(0).integers(-200, 1200, (6, 12, 12))
    axial = [1, 0, 0, 0, 1, 0]
    place = {"ImageOrientationPatient": axial, "InstanceNumber": 1}
    write_slice(tmp_path / "a/x.dcm", stored[0], ImagePositionPatient=[0, 0, 7.5], **place)
    write_slice(tmp_path / "a/y", stored[1], ImagePositionPatient=[9, 9, -20], **place)
    write_slice(tmp_path / "b/1.2.840.7", stored[2], ImagePositionPatient=[0, 0, 3], **place)
    # another series, without positions: by number; and one seen from the side: normal (1, 0, 0)
    write_slice(tmp_path / "c/p.dcm", stored[3], InstanceNumber=12, SeriesInstanceUID="1.3")
    write_slice(tmp_path / "c/q.dcm", stored[4], InstanceNumber=9, SeriesInstanceUID="1.3")
    side = {"ImageOrientationPatient": [0, 1, 0, 0, 0, 1], "SeriesInstanceUID": "1.1"}
    write_slice(tmp_path / "c/r.dcm", stored[5], ImagePositionPatient=[-5, 0, 0], **side)
    write_slice(tmp_path / "c/a.dcm", stored[0], ImagePositionPatient=[4, -90, 0], **side)
    # no slices: a scout, a report, an index, other files
    write_slice(tmp_path / "scout.dcm", stored[0], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    write_slice(tmp_path / "report.dcm", None)
    write_slice(tmp_path / "DICOMDIR", None)
    (tmp_path / "notes").write_text("no DICOM" * 30)
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "preview.png")
    options = ct.CT(size=12, hu_low=-400.0, hu_high=600.0)
    slices = ct.open_all(tmp_path, options)
    names = ["c/r.dcm", "c/a.dcm", "a/y", "b/1.2.840.7", "a/x.dcm", "c/q.dcm", "c/p.dcm"]
    assert list(slices.names) == names
    for index, source in enumerate((5, 0, 1, 2, 0, 4, 3)):
        wanted = np.clip((stored[source] * 2.0 - 1024 + 400) / 1000, 0, 1)
        np.testing.assert_allclose(slices[index][..., 0].numpy(), wanted, atol=1e-6)
    parts = ct.open_splits(tmp_path, ct.CT(size=12, group=r"^(.)/"), 3)
    assert sum(map(len, parts)) == 7 and all(map(len, parts))
    single = dicom.open_dicom(tmp_path / "a/y", size=6)
    assert single.names == ("y",) and single[0].shape == (6, 6, 1)
    wanted = np.clip((stored[1] * 2.0 - 1024 + 1000) / 2000, 0, 1).mean()
    assert abs(single[0].mean().item() - wanted) < 0.02
    match = "phantoms is 5 with data that are DICOM"
    one_line(match, ct.open_splits, tmp_path, ct.CT(size=12, phantoms=5))


def test_dicom_refuses(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    from pydicom.encaps import encapsulate

    stored, options = np.zeros((12, 12), int), ct.CT(size=12)
    write_slice(tmp_path / "whole/a.dcm", stored)
    whole = (tmp_path / "whole/a.dcm").read_bytes()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/a.dcm").write_bytes(whole[:-100])
    cut = ct.open_all(tmp_path / "cut", options)
    one_line("ct: a.dcm is truncated or not DICOM", cut.__getitem__, 0, error=OSError)
    (tmp_path / "text").mkdir()
    (tmp_path / "text/b.dcm").write_text("not DICOM")
    one_line("ct: b.dcm is trunc", ct.open_all, tmp_path / "text", options, error=OSError)
    lossless = pydicom.uid.JPEGLosslessSV1
    data = encapsulate([b"\xff\xd8 no JPEG"])
    tags = {"syntax": lossless, "PixelData": data}
    write_slice(tmp_path / "packed/c.dcm", stored, **tags)
    packed = ct.open_all(tmp_path / "packed", options)
    match = r"ct: c.dcm is compressed \(JPEG Lossless.*\) and was not decoded .* pip install"
    one_line(match, packed.__getitem__, 0, error=OSError)
    write_slice(tmp_path / "many/d.dcm", stored, NumberOfFrames=2)
    match = "ct: d.dcm has 2 frames of 1 samples, MONOCHROME2; accepted is one frame"
    one_line(match, ct.open_all, tmp_path / "many", options)
    write_slice(tmp_path / "none/report.dcm", None)
    one_line("holds DICOM files, but no slice", ct.open_all, tmp_path / "none", options)
    one_line("holds no DICOM file; accepted are .dcm", dicom.open_dicom, tmp_path / "nowhere")


def test_without_pydicom_the_message_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "IM1").write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 20)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    match = "ct: IM1 is a DICOM file, and pydicom is not installed; .* pip install pydicom"
    one_line(match, ct.open_all, tmp_path, ct.CT(), error=ImportError)


# Real data


def test_chest_slices_are_projected_and_come_back(data_path):
    path = data_path("ct_chest/ct_chest_256.npz")
    options = ct.CT(size=128, angles=180, spacing="even")
    train, validation, test = ct.open_splits(path, options, 0)
    assert len(train) + len(validation) + len(test) == 133 and min(map(len, (validation, test))) > 4
    items = [test[0], validation[0]]
    batch = ct.observe(items, options, NET, seeds(1, 2))
    # the mean of a slice is the mean of each of its projections, but for what a turn leaves out
    for image, sino in zip(items, batch.y, strict=True):
        u = torch.arange(128.0) - 64
        inside = torch.hypot(u[:, None], u) < 63
        assert sino.mean(1)[0] == pytest.approx(image.mean().item(), rel=1e-5)
        assert sino.mean(1).min() > (image[..., 0] * inside).mean() * 0.99
    back = ct.fbp(batch.y, batch.measure.angles)
    assert min(psnr(f, i[..., 0]) for f, i in zip(back, items, strict=True)) > 27


def test_a_network_learns_a_chest_slice_from_its_sinogram(data_path):
    options = ct.CT(size=48)
    item = ct.open_all(data_path("ct_chest/ct_chest_256.npz"), options)[66]
    net = fm.fourier_mlp(2, 1, width=64, depth=4, features=64, scale=8.0)
    batch = ct.observe([item], options, net, seeds(3), 20)
    start = net.init(1, generator=torch.Generator().manual_seed(0))
    fit = fm.adapt(net, start, batch, 60, 3e-3, rule="adam")
    shown = ct.picture(net, fit.params[0], item, options)
    truth = ct.truth(item, options)
    assert fit.losses[-1] < 0.05 * fit.losses[0]
    assert psnr(shown, truth) > psnr(truth.mean(), truth) + 3


def test_a_damaged_header_is_left_out_with_skip_bad(tmp_path):
    pytest.importorskip("pydicom")
    write_slice(tmp_path / "good.dcm", np.arange(64).reshape(8, 8))
    (tmp_path / "bad.dcm").write_bytes((tmp_path / "good.dcm").read_bytes()[:200])
    with pytest.raises((ValueError, OSError), match="bad.dcm"):
        ct.open_all(tmp_path, ct.CT(size=8))
    with pytest.warns(UserWarning, match="bad.dcm"):
        slices = ct.open_all(tmp_path, ct.CT(size=8, skip_bad=True))
    assert slices.names == ("good.dcm",)
