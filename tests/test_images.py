"""tasks/images.py: what is read from where, how it is split, and the batches made of it."""

import io
import os
import re
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmeta import rng, viz
from fastmeta.spec import MLP, siren
from fastmeta.tasks import images as im
from fastmeta.tasks.files import Memory


def data(path):
    """A file of the real data; absent: skip, or fail where FASTMETA_TEST_DATA names its folder."""
    beside = Path(__file__).resolve().parents[1] / "../shared/data"
    found = Path(os.environ.get("FASTMETA_DATA") or beside) / path
    name = path.split("/")[0]
    if not found.exists():
        required = re.split(r"[,\s]+", os.environ.get("FASTMETA_TEST_DATA", ""))
        assert name not in required, f"FASTMETA_TEST_DATA names {name}, {found} is absent"
        pytest.skip(f"{name}: {found} is absent; set FASTMETA_DATA to the folder that holds it")
    return found


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def one_line(match, call, *args, error=ValueError, **kwargs):
    with pytest.raises(error, match=match) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)


def counted(images):
    """The set, and the list of rows its reader was asked for."""
    reads = []
    return replace(images, read=lambda row: reads.append(row) or images.read(row)), reads


# grid


def test_grid_in_each_convention():
    i, j = np.divmod(np.arange(6), 3)  # 2 rows, 3 columns
    wanted = {
        "unit": (i / 2, j / 3),
        "unit_xy": (j / 3, i / 2),
        "centers": ((2 * i + 1) / 2 - 1, (2 * j + 1) / 3 - 1),
        "corners": (2 * i / 1 - 1, 2 * j / 2 - 1),
    }
    for coords, pair in wanted.items():
        got = im.grid(2, 3, coords)
        assert got.dtype == torch.float32
        np.testing.assert_array_equal(got.numpy(), np.stack(pair, 1).astype(np.float32))
    assert im.grid(1, 2, "corners").tolist() == [[0.0, -1.0], [0.0, 1.0]]
    im.grid(2, 3).zero_()
    assert im.grid(2, 3)[5].tolist() == [0.5, float(np.float32(2 / 3))]  # nobody's copy is shared
    for coords in ("world", "polar"):
        one_line(
            f"grid: coords is '{coords}'; accepted for pixels are unit, ", im.grid, 2, 2, coords
        )


# reading


def test_a_folder_is_read_sorted_and_hidden_files_are_left_out(tmp_path):
    pixels = noise(4, 5, 7, 3)
    (tmp_path / "b" / ".thumbs").mkdir(parents=True)
    for name, p in zip(("b/2.png", "a.BMP", "b/10.tiff", "b/.x.png"), pixels, strict=True):
        Image.fromarray(p).save(tmp_path / name, format=None if name[0] != "a" else "BMP")
    Image.fromarray(pixels[0]).save(tmp_path / "b/.thumbs/1.png")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "b/up").symlink_to(tmp_path)  # a loop
    images = im.open_images(tmp_path, size=None)
    assert images.names == ("a.BMP", "b/10.tiff", "b/2.png")
    assert (len(images), images.size, images.channels) == (3, (5, 7), 3)
    for index, source in enumerate((1, 2, 0)):
        wanted = pixels[source].astype(np.float32) / np.float32(255)
        np.testing.assert_array_equal(images[index].numpy(), wanted)
    assert images[-1].equal(images[2])
    with pytest.raises(IndexError):
        images[3]
    single = im.open_images(tmp_path / "b/2.png", size=None)
    assert single.names == ("2.png",) and single[0].equal(images[2])


def test_crop_is_centred_and_keeps_pixels_where_no_resize_is_needed(tmp_path):
    pixels = noise(6, 11, 3)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    Image.fromarray(pixels.transpose(1, 0, 2)).save(tmp_path / "tall.png")
    tall, wide = im.open_images(tmp_path, size=6)
    wanted = pixels[:, 2:8].astype(np.float32) / np.float32(255)
    np.testing.assert_array_equal(wide.numpy(), wanted)
    np.testing.assert_array_equal(tall.numpy(), wanted.transpose(1, 0, 2))
    assert im.open_images(tmp_path, size=(3, 12)).take([1])[0].shape == (3, 12, 3)


