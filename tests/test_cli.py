"""cli.py, apply/: what a user types, what comes back, and one line for every bad input."""

import csv
import importlib
import json
import math
import os
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import fastmeta as fm
from fastmeta import apply
from fastmeta import train as tr
from fastmeta.apply import Eval, Fit, Learned, builtin, open_start, table
from fastmeta.apply import start as starts
from fastmeta.checkpoint import load_start, load_tensors, spec_from_json
from fastmeta.cli import main
from fastmeta.meta import baselines
from fastmeta.meta.evaluate import Start, Tuned, psnr, rates, ssim, tune
from fastmeta.tasks import images as im
from fastmeta.tasks.ct import CT
from fastmeta.tasks.sdf import SDF

fitting = importlib.import_module("fastmeta.apply.fit")  # the package's own fit is the function

SMALL = ["--size", "12", "--width", "16", "--depth", "3", "--w0", "30", "--tasks", "2"]
SMALL += ["--lr", "1e-3", "--inner-lr", "0.01", "--device", "cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small run on text."""
    out = tmp_path_factory.mktemp("cli") / "run"
    few = ["--iterations", "20", "--validate-every", "10", "--validate-tasks", "4"]
    assert main(["train", "images", "--data", "text", "--out", str(out), *SMALL, *few]) == 0
    return out


@pytest.fixture
def photos(tmp_path):
    """A folder of pictures of several sizes, in a sub-folder too."""
    for number, (name, size) in enumerate(
        [("a.png", (14, 12)), ("b.png", (12, 12)), ("sub/c.bmp", (20, 31))]
    ):
        save(tmp_path / "photos" / name, size, number)
    return tmp_path / "photos"


def save(path, size=(12, 12), seed=0, channels=3):
    path.parent.mkdir(exist_ok=True, parents=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, channels), dtype=np.uint8)
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    image.resize(size, Image.Resampling.BICUBIC).save(path)


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def scores(out):
    with open(out / "scores.csv", newline="") as file:
        return list(csv.DictReader(file))


def picture(path):
    with Image.open(path) as image:
        image.load()
    return image


def shown(path):
    return torch.from_numpy(np.array(picture(path).convert("RGB"))).double() / 255


# the command line itself


