"""tasks/audio.py, volumes.py, arrays.py and grids.py: what is read from where, and the batches made
of it."""

import io
import struct
import wave
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import fastmeta as fm
from fastmeta import rng
from fastmeta.spec import MLP, siren
from fastmeta.tasks import arrays, audio, images, volumes
from fastmeta.tasks.audio import Audio
from fastmeta.tasks.grids import lattice
from fastmeta.tasks.volumes import Volumes


def one_line(match, call, *args, error=ValueError, **kwargs):
    with pytest.raises(error, match=match) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)


def noise(*shape, seed=0, dtype=np.int16):
    info = np.iinfo(dtype)
    return np.random.default_rng(seed).integers(info.min, info.max, shape, dtype, endpoint=True)


def write(path, samples, rate=8000):
    from scipy.io import wavfile

    path.parent.mkdir(parents=True, exist_ok=True)
    wavfile.write(path, rate, samples)
    return path


def write24(path, samples):
    """24 bits, of the upper ones of int32 [n,c]."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(3)
        file.setframerate(8000)
        file.writeframes(samples.view(np.uint8).reshape(-1, 4)[:, 1:].tobytes())


def joined(tasks):
    return torch.cat([tasks[i] for i in range(len(tasks))]).numpy()


# audio: reading


@pytest.mark.parametrize("kind", ["u1", "i2", "i4", "f4", "f8", "i3", "extensible"])
def test_every_kind_of_wav_is_read_as_scipy_reads_it(tmp_path, kind):
    from scipy.io import wavfile

    path = tmp_path / "a.wav"
    if kind in ("i3", "extensible"):
        write24(path, noise(70, 2, dtype=np.int32))
    elif kind[0] == "f":
        write(path, np.random.default_rng(0).uniform(-1, 1, (70, 2)).astype(kind))
    else:
        write(path, noise(70, 2, dtype=np.dtype(kind)))
    truth = wavfile.read(path)[1].astype(np.float64)
    if kind == "extensible":  # the same data under WAVE_FORMAT_EXTENSIBLE, behind an odd chunk
        data = path.read_bytes()[-70 * 6 :]
        form = struct.pack("<HHIIHHHHI", 0xFFFE, 2, 8000, 48000, 6, 24, 22, 24, 3)
        form += struct.pack("<H", 1) + bytes.fromhex("000000001000800000aa00389b71")
        body = b"WAVE" + b"LIST" + struct.pack("<I", 3) + b"abc\0"
        body += b"fmt " + struct.pack("<I", len(form)) + form
        body += b"data" + struct.pack("<I", len(data)) + data
        path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    full = {"u1": 128, "i2": 2**15, "i4": 2**31, "i3": 2**31, "extensible": 2**31}.get(kind, 1)
    truth = ((truth - (128 if kind == "u1" else 0)) / full).astype(np.float32)
    tasks = audio.open_all(path, Audio(length=17, channels=2))
    assert tasks.names == tuple(f"a.wav#{k}" for k in range(4))  # two frames are left over
    np.testing.assert_array_equal(joined(tasks), truth[:68])
    assert tasks[0].dtype == torch.float32 and np.abs(truth).max() > 0.9


def test_channels_are_mixed_and_doubled(tmp_path):
    stereo, mono, four = noise(40, 2), noise(40), noise(40, 4)
    for name, samples in (("a/s.wav", stereo), ("b/m.WAV", mono), ("c/q.wav", four)):
        write(tmp_path / name, samples)
    (tmp_path / ".hidden.wav").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no")
    tasks = audio.open_all(tmp_path, Audio(length=40))
    assert tasks.names == ("a/s.wav#0", "b/m.WAV#0", "c/q.wav#0")
    for item, samples in zip(
        (tasks[i] for i in range(3)), (stereo, mono[:, None], four), strict=True
    ):
        wanted = samples.mean(1, keepdims=True) / 2**15
        np.testing.assert_allclose(item.numpy(), wanted, atol=2**-24)
    one_line("c/q.wav has 4 channels", audio.open_all, tmp_path, Audio(length=40, channels=2))
    (tmp_path / "c/q.wav").unlink()
    both = audio.open_all(tmp_path, Audio(length=40, channels=2))
    np.testing.assert_array_equal(both[0].numpy(), stereo / np.float32(2**15))
    np.testing.assert_array_equal(both[1].numpy(), np.stack([mono, mono], 1) / np.float32(2**15))


@pytest.mark.parametrize(
    ("stored", "rate"), [(8000, 16000), (16000, 8000), (44100, 16000), (8000, 11025)]
)
def test_windows_are_resampled_as_the_whole_is(tmp_path, stored, rate):
    from scipy.signal import resample_poly

    samples = np.cumsum(noise(9001, 2).astype(np.int64), 0) // 500  # a random walk: low and high
    samples = np.clip(samples, -(2**15), 2**15 - 1).astype(np.int16)
    samples[4000:4200] = 2**15 - 1  # a step, where the filter overshoots
    write(tmp_path / "a.wav", samples, stored)
    tasks = audio.open_all(tmp_path / "a.wav", Audio(length=250, rate=rate, channels=2))
    common = np.gcd(stored, rate)
    whole = resample_poly(samples / 2**15, rate // common, stored // common, axis=0)
    assert len(tasks) == len(whole) // 250
    # float32 in the filter's sum of 20 max(1, down/up) + 1 terms of size below 1
    wanted = np.clip(whole, -1, 1)[: 250 * len(tasks)]
    assert np.abs(joined(tasks) - wanted).max() < 20 * 3 * 2**-24
    assert np.abs(whole).max() > 1
    same = audio.open_all(tmp_path / "a.wav", Audio(length=250, rate=stored, channels=2))
    np.testing.assert_array_equal(joined(same), samples[:9000] / np.float32(2**15))


def test_arrays_of_sound(tmp_path):
    rows = noise(3, 21)
    np.save(tmp_path / "a.npy", rows)
    np.savez(tmp_path / "b.npz", audio=rows, other=rows, names=["x", "y", "z"])
    wanted = rows[:, :20].reshape(-1, 1) / np.float32(2**15)
    for source in (tmp_path / "a.npy", str(tmp_path / "b.npz"), rows, torch.from_numpy(rows)):
        tasks = audio.open_all(source, Audio(length=10))
        np.testing.assert_array_equal(joined(tasks), wanted)
        first = "x" if str(source).endswith("npz") else "0"
        assert tasks.names[:3] == (f"{first}#0", f"{first}#1", tasks.names[2])
    stereo = torch.rand(2, 8, 2) * 2 - 1
    assert audio.open_all(stereo, Audio(length=8, channels=2))[1].equal(stereo[1])


def test_windows_of_a_file_stay_together(tmp_path):
    for i in range(12):
        write(tmp_path / f"{i}.wav", noise(35, seed=i))
    parts = audio.open_splits(tmp_path, Audio(length=10, validation=0.3, test=0.2), seed=1)
    files = [{name.split("#")[0] for name in part.names} for part in parts]
    assert sum(map(len, files)) == 12 and all(files) and sum(map(len, parts)) == 36
    by_window = audio.open_splits(tmp_path, Audio(length=10, group="(.*)"), seed=1)
    assert {n.split("#")[0] for n in by_window[1].names} & {
        n.split("#")[0] for n in by_window[0].names
    }
    alone = audio.open_splits(tmp_path / "0.wav", Audio(length=5))  # of one file: by window
    assert sum(map(len, alone)) == 7 and all(map(len, alone))
    write(tmp_path / "new" / "train" / "a.wav", noise(20))
    write(tmp_path / "new" / "val" / "b.wav", noise(20))
    given = audio.open_splits(tmp_path / "new", Audio(length=10, test=0))
    assert [p.names for p in given] == [
        ("train/a.wav#0", "train/a.wav#1"),
        ("val/b.wav#0", "val/b.wav#1"),
        (),
    ]


def test_headers_come_first_and_windows_when_asked_for(tmp_path):
    for i in range(3):
        write(tmp_path / f"{i}.wav", noise(100))
    tasks = audio.open_all(tmp_path, Audio(length=50))
    good = (tmp_path / "1.wav").read_bytes()
    (tmp_path / "1.wav").write_bytes(good[:-10])  # cut after it was opened
    assert tasks[2].shape == (50, 1)
    one_line("1.wav has become shorter", tasks.__getitem__, 3)


def test_audio_refuses(tmp_path):
    def refused(match, source=tmp_path / "a.wav", error=ValueError, **options):
        one_line(
            f"audio: .*{match}",
            audio.open_all,
            source,
            Audio(**{"length": 50, **options}),
            error=error,
        )

    path = write(tmp_path / "a.wav", noise(100))
    good = path.read_bytes()
    for content, match in (
        (good[:-1], "a.wav is truncated .data are missing"),
        (good[:44], "data are missing"),
        (good[:30], "its header ends early"),
        (good[:12] + good[36:], "its header ends early"),
        (b"", "is no WAV .RIFF. file"),
        (b"OggS" + good, "is no WAV"),
        (good[:20] + b"\x06\0" + good[22:], "format 6 of 16 bits; accepted are PCM"),
        (good[:40] + b"\0\0\0\0", "a.wav has 0 samples; accepted is a window, 50, and more"),
    ):
        path.write_bytes(content)
        refused(match)
    write(path, noise(49))
    refused("a.wav has 49 samples")
    refused("a.wav has 25 samples", rate=4000, length=26)
    write(tmp_path / "b.wav", noise(100), 16000)
    write(path, noise(100))
    refused("b.wav is at 16000 Hz, a.wav at 8000; without a rate", tmp_path)
    assert len(audio.open_all(tmp_path, Audio(length=50, rate=8000))) == 3
    for value in (np.nan, 1.5):
        write(path, np.full(100, value, np.float32))
        one_line(
            r"audio: a.wav has values from (nan|1.5)",
            audio.open_all(path, Audio(length=9)).__getitem__,
            0,
        )
    np.save(tmp_path / "o.npy", np.array([[None]]))
    refused("o.npy is no readable .npy", tmp_path / "o.npy")
    np.save(tmp_path / "c.npy", np.zeros((2, 100), np.complex64))
    refused("c.npy holds complex64", tmp_path / "c.npy")
    np.save(tmp_path / "u.npy", np.zeros((2, 100), np.uint16))
    refused("u.npy holds uint16; accepted are int16", tmp_path / "u.npy")
    refused("shape .100,.; accepted are arrays of 2 or 3 axes", np.zeros(100))
    refused("shape .0, 100.; .* none empty", np.zeros((0, 100)))
    refused("rate is 8000, and an array does not say", np.zeros((1, 100)), rate=8000)
    refused("source is a list", [1.0])
    refused("gone does not exist", tmp_path / "gone", error=FileNotFoundError)
    (tmp_path / "empty").mkdir()
    refused("empty holds no .wav", tmp_path / "empty")
    refused("ends in '.mp3'; accepted are", write(tmp_path / "x.mp3", noise(9)))
    for change, match in (
        ({"length": 0}, "length is 0"),
        ({"rate": 0}, "rate is 0"),
        ({"channels": 3}, "channels is 3"),
    ):
        one_line(f"^audio: {match}; accepted", Audio, **change)


def test_bad_sounds_are_left_out_on_demand(tmp_path):
    for i in range(4):
        write(tmp_path / f"{i}.wav", noise(60))
    (tmp_path / "1.wav").write_bytes(b"RIFF")
    write(tmp_path / "2.wav", noise(49))
    with pytest.warns(UserWarning, match=r"(1.wav is no WAV|2.wav has 49 samples)") as said:
        tasks = audio.open_all(tmp_path, Audio(length=50, skip_bad=True))
    assert tasks.names == ("0.wav#0", "3.wav#0") and len(said) == 2
    with pytest.warns(UserWarning):
        one_line("no file can be read", audio.open_all, tmp_path / "1.wav", Audio(skip_bad=True))


def test_wav_bytes():
    samples = torch.cat([torch.arange(-(2**15), 2**15, 97) / 2**15, torch.tensor([-3.0, 3.0])])
    samples = torch.stack([samples, -samples], 1)
    content = audio.wav_bytes(samples.requires_grad_(), 22050)
    with wave.open(io.BytesIO(content)) as file:
        assert file.getparams()[:4] == (2, 2, 22050, len(samples))
        got = np.frombuffer(file.readframes(len(samples)), "<i2").reshape(-1, 2)
    wanted = np.clip(samples.detach().double().numpy() * 2**15, -(2**15), 2**15 - 1)
    np.testing.assert_array_equal(got, wanted)
    one_line(r"samples \(3,\); accepted is \[N,C\]", audio.wav_bytes, torch.zeros(3), 8000)
    one_line("with NaN", audio.wav_bytes, torch.full((2, 1), torch.nan), 8000)
    one_line("rate is 0", audio.wav_bytes, torch.zeros(3, 1), 0)


def test_what_is_written_is_read_back(tmp_path):
    samples = torch.from_numpy(noise(50, 2) / np.float32(2**15))
    (tmp_path / "a.wav").write_bytes(audio.wav_bytes(samples, 8000))
    assert audio.open_all(tmp_path / "a.wav", Audio(length=50, channels=2))[0].equal(samples)


# audio: tasks


def test_audio_batches():
    items = [torch.rand(5, 2) * 2 - 1 for _ in range(3)]
    options, seeds = Audio(length=5, channels=2), rng.task_seeds(0, 0, 3)
    assert audio.shape(options) == (1, 2, "unit", False)
    net = siren(1, 2, width=8, depth=3)
    batch = audio.learn(items, options, net, seeds, None)
    np.testing.assert_array_equal(
        batch.x.numpy(), np.arange(5, dtype=np.float32)[:, None] / np.float32(5)
    )
    assert batch.y.equal(torch.stack(items)) and batch.seed is None and batch.query is None
    drawn = audio.learn(items, options, net, seeds, 3)
    assert drawn.per_step == 3 and drawn.seed.equal(seeds)
    seen = audio.observe(items, options, net, seeds, None, 3)
    assert seen.per_step == 3 and seen.query.per_step is None and seen.query.y.equal(batch.y)
    assert audio.observe(items, options, net, seeds).query is None
    one_line("audio: count is 2", audio.observe, items, options, net, seeds, 2)
    one_line("audio: net goes from 2 to 2 features; accepted for these is 1 to 2",
             audio.learn, items, options, siren(2, 2, width=8, depth=3), seeds, None)  # fmt: skip


def test_a_waveform_is_drawn_where_it_is():
    ramp = torch.linspace(1, -1, 33)[:, None]
    image = audio.waveform(torch.cat([ramp, torch.zeros(33, 1)], 1), height=33, width=32)
    assert image.shape == (66, 32, 3)
    inked = (image[..., 0] < 0.5).numpy()
    for column in range(32):  # row k is the value of sample k; each column reaches the next sample
        assert np.flatnonzero(inked[:33, column]).tolist() == [column, column + 1]
        assert np.flatnonzero(inked[33:, column]).tolist() == [16]
    loud = audio.waveform(
        torch.tensor([[5.0], [torch.nan]]), height=9, width=6
    )  # fewer than columns
    assert (loud[:, 0, 0] < 0.5).nonzero().flatten().tolist() == [0]
    assert (loud[:, 5, 0] < 0.5).nonzero().flatten().tolist() == [4]


def test_audio_is_fitted_and_shown():
    """A fit from a fresh start comes close to a short sound, and its picture shows it."""
    t = torch.arange(64) / 64
    item = (0.6 * torch.sin(2 * torch.pi * 2 * t) + 0.2 * torch.cos(2 * torch.pi * 5 * t))[:, None]
    net = siren(1, 1, width=32, depth=3, w0=20.0)
    batch = audio.learn([item], Audio(length=64), net, rng.task_seeds(0, 0, 1), None)
    start = net.init(1, generator=torch.Generator().manual_seed(0))
    fit = fm.adapt(net, start, batch, 300, 1e-3, rule="adam")
    assert fit.losses[-1] < 1e-3 < fit.losses[0]
    shown = audio.picture(net, fit.params[0], item, Audio(length=64))
    worse = audio.picture(net, start[0], item, Audio(length=64))
    truth = audio.truth(item, Audio(length=64))
    assert (shown - truth).abs().mean() < 0.3 * (worse - truth).abs().mean()


# volumes: reading


def test_arrays_of_volumes(tmp_path):
    voxels = noise(3, 4, 4, 4, dtype=np.uint8)
    np.save(tmp_path / "a.npy", voxels)
    np.savez(tmp_path / "b.npz", volumes=voxels, more=voxels, names=["x", "y", "z"])
    for source in (tmp_path / "a.npy", tmp_path / "b.npz", voxels, torch.from_numpy(voxels)):
        tasks = volumes.open_all(source, Volumes(size=4))
        assert tasks.names == (("x", "y", "z") if str(source).endswith("npz") else ("0", "1", "2"))
        assert tasks[2].shape == (4, 4, 4, 1) and tasks[2].dtype == torch.float32
        np.testing.assert_array_equal(tasks[2][..., 0].numpy(), voxels[2] / np.float32(255))
    one = volumes.open_all(tmp_path / "a.npy", Volumes(size=4)).take([1])
    assert one.names == ("1",)
    for i in range(3):
        (tmp_path / "f" / "g").mkdir(parents=True, exist_ok=True)
        np.savez_compressed(tmp_path / "f" / "g" / f"{i}.npz", v=voxels[i])
    np.save(tmp_path / "f" / "z.npy", voxels[0].astype(np.uint16) * 257)
    tasks = volumes.open_all(tmp_path / "f", Volumes(size=4))
    assert tasks.names == ("g/0.npz", "g/1.npz", "g/2.npz", "z.npy")
    for i, k in enumerate((0, 1, 2, 0)):
        np.testing.assert_allclose(tasks[i][..., 0].numpy(), voxels[k] / 255, rtol=2**-22)
    colour = np.random.default_rng(0).random((2, 4, 4, 4, 3))
    np.testing.assert_allclose(
        volumes.open_all(colour, Volumes(size=4, channels=3))[1], colour[1], rtol=2**-23
    )
    assert volumes.open_all(colour[0], Volumes(size=4, channels=3)).names == ("0",)


def test_a_window_maps_values():
    hounsfield = np.array([-1000, -200, 100, 400, 3000] + [0] * 3, np.int16).reshape(1, 2, 2, 2)
    item = volumes.open_all(hounsfield, Volumes(size=2, window=(-200, 400)))[0]
    assert item.flatten().tolist() == [0, 0, 0.5, 1, 1] + [pytest.approx(1 / 3)] * 3
    deep = np.array([2**30, 2**30 + 1, 2**30 + 2, 2**30 + 4] * 2, np.int32).reshape(1, 2, 2, 2)
    item = volumes.open_all(deep, Volumes(size=2, window=(2**30, 2**30 + 4)))[0]
    assert item.flatten()[:4].tolist() == [0, 0.25, 0.5, 1]  # float32 would see one value
    assert volumes.open_all(hounsfield > 0, Volumes(size=2))[0].sum() == 3


def tent(n, m):
    """[m,n]: weights of a tent as wide as the larger spacing, about each new cell's centre."""
    scale = max(n / m, 1)
    centre = (np.arange(m)[:, None] + 0.5) * n / m - 0.5
    weights = np.clip(1 - np.abs(np.arange(n) - centre) / scale, 0, None)
    if n < m:  # linear: edges are held
        weights = np.zeros((m, n))
        low = np.clip(centre[:, 0], 0, n - 1)
        k = np.minimum(low.astype(int), n - 2)
        weights[np.arange(m), k], weights[np.arange(m), k + 1] = 1 - (low - k), low - k
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("slab", [1, 1 << 22])
def test_resizing_is_separable_and_antialiased(monkeypatch, slab):
    monkeypatch.setattr(volumes, "_SLAB", slab)
    source = np.random.default_rng(0).random((1, 13, 4, 9, 2), np.float32)
    item = volumes.open_all(source, Volumes(size=6, channels=2))[0]
    wanted = np.einsum("ai,bj,dk,ijkc->abdc", tent(13, 6), tent(4, 6), tent(9, 6), source[0])
    np.testing.assert_allclose(item.numpy(), wanted, atol=5e-6)
    assert item.is_contiguous()