def test_resize_averages_instead_of_skipping():
    checker = np.indices((64, 64)).sum(0) % 2  # every second pixel alone would be all 0 or all 1
    small = im.open_images(checker[None].astype(np.float32), size=8, channels=1)[0]
    assert (small - 0.5).abs().max() < 0.02
    ramp = np.linspace(0, 1, 64)[None, None].repeat(64, 1)  # [1,64,64], along columns
    small = im.open_images(ramp, size=16, channels=1)[0]
    inner = small[4:12, 3:-3, 0]  # Lanczos looks three pixels far
    wanted = torch.from_numpy(ramp[0, 0].reshape(16, 4).mean(1)[3:-3]).float()
    assert (inner - wanted).abs().max() < 1e-4  # a line stays a line
    assert im.open_images((ramp > 0.5), size=16, channels=1)[0].max() == 1  # overshoot is clipped


def test_alpha_goes_onto_white(tmp_path):
    pixels = np.zeros((2, 4, 4, 4), np.uint8)
    pixels[0] = (200, 100, 0, 51)  # a fifth
    pixels[1, ..., 3] = 0
    wanted = torch.tensor([0.2 * 200 + 0.8 * 255, 0.2 * 100 + 0.8 * 255, 0.8 * 255]) / 255
    for n, p in enumerate(pixels):
        Image.fromarray(p).save(tmp_path / f"{n}.png")
    for source in (tmp_path, pixels, torch.from_numpy(pixels), pixels / 255):
        first, second = im.open_images(source, size=4)
        assert (first - wanted).abs().max() <= 1 / 255
        assert second.eq(1).all()
    luma = float(wanted @ torch.tensor([0.299, 0.587, 0.114]))
    for source in (pixels, pixels / 255):
        grey = im.open_images(source, size=4, channels=1)[0]
        assert grey.shape == (4, 4, 1) and (grey - luma).abs().max() <= 1.5 / 255
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "p.png")
    palette.save(tmp_path / "q.gif", transparency=1)
    opened = im.open_images(tmp_path, size=4)
    assert (opened[2][1, 1] * 255).round().tolist() == [10, 20, 30]
    assert opened.names[3] == "q.gif" and opened[3].eq(1).all()


def test_modes_of_pillow(tmp_path):
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "cmyk.tif")
    Image.fromarray(np.eye(4, dtype=bool)).save(tmp_path / "one.png")
    Image.new("LA", (4, 4), (0, 0)).save(tmp_path / "la.png")
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "rgb.ppm")
    images = im.open_images(tmp_path, size=4)
    assert images.names == ("cmyk.tif", "la.png", "one.png", "rgb.ppm")
    assert images[0].flatten(0, 1).unique(dim=0).tolist() == [[1.0, 0.0, 0.0]]
    assert images[1].eq(1).all()
    assert images[2].equal(torch.eye(4)[..., None].expand(4, 4, 3))
    grey = im.open_images(tmp_path, size=4, channels=1)
    assert grey[3].eq(76 / 255).all()  # 0.299 · 255


def test_sixteen_bits_are_kept(tmp_path):
    pixels = (np.arange(36, dtype=np.uint16) * 1800 + 7).reshape(6, 6)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).save(tmp_path / "b.tif")
    Image.fromarray(pixels.astype(np.int32)).save(tmp_path / "c.pgm")
    Image.fromarray((pixels / 65535).astype(np.float32)).save(tmp_path / "d.tif")
    np.save(tmp_path / "e.npy", pixels.astype(">u2")[None])
    wanted = torch.from_numpy((pixels / 65535.0).astype(np.float32))[..., None]
    for image in im.open_images(tmp_path, size=None, channels=1):
        assert (image - wanted).abs().max() < 1e-7
    assert im.open_images(tmp_path, size=6, channels=3)[0].equal(wanted.expand(6, 6, 3))
    assert im.open_images(tmp_path / "e.npy", size=None, channels=1)[0].equal(wanted)
    assert im.open_images(pixels[None], size=6, channels=1)[0].equal(wanted)
    assert im.open_images(torch.from_numpy(pixels)[None], size=6)[0].equal(wanted.expand(6, 6, 3))
    Image.fromarray(pixels.astype(np.int32) * 40).save(tmp_path / "f.tif")
    bad = im.open_images(tmp_path / "f.tif", size=6)
    one_line(r"f\.tif has values from 280 to \d+; accepted are 8 or 16 bits", bad.__getitem__, 0)


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
def test_exif_turns_the_photo(tmp_path, kind):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :8] = 255  # a white corner, top left as stored
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    options = {"jpg": {"quality": 100}, "webp": {"lossless": True}}.get(kind, {})
    Image.fromarray(pixels).save(tmp_path / f"a.{kind}", exif=exif, **options)
    images = im.open_images(tmp_path, size=None)
    assert images.size == (32, 16)
    image = images[0]
    assert image[1:7, 9:15].min() > 0.9 and image[:, :7].max() < 0.1 and image[9:].max() < 0.1


