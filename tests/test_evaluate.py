"""meta/evaluate.py, meta/baselines.py, viz.py: scores, the paper's other starts, pictures."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import structural_similarity

import fastmeta as fm
from fastmeta import viz
from fastmeta.meta import baselines
from fastmeta.meta.eikonal import adapt_eikonal
from fastmeta.meta.evaluate import (
    Start,
    _best_rate,
    fitted,
    predicted,
    psnr,
    rates,
    reached,
    score,
    ssim,
    tune,
)
from fastmeta.tasks.images import grid, image_batch, mask

NET = fm.siren(2, 3, 16, 3, 30.0, output_shift=0.5)


def images(count=3, size=(12, 14), seed=0):
    """Smooth pictures in [0,1], [n,H,W,3]."""
    draw = torch.Generator().manual_seed(seed)
    small = torch.rand(count, 3, 4, 4, generator=draw)
    return torch.nn.functional.interpolate(small, size, mode="bilinear").movedim(1, -1)


def start(seed=1):
    return NET.init(generator=torch.Generator().manual_seed(seed))[0]


# scores


def test_psnr_by_hand():
    a = torch.zeros(2, 5, 3)
    b = a.clone()
    b[0], b[1, 0, 0] = 0.1, 0.5  # mean squares 0.01 and 0.25 / 15
    assert psnr(a, b).tolist() == pytest.approx([20.0, -10 * math.log10(0.25 / 15)], abs=1e-4)
    assert psnr(a, a - 3)[0].item() == pytest.approx(-10 * math.log10(9), abs=1e-4)  # not clipped
    assert psnr(a, a)[0].item() == math.inf


@pytest.mark.parametrize(
    "size, channels, window", [((24, 20), 3, 11), ((24, 20), 1, 11), ((8, 9), 3, 7)]
)
def test_ssim_is_skimages(size, channels, window):
    draw = np.random.default_rng(0)
    a = draw.random((*size, channels), dtype=np.float32)
    b = np.clip(a + 0.1 * draw.standard_normal(a.shape), 0, 1).astype(np.float32)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    options |= {"data_range": 1.0, "channel_axis": -1, "win_size": window}
    expected = structural_similarity(a.astype(np.float64), b.astype(np.float64), **options)
    assert ssim(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected, abs=1e-12)
    assert 0.5 < expected < 0.995
    assert ssim(torch.from_numpy(a), torch.from_numpy(a)) == 1.0


def test_reached_without_a_query_scores_what_was_seen():
    batch = image_batch(images(), NET)
    scores, thetas = reached(NET, Start(start(), 0.02, "momentum"), batch, range(4))
    assert scores.shape == (3, 4) and len(thetas) == 4
    for k in range(4):
        theta = fm.adapt(NET, start(), batch, k, 0.02, rule="momentum").params
        y = fm.mlp(NET, theta, batch.x)
        torch.testing.assert_close(thetas[k], theta, rtol=0, atol=1e-6)
        torch.testing.assert_close(predicted(NET, thetas[k], batch), y, rtol=0, atol=1e-6)
        by_hand = [-10 * math.log10(((y[t] - batch.y[t]) ** 2).double().mean()) for t in range(3)]
        assert scores[:, k].tolist() == pytest.approx(by_hand, abs=1e-4)
    assert (scores[:, 3] > scores[:, 0] + 0.2).all()


def test_reached_after_some_steps_in_any_order_is_the_same():
    """One number of steps keeps no trajectory; the others take theirs from it."""
    batch, chosen = image_batch(images(), NET), Start(start(), 0.02)
    whole, thetas = reached(NET, chosen, batch, range(4))
    some, others = reached(NET, chosen, batch, [3, 1])
    alone, last = reached(NET, chosen, batch, [3])
    assert torch.equal(some, whole[:, [3, 1]]) and torch.equal(alone, whole[:, 3:])
    assert torch.equal(others[1], thetas[1]) and torch.equal(last[0], thetas[3])


def test_reached_of_ragged_masked_batches_scores_the_unseen_rest():
    pictures = images()
    seen = mask("random:0.3", 12, 14, 3, 0)
    seen[1, :6], seen[2] = True, mask("left", 12, 14, 1)[0]
    batch = image_batch(pictures, NET, seen=seen)
    assert len(set(batch.counts.tolist())) == 3
    batch.query.x[0, batch.query.counts[0] :] = math.nan  # padding may hold anything
    batch.query.y[0, batch.query.counts[0] :] = math.nan
    scores, _ = reached(NET, Start(start(), 0.02), batch, range(3))
    x = image_batch(pictures, NET).x
    for t in range(3):
        where = seen[t].flatten()
        own = fm.Batch(x[where], pictures[t].flatten(0, 1)[where][None])
        for k in range(3):
            y = fm.mlp(NET, fm.adapt(NET, start(), own, k, 0.02).params, x)[0]
            error = (y - pictures[t].flatten(0, 1))[~where] ** 2
            by_hand = -10 * math.log10(error.double().mean())
            assert float(scores[t, k]) == pytest.approx(by_hand, abs=1e-3)


def test_the_mean_absolute_error_in_decibels():
    net = fm.MLP(2, 1, 8, 3)
    x = torch.rand(2, 9, 2, generator=torch.Generator().manual_seed(0))
    values = torch.tensor([[[0.02], [-0.1], [0.3]] * 3, [[0.01], [0.04], [9.0]] * 3])
    counts = torch.tensor([9, 2])
    batch = fm.Batch(x, torch.zeros(2, 9, 1), loss="l1", counts=counts)
    found = score(values, batch, "mae").tolist()
    wanted = [-20 * math.log10(0.42 / 3), -20 * math.log10(0.05 / 2)]
    assert found == pytest.approx(wanted, abs=1e-4)
    squares = [-10 * math.log10((0.02**2 + 0.1**2 + 0.3**2) / 3), -10 * math.log10(0.0017 / 2)]
    assert score(values, batch, "psnr").tolist() == pytest.approx(squares, abs=1e-4)
    clipped = fm.Batch(x, torch.full((2, 9, 1), -0.5), loss=("l1", 0.1), counts=counts)
    wanted = [-20 * math.log10((0.12 + 0.2) / 3), -20 * math.log10((0.11 + 0.14) / 2)]
    assert score(values, clipped, "mae").tolist() == pytest.approx(wanted, abs=1e-4)
    with pytest.raises(ValueError, match="score: metric is 'ssim'; accepted are psnr, mae"):
        score(fm.mlp(net, net.init(2), x), batch, "ssim")


def test_predictions_of_projections_are_projected():
    net = fm.MLP(2, 1, 8, 3, output="sigmoid", coords="unit_xy")
    params = net.init(2, generator=torch.Generator().manual_seed(0)) * 3
    angles = torch.tensor([[0.0, 0.7, 2.0], [0.3, 1.1, 3.0]])
    batch = fm.Batch(grid(10, 10, "unit_xy"), torch.zeros(2, 3, 10), measure=fm.Project(angles))
    slices = fm.mlp(net, params, batch.x).view(2, 10, 10)
    assert torch.equal(predicted(net, params, batch), fm.project(slices, angles))
    shared = predicted(net, params[0], batch)  # one [P] for both tasks
    expected = fm.project(slices[:1].expand(2, 10, 10).contiguous(), angles)
    torch.testing.assert_close(shared, expected, rtol=0, atol=1e-6)


def test_predictions_of_rays_are_rendered_piece_by_piece_and_clipped(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    net = fm.nerf_mlp(8, 3, frequencies=3, max_exponent=2.0)
    params = net.init(2, generator=draw) * 4
    origins, directions = torch.randn(2, 7, 3, generator=draw), torch.randn(2, 7, 3, generator=draw)
    rays, march = fm.Rays(origins, directions, 0.5, 2.0), fm.March(6, density="softplus")
    batch = fm.Batch(rays, torch.zeros(2, 7, 3), measure=march)
    expected = fm.render(net, params, rays, march)[0].clamp(0, 1)
    assert float(expected.std()) > 0.02
    for points in (2**17, 24, 1):  # all rays, two and one of each task at a time
        monkeypatch.setattr("fastmeta.tasks.cameras._POINTS", points)
        torch.testing.assert_close(predicted(net, params, batch), expected, rtol=0, atol=1e-6)


def test_a_start_with_an_eikonal_term_is_fitted_with_it():
    net = fm.MLP(2, 1, 8, 3, "softplus")
    init = net.init(generator=torch.Generator().manual_seed(0))[0]
    x = torch.rand(1, 20, 2, generator=torch.Generator().manual_seed(1)) * 2 - 1
    batch = fm.Batch(x, x.norm(dim=-1, keepdim=True) - 0.5, seed=torch.tensor([7]))
    ended = fitted(net, Start(init, 0.05, eikonal=0.1), batch, 3).params
    by_hand = adapt_eikonal(net, init, batch, 3, 0.05, 0.1).params
    assert torch.equal(ended, by_hand)
    assert (ended - fitted(net, Start(init, 0.05), batch, 3).params).abs().max() > 1e-4


# tuning


def test_the_grid_holds_five_rates_of_each_rule():
    for lr in (1e-2, 10.0):
        grid = rates(lr)
        assert set(grid) == {"sgd", "adam"} and all(len(set(r)) >= 5 for r in grid.values())
        assert min(grid["sgd"]) == pytest.approx(lr / 10) and lr in grid["sgd"]
        assert max(grid["sgd"]) == pytest.approx(lr * 10) and 1e-3 in grid["adam"]


def test_tune_takes_the_best_of_the_grid_and_skips_what_diverged():
    batch, init = image_batch(images(), NET), start()
    grid = {"sgd": (1e20, 1e-3, 1e-2), "adam": (1e-6, 1e-5)}
    ends = {
        (rule, lr): float(reached(NET, Start(init, lr, rule), batch, [2])[0].mean())
        for rule, tried in grid.items()
        for lr in tried
    }
    assert math.isnan(ends["sgd", 1e20])
    found = tune(NET, init, batch, 2, grid=grid, beyond=0)
    finite = {key: value for key, value in ends.items() if not math.isnan(value)}
    assert (found.start.rule, found.start.lr) == max(finite, key=finite.get)
    assert found.score == max(finite.values()) and torch.equal(found.start.init, init)
    with pytest.raises(ValueError, match="every rate diverged"):
        tune(NET, init, batch, 2, grid={"sgd": (1e20, 1e30)}, beyond=1)


def test_tune_on_several_batches_takes_the_mean_over_their_tasks():
    pictures, init = images(3), start()
    grid = {"sgd": (1e-3, 1e-2, 3e-2), "adam": (1e-4, 1e-3)}
    parts = [image_batch(p, NET) for p in (pictures[:1], pictures[1:])]
    one = tune(NET, init, image_batch(pictures, NET), 2, grid=grid, metric="mae")
    many = tune(NET, init, parts, 2, grid=grid, metric="mae")
    assert (one.start.rule, one.start.lr) == (many.start.rule, many.start.lr)
    assert one.score == pytest.approx(many.score, abs=1e-4)
    theta = fm.adapt(NET, init, parts[1], 2, many.start.lr, rule=many.start.rule).params
    error = (fm.mlp(NET, theta, parts[1].x) - parts[1].y).abs().mean((1, 2))
    alone = tune(NET, init, parts[1], 2, grid={many.start.rule: (many.start.lr,)}, metric="mae")
    assert alone.score >= float((-20 * error.log10()).mean()) - 1e-4


@pytest.mark.parametrize(
    "peak, best, inside, tries",
    [
        (1e-2, 1e-2, True, 3),  # in the middle: nothing beyond is tried
        (0.27, 0.3, True, 5),
        (1e-4, 1e-3 / 9, True, 6),
        (1e3, 2.7, False, 6),  # three rates further, and still the last
    ],
)
def test_the_search_goes_on_beyond_the_ends_of_the_grid(peak, best, inside, tries):
    asked = []

    def score(lr):
        asked.append(lr)
        return -abs(math.log(lr / peak))

    lr, top, sure = _best_rate(score, (1e-3, 1e-2, 1e-1), 3)
    assert (lr, sure, len(asked)) == (pytest.approx(best), inside, tries)
    assert top == max(map(score, asked[:tries]))


def test_rates_that_all_diverge_send_the_search_down():
    lr, _, inside = _best_rate(lambda lr: -math.inf if lr > 0.05 else lr, (0.1, 0.3, 1.0), 3)
    assert (lr, inside) == (pytest.approx(0.1 / 3), True)


# starts


def parts(params):
    return [p for layer in NET.layers(params) for p in layer]


def test_standard_is_the_networks_own_init():
    assert torch.equal(baselines.standard(NET, seed=4), start(4))
    assert not torch.equal(baselines.standard(NET, seed=4), baselines.standard(NET, seed=5))


def test_mean_is_the_mean_of_weights_adapted_one_by_one():
    pictures = images(4)
    got = baselines.mean(NET, image_batch(pictures, NET), 5, 1e-3, seed=2)
    alone = [
        fm.adapt(NET, start(2), image_batch(p[None], NET), 5, 1e-3, rule="adam").params[0]
        for p in pictures
    ]
    torch.testing.assert_close(got, torch.stack(alone).mean(0), rtol=0, atol=1e-6)
    assert (got - alone[0]).abs().max() > 1e-3  # the images pull apart


def test_matched_has_each_parts_mean_and_deviation():
    init = start() + 0.3
    got = baselines.matched(NET, init, seed=0)
    assert torch.equal(got, baselines.matched(NET, init, seed=0))
    assert not torch.equal(got, baselines.matched(NET, init, seed=1))
    for part, new in zip(parts(init), parts(got), strict=True):
        spread, n = float(part.std(correction=0)), part.numel()
        assert abs(float(new.mean() - part.mean())) <= 5 * spread / n**0.5 + 1e-6
        assert abs(float(new.std(correction=0)) - spread) <= 5 * spread / (2 * n) ** 0.5 + 1e-6
        if spread > 1e-6:  # biases are all alike
            assert (new != part).all()


def test_shuffled_permutes_each_matrix_and_each_bias():
    init = torch.arange(NET.num_params, dtype=torch.float32)
    got = baselines.shuffled(NET, init, seed=0)
    for part, new in zip(parts(init), parts(got), strict=True):
        assert torch.equal(new.flatten().sort().values, part.flatten())
        assert new.numel() < 10 or not torch.equal(new, part)
    assert not torch.equal(got, baselines.shuffled(NET, init, seed=1))


# pictures


def test_strip_shows_the_target_and_every_step_in_its_place(tmp_path):
    """Each cell is one flat colour, so the picture says which image was drawn where."""
    levels = torch.linspace(0.1, 0.9, 9)

    def flat(level):
        return level.expand(8, 8, 3)

    rows = {
        name: [[(flat(levels[2 + at] + k * 0.01), f"{k} dB") for k in (0, 2)] for task in range(2)]
        for at, name in enumerate(("learned", "standard"))
    }
    targets = [flat(level) for level in levels[:2]]
    viz.strip(tmp_path / "strip.png", targets, rows, ["0 steps", "2 steps"])
    drawn = np.asarray(Image.open(tmp_path / "strip.png").convert("RGB")).astype(int)
    for block, level in enumerate(levels[:2]):
        columns = [levels[2], levels[2] + 0.02, levels[3], levels[3] + 0.02, level]
        for value in columns:  # 96 x 96 pixels of it, but for the frame
            same = (abs(drawn - 255 * float(value)) <= 1.01).all(-1)
            assert same.sum() >= 90 * 90, (block, float(value))
    places = []
    for value in (levels[0], levels[2], levels[2] + 0.02):  # target, step 0, step 2
        same = (abs(drawn - 255 * float(value)) <= 1.01).all(-1)
        places.append(float(np.median(same.nonzero()[1])))
    assert places == sorted(places) and min(np.diff(places)) >= 96


def test_learning_curves_draw_every_start(tmp_path):
    curves = {"learned": torch.rand(4, 3) + 20, "standard": torch.rand(1, 3) + 10}
    viz.learning_curves(tmp_path / "curve.png", curves, title="two")
    drawn = np.asarray(Image.open(tmp_path / "curve.png").convert("RGB")).astype(int)
    for colour in ((31, 119, 180), (255, 127, 14)):  # matplotlib's first two
        assert (abs(drawn - np.array(colour)) <= 2).all(-1).sum() > 100


def test_learning_curves_lie_where_their_columns_do(tmp_path):
    """Markers at x = 1, 2, 25: half-way on a plain axis it would be 13, on a logarithmic one 5."""
    scores = {"learned": torch.tensor([[10.0, 15.0, 30.0]] * 2)}  # the legend is half-way up
    viz.learning_curves(tmp_path / "c.png", scores, x=[1, 2, 25], across="views")
    drawn = np.asarray(Image.open(tmp_path / "c.png").convert("RGB")).astype(int)
    rows, columns = (abs(drawn - np.array((31, 119, 180))) <= 2).all(-1).nonzero()
    low, high = rows.max() - 3, rows.min() + 3  # middles of markers 7 pixels high
    first, middle, last = (
        np.median(columns[abs(rows - row) <= 1]) for row in (low, low + (high - low) / 4, high)
    )
    assert (middle - first) / (last - first) == pytest.approx(math.log(2) / math.log(25), abs=0.02)