def test_blocks(tmp_path):
    big = noise(7, 4, 5, dtype=np.uint8)
    np.save(tmp_path / "big.npy", big)
    tasks = volumes.open_all(tmp_path / "big.npy", Volumes(size=2, blocks=True))
    assert len(tasks) == 3 * 2 * 2 and tasks.names[1] == "big#0,0,1"
    at = tasks.names.index("big#2,1,0")
    np.testing.assert_array_equal(tasks[at][..., 0].numpy(), big[4:6, 2:4, 0:2] / np.float32(255))
    alone = volumes.open_splits(tmp_path / "big.npy", Volumes(size=2, blocks=True))
    assert sum(map(len, alone)) == 12 and all(map(len, alone))  # of one volume: by block
    for i in range(8):
        (tmp_path / "many").mkdir(exist_ok=True)
        np.save(tmp_path / "many" / f"{i}.npy", big)
    parts = volumes.open_splits(tmp_path / "many", Volumes(size=2, blocks=True, validation=0.3))
    members = [{name.split("#")[0] for name in part.names} for part in parts]
    assert sum(map(len, members)) == 8 and all(members) and sum(map(len, parts)) == 96
    one_line(
        "has 7 x 4 x 5 voxels; accepted is 5 and more",
        volumes.open_all,
        big,
        Volumes(size=5, blocks=True),
    )


