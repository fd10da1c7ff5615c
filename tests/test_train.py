"""train.py: runs that stop, resume, fail and learn, down to the bit."""

import csv
import dataclasses
import errno
import io
import json
import operator
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import fastmeta as fm
from fastmeta import train as tr
from fastmeta.apply import open_start
from fastmeta.checkpoint import load_start
from fastmeta.cli import _options, _resumed, main
from fastmeta.meta.evaluate import psnr
from fastmeta.tasks import images as im
from fastmeta.tasks.images import Images

CASES = {
    "maml": {},
    "meta_sgd": {"rule": "meta_sgd"},
    "reptile": {"algorithm": "reptile", "rule": "momentum"},
    "per_step": {"per_step": 30, "order": 1, "clip": 0.01},
}


def config(out, **changes):
    small = {
        "size": 12,
        "width": 16,
        "depth": 3,
        "w0": 30.0,
        "tasks": 2,
        "inner_lr": 1e-2,
        "lr": 1e-3,
    }
    small |= {"iterations": 10, "validate_every": 4, "validate_tasks": 3}
    small |= {"save_every": 3, "log_every": 2, "device": "cpu"}
    chosen = {"data": "text"} | small | changes
    own = {f.name: chosen.pop(f.name) for f in dataclasses.fields(Images) if f.name in chosen}
    return tr.Config(out=Path(out), signal=Images(**own), **chosen)


def arguments(config):
    """The command line of a configuration."""
    given = []
    for part in (config, config.signal):
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if field.name not in ("resume", "signal") and value != field.default:
                given += [f"--{field.name.replace('_', '-')}", str(value)]
    return ["train", "images", *given]


def rows(out):
    return [json.loads(line) for line in (out / tr.LOG).read_text().splitlines()]


def table(out):
    with open(out / tr.TABLE, newline="") as file:
        return list(csv.DictReader(file))


def state(out):
    """All that a run leaves, apart from seconds."""
    kept = []
    for name in (tr.LAST, tr.BEST):
        _, init, extra, meta = load_start(out / name)
        kept.append({"init": init, **extra})
        kept.append(meta)
    logs = [{k: v for k, v in row.items() if k != "seconds"} for row in rows(out) + table(out)]
    return kept, logs