@pytest.mark.parametrize("cut", [0, 2, 4, 8])  # decoded at 1/8, 1/2, 1/4, 1/8
def test_a_large_jpeg_is_close_to_the_whole_decode(tmp_path, cut):
    coarse = Image.fromarray(noise(30, 40))  # detail down to the pixels of the target
    coarse = coarse.resize((1200 - cut, 904 - cut), Image.Resampling.BICUBIC)
    coarse.save(tmp_path / "a.jpg", quality=95)
    box = (148, 0, 1052 - cut, 904 - cut)
    whole = Image.open(tmp_path / "a.jpg").resize((32, 32), Image.Resampling.LANCZOS, box)
    error = (
        im.open_images(tmp_path, size=32, channels=1)[0][..., 0].numpy() - np.asarray(whole) / 255
    )
    assert np.abs(error).max() < 4 / 255


def test_arrays():
    pixels = noise(3, 8, 8, 3)
    for source in (pixels, torch.from_numpy(pixels), pixels.astype(np.float64) / 255):
        images = im.open_images(source, size=8)
        assert images.names == ("0", "1", "2")
        wanted = torch.from_numpy(pixels[1]).float() / 255
        assert (images[1] - wanted).abs().max() < 1e-7 and images[1].dtype == torch.float32
    images[1].zero_()
    assert images[1].max() > 0  # what is handed out is a copy
    assert im.open_images(pixels[..., 0], size=8)[2].equal(
        (torch.from_numpy(pixels[2, ..., :1]).float() / 255).expand(8, 8, 3)
    )
    assert im.open_images(pixels > 99, size=None)[0].unique().tolist() == [0, 1]
    taken = images.take([2, 0]).take(torch.tensor([1]))
    assert taken.names == ("0",) and taken[0].equal(images[0])
    assert im.open_images(torch.rand(1, 4, 4, 3).bfloat16(), size=4)[0].shape == (4, 4, 3)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (noise(2, 8, 8, 2), r"shape \(2, 8, 8, 2\); accepted are .*channels last, C = 1, 3 or 4"),
        (noise(2, 3, 8, 8), "channels last"),
        (noise(8, 8, 3), "one image; accepted is"),
        (noise(8, 8), r"accepted are \[n,H,W\]"),
        (noise(0, 8, 8), "none empty"),
        (
            noise(2, 8, 8).astype(np.int64),
            "holds int64; accepted are uint8, uint16, bool and floats",
        ),
        (np.array([[["a"]]]), "holds <U1; accepted"),
        (np.array([[[{}]]]), "holds object; accepted"),
        ({"a": 1}, "source is a dict; accepted are a folder, png, jpg"),
    ],
)
def test_arrays_refused(bad, match):
    one_line(f"^images: .*{match}", im.open_images, bad)


@pytest.mark.parametrize("size", [4, 2])
@pytest.mark.parametrize("value", [np.nan, 1.01, -0.5, 255.0, np.inf])
def test_floats_outside_the_range_name_the_image(value, size):
    pixels = np.full((3, 4, 4, 3), 0.5)
    pixels[1, 2, 2, 2] = value
    images = im.open_images(pixels, size=size)
    assert images[0].eq(0.5).all()
    one_line("^images: 1 has values from .* accepted are floats in", images.__getitem__, 1)


@pytest.mark.parametrize("size", [0, -1, 2.5, (3,), (3, 0), "64"])
def test_sizes_refused(size):
    one_line("images: size is .*; accepted are n and", im.open_images, noise(1, 4, 4), size=size)


def test_other_arguments_refused():
    one_line("images: channels is 2", im.open_images, noise(1, 4, 4), channels=2)
    one_line("memory -1; accepted", im.open_images, noise(1, 4, 4), memory=-1)


# broken files


def test_broken_sources(tmp_path):
    gone = tmp_path / "gone"
    one_line("gone does not exist; accepted are a folder", im.open_images, gone, error=OSError)
    (tmp_path / "empty").mkdir()
    one_line("empty holds no image, accepted are png, jpg", im.open_images, tmp_path / "empty")
    np.save(tmp_path / "empty/set.npy", noise(1, 4, 4))
    one_line("set.npy in it can be given by its own path", im.open_images, tmp_path / "empty")
    (tmp_path / "a.mp4").touch()
    one_line("ends in '.mp4'; accepted are", im.open_images, tmp_path / "a.mp4")
    for content in (b"", b"hello", b"\x89PNG\r\n\x1a\n" + b"\0" * 40, b"\xff\xd8\xff\xe0"):
        (tmp_path / "x.png").write_bytes(content)
        match = r"^images: x\.png is truncated or not an image \(Pillow: .+\); accepted are png, "
        one_line(match, im.open_images, tmp_path / "x.png", error=OSError)