def test_volumes_refuse(tmp_path):
    def refused(match, source, error=ValueError, **options):
        one_line(
            f"volumes: .*{match}",
            volumes.open_all,
            source,
            Volumes(**{"size": 2, **options}),
            error=error,
        )

    good = noise(2, 4, 4, 4, dtype=np.uint8)
    refused("holds int16; accepted without a window", good.astype(np.int16))
    refused("holds complex64", good.astype(np.complex64))
    refused("shape .4, 4.; accepted are arrays of 3 or 4 or 5 axes", good[0, 0])
    refused("shape .2, 0, 4, 4.;", good[:, :0])
    refused("has 3 values per voxel, channels is 1", np.zeros((2, 4, 4, 4, 3)))
    refused("has 1 values per voxel, channels is 2", good, channels=2)
    path = tmp_path / "a.npy"
    np.save(path, good)
    path.write_bytes(path.read_bytes()[:-1])
    refused("a.npy is no readable .npy", path)
    path.write_bytes(b"")
    refused("a.npy is no readable .npy", path)
    np.save(path, np.array([[[None]]]), allow_pickle=True)
    refused("a.npy is no readable .npy", path)
    np.savez(tmp_path / "b.npz", a=np.array([[[None]]]))
    refused("b.npz holds object", tmp_path / "b.npz")
    np.savez(tmp_path / "b.npz", a=good, b=good)
    refused('b.npz holds a, b; accepted is an array called "volumes"', tmp_path / "b.npz")
    (tmp_path / "c.npz").write_bytes(b"PK")
    refused("c.npz is no readable .npz", tmp_path / "c.npz")
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as file:
        np.savez(tmp_path / "b.npz", volumes=good)
        content = zipfile.ZipFile(tmp_path / "b.npz").read("volumes.npy")
        file.writestr("volumes.npy", content[:-9])
    one_line(
        "d.npz is damaged", volumes.open_all(tmp_path / "d.npz", Volumes(size=2)).__getitem__, 0
    )
    refused("gone does not exist", tmp_path / "gone", FileNotFoundError)
    refused("ends in '.txt'; accepted are npy", write(tmp_path / "x.txt", noise(9)))
    refused("source is a int", 3)
    (tmp_path / "empty").mkdir()
    refused("empty holds no .npy or .npz", tmp_path / "empty")
    for values, match in ((np.nan, "nan"), (1.5, "1.5"), (-1, "-1")):
        item = volumes.open_all(np.full((1, 2, 2, 2), values, float), Volumes(size=2))
        one_line(f"volumes: 0 has values from {match} .* without a window", item.__getitem__, 0)
    item = volumes.open_all(np.full((1, 2, 2, 2), np.nan), Volumes(size=2, window=(0, 1)))
    one_line("volumes: 0 holds NaN", item.__getitem__, 0)
    for change, match in (
        ({"size": 0}, "size is 0"), ({"channels": 0}, "channels is 0"),
        ({"window": (1, 1)}, "window is"), ({"window": (0, np.inf)}, "window is"),
    ):  # fmt: skip
        one_line(f"^volumes: {match}", Volumes, **change)