def assert_same(a, b):
    (tensors, logs), (others, other_logs) = state(a), state(b)
    assert logs == other_logs
    for one, other in zip(tensors, others, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            equal = torch.equal if torch.is_tensor(value) else operator.eq
            assert equal(value, other[name]), name


def interrupt_after(monkeypatch, step, number=signal.SIGINT):
    """A signal arrives while this outer step is taken."""
    plain = tr._outer_step

    def outer(config, run, batch, at):
        row = plain(config, run, batch, at)
        if at + 1 == step:
            signal.raise_signal(number)
        return row

    monkeypatch.setattr(tr, "_outer_step", outer)


def stopped(monkeypatch, config, step, number=signal.SIGINT):
    """The run of a configuration, interrupted after so many steps."""
    with monkeypatch.context() as patch:
        interrupt_after(patch, step, number)
        with pytest.raises(KeyboardInterrupt, match=f"outer step {step} of {config.iterations}"):
            tr.train(config)


def validated(count, net):
    """The first validation tasks of ``config``, in one batch."""
    pixels = tr.open_data(config("x"))[1]
    return im.image_batch(torch.stack([pixels[i] for i in range(count)]), net)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run of each case."""
    made = {}

    def make(case):
        if case not in made:
            made[case] = tmp_path_factory.mktemp(case) / "run"
            tr.train(config(made[case], **CASES[case]))
        return made[case]

    return make


# resuming


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(case, whole, tmp_path, monkeypatch):
    options = config(tmp_path / "run", **CASES[case])
    stopped(monkeypatch, options, 4)
    stopped(monkeypatch, dataclasses.replace(options, resume=True), 7, signal.SIGTERM)
    best = tr.train(dataclasses.replace(options, resume=True))
    assert best == tmp_path / "run" / tr.BEST
    assert_same(options.out, whole(case))
    moments = load_start(options.out / tr.LAST)[2]
    assert moments["adam.init.step"] == 10 and moments["adam.init.exp_avg_sq"].max() > 0


def test_cases_differ_and_the_best_checkpoint_is_the_best_validated(whole):
    ends = [load_start(whole(case) / tr.LAST)[1] for case in CASES]
    assert all(not torch.equal(a, b) for i, a in enumerate(ends) for b in ends[:i])
    for case in CASES:
        checked = [row for row in rows(whole(case)) if row["val_score"] is not None]
        assert [row["step"] for row in checked] == [4, 8, 10]
        top = max(checked, key=lambda row: row["val_score"])
        meta = load_start(whole(case) / tr.BEST)[3]
        assert (meta["best"], meta["step"]) == (top["val_score"], top["step"])


def test_meta_sgd_learns_rates_that_validation_and_fitting_use(whole):
    net, init, extra, _ = load_start(whole("meta_sgd") / tr.LAST)
    rates = extra["inner_lr"]
    assert rates.shape == init.shape and rates.std() > 1e-4  # began as 0.01, all of them
    best, _, learned, _ = load_start(whole("meta_sgd") / tr.BEST)
    opened = open_start(str(whole("meta_sgd")), torch.device("cpu"))
    assert torch.equal(opened.start.lr, learned["inner_lr"]) and opened.start.rule == "meta_sgd"
    checks = validated(3, net)

    def reached(lr):
        fitted = fm.adapt(net, init, checks, 2, lr, rule="meta_sgd").params
        return float(psnr(fm.mlp(net, fitted, checks.x), checks.y).mean())

    logged = rows(whole("meta_sgd"))[-1]["val_score"]
    assert logged == pytest.approx(reached(rates), abs=1e-4)
    assert abs(logged - reached(0.01)) > 1e-3


def test_killed_at_random_moments_a_run_ends_bit_equal(tmp_path):
    """SIGKILL at three random moments, each resumption a new process, and once more in this one."""
    few = {"iterations": 200, "validate_every": 40, "save_every": 5, "log_every": 10, "threads": 1}
    tr.train(config(tmp_path / "whole", **few))
    options, draw = config(tmp_path / "run", **few), random.Random(3)
    for attempt in range(3):
        child = launch([*arguments(options), *["--resume"] * bool(attempt)])
        late = saved_step(options.out) + draw.randrange(5, 50)  # at 5 ms a step, some 10 more pass
        wait_for(lambda c=child, n=late: saved_step(options.out) >= n or c.poll() is not None)
        time.sleep(draw.uniform(0, 0.04))
        child.kill()
        said = child.communicate()
        assert child.returncode == -signal.SIGKILL and saved_step(options.out) < 200, said
    (options.out / ".fastmeta-0.tmp").write_bytes(b"half a checkpoint")
    tr.train(dataclasses.replace(options, resume=True))
    assert_same(options.out, tmp_path / "whole")
    assert not list(options.out.glob(".*"))  # nor is anything left that was half written


def launch(given):
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    root = str(Path(fm.__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "fastmeta", *given]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)


def saved_step(out):
    """Outer step of the last checkpoint, 0 where there is none; from the header of one opened file,
    as a running child may replace it."""
    if not (out / tr.LAST).exists():
        return 0
    with open(out / tr.LAST, "rb") as file:
        head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return json.loads(head["__metadata__"]["fastmeta"])["meta"]["meta"]["step"]


def wait_for(true, limit=60.0):
    end = time.monotonic() + limit
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_ctrl_c_saves_says_so_in_one_line_and_exits_130(tmp_path):
    options = config(tmp_path / "run", iterations=10**6, save_every=10**6, log_every=1)
    child = launch(arguments(options))
    log = options.out / tr.LOG
    wait_for(lambda: log.exists() and log.stat().st_size > 0 or child.poll() is not None)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130
    found = re.fullmatch(r"fastmeta: interrupted: saved after outer step (\d+) of .*\n", said)
    assert found and "--resume" in said and str(options.out) in said
    assert saved_step(options.out) == int(found[1])


def test_resuming_with_another_option_names_it(whole, tmp_path, monkeypatch):
    options = config(tmp_path / "run")
    stopped(monkeypatch, options, 4)
    before = (options.out / tr.LAST).read_bytes()
    with pytest.raises(ValueError, match=r"inner_lr 0\.01 -> 0\.02, tasks|tasks 2 -> 3, inner_lr"):
        tr.train(dataclasses.replace(options, resume=True, tasks=3, inner_lr=0.02))
    assert (options.out / tr.LAST).read_bytes() == before
    with pytest.raises(ValueError, match="is at outer step 4, iterations is 2; accepted are 4"):
        tr.train(dataclasses.replace(options, resume=True, iterations=2))
    tr.train(dataclasses.replace(options, resume=True, save_every=7))
    assert torch.equal(load_start(options.out / tr.LAST)[1], load_start(whole("maml") / tr.LAST)[1])


def test_a_resumed_run_knows_its_best(tmp_path, monkeypatch):
    monkeypatch.setattr(tr, "_validate", lambda config, run, checks: 30.0 - run.step)
    options = config(tmp_path / "run")
    stopped(monkeypatch, options, 6)
    tr.train(dataclasses.replace(options, resume=True))
    assert [load_start(options.out / name)[3]["best"] for name in (tr.LAST, tr.BEST)] == [
        26.0,
        26.0,
    ]
    assert load_start(options.out / tr.BEST)[3]["step"] == 4


def test_a_folder_that_holds_a_run_is_refused(whole):
    out = whole("maml")
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match="holds a run already; accepted are --resume"):
        tr.train(config(out, seed=5))
    assert before == {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def test_nothing_to_resume(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json there; accepted is the folder"):
        tr.train(config(tmp_path / "none", resume=True))
    assert not (tmp_path / "none").exists()


def test_a_failed_start_leaves_nothing_in_the_way(tmp_path):
    (tmp_path / "empty").mkdir()
    options = config(tmp_path / "run")
    with pytest.raises(ValueError, match="holds no image"):
        tr.train(dataclasses.replace(options, data=str(tmp_path / "empty")))
    with pytest.raises(ValueError, match="cannot run this case"):
        tr.train(dataclasses.replace(options, precision="bf16", impl="reference"))
    assert tr.train(dataclasses.replace(options, iterations=0)).exists()


@pytest.mark.parametrize("network", ["fourier", "frequencies", "siren"])
def test_resume_takes_every_option_of_the_run(network, tmp_path, monkeypatch):
    images = np.random.default_rng(0).random((20, 13, 13, 3))
    np.savez(tmp_path / "a.npz", images=images, names=[f"{i // 2}.png" for i in range(20)])
    changed = {"data": str(tmp_path / "a.npz"), "network": network}
    changed |= {"order": 1, "iterations": 12, "tasks": 1, "inner_steps": 3, "inner_lr": 0.02}
    changed |= {"algorithm": "maml", "rule": "momentum", "lr": 2e-3, "clip": 0.5, "per_step": 50}
    changed |= {"size": 13, "channels": 3, "width": 12, "depth": 4}
    own = {
        "fourier": {"features": 7, "feature_scale": 3.0},
        "frequencies": {"frequencies": 3, "max_exponent": 4.0},
        "siren": {"w0": 20.0},
    }
    changed |= {"w0": 100.0} | own[network]
    changed |= {"validation": 0.2, "test": 0.3, "skip_bad": True}
    changed |= {"test_steps": 4, "test_per_step": 60}
    changed |= {"group": r"(\d+)\.", "validate_every": 5, "validate_tasks": 2, "save_every": 6}
    changed |= {"log_every": 1, "seed": 9, "threads": 1, "impl": "reference", "precision": "fp32"}
    changed |= {"max_memory": 10**6}
    options = config(tmp_path / "run", **changed)
    same = {"algorithm", "channels"}  # reptile has no order; the images have colours
    same |= {"eikonal", "test_counts"}  # of other kinds of signal: tests/test_recipes.py
    same |= {name for names in own.values() for name in names} - set(own[network])
    same |= {"network"} if network == "siren" else set()
    for part in (options, options.signal):
        for field in dataclasses.fields(part):
            if field.name not in same | {"resume", "signal"}:
                assert getattr(part, field.name) != field.default, field.name
    stopped(monkeypatch, options, 4)
    given = ["--resume", "--out", str(options.out)]
    resumed = _options(tr.Config[Images], "train images", given, _resumed(given))
    assert resumed == dataclasses.replace(options, resume=True)
    given = ["--resume", f"--out={options.out}", "--iterations", "14"]
    resumed = _options(tr.Config[Images], "train images", given, _resumed(given))
    assert resumed == dataclasses.replace(options, resume=True, iterations=14)
    assert main(["train", "images", "--resume", "--out", str(options.out)]) == 0
    assert saved_step(options.out) == 12


# learning


def test_validation_improves_on_text(tmp_path):
    tr.train(config(tmp_path / "run", iterations=60, validate_every=10, validate_tasks=16))
    reached = [row["val_score"] for row in rows(tmp_path / "run") if row["val_score"] is not None]
    assert len(reached) == 6 and reached[-1] > reached[0] + 2
    net, init, _, meta = load_start(tmp_path / "run" / tr.BEST)
    assert meta["best"] == max(reached)
    checks = validated(16, net)
    fitted = fm.adapt(net, init, checks, 2, 1e-2).params  # all at once, where training took fours
    by_hand = float(psnr(fm.mlp(net, fitted, checks.x), checks.y).mean())
    assert meta["best"] == pytest.approx(by_hand, abs=1e-3)


def test_clipping_bounds_the_gradient_that_adam_sees(tmp_path):
    """Adam's first moment after one step is 0.1 g."""
    seen = {}
    for clip in (None, 1e-3):
        tr.train(config(tmp_path / str(clip), iterations=1, clip=clip, rule="meta_sgd"))
        extra = load_start(tmp_path / str(clip) / tr.LAST)[2]
        moments = torch.cat([extra["adam.init.exp_avg"], extra["adam.inner_lr.exp_avg"]])
        seen[clip] = float(moments.norm() / 0.1), rows(tmp_path / str(clip))[0]["grad_norm"]
    assert seen[None][0] == pytest.approx(seen[None][1], rel=1e-5)
    assert seen[1e-3] == (pytest.approx(1e-3, rel=1e-3), seen[None][1])
    assert seen[None][1] > 1e-2


# logs


def test_both_logs_agree(whole):
    log, lines = rows(whole("maml")), table(whole("maml"))
    assert [row["step"] for row in log] == [2, 4, 6, 8, 10]
    assert tuple(lines[0]) == tr.COLUMNS
    for row, line in zip(log, lines, strict=True):
        assert line == {k: "" if v is None else str(v) for k, v in row.items()}
        assert row["psnr"] == pytest.approx(
            -10 * torch.tensor(row["loss"]).log10().item(), abs=1e-3
        )


def test_half_written_log_lines_are_repaired(whole, tmp_path, monkeypatch):
    options = config(tmp_path / "run")
    stopped(monkeypatch, options, 7)
    with open(options.out / tr.LOG, "a") as log, open(options.out / tr.TABLE, "a") as csv_file:
        log.write(json.dumps({**rows(options.out)[-1], "step": 8}) + '\n{"step": 10, "lo')
        csv_file.write("8,0.1,10.0\n10,0.0")
    tr.train(dataclasses.replace(options, resume=True))
    assert_same(options.out, whole("maml"))


def test_without_a_terminal_progress_is_lines_on_standard_output(tmp_path, capsys):
    tr.train(config(tmp_path / "run"))
    said = capsys.readouterr()
    assert said.err == "" and len(said.out.splitlines()) == 3
    last = rows(tmp_path / "run")[-1]
    assert said.out.splitlines()[-1].startswith(f"outer step 10 of 10: loss {last['loss']:.5f}, ")


def test_a_terminal_gets_a_bar_with_loss_and_psnr(tmp_path, capsys, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    tr.train(config(tmp_path / "run", log_every=1))
    last, best = rows(tmp_path / "run")[-1], load_start(tmp_path / "run" / tr.BEST)[3]["best"]
    shown = terminal.getvalue().replace("\r", "\n").splitlines()[-1]
    assert "10/10" in shown and f"loss={last['loss']:.4f}" in shown
    assert f"PSNR={last['psnr']:.2f} dB" in shown and f"best val={best:.2f} dB" in shown
    assert capsys.readouterr().out == ""


def test_tensorboard_gets_the_rows_where_it_is_and_is_not_needed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    tr.train(config(tmp_path / "without", iterations=2))
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, *row):
            written.append(row)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            written.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type(sys)("board"))
    sys.modules["torch.utils.tensorboard"].SummaryWriter = Writer
    tr.train(config(tmp_path / "with", iterations=2))
    row = rows(tmp_path / "with")[-1]
    assert written[0] == (str(tmp_path / "with" / "tensorboard"), 1) and written[-1] == "closed"
    assert written[1:-1] == [(name, row[name], 2) for name in tr.COLUMNS[1:]]
    assert_same(tmp_path / "with", tmp_path / "without")