@pytest.mark.parametrize("kind", ["png", "jpg", "bmp", "gif", "webp", "tif", "ppm"])
def test_truncated_files_are_named_when_read(tmp_path, kind):
    whole = io.BytesIO()
    names = {"jpg": "JPEG", "tif": "TIFF"}
    Image.fromarray(noise(40, 40, 3)).save(whole, format=names.get(kind, kind))
    content = whole.getvalue()
    (tmp_path / f"bad.{kind}").write_bytes(content[: len(content) * 2 // 3])
    (tmp_path / f"good.{kind}").write_bytes(content)

    def read():
        return im.open_images(tmp_path, size=40)[0]

    match = rf"^images: bad\.{kind} is truncated or not an image \(Pillow: .+\); accepted are png, "
    one_line(match, read, error=OSError)


def test_a_file_that_changes_or_goes_after_opening(tmp_path):
    for name in ("a.png", "b.png"):
        Image.fromarray(noise(8, 8, 3)).save(tmp_path / name)
    images = im.open_images(tmp_path, size=8)
    (tmp_path / "a.png").unlink()
    one_line("a.png cannot be opened", images.__getitem__, 0, error=FileNotFoundError)
    assert images[1].shape == (8, 8, 3)


def test_native_sizes_must_agree(tmp_path):
    for n, name in ((8, "a.png"), (9, "b.png")):
        Image.fromarray(noise(8, n, 3)).save(tmp_path / name)
    match = r"b\.png has \(8, 9\) pixels \(height, width\), a\.png has \(8, 8\)"
    one_line(match, im.open_images, tmp_path, size=None)
    assert len(im.open_images(tmp_path, size=4)) == 2


class Hostile:
    def __reduce__(self):
        return (os.mkdir, ("pwned",))


def test_pickles_are_refused_and_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad = np.empty((1, 4, 4), object)
    bad[:] = Hostile()
    np.savez("a.npz", images=bad)
    np.savez("b.npz", images=noise(1, 4, 4), names=bad[0, 0, :1])
    np.save("c.npy", bad)
    one_line("images in a.npz is pickled; accepted are plain arrays", im.open_images, "a.npz")
    one_line("names in b.npz is pickled", im.open_images, "b.npz")
    one_line("c.npy is no readable .npy", im.open_images, "c.npy")
    assert not Path("pwned").exists()


def test_npz(tmp_path):
    path = tmp_path / "set.npz"
    pixels = noise(3, 8, 8, 3)
    np.savez_compressed(path, images=pixels, names=["x", "y", "z"], other=noise(2, 4, 4))
    images = im.open_images(path, size=8)
    assert images.names == ("x", "y", "z")
    np.testing.assert_array_equal(images[2].numpy(), pixels[2].astype(np.float32) / np.float32(255))
    np.savez(path, slices=pixels[..., 0], spacing=np.zeros(2))
    assert im.open_images(path, size=8, channels=1)[0].shape == (8, 8, 1)
    np.savez(path, a=pixels, b=pixels)
    one_line('holds a, b; accepted is an array called "images"', im.open_images, path)
    np.savez(path, images=pixels, names=["x"])
    one_line(r"names in .* is <U1 \(1,\); accepted are 3 strings", im.open_images, path)
    np.savez(path, images=pixels[None])
    one_line(r"set\.npz has shape \(1, 3, 8, 8, 3\); accepted", im.open_images, path)
    content = path.read_bytes()
    path.write_bytes(content[:200])
    one_line("set.npz is no readable .npz", im.open_images, path)
    pixels = noise(30, 64, 64)
    np.savez(path, images=pixels)
    content = path.read_bytes()
    path.write_bytes(content.replace(pixels[20].tobytes(), pixels[0].tobytes()))
    one_line(r"set\.npz is damaged \(Bad CRC-32", im.open_images, path)


def test_an_npz_beyond_the_memory_is_refused_by_its_header(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((100, 64, 64, 3), np.uint8))
    monkeypatch.setattr(np, "load", None)  # not even touched
    match = "needs 1228800 bytes, memory is 1000000; a .npz is read whole: save it as .npy"
    one_line(match, im.open_images, tmp_path / "a.npz", memory=10**6)


# memory


def test_a_set_larger_than_the_memory_is_read_again_and_not_held(tmp_path):
    for n in range(6):
        Image.fromarray(noise(8, 8, 3, seed=n)).save(tmp_path / f"{n}.png")
    one = 8 * 8 * 3
    images, reads = counted(im.open_images(tmp_path, size=8, memory=2 * one + 1))
    first = torch.stack(list(images))
    assert reads == [0, 1, 2, 3, 4, 5]
    assert (images.cached, images.memory.used) == (2, 2 * one)
    assert torch.stack(list(images)).equal(first)
    assert reads[6:] == [2, 3, 4, 5]  # what is held is not read again, the rest is
    part = images.take([5, 1])
    assert part.cached == 1 and part.memory is images.memory
    whole, reads = counted(im.open_images(tmp_path, size=8))
    assert torch.stack([*whole, *whole])[6:].equal(first) and len(reads) == 6


def test_npy_is_mapped_and_arrays_are_not_held_twice(tmp_path):
    pixels = noise(50, 16, 16, 3)
    np.save(tmp_path / "a.npy", pixels)
    images, reads = counted(im.open_images(tmp_path / "a.npy", size=16, memory=768 * 3))
    for _ in range(2):
        np.testing.assert_array_equal(
            torch.stack(list(images)).numpy(), pixels.astype(np.float32) / np.float32(255)
        )
    assert len(reads) == 50 + 47 and images.cached == 3
    assert all(
        type(held) is np.ndarray and held.base is None for held in images.memory.held.values()
    )
    in_memory = im.open_images(pixels, size=16)
    list(in_memory)
    assert in_memory.cached == 0
    resized = im.open_images(pixels, size=8)
    list(resized)
    assert resized.cached == 50
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:5000])
    one_line("a.npy is no readable .npy", im.open_images, tmp_path / "a.npy")


