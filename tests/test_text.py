"""tasks/text.py: rendered strings are a function of (seed, index, size), legible, and fast."""

import time

import numpy as np
import pytest
import torch

from fastmeta.spec import siren
from fastmeta.tasks import images as im
from fastmeta.tasks import text


def stack(images):
    return torch.stack([images[i] for i in range(len(images))])


def test_an_image_depends_on_seed_and_index_alone():
    twelve = stack(text.text_images(12, size=32, seed=4))
    assert stack(text.text_images(5, size=32, seed=4)).equal(twelve[:5])  # a prefix
    assert stack(text.text_images(4, size=32, seed=4, first=7)).equal(twelve[7:11])
    assert text.text_images(12, size=32, seed=4)[9].equal(twelve[9])  # in any order
    assert not text.text_images(1, size=32, seed=5)[0].equal(twelve[0])
    assert len(twelve.flatten(1).unique(dim=0)) == 12
    taken = text.text_images(12, size=32, seed=4).take([3, 8])
    assert taken[1].equal(twelve[8]) and taken.names == ("text-4-3", "text-4-8")
    big = text.text_images(1, size=32, seed=2**70 - 5)
    assert big[0].shape == (32, 32, 3)


@pytest.mark.parametrize("size", [16, 64, (40, 90)])
def test_text_is_visible_on_its_ground(size):
    images = text.text_images(300, size=size, seed=1)
    H, W = images.size
    white, ink = 0, []
    for index in range(len(images)):
        image = images[index]
        colours, counts = image.view(-1, 3).unique(dim=0, return_counts=True)
        ground = colours[counts.argmax()]
        white += bool(ground.eq(1).all())
        weights = torch.tensor([0.299, 0.587, 0.114])
        luma = ((image - ground) @ weights).abs()  # [H,W]
        ink.append(float((luma > 0.3).float().mean()))
    assert images.names[0] == "text-1-0" and image.shape == (H, W, 3)
    # text differs by 0.35 in luma; at least 1 % of the pixels show it in 95 % of the images
    assert np.mean(np.array(ink) > 0.01) >= 0.95
    assert 0.02 < np.median(ink) < 0.4
    assert 0.4 < white / 300 < 0.65  # about half the grounds are white


def test_std_over_a_threshold():
    std = stack(text.text_images(300, seed=2)).flatten(1).std(1)
    assert (std > 0.05).float().mean() >= 0.95


def test_ink_is_apart_from_the_ground():
    draws = iter(torch.rand(500_000, generator=torch.Generator().manual_seed(0)).tolist())
    for _ in range(5000):
        ground = text._colour(draws)
        ink = text._ink(ground, draws)
        assert abs(text._luma(ink) - text._luma(ground)) >= 0.35


def test_lines_have_one_to_four_words():
    draws = iter(torch.rand(500_000, generator=torch.Generator().manual_seed(1)).tolist())
    drawn = [text._lines(draws) for _ in range(3000)]
    words = np.array([sum(len(line.split()) for line in lines) for lines in drawn])
    assert np.bincount(words).tolist()[0] == 0 and words.max() == 4
    assert (np.bincount(words)[1:] > 600).all()  # 750 each
    assert {len(lines) for lines in drawn} == {1, 2, 3}
    assert max(len(line.split()) for lines in drawn for line in lines) == 2
    used = {word.lower() for lines in drawn for line in lines for word in line.split()}
    assert len(used & set(text.WORDS)) > 0.9 * len(text.WORDS)


def test_splits_are_disjoint_and_do_not_move():
    train, validation, test = text.text_splits(24, 40, 10, 10, seed=3)
    assert [len(p) for p in (train, validation, test)] == [40, 10, 10]
    pixels = torch.cat([stack(p) for p in (train, validation, test)])
    assert len(pixels.flatten(1).unique(dim=0)) == 60
    assert len({*train.names, *validation.names, *test.names}) == 60
    more = text.text_splits(24, 80, 20, 5, seed=3)
    assert stack(more[0])[:40].equal(stack(train))
    assert stack(more[1])[:10].equal(stack(validation)) and stack(more[2]).equal(stack(test)[:5])


def test_it_is_an_image_set():
    images = text.text_images(9, size=16)
    step, pixels, indices = next(stream := im.batches(images, tasks=3, seed=0))
    stream.close()
    assert step == 0 and pixels.equal(torch.stack([images[i] for i in indices.tolist()]))
    assert im.image_batch(pixels, siren(2, 3, width=8, depth=3)).y.shape == (3, 256, 3)
    assert images.cached >= 3
    held = text.text_images(9, size=16, memory=16 * 16 * 3)
    assert stack(held).equal(stack(images)) and held.cached == 1
    assert [len(p) for p in im.split(images, validation=0.3, test=0.3)] != [9, 0, 0]


def test_without_matplotlib_pillows_own_font_serves(monkeypatch):
    usual = stack(text.text_images(6, seed=8))
    text._font.cache_clear()
    monkeypatch.setattr(text, "_folder", lambda: None)
    try:
        other = stack(text.text_images(6, seed=8))
    finally:
        text._font.cache_clear()
    assert other.flatten(1).std(1).min() > 0.03 and not other.equal(usual)


def test_numbers_refused():
    for bad in ({"count": -1}, {"count": 1, "first": -1}, {"count": 1, "first": 2**32}):
        with pytest.raises(ValueError, match="text_images: count is .*; accepted are 0 to"):
            text.text_images(**bad)
    for size in (7, (64, 4)):
        with pytest.raises(ValueError, match="size at least 8"):
            text.text_images(1, size=size)
    with pytest.raises(ValueError, match="text_images: size is 2.5; accepted"):
        text.text_images(1, size=2.5)
    with pytest.raises(ValueError, match=r"at most 2\*\*30 each"):
        text.text_splits(16, train=2**30 + 1)


def test_rendering_is_fast():
    images = text.text_images(400, size=64, seed=12)
    for row in range(200):
        images.read(row)  # fonts are loaded once for each size
    times = []
    for row in range(200, 400):
        start = time.perf_counter()
        images.read(row)
        times.append(time.perf_counter() - start)
    print(f"{1e3 * np.median(times):.3f} ms an image")
    assert np.median(times) < 2e-3