# failing


def one_line(capsys, *words):
    said = capsys.readouterr().err
    assert said.startswith("fastmeta: error: ") and said.count("\n") == 1 and said[-1] == "\n"
    for word in words:
        assert word in said
    return said


def test_a_full_disk_leaves_the_earlier_checkpoint(whole, tmp_path, monkeypatch, capsys):
    options = config(tmp_path / "run")
    stopped(monkeypatch, options, 4)
    before = {path.name: path.read_bytes() for path in options.out.glob("*.safetensors")}

    def full(path, data):
        with open(path, "wb") as file:
            file.write(data[:1000])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert main(["train", "images", "--resume", "--out", str(options.out)]) == 2
    one_line(capsys, "safetensors: could not be written", "No space left on device", "unchanged")
    assert before == {path.name: path.read_bytes() for path in options.out.glob("*.safetensors")}
    assert not list(options.out.glob(".*"))
    tr.train(dataclasses.replace(options, resume=True))
    assert_same(options.out, whole("maml"))


def test_a_diverging_loss_touches_no_checkpoint(tmp_path, monkeypatch, capsys):
    assert main([*arguments(config(tmp_path / "new")), "--inner-lr", "1e6"]) == 2
    one_line(capsys, "at outer step 1 the loss is", "a smaller inner_lr (1e+06)")
    assert not list((tmp_path / "new").glob("*.safetensors"))
    options = config(tmp_path / "run")
    stopped(monkeypatch, options, 6)
    before = {path.name: path.read_bytes() for path in options.out.glob("*.safetensors")}
    assert set(before) == {tr.LAST, tr.BEST}
    stored = json.loads((options.out / tr.CONFIG).read_text())
    (options.out / tr.CONFIG).write_text(json.dumps({**stored, "inner_lr": 1e6}))
    capsys.readouterr()
    assert main(["train", "images", "--resume", "--out", str(options.out)]) == 2
    one_line(capsys, "at outer step 7 the loss is")
    assert before == {path.name: path.read_bytes() for path in options.out.glob("*.safetensors")}