def test_an_npy_far_beyond_the_memory_is_opened_at_once(tmp_path):
    shape = (400_000, 64, 64, 3)  # 4.9 GB of holes
    mapped = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.uint8, shape)
    mapped[399_999] = 255
    del mapped
    start = time.perf_counter()
    images = im.open_images(tmp_path / "a.npy", memory=10**6)
    assert images[-1].eq(1).all() and images[7].eq(0).all()
    assert time.perf_counter() - start < 2


def test_a_reader_of_the_wrong_shape_is_caught():
    images = im.ImageSet(lambda row: np.zeros((4, 5, 3), np.uint8), ("x",), (4, 4), 3)
    one_line(r"images: x is \(4, 5, 3\); accepted is \(4, 4, 3\)", images.__getitem__, 0)


# splits


def names_only(names):
    return im.ImageSet(lambda row: np.zeros((2, 2, 1), np.uint8), tuple(names), (2, 2), 1)


def test_split_is_a_partition_of_about_the_right_shares():
    images = names_only(f"{i}.png" for i in range(5000))
    parts = im.split(images, validation=0.2, test=0.1, seed=3)
    names = [set(part.names) for part in parts]
    assert sum(map(len, parts)) == 5000 and set.union(*names) == set(images.names)
    for part, share in zip(parts, (0.7, 0.2, 0.1), strict=True):
        sigma = (share * (1 - share) * 5000) ** 0.5
        assert abs(len(part) - share * 5000) < 4 * sigma
    again = im.split(images, validation=0.2, test=0.1, seed=3)
    assert [p.names for p in again] == [p.names for p in parts]
    other = im.split(images, validation=0.2, test=0.1, seed=4)
    assert len(set(other[1].names) & names[1]) < 0.3 * len(names[1])  # 0.2 by chance


def test_split_stays_when_images_come():
    few = names_only(f"{i}.png" for i in range(0, 400, 2))
    many = names_only(f"{i}.png" for i in range(400))
    for small, large in zip(im.split(few), im.split(many), strict=True):
        assert set(small.names) <= set(large.names) and len(small) > 0


def test_groups_never_straddle():
    images = names_only(f"set/{person:03d}_{k}.jpg" for person in range(60) for k in range(5))
    parts = im.split(images, validation=0.3, test=0.3, group=r"(\d+)_")
    people = [{name[4:7] for name in part.names} for part in parts]
    assert all(people) and not people[0] & people[1] and not people[1] & people[2]
    assert not people[0] & people[2] and sum(map(len, people)) == 60
    assert [len(p) for p in parts] == [5 * len(p) for p in people]
    wrong = names_only(["1_a", "b"])
    one_line(r"split: b does not match group '\(\\\\d\+\)_'", im.split, wrong, group=r"(\d+)_")
    one_line("has 0 groups; accepted is one", im.split, wrong, group=r"\d+_")
    one_line("is no regular expression", im.split, wrong, group="(")