def test_version_help_and_usage(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastmeta {fm.__version__}\n"
    for given, code in (
        (["--help"], 0),
        (["-h"], 0),
        ([], 2),
        (["train"], 0),
        (["train", "--help"], 0),
    ):
        assert main(given) == code
        assert capsys.readouterr().out.startswith("usage: fastmeta COMMAND")
    for given in ["train", "images"], ["fit"], ["eval"], ["render"]:
        assert main([*given, "--help"]) == 0
        said = capsys.readouterr()
        assert "--device" in said.out and said.err == ""


def test_info_says_what_runs_and_why_the_rest_does_not(capsys):
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    assert f"torch {torch.__version__}" in said and "reference  runs" in said
    for name, reason in fm.available().items():
        assert reason is None or f"{name:<10} cannot run: {reason}" in said
    lines = [line.split() for line in said.splitlines()]
    rows = [line for line in lines if line[:1] == ["maml"]]
    assert len(rows) == 3 * 4 * 2  # measure x rule x order
    heads = next(line for line in lines if line[:1] == ["op"])
    assert all(row[heads.index("reference")] == "all" for row in rows)


def test_as_a_module_in_a_process_of_its_own(tmp_path):
    root = os.path.dirname(os.path.dirname(fm.__file__))
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=root)
    command = [sys.executable, "-m", "fastmeta", "fit", "nowhere", "--data", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.startswith("fastmeta: error: nowhere: no start there")
    assert ended.stderr.count("\n") == 1


def test_debug_shows_the_traceback(monkeypatch, capsys):
    monkeypatch.setenv("FASTMETA_DEBUG", "1")
    assert main(["fit", "nowhere", "--data", "x"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_fault_of_ours_is_not_hidden(monkeypatch):
    monkeypatch.setattr("fastmeta.cli.info", lambda: {}["missing"])
    with pytest.raises(KeyError):
        main(["info"])


# bad input


@pytest.fixture
def bad(capsys):
    """Runs a command line that must fail with one line that has these words."""

    def check(given, *words):
        capsys.readouterr()
        assert main([str(part) for part in given]) == 2
        said = capsys.readouterr()
        announced = given[0] == "train" and re.fullmatch(r"kind=images .*\n", said.out)
        assert said.out == "" or announced  # what would be trained
        assert said.err.startswith("fastmeta: error: ") and said.err.count("\n") == 1
        assert "Traceback" not in said.err
        for word in words:
            assert word in said.err, said.err

    return check


def training(data, out):
    return ["train", "images", "--data", data, "--out", out, *SMALL, "--iterations", "2"]


def test_bad_words(bad, run):
    bad(["trian"], "trian: no such command; accepted are train, fit, eval, render, info")
    bad(["train", "sounds"], "the kind of signal is sounds; accepted are images, ct, views")
    bad(["train", "images"], "--data", "--out", "required")
    bad(["fit", run], "--data")
    fit = ["fit", run, "--data", "x"]
    bad([*fit, "--impl", "nonsense"], "'nonsense'", "--impl", "'reference'", "'triton'")
    bad([*fit, "--precision", "fp8"], "'fp8'", "'bf16'")
    bad([*fit, "--steps", "many"], "--steps", "many")
    bad([*fit, "--bogus", "3"], "--bogus")
    bad([*fit, "--steps", "-1"], "steps is -1; accepted is an integer >= 0")
    bad([*fit, "--threads", "0"], "threads is 0; accepted is an integer >= 1")
    bad([*fit, "--device", "nonsense"], "'nonsense'", "accepted are auto, cpu, cuda")
    bad([*fit, "--device", "meta"], "'meta'", "accepted are auto, cpu, cuda")
    bad(["eval", run, "--count", "0"], "count is 0")
    bad([*training("text", "x"), "--tasks", "0"], "tasks is 0; accepted is an integer >= 1")
    if not torch.cuda.is_available():
        bad([*fit, "--device", "cuda"], "'cuda'", "accepted are auto, cpu, cuda")


def test_bad_data(bad, run, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    cut = tmp_path / "cut"
    for number in range(3):
        save(cut / f"{number}.png", (40, 40), number)
    (cut / "1.png").write_bytes((cut / "1.png").read_bytes()[:-60])
    nan, odd, one = np.zeros((3, 12, 12, 3), np.float32), tmp_path / "odd.npy", tmp_path / "one.npy"
    nan[1, 2, 3] = np.nan
    np.save(tmp_path / "nan.npy", nan)
    np.save(odd, np.zeros((3, 12, 12, 2), np.uint8))
    np.save(one, np.zeros((12, 12, 3), np.uint8))
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    cases = [
        (empty, ["holds no image, accepted are png"]),
        (tmp_path / "absent", ["absent does not exist", "accepted are a folder"]),
        (cut, ["1.png is truncated"]),
        (tmp_path / "nan.npy", ["nan", "accepted are floats in [0,1]"]),
        (odd, ["(3, 12, 12, 2)", "C = 1, 3 or 4"]),
        (one, ["one image; accepted is [n,H,W,C]"]),
        (tmp_path / "objects.npy", ["objects.npy is no readable .npy"]),
    ]
    before = files(run)
    for data, words in cases:
        bad([*training(data, tmp_path / "new"), "--iterations", "9"], *words)
        assert not (tmp_path / "new" / tr.LAST).exists()
        bad(["fit", run, "--data", data, "--out", tmp_path / "fits", "--size", 40], *words)
        if data != tmp_path / "nan.npy" and data != cut:
            bad(["eval", run, "--data", data, "--out", tmp_path / "eval"], *words)
    assert files(run) == before
    save(tmp_path / "grey.png", channels=1)
    bad(training(tmp_path / "grey.png", tmp_path / "new"), "0 to validate")
    bad(
        [*training("text", tmp_path / "new"), "--channels", "1"],
        "channels is 1 with data text, where it has no effect; accepted is without",
    )
    np.savez(tmp_path / "both.npz", images=np.zeros((3, 12, 12, 3), np.uint8), names=["a", "b"])
    bad(training(tmp_path / "both.npz", tmp_path / "new"), "names in", "accepted are 3 strings")
    np.save(tmp_path / "wide.npy", np.zeros((3, 12, 12, 3, 1), np.uint8))
    bad(["fit", run, "--data", tmp_path / "wide.npy"], "(3, 12, 12, 3, 1)", "accepted are [n,H,W]")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_bad_starts(bad, run, photos, tmp_path):
    touched = tmp_path / "touched"
    for name in ("evil.pkl", "evil.safetensors", "evil.pt"):
        with open(tmp_path / name, "wb") as file:
            pickle.dump(Evil(str(touched)), file)
        bad(
            ["fit", tmp_path / name, "--data", photos],
            name,
            "refused" if name[-1] == "l" else "accepted",
        )
        assert not touched.exists()
    with open(tmp_path / "evil.pkl", "rb") as file:
        pickle.load(file)
    assert touched.exists()  # it would have worked
    for inputs, outputs in ((3, 3), (2, 4), (2, 2), (3, 1)):
        net = fm.siren(inputs, outputs, 8, 2)
        fm.save_init(tmp_path / "other.safetensors", net, net.init()[0])
        came = f"from {inputs} to {outputs} features"
        bad(["fit", tmp_path / "other.safetensors", "--data", photos], "other.safetensors", came)
        bad(["eval", tmp_path / "other.safetensors", "--data", photos], came, "2 to 1 or 3 (images")
    (tmp_path / "half.safetensors").write_bytes((run / tr.BEST).read_bytes()[:-100])
    bad(["fit", tmp_path / "half.safetensors", "--data", photos], "not a complete safetensors file")
    bad(["fit", photos, "--data", photos], "no config.json there")
    bad(["fit", "nowhere", "--data", photos], "accepted are the folder of a training run")
    net = fm.siren(2, 3, 8, 2)
    fm.save_init(tmp_path / "plain.safetensors", net, net.init()[0])
    bad(["eval", tmp_path / "plain.safetensors"], "no test split", "--data")


def test_bad_places_to_write(bad, run, photos, tmp_path):
    (tmp_path / "file").write_text("mine")
    below = tmp_path / "file" / "out"
    words = "the output folder cannot be made", "file/out"
    bad(training("text", below), *words)
    bad(["fit", run, "--data", photos, "--out", below], *words)
    bad(["eval", run, "--out", below], *words)
    assert (tmp_path / "file").read_text() == "mine"
    before = files(photos)
    for out in (photos, photos / "sub", photos / "new"):
        bad(["fit", run, "--data", photos, "--out", out], "lies where the images of --data are")
    bad(["fit", run, "--data", photos / "a.png", "--out", photos], "lies where the images")
    assert files(photos) == before and not (photos / "new").exists()
    kept = files(run)
    bad(training("text", run), "holds a run already; accepted are --resume")
    assert files(run) == kept


def test_workers_that_refuse(bad, run, photos, tmp_path):
    fit = ["fit", run, "--data", photos, "--out", tmp_path / "fits", "--device", "cpu"]
    bad([*fit, "--impl", "reference", "--precision", "bf16"], "impl='reference'", "bf16", "fp32")
    for name, reason in fm.available().items():
        if reason is not None:
            bad([*fit, "--impl", name], f"impl='{name}' cannot run this case", reason)
            bad([*training("text", tmp_path / "new"), "--impl", name], reason)
    assert not (tmp_path / "fits").exists() and not list(tmp_path.rglob("*.safetensors"))


def test_a_fit_that_diverges(bad, run, photos, tmp_path):
    fit = ["fit", run, "--data", photos, "--out", tmp_path / "fits"]
    bad([*fit, "--lr", "1e20", "--steps", "3"], "a.png diverged within 3 steps; a smaller --lr")


# fit


def test_fit_writes_weights_that_show_the_pictures(run, photos, tmp_path, capsys):
    out = tmp_path / "fits"
    assert main(["fit", str(run), "--data", str(photos), "--out", str(out), "--steps", "3"]) == 0
    said = capsys.readouterr().out
    tensors, meta = load_tensors(out / "fits.safetensors")
    net = spec_from_json(meta["net"], {k: v for k, v in tensors.items() if k != "params"})
    assert (
        meta["name"] == ["a.png", "b.png", "sub/c.bmp"]
        and meta["tasks"] == [{"size": [12, 12]}] * 3
    )
    assert meta["picture"] == ["a.png", "b.png", "sub_c.png"]
    learned, init, _, _ = load_start(run / tr.BEST)
    assert net == learned
    batch = im.image_batch(torch.stack(list(im.open_images(photos, size=12))), net)
    ends, rows = [], scores(out)
    for k in range(4):
        theta = fm.adapt(net, init, batch, k, 1e-2).params
        y = fm.mlp(net, theta, batch.x)
        by_hand = psnr(y, batch.y).tolist()
        assert [float(row[f"psnr_{k}"]) for row in rows] == pytest.approx(by_hand, abs=2e-3)
        ends.append(sum(by_hand) / 3)
    torch.testing.assert_close(tensors["params"], theta, rtol=0, atol=1e-6)
    for t, name in enumerate(meta["picture"]):
        mine = fm.mlp(net, tensors["params"][t], batch.x).view(12, 12, 3).clamp(0, 1)
        assert (shown(out / name) - mine).abs().max() <= 0.5 / 255 + 1e-5
    pattern = r"3 tasks, mean PSNR ([\d.]+) dB at the start, ([\d.]+) dB after 3 steps\n"
    told = [float(number) for number in re.match(pattern, said).groups()]
    assert told == pytest.approx([ends[0], ends[3]], abs=0.01)


def test_fit_of_one_file_takes_the_steps_it_was_learned_for(run, photos, tmp_path):
    given = [
        "fit",
        "--run",
        str(run),
        "--data",
        str(photos / "b.png"),
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(given) == 0
    assert list(scores(tmp_path / "o")[0]) == ["name", "picture", "psnr_0", "psnr_1", "psnr_2"]
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == [
        "b.png",
        "fits.safetensors",
        "scores.csv",
    ]
    assert main([*given, "--steps", "0"]) == 0
    assert list(scores(tmp_path / "o")[0]) == ["name", "picture", "psnr_0"]


def test_fit_with_a_mask_scores_what_was_not_seen(run, photos, tmp_path, capsys, monkeypatch):
    plain = fitting._chunks
    for number, chunk in enumerate((10**6, 1)):  # together, and one by one
        monkeypatch.setattr(fitting, "_chunks", rechunked(plain, chunk))
        given = ["--mask", "random:0.4", "--seed", "3", "--out", str(tmp_path / str(number))]
        assert main(["fit", str(run), "--data", str(photos), *given]) == 0
    rows = scores(tmp_path / "0")
    assert rows == scores(tmp_path / "1")
    assert "dB where nothing was seen" in capsys.readouterr().out
    net, init, _, _ = load_start(run / tr.BEST)
    pictures = torch.stack(list(im.open_images(photos, size=12)))
    seen = torch.cat([im.mask("random:0.4", 12, 12, 1, 3 + t) for t in range(3)])
    assert not torch.equal(seen[0], seen[1])
    x = im.image_batch(pictures, net).x
    for t, row in enumerate(rows):
        where, truth = seen[t].flatten(), pictures[t].flatten(0, 1)
        theta = fm.adapt(net, init, fm.Batch(x[where], truth[where][None]), 2, 1e-2).params
        error = (fm.mlp(net, theta, x)[0] - truth) ** 2
        for name, part in (("psnr_2", where), ("psnr_unseen", ~where)):
            by_hand = -10 * math.log10(error[part].mean())
            assert float(row[name]) == pytest.approx(by_hand, abs=2e-3)


def test_fit_draws_pixels_by_the_number_of_the_task(run, photos, tmp_path, monkeypatch):
    plain = fitting._chunks
    for number, chunk in enumerate((10**6, 1)):  # together, and one by one
        monkeypatch.setattr(fitting, "_chunks", rechunked(plain, chunk))
        given = ["--per-step", "30", "--seed", "3", "--out", str(tmp_path / str(number))]
        assert main(["fit", str(run), "--data", str(photos), *given]) == 0
    one, two = (load_tensors(tmp_path / n / "fits.safetensors")[0]["params"] for n in "01")
    torch.testing.assert_close(one, two, rtol=0, atol=1e-6)
    net, init, _, _ = load_start(run / tr.BEST)
    pictures = torch.stack(list(im.open_images(photos, size=12)))
    seeds = torch.cat([fm.rng.task_seeds(3, t, 1) for t in range(3)])
    batch = im.image_batch(pictures, net, seed=seeds, per_step=30)
    torch.testing.assert_close(one, fm.adapt(net, init, batch, 2, 1e-2).params, rtol=0, atol=1e-6)


def rechunked(chunks, many):
    def split(options, learned):
        for names, items, signal in chunks(options, learned):
            for at in range(0, len(names), many):
                yield names[at : at + many], items[at : at + many], signal

    return split


def test_fit_at_native_sizes(run, photos, tmp_path):
    given = ["--size", "native", "--out", str(tmp_path / "fits")]
    assert main(["fit", str(run), "--data", str(photos), *given]) == 0
    _, meta = load_tensors(tmp_path / "fits" / "fits.safetensors")
    assert meta["tasks"] == [{"size": size} for size in ([12, 14], [12, 12], [31, 20])]
    assert picture(tmp_path / "fits" / "sub_c.png").size == (20, 31)
    net, init, _, _ = load_start(run / tr.BEST)
    batch = im.image_batch(shown(photos / "sub" / "c.bmp").float()[None], net)
    theta = fm.adapt(net, init, batch, 2, 1e-2).params
    by_hand = float(psnr(fm.mlp(net, theta, batch.x), batch.y))
    assert float(scores(tmp_path / "fits")[2]["psnr_2"]) == pytest.approx(by_hand, abs=2e-3)


def test_fit_overwrites_no_picture_of_the_same_name(run, tmp_path):
    names = ["a.bmp", "a.png", "A.gif", "sub/a.png", "sub_a.png", "a-2.png", "sub_A.png"]
    for number, name in enumerate(names):
        save(tmp_path / "photos" / name, seed=number)
    out = tmp_path / "fits"
    assert main(["fit", str(run), "--data", str(tmp_path / "photos"), "--out", str(out)]) == 0
    _, meta = load_tensors(out / "fits.safetensors")
    assert meta["name"] == sorted(names)
    assert len({name.lower() for name in meta["picture"]}) == len(names)
    assert {p.name for p in out.glob("*.png")} == set(meta["picture"])
    net = load_start(run / tr.BEST)[0]
    tensors, x = load_tensors(out / "fits.safetensors")[0], im.grid(12, 12)
    for t, name in enumerate(meta["picture"]):
        mine = fm.mlp(net, tensors["params"][t], x).view(12, 12, 3).clamp(0, 1)
        assert (shown(out / name) - mine).abs().max() <= 0.5 / 255 + 1e-5


def test_names_in_an_array_lead_nowhere_else(run, tmp_path):
    pixels = np.random.default_rng(0).random((2, 12, 12, 3), dtype=np.float32)
    names = ["../../up", str(tmp_path / "absolute")]
    np.savez(tmp_path / "set.npz", images=pixels, names=names)
    given = ["--data", str(tmp_path / "set.npz"), "--out", str(tmp_path / "in" / "fits")]
    assert main(["fit", str(run), *given]) == 0
    assert len(list((tmp_path / "in" / "fits").glob("*.png"))) == 2
    assert len(list(tmp_path.rglob("*.png"))) == 2


def test_fit_with_other_rules_and_rates(run, photos, tmp_path):
    given = ["--rule", "adam", "--lr", "0.003", "--out", str(tmp_path / "fits")]
    assert main(["fit", str(run), "--data", str(photos), *given]) == 0
    net, init, _, _ = load_start(run / tr.BEST)
    batch = im.image_batch(im.open_images(photos, size=12)[0][None], net)
    theta = fm.adapt(net, init, batch, 2, 0.003, rule="adam").params
    by_hand = float(psnr(fm.mlp(net, theta, batch.x), batch.y))
    assert float(scores(tmp_path / "fits")[0]["psnr_2"]) == pytest.approx(by_hand, abs=2e-3)


def test_a_double_precision_start_is_fitted_too(photos, tmp_path):
    net = fm.siren(2, 1, 8, 2)
    fm.save_init(tmp_path / "grey.safetensors", net, net.init()[0].double())
    out = tmp_path / "fits"
    assert (
        main(["fit", str(tmp_path / "grey.safetensors"), "--data", str(photos), "--out", str(out)])
        == 0
    )
    assert picture(out / "a.png").size == (14, 12)  # no size is known: native
    assert picture(out / "a.png").mode == "L"


def test_the_authors_pickle(data_path, tmp_path, capsys):
    """A face not in training; 31 dB are expected after two steps, as a mean over faces."""
    start = data_path("learnit_celeba_maml") / "maml_ilr_0.01_olr_1e-05_bs_3_150000.pkl"
    faces = np.load(data_path("faces_london") / "faces_178.npz")
    array = next(faces[key] for key in faces.files if faces[key].ndim == 4)
    np.save(tmp_path / "face.npy", array[:1])
    given = ["--data", str(tmp_path / "face.npy"), "--out", str(tmp_path / "fits"), "--steps", "2"]
    assert main(["fit", str(start), *given]) == 0
    row = scores(tmp_path / "fits")[0]
    assert float(row["psnr_1"]) > 24 and float(row["psnr_2"]) > 29
    assert picture(tmp_path / "fits" / "0.png").size == (178, 178)


@pytest.mark.parametrize("name", builtin())
def test_a_start_that_comes_along_fits_what_it_was_learned_on(name):
    learned = open_start(name, torch.device("cpu"))
    assert learned.known and (learned.kind, learned.config.data) == ("images", "text")
    test = tr.open_data(learned.config)[2]
    batch = im.image_batch(torch.stack([test[i] for i in range(4)]), learned.net)
    ends = {}
    for k, init in ((0, learned.start.init), (1, baselines.standard(learned.net))):
        theta = fm.adapt(learned.net, init, batch, 2, learned.start.lr).params
        ends[k] = float(psnr(fm.mlp(learned.net, theta, batch.x), batch.y).mean())
    assert ends[0] > ends[1] + 6


def test_starts_of_the_package(run, photos, tmp_path, monkeypatch, capsys):
    assert all((starts._starts() / f"{name}.safetensors").is_file() for name in builtin())
    monkeypatch.setattr(starts, "_starts", lambda: tmp_path / "absent")
    assert builtin() == []
    (tmp_path / "starts").mkdir()
    monkeypatch.setattr(starts, "_starts", lambda: tmp_path / "starts")
    assert builtin() == []
    (tmp_path / "starts" / "text.safetensors").write_bytes((run / tr.BEST).read_bytes())
    assert builtin() == ["text"]
    assert main(["--help"]) == 0
    assert "or the name of one that comes along: text" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "text", "--data", str(photos)]) == 0
    assert (tmp_path / "fits" / "a.png").exists()
    opened = open_start("text", torch.device("cpu"))
    assert (opened.config.signal.size, opened.config.inner_steps) == (12, 2) and opened.known
    assert (opened.kind, opened.row) == ("images", "maml")


# eval


@pytest.fixture(scope="module")
def evaluated(run):
    few = ["--count", "5", "--tune-tasks", "3", "--mean-steps", "4", "--pictures", "2"]
    assert main(["eval", str(run), *few]) == 0
    return run / "eval"


def cells(out):
    with open(out / "table.csv", newline="") as file:
        return {row["start"]: row for row in csv.DictReader(file)}


def test_eval_writes_what_it_says(evaluated):
    assert sorted(p.name for p in evaluated.iterdir()) == [
        "curve.png",
        "scores.json",
        "strip.png",
        "table.csv",
        "table.md",
    ]
    for name in ("curve.png", "strip.png"):
        assert min(picture(evaluated / name).size) > 300
    rows, said = cells(evaluated), (evaluated / "table.md").read_text()
    assert list(rows) == ["maml", "standard", "mean", "matched", "shuffled"]
    for name, row in rows.items():
        shown = [
            f"{float(row[f'psnr_{k}']):.2f} ± {float(row[f'stderr_{k}']):.2f}" for k in range(6)
        ]
        shown.append(f"{float(row['ssim']):.3f}")
        assert f"| {name} | {row['fitted_with']} | " + " | ".join(shown) + " |\n" in said
    heads = ["start", "fitted with", "0 steps", "1 step", *(f"{k} steps" for k in range(2, 6))]
    assert "| " + " | ".join([*heads, "SSIM, 5 steps"]) + " |\n" in said
    assert "over 5 tasks" in said and "after 2 steps." in said


def test_eval_numbers_by_hand(run, evaluated):
    """Each start, its tuned rule and rate, and every score, from fm.adapt and fm.mlp alone."""
    net, init, _, _ = load_start(run / tr.BEST)
    training, _, test = tr.open_data(tr.saved_config(run))
    tasks, batch = (
        im.image_batch(torch.stack([part[i] for i in range(n)]), net)
        for part, n in ((training, 3), (test, 5))
    )
    inits = {
        "standard": baselines.standard(net, seed=1),
        "mean": baselines.mean(net, tasks, 4, 1e-4, seed=1),
        "matched": baselines.matched(net, init, seed=0),
        "shuffled": baselines.shuffled(net, init, seed=0),
    }
    named = {"maml": Tuned(Start(init, 1e-2, "sgd"), 0.0, True)}
    named |= {name: tune(net, value, tasks, 2, grid=rates(1e-2)) for name, value in inits.items()}
    raw, rows = json.loads((evaluated / "scores.json").read_text()), cells(evaluated)
    for name, (start, _, inside) in named.items():
        assert rows[name]["fitted_with"] == f"{start.rule} {start.lr:.3g}" + "*" * (not inside)
        for k in range(6):
            theta = fm.adapt(net, start.init, batch, k, start.lr, rule=start.rule).params
            y = fm.mlp(net, theta, batch.x)
            reached = psnr(y, batch.y)
            assert [row[k] for row in raw[name]["score"]] == pytest.approx(
                reached.tolist(), abs=1e-2
            )
            assert float(rows[name][f"psnr_{k}"]) == pytest.approx(float(reached.mean()), abs=1e-2)
            error = float(reached.std(correction=1)) / 5**0.5
            assert float(rows[name][f"stderr_{k}"]) == pytest.approx(error, abs=1e-2)
        alike = [
            ssim(a.view(12, 12, 3), b.view(12, 12, 3)) for a, b in zip(y, batch.y, strict=True)
        ]
        assert raw[name]["ssim"] == pytest.approx(alike, abs=2e-3)
        assert float(rows[name]["ssim"]) == pytest.approx(np.mean(alike), abs=2e-3)


def test_eval_does_not_depend_on_its_chunks(run, evaluated, tmp_path, monkeypatch):
    plain = table.seen_at_test
    monkeypatch.setattr(table, "seen_at_test", lambda *a, chunk, **how: plain(*a, chunk=2, **how))
    few = ["--count", "5", "--tune-tasks", "3", "--mean-steps", "4", "--pictures", "3"]
    assert main(["eval", str(run), *few, "--out", str(tmp_path)]) == 0
    one, two = (json.loads((out / "scores.json").read_text()) for out in (evaluated, tmp_path))
    for name in one:
        for key in ("score", "ssim"):
            torch.testing.assert_close(
                torch.tensor(two[name][key]), torch.tensor(one[name][key]), rtol=0, atol=1e-3
            )
    few[-1] = "0"
    assert main(["eval", str(run), *few, "--out", str(tmp_path / "none")]) == 0
    assert not (tmp_path / "none" / "strip.png").exists()
    none = json.loads((tmp_path / "none" / "scores.json").read_text())
    assert {name: row["ssim"] for name, row in none.items()} == {
        name: pytest.approx(row["ssim"]) for name, row in two.items()
    }


def test_eval_of_several_runs_is_one_table(run, tmp_path, bad):
    """Rows by algorithm; of two with the same one, by folder; another kind of task is refused."""
    few = ["--iterations", "3", "--validate-tasks", "2"]
    for name, given in (("rep", ["--algorithm", "reptile"]), ("again", ["--seed", "0"])):
        out = ["--data", "text", "--out", str(tmp_path / name)]
        assert main(["train", "images", *out, *SMALL, *few, *given]) == 0
    also = ["--also", str(tmp_path / "rep"), str(tmp_path / "again"), "--starts", "standard"]
    given = ["eval", str(run), "--count", "3", "--tune-tasks", "2", "--out", str(tmp_path / "o")]
    written = tmp_path / "both.md"
    assert main([*given, *also, "--table", str(written)]) == 0
    assert written.read_text() == (tmp_path / "o" / "table.md").read_text()
    rows = cells(tmp_path / "o")
    assert list(rows) == ["maml run-1", "reptile", "maml again-3", "standard"]
    test = tr.open_data(tr.saved_config(run))[2]
    for folder, name in ((run, "maml run-1"), (tmp_path / "again", "maml again-3")):
        net, init, _, _ = load_start(folder / tr.BEST)
        batch = im.image_batch(torch.stack([test[i] for i in range(3)]), net)
        y = fm.mlp(net, fm.adapt(net, init, batch, 4, 1e-2).params, batch.x)
        assert float(rows[name]["psnr_4"]) == pytest.approx(
            float(psnr(y, batch.y).mean()), abs=0.01
        )
    out = ["--data", "text", "--out", str(tmp_path / "large"), "--iterations", "1"]
    assert main(["train", "images", *out, *SMALL, "--size", "13"]) == 0
    bad([*given, "--also", tmp_path / "large"], "large learned Images(size=13", "same kind of task")
    bad([*given, "--counts", "3"], "counts is (3,) with images, where nothing is counted")


def test_a_rate_at_the_edge_is_marked(run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        table, "tune", lambda net, init, *_, **__: Tuned(Start(init, 2.7), 1.0, False)
    )
    given = ["--count", "2", "--starts", "standard", "--steps", "1", "--out", str(tmp_path)]
    assert main(["eval", str(run), *given]) == 0
    said = (tmp_path / "table.md").read_text()
    assert "| standard | sgd 2.7* |" in said and "* the best rate tried" in said
    assert "| maml | sgd 0.01 |" in said


def test_eval_on_a_folder_keeps_tuning_and_scoring_apart(run, tmp_path, monkeypatch):
    for number in range(7):
        save(tmp_path / "photos" / f"{number}.png", seed=number)
    learned = open_start(str(run), torch.device("cpu"))
    options = Eval(str(run), data=str(tmp_path / "photos"))
    training, held_out = table._evaluation_data(options, learned)
    assert training.names == ("5.png", "6.png") and held_out.names == tuple(
        f"{n}.png" for n in range(5)
    )
    given = [
        "--data",
        str(tmp_path / "photos"),
        "--starts",
        "standard",
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(["eval", str(run / tr.BEST), *given, "--pictures", "0"]) == 0
    assert len(json.loads((tmp_path / "o" / "scores.json").read_text())["maml"]["score"]) == 5
    assert not (tmp_path / "o" / "strip.png").exists()
    net, init, _, _ = load_start(run / tr.BEST)
    fm.save_init(tmp_path / "bare.safetensors", net, init)  # nothing tells how it was learned
    given[-1] = str(tmp_path / "bare")
    assert main(["eval", str(tmp_path / "bare.safetensors"), *given, "--steps", "1"]) == 0
    assert list(cells(tmp_path / "bare")) == ["learned", "standard"]
    assert list(cells(tmp_path / "bare")["learned"])[2:] == [
        "psnr_0",
        "stderr_0",
        "psnr_1",
        "stderr_1",
        "ssim",
    ]


def test_python_face_takes_the_same_options(run, photos, tmp_path):
    assert apply.fit(Fit(str(run), str(photos), tmp_path / "fits", size=16)) == tmp_path / "fits"
    assert picture(tmp_path / "fits" / "a.png").size == (16, 16)
    assert isinstance(open_start(str(run), torch.device("cpu")), Learned)


def test_eval_refuses_rows_of_other_networks_and_tasks_learned_from(tmp_path, bad):
    """Weights of one w0 fit the network of another in number; another seed splits otherwise."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    small = ["--size", "8", "--width", "16", "--depth", "3", "--iterations", "1", "--tasks", "1"]
    for name, given in (("a", []), ("w0", ["--w0", "30"]), ("seed", ["--seed", "5"])):
        out = ["--data", str(folder), "--out", str(tmp_path / name)]
        assert main(["train", "images", *out, *small, *given]) == 0
    held_out = tr.open_data(tr.saved_config(tmp_path / "a"))[2].names
    other = tr.open_data(tr.saved_config(tmp_path / "seed"))
    leaked = {*held_out} & {*other[0].names, *other[1].names}
    assert leaked  # else this tests nothing
    bad(["eval", tmp_path / "a", "--also", tmp_path / "w0"], "w0=30.0", "with the same network")
    bad(
        ["eval", tmp_path / "a", "--also", tmp_path / "seed"],
        f"seed has learned from {min(leaked)}",
    )


def test_scores_of_a_fit_hold_no_eikonal_term(tmp_path):
    """At a rate of 0 nothing moves: what is seen of all points is as far off after as before."""
    axis = np.linspace(-1, 1, 8, dtype=np.float32)
    away = np.sqrt(sum(a**2 for a in np.meshgrid(axis, axis, axis)))
    np.savez(tmp_path / "balls.npz", sdf=np.stack([away - r / 20 for r in range(8, 14)]))
    config = tr.Config(
        data=str(tmp_path / "balls.npz"), out=tmp_path / "run", signal=SDF(points=64),
        network="relu", width=16, depth=3, order=1, eikonal=0.5, iterations=1, tasks=1,
    )  # fmt: skip
    tr.train(config)
    command = ["fit", str(config.out), "--data", config.data, "--names", "0", "--lr", "0"]
    assert main([*command, "--steps", "2", "--out", str(tmp_path / "fits")]) == 0
    (row,) = csv.DictReader((tmp_path / "fits" / "scores.csv").read_text().splitlines())
    assert row["psnr_0"] == row["psnr_2"] and "psnr_1" not in row


def test_scans_cannot_be_scored(tmp_path, bad):
    """Nobody has their slices."""
    angles = np.linspace(0, 3, 4)
    np.savez(tmp_path / "s.npz", sinogram=np.full((9, 4, 8), 0.3, np.float32), angles=angles)
    config = tr.Config(
        data=str(tmp_path / "s.npz"), out=tmp_path / "run", signal=CT(size=8, angles=2),
        algorithm="reptile", width=16, depth=3, iterations=1, tasks=1, test_counts=(2,),
    )  # fmt: skip
    tr.train(config)
    bad(["eval", config.out], "the image itself is not known", "accepted are images or slices")


def test_none_is_none_as_the_help_has_it(tmp_path):
    out = tmp_path / "run"
    few = ["--iterations", "1", "--per-step", "none", "--clip", "None", "--validate-tasks", "1"]
    assert main(["train", "images", "--data", "text", "--out", str(out), *SMALL, *few]) == 0
    assert tr.saved_config(out).per_step is None


def test_an_interrupt_keeps_the_fits_that_are_done(run, photos, tmp_path, monkeypatch, capsys):
    module = importlib.import_module("fastmeta.apply.fit")
    plain, calls = module._fit_some, []

    def interrupted(*given):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        plain(*given)

    monkeypatch.setattr(module, "_fit_some", interrupted)
    given = ["fit", str(run), "--data", str(photos), "--size", "native"]
    assert main([*given, "--out", str(tmp_path / "fits")]) == 130
    assert "2 fits are done and in" in capsys.readouterr().err
    assert [row["name"] for row in scores(tmp_path / "fits")] == ["a.png", "b.png"]
    tensors, meta = load_tensors(tmp_path / "fits" / "fits.safetensors")
    assert len(tensors["params"]) == 2 and meta["name"] == ["a.png", "b.png"]
    calls.clear()
    calls += [1, 1]
    assert main([*given, "--out", str(tmp_path / "none")]) == 130
    assert not (tmp_path / "none" / "scores.csv").exists()