def test_bad_volumes_are_left_out_on_demand(tmp_path):
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", noise(2, 2, 2, dtype=np.uint8))
    (tmp_path / "1.npy").write_bytes(b"no")
    one_line("volumes: .*1.npy is no readable", volumes.open_all, tmp_path, Volumes(size=2))
    with pytest.warns(UserWarning, match=r"left out: volumes: .*1.npy is no readable .npy"):
        tasks = volumes.open_all(tmp_path, Volumes(size=2, skip_bad=True))
    assert tasks.names == ("0.npy", "2.npy")


# what every kind of signal opens its sources through


def test_npz_is_refused_by_its_headers(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    np.savez(path, a=noise(5, 3), b=np.zeros((2, 2)), c=np.array([None]))
    heads = arrays.npz_heads("x", path, ("b", "gone", "a"))
    assert list(heads.items()) == [("b", ((2, 2), np.float64)), ("a", ((5, 3), np.int16))]
    assert list(arrays.npz_heads("x", path)) == ["a", "b", "c"]
    read = arrays.read_npz("x", path, heads, 32 + 30)
    assert (read["a"] == noise(5, 3)).all() and (read["b"] == 0).all() and len(read) == 2
    monkeypatch.setattr(np, "load", None)  # nothing below gets as far as the data
    match = "x: .*a.npz needs 62 bytes, memory is 61; a .npz is read whole: buy more"
    one_line(match, arrays.read_npz, "x", path, heads, 61, "buy more")
    heads = arrays.npz_heads("x", path, "c")
    one_line("x: c in .*a.npz is pickled; accepted are plain", arrays.read_npz, "x", path, heads)


def test_tensors_as_arrays():
    values = torch.tensor([1.5, -2.0], dtype=torch.bfloat16, requires_grad=True)
    got = arrays.as_array(values)
    assert got.dtype == np.float32 and got.tolist() == [1.5, -2.0]
    assert arrays.as_array("path") == "path"


# volumes: tasks


@pytest.mark.parametrize("coords", ["unit", "unit_xy", "centers", "corners"])
def test_lattice(coords):
    got = lattice((3, 4, 1), coords).view(3, 4, 1, 3)
    for place in np.ndindex(3, 4, 1):
        at = [
            {"unit": i / n, "unit_xy": i / n, "centers": (2 * i + 1) / n - 1,
             "corners": 2 * i / (n - 1) - 1 if n > 1 else 0}[coords]
            for i, n in zip(place, (3, 4, 1), strict=True)
        ]  # fmt: skip
        wanted = np.array(at[::-1] if coords == "unit_xy" else at, np.float32)
        np.testing.assert_array_equal(got[place].numpy(), wanted)
    assert lattice((5, 7), coords).equal(images.grid(5, 7, coords))
    one_line("grid: coords is 'world'; accepted for samples are unit,", lattice, (2,), "world")


def test_volume_batches():
    items = [torch.rand(3, 3, 3, 2, dtype=torch.float64) for _ in range(2)]
    options, seeds = Volumes(size=3, channels=2), rng.task_seeds(0, 0, 2)
    assert volumes.shape(options) == (3, 2, "unit", True)
    net = MLP(3, 2, 8, 3)
    batch = volumes.learn(items, options, net, seeds, None)
    n = 2 * 9 + 0 * 3 + 1  # voxel (2, 0, 1)
    assert batch.x[n].tolist() == [2 / 3, 0, 1 / 3] and batch.y[1, n].equal(items[1][2, 0, 1])
    seen = volumes.observe(items, options, net, seeds, per_step=5)
    assert seen.seed.equal(seeds) and seen.per_step == 5 and seen.query.y.equal(batch.y)
    one_line("volumes: count is 1", volumes.observe, items, options, net, seeds, 1)


def test_pictures_are_the_middle_slices():
    net = siren(3, 1, width=8, depth=3, w0=3.0)
    params = net.init(1, generator=torch.Generator().manual_seed(0))[0]
    item = fm.mlp(net, params, lattice((5, 5, 5))).view(5, 5, 5, 1).detach()
    options = Volumes(size=5)
    truth = volumes.truth(item, options)
    assert truth.shape == (5, 15, 1)
    for i, j in np.ndindex(5, 5):
        slices = [truth[i, 5 * s + j, 0] for s in range(3)]
        assert slices == [item[2, i, j, 0], item[i, 2, j, 0], item[i, j, 2, 0]]
    shown = volumes.picture(net, params, item, options)
    # The same network at the same points, in other tiles: float32 sums of 8 terms.
    assert (shown - truth).abs().max() < 1e-6
    assert volumes.truth(torch.rand(2, 2, 2, 4), Volumes(size=2, channels=4)).shape == (2, 6, 1)


# real data


def test_distance_grids_as_volumes(data_path):
    path = data_path("sdf_chairs/sdf_chairs_64.npz")
    options = Volumes(size=64, window=(-127, 127))
    train, check, held = volumes.open_splits(path, options)
    with np.load(path) as file:
        names, grids = file["names"].tolist(), file["sdf_i8"]
    assert len(train) + len(check) + len(held) == 48 and set(train.names) < set(names)
    item = train[3][..., 0].numpy()
    wanted = np.clip((grids[names.index(train.names[3])].astype(float) + 127) / 254, 0, 1)
    np.testing.assert_allclose(item, wanted, atol=2**-23)
    small = volumes.open_all(path, Volumes(size=16, window=(-127, 127)))[5]
    blocks = (grids[5].clip(-127, 127).reshape(16, 4, 16, 4, 16, 4).mean((1, 3, 5)) + 127) / 254
    assert np.abs(small[..., 0].numpy() - blocks).mean() < 0.01  # a tent against a box


def test_a_chest_in_blocks(data_path):
    path = next(Path(data_path("ct_chest")).glob("*.npz"))
    with np.load(path) as file:
        slices = file["slices"]
        low, high = float(file["hu_lo"]), float(file["hu_hi"])
    window = (low, high) if slices.dtype.kind == "i" else None
    tasks = volumes.open_all(path, Volumes(size=64, blocks=True, window=window))
    assert len(tasks) == 2 * 4 * 4
    item = tasks[tasks.names.index(f"{path.stem}#1,2,3")]
    block = slices[64:128, 128:192, 192:256].astype(float)
    wanted = (block - low) / (high - low) if window else block / np.iinfo(slices.dtype).max
    np.testing.assert_allclose(item[..., 0].numpy(), wanted.clip(0, 1), atol=2**-22)
    assert item.std() > 0.01


def test_values_that_cannot_be_used_are_left_out_with_skip_bad(tmp_path):
    """NaN is found on reading only, so everything is read once then."""
    good = np.random.default_rng(0).random((4, 4, 4), dtype=np.float32)
    bad = np.where(np.arange(4) == 2, np.nan, good).astype(np.float32)
    for name, values in (("a", good), ("b", bad), ("c", good)):
        np.save(tmp_path / f"{name}.npy", values)
    with pytest.warns(UserWarning, match=r"1 of 3 left out: .*b"):
        tasks = volumes.open_all(tmp_path, Volumes(size=2, skip_bad=True))
    assert [name[0] for name in tasks.names] == ["a", "c"]
    sounds = np.stack([good.reshape(-1), bad.reshape(-1)])
    with pytest.warns(UserWarning, match="1 of 2 left out"):
        assert len(audio.open_all(sounds, Audio(length=64, skip_bad=True))) == 1