@pytest.mark.parametrize("seed", range(40))
def test_every_part_with_a_share_has_an_image(seed):
    for n in (3, 4, 10):
        parts = im.split(names_only(map(str, range(n))), seed=seed)
        assert all(len(part) for part in parts) and sum(map(len, parts)) == n
        train, validation, test = im.split(names_only(map(str, range(n))), seed=seed, test=0)
        assert len(train) and len(validation) and not len(test)
    assert [len(p) for p in im.split(names_only("a"), seed=seed)] == [1, 0, 0]
    assert [len(p) for p in im.split(names_only("ab"), seed=seed)][0] == 1
    everything = im.split(names_only(map(str, range(9))), seed=seed, validation=0, test=1)
    assert [len(p) for p in everything] == [0, 0, 9]


def test_shares_refused():
    for shares in ({"validation": -0.1}, {"validation": 0.6, "test": 0.6}, {"test": float("nan")}):
        one_line("split: validation is .* sum to at most 1", im.split, names_only("abc"), **shares)


def test_open_splits_uses_sub_folders(tmp_path):
    def put(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise(8, 8, 3)).save(tmp_path / name)

    put(*(f"train/c/{i}.png" for i in range(9)), "Validation/v.png", "cover.png")
    train, validation, test = im.image_splits(tmp_path, size=8)
    assert validation.names == ("Validation/v.png",) and len(test) >= 1
    assert {*train.names, *test.names} == {f"train/c/{i}.png" for i in range(9)}
    assert len(train) + len(test) == 9 and train.memory is test.memory
    put("test/t.png")
    train, validation, test = im.image_splits(tmp_path, size=8)
    assert (len(train), validation.names, test.names) == (9, ("Validation/v.png",), ("test/t.png",))
    flat = im.image_splits(tmp_path / "train", size=8, seed=1)
    direct = im.split(im.open_images(tmp_path / "train", size=8), seed=1)
    assert [p.names for p in flat] == [p.names for p in direct]


# batches


def test_image_batch_is_the_grid_and_the_pixels():
    images = torch.rand(2, 3, 5, 3, dtype=torch.float64)
    net = siren(2, 3, width=8, depth=3)
    batch = im.image_batch(images, net)
    assert batch.x.shape == (15, 2) and batch.query is None and batch.counts is None
    assert batch.x.dtype == torch.float64  # in full precision, not the float32 grid widened
    assert batch.x[7].tolist() == [1 / 3, 2 / 5] and batch.y[1, 7].equal(images[1, 1, 2])
    assert im.to_pixels(batch.y, (3, 5)).equal(images)
    centers = MLP(2, 3, 8, 3, coords="centers")
    assert im.image_batch(images.float(), centers).x.equal(im.grid(3, 5, "centers"))
    seed = torch.tensor([5, 6])
    batch = im.image_batch(images, net, seed=seed, per_step=4)
    assert batch.per_step == 4 and batch.seed.equal(seed)


def test_ragged_batch_matches_a_gather_by_hand():
    T, H, W = 3, 5, 7
    images = torch.rand(T, H, W, 3)
    seen = torch.rand(T, H, W) < torch.tensor([0.2, 0.5, 0.8])[:, None, None]
    seen[:, 0, 0], seen[:, 0, 1] = True, False
    seed = torch.tensor([1, 2, 3])
    net = siren(2, 3, width=8, depth=3)
    batch = im.image_batch(images, net, seen=seen, seed=seed, per_step=2)
    assert batch.seed.equal(seed) and batch.per_step == 2 and batch.query.per_step is None
    for part, chosen in ((batch, seen), (batch.query, ~seen)):
        assert part.points == int(part.counts.max()) and len(set(part.counts.tolist())) == 3
        for t in range(T):
            places = [(i, j) for i in range(H) for j in range(W) if chosen[t, i, j]]
            n = int(part.counts[t])
            assert n == len(places)
            x = np.array([[i / H, j / W] for i, j in places], np.float32)
            np.testing.assert_array_equal(part.x[t, :n].numpy(), x)
            assert part.y[t, :n].equal(torch.stack([images[t, i, j] for i, j in places]))
            assert not part.x[t, n:].any() and not part.y[t, n:].any()  # nothing hidden leaks