@pytest.mark.parametrize("name", [tr.LAST, tr.CONFIG])
def test_a_damaged_run_is_not_resumed(name, tmp_path, monkeypatch, capsys):
    options = config(tmp_path / "run")
    stopped(monkeypatch, options, 4)
    cut = (options.out / name).read_bytes()[:-20]
    (options.out / name).write_bytes(cut)
    assert main(["train", "images", "--resume", "--out", str(options.out)]) == 2
    one_line(capsys, str(options.out / name))
    assert (options.out / name).read_bytes() == cut


def test_a_checkpoint_of_another_run_is_not_resumed(tmp_path, monkeypatch):
    options = config(tmp_path / "run")
    stopped(monkeypatch, options, 4)
    net, init, _, _ = load_start(options.out / tr.LAST)
    fm.save_init(options.out / tr.LAST, net, init)
    with pytest.raises(ValueError, match="has no 'step'; accepted is a checkpoint of this run"):
        tr.train(dataclasses.replace(options, resume=True))
    fm.save_init(options.out / tr.LAST, fm.siren(2, 3, 8, 2), fm.siren(2, 3, 8, 2).init()[0])
    with pytest.raises(ValueError, match="accepted is the run's MLP"):
        tr.train(dataclasses.replace(options, resume=True))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"tasks": 0}, "tasks is 0; accepted is an integer >= 1"),
        ({"iterations": -1}, "iterations is -1"),
        ({"per_step": 0}, "per_step is 0"),
        ({"features": 0}, "features is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"clip": 0.0}, "clip 0.0"),
    ],
)
def test_options_out_of_range(change, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        config("x", **change)


def test_reptile_learns_no_rates(tmp_path):
    with pytest.raises(ValueError, match=r"fm\.MAML has"):
        tr.train(config(tmp_path / "run", algorithm="reptile", rule="meta_sgd"))


def test_a_set_without_validation_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", torch.rand(1, 12, 12, 3).numpy())
    options = config(tmp_path / "run", data=str(tmp_path / "a.npy"))
    with pytest.raises(ValueError, match="0 to validate; accepted is at least one of each"):
        tr.train(options)
    assert not options.out.exists()


def test_no_validation_asked_for_scores_what_is_learned(tmp_path):
    images = torch.rand(3, 12, 12, 3)
    np.save(tmp_path / "a.npy", images.numpy())
    shares = {"validation": 0.0, "test": 0.0}
    tr.train(config(tmp_path / "run", data=str(tmp_path / "a.npy"), iterations=4, **shares))
    net, init, _, meta = load_start(tmp_path / "run" / tr.BEST)
    batch = im.image_batch(images, net)
    fitted = fm.adapt(net, init, batch, 2, 1e-2).params
    by_hand = float(psnr(fm.mlp(net, fitted, batch.x), batch.y).mean())
    assert meta["best"] == pytest.approx(by_hand, abs=1e-3)


@pytest.mark.parametrize(
    "given, said",
    [
        ({"algorithm": "reptile", "order": 1}, "order is 1 with algorithm reptile"),
        ({"features": 64}, "features is 64 with network siren"),
        ({"network": "fourier", "w0": 30.0}, "w0 is 30.0 with network fourier"),
        (
            {"network": "frequencies", "feature_scale": 1.0},
            "feature_scale is 1.0 with network freq",
        ),
        ({"network": "relu", "max_exponent": 4.0}, "max_exponent is 4.0 with network relu"),
        ({"test_counts": (3,)}, "test_counts is (3,) with images, where nothing is counted"),
        ({"eikonal": 0.1}, "eikonal is 0.1 with images"),
    ],
)
def test_an_option_without_effect_is_refused(given, said, tmp_path):
    with pytest.raises(ValueError, match=re.escape(said)):
        tr.Config(**{"data": "text", "out": tmp_path, **given})


@pytest.mark.parametrize("given", [{"group": "(a)"}, {"validation": 0.2}, {"channels": 1}])
def test_an_option_that_the_data_leave_without_effect_is_refused(given, tmp_path):
    (name, value), *_ = given.items()
    said = f"{name} is {value!r} with data text, where it has no effect; accepted is without"
    with pytest.raises(ValueError, match=re.escape(said)):
        tr.train(config(tmp_path / "run", **given))
    assert not (tmp_path / "run").exists()