def test_image_batch_refuses():
    images, net = torch.rand(2, 4, 4, 3), siren(2, 3, width=8, depth=3)
    seen = torch.zeros(2, 4, 4, dtype=torch.bool)
    seen[0, 0] = True
    batch = im.image_batch
    one_line("task 1 has 0 of 16 pixels seen; accepted is some", batch, images, net, seen=seen)
    one_line("task 0 has 16 of 16 pixels seen", batch, images, net, seen=~seen | seen)
    one_line(r"seen is torch.float32 \(2, 4, 4\)", batch, images, net, seen=seen.float())
    one_line(r"seen is torch.bool \(4, 4\); accepted is bool", batch, images, net, seen=seen[0])
    match = "net goes from 2 to 3 features; accepted for these images is 2 to 1"
    one_line(match, batch, images[..., :1], net)
    one_line("accepted for these images is 2 to 3", batch, images, siren(3, 3, width=8, depth=3))
    one_line(r"images is torch.uint8 \(2, 4, 4, 3\)", batch, images.byte(), net)
    one_line("grid: coords is 'world'", batch, images, MLP(2, 3, 8, 3, coords="world"))


def test_masks():
    mask = im.mask
    for W, seen in ((6, 3), (7, 4)):
        left, top = mask("left", W, W, 2), mask("top", W, W, 2)
        assert left[1, 0].tolist() == [True] * seen + [False] * (W - seen)
        assert left.equal(top.mT)
    hidden = ~mask("center", 8, 12, 1)[0]
    assert hidden.nonzero().amin(0).tolist() == [2, 3] and int(hidden.sum()) == 4 * 6
    assert hidden.equal(hidden.flip(0, 1))
    every = mask("every:3", 7, 4, 2)[1]
    assert every.nonzero().tolist() == [[i, j] for i in (0, 3, 6) for j in (0, 3)]
    random = mask("random:0.25", 10, 10, 5, seed=7)
    assert random.sum((1, 2)).tolist() == [25] * 5 and len(random.unique(dim=0)) == 5
    assert mask("random:0.25", 10, 10, 2, seed=7).equal(random[:2])  # t depends on seed and t
    assert not mask("random:0.25", 10, 10, 5, seed=8).equal(random)
    often = mask("random:.5", 8, 8, 2000).float().mean(0)
    assert (often - 0.5).abs().max() < 5 * (0.25 / 2000) ** 0.5  # every pixel alike
    for kind in ("right", "random", "random:0", "random:1", "every:1", "every:2.5", "left:2", ""):
        one_line(f"mask: kind is '{kind}'; accepted are left, top, center", mask, kind, 4, 4, 1)
    one_line("leaves none seen, or all", mask, "center", 1, 1, 1)
    one_line("leaves none seen, or all", mask, "random:0.01", 4, 4, 1)


def test_to_pixels_refuses():
    one_line(
        r"y has shape \(2, 7, 3\); accepted for 2 x 4", im.to_pixels, torch.zeros(2, 7, 3), (2, 4)
    )


def test_save_png(tmp_path):
    image = torch.tensor([[[-1.0, 0.5, 0.4979], [2.0, 0.0019, 0.0020]]])
    path = tmp_path / "a.png"
    path.write_text("old")
    viz.save_png(path, image)
    assert np.asarray(Image.open(path)).tolist() == [[[0, 128, 127], [255, 0, 1]]]
    viz.save_png(str(path), image[..., :1].requires_grad_())
    assert np.asarray(Image.open(path)).shape == (1, 2) and list(tmp_path.iterdir()) == [path]
    one_line(r"shape \(2, 2\); accepted is \[H,W,C\]", viz.save_png, path, torch.zeros(2, 2))
    one_line("holds NaN", viz.save_png, path, image * float("nan"))
    gone = tmp_path / "gone" / "a.png"
    one_line("a.png: could not be written", viz.save_png, gone, image, error=OSError)
    assert np.asarray(Image.open(path)).tolist() == [[0, 255]]  # an error leaves the old one


def some(n, memory=2 << 30):
    pixels = noise(n, 8, 8, 3)
    return im.ImageSet(
        lambda row: pixels[row], tuple(map(str, range(n))), (8, 8), 3, Memory(memory)
    )


def test_batches_lay_permutations_end_to_end():
    images = some(7)
    got = list(im.batches(images, tasks=3, seed=5, stop=7))  # three epochs
    assert [step for step, _, _ in got] == list(range(7))
    order = torch.cat([indices for _, _, indices in got])
    assert order.equal(torch.cat([rng.permutation(5, epoch, 7) for epoch in range(3)]))
    for _, pixels, indices in got:
        assert pixels.equal(torch.stack([images[i] for i in indices.tolist()]))
    wide = list(im.batches(images, tasks=20, seed=5, stop=1))  # more tasks than images
    assert wide[0][2].equal(torch.cat([rng.permutation(5, e, 7) for e in range(3)])[:20])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_resumed_run_sees_the_same(threads):
    slow = some(11, memory=0)
    jitter = np.random.default_rng(0).random(10_000).tolist()
    read = slow.read
    slow = replace(slow, read=lambda row: time.sleep(jitter.pop() / 500) or read(row))
    whole = list(im.batches(slow, tasks=4, seed=9, stop=12, threads=1, ahead=1))
    resumed = im.batches(slow, tasks=4, seed=9, start=5, threads=threads, ahead=6)
    for (a, x, i), (b, y, j) in zip(whole[5:], resumed, strict=False):
        assert a == b and x.equal(y) and i.equal(j)
    resumed.close()


def loaders():
    return [t for t in threading.enumerate() if t.name.startswith("fastmeta-feed")]


def test_closing_ends_the_threads_and_reading_stays_ahead():
    images, reads = counted(some(50, memory=0))
    before = len(loaders())
    stream = im.batches(images, tasks=2, seed=0, threads=2, ahead=3)
    next(stream)
    assert len(loaders()) > before
    until = time.monotonic() + 5
    while len(reads) < 6 and time.monotonic() < until:
        time.sleep(0.01)
    assert len(reads) == 6  # three steps, one of them in use, and no more
    stream.close()
    assert len(loaders()) == before
    assert next(stream, None) is None


def test_an_error_surfaces_at_its_step(tmp_path):
    for n in range(6):
        Image.fromarray(noise(40, 40, 3)).save(tmp_path / f"{n}.png")
    content = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(content[: len(content) // 2])
    images = im.open_images(tmp_path, size=40)
    bad = rng.permutation(1, 0, 6).tolist().index(3)
    before = len(loaders())
    stream = im.batches(images, tasks=1, seed=1)
    for _ in range(bad):
        next(stream)
    one_line("images: 3.png is truncated", next, stream, error=OSError)
    assert len(loaders()) == before


def test_batches_refuses():
    for change in ({"tasks": 0}, {"start": -1}, {"threads": 0}, {"ahead": 0}):
        arguments = {"tasks": 1, "seed": 0, **change}
        one_line(
            "feed: 3 tasks to choose from, .* accepted are integers >= 1",
            im.batches,
            some(3),
            **arguments,
        )
    one_line("feed: 0 tasks", im.batches, some(3).take([]), tasks=1, seed=0)


def test_a_cached_step_is_cheap():
    images = im.open_images(noise(100, 64, 64, 3), size=64)
    stream = im.batches(images, tasks=3, seed=0)
    for _ in range(50):
        next(stream)
    times = []
    for _ in range(200):
        start = time.perf_counter()
        next(stream)
        times.append(time.perf_counter() - start)
    stream.close()
    print(f"{1e3 * np.median(times):.3f} ms a step")
    assert np.median(times) < 1e-3


# real data


def test_faces_are_read_and_split_by_person():
    path = data("faces_london/faces_178.npz")
    train, validation, test = im.image_splits(path, size=64, group=r"(\d+)_")
    people = [
        {name.split("/")[-1][:3] for name in part.names} for part in (train, validation, test)
    ]
    assert sum(map(len, people)) == 70 and not people[0] & (people[1] | people[2])
    assert len(train) + len(validation) + len(test) == 140 and len(validation) and len(test)
    image = test[0]
    assert image.shape == (64, 64, 3) and 0.05 < image.std() < 0.5
    with np.load(path) as file:
        whole = file["images"][file["names"].tolist().index(test.names[0])] / 255
    blocks = torch.from_numpy(whole[1:177, 1:177]).view(8, 22, 8, 22, 3).mean((1, 3))
    near = torch.nn.functional.adaptive_avg_pool2d(image.permute(2, 0, 1), 8).permute(1, 2, 0)
    assert (blocks - near).abs().max() < 0.05  # the same picture, not turned, not cropped


def test_photos_of_a_landmark_are_cropped_to_one_size():
    images = im.open_images(data("sacre_coeur/dense/images"), size=(48, 64))
    assert len(images) == 10
    for image in images:
        assert image.shape == (48, 64, 3) and image.std() > 0.05
