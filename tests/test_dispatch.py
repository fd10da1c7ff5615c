"""The dispatcher: the name fixes who computes; refusals carry their reasons; nothing falls back in
silence."""

import types

import pytest
import torch

import fastmeta as fm
from fastmeta import reference
from fastmeta.ops import dispatch

NET = fm.siren(2, 3, 8, 3)


@pytest.fixture(autouse=True)
def fresh():
    dispatch.load.cache_clear()
    dispatch._choose.cache_clear()
    yield
    dispatch.load.cache_clear()
    dispatch._choose.cache_clear()


def call(**options):
    return fm.mlp(NET, torch.zeros(NET.num_params), torch.zeros(4, 2), **options)


def test_available_names_every_worker():
    names = fm.available()
    assert list(names) == ["cuda", "triton", "cpu", "reference"]
    assert names["reference"] is None
    assert all(reason is None or len(reason) > 10 for reason in names.values())


def test_unknown_names_are_refused():
    with pytest.raises(
        ValueError, match="impl is 'gpu'; accepted are cuda, triton, cpu, reference"
    ):
        call(impl="gpu")
    with pytest.raises(ValueError, match="precision is 'fp8'; accepted are fp32, tf32, fp16, bf16"):
        call(precision="fp8")


def test_a_named_worker_is_never_replaced(monkeypatch):
    monkeypatch.setitem(dispatch.WORKERS, "triton", ("fastmeta.no_such_module", None))
    message = (
        r"mlp: impl='triton' cannot run this case. triton: this version of fastmeta has no triton"
    )
    with pytest.raises(ValueError, match=message):
        call(impl="triton")
    with pytest.raises(ValueError, match="reference: precision 'bf16'"):
        call(impl="reference", precision="bf16")


def test_when_all_object_one_error_lists_every_objection():
    with pytest.raises(ValueError) as caught:
        call(precision="tf32")
    text = str(caught.value)
    assert text.startswith("mlp: no worker runs this case. ")
    assert all(f"{name}: " in text for name in dispatch.WORKERS)


def worker(**attributes):
    made = types.SimpleNamespace(
        mlp=lambda net, p, x: x.new_full((1, 4, 3), 7.0), objections=lambda case: [], asked=[]
    )
    made.at = lambda precision: made.asked.append(precision) or made
    made.__dict__.update(attributes)
    return made


def test_the_precision_reaches_the_worker(monkeypatch):
    fast = worker()
    monkeypatch.setattr(dispatch, "load", lambda name: (fast, None))
    assert call(precision="tf32").eq(7).all() and call().eq(7).all()
    assert fast.asked == ["tf32", None]


def test_the_first_without_objection_runs(monkeypatch):
    seen = []

    def objections(case):
        seen.append(case)
        return ["widths above 4"] if case.net.width > 4 else []

    fast = worker(objections=objections)
    monkeypatch.setattr(
        dispatch, "load", lambda name: (fast if name == "triton" else reference, None)
    )
    assert not call().eq(7).any()  # triton objects, so the next one runs
    assert (seen[0].op, seen[0].order, seen[0].device, seen[0].dtype) == (
        "mlp",
        2,
        "cpu",
        torch.float32,
    )
    with pytest.raises(
        ValueError, match="impl='triton' cannot run this case. triton: widths above 4"
    ):
        call(impl="triton")
    narrow = fm.siren(2, 3, 4, 3)
    assert fm.mlp(narrow, torch.zeros(narrow.num_params), torch.zeros(4, 2)).eq(7).all()


def test_a_worker_for_callers_who_name_it(monkeypatch):
    fast = worker()
    monkeypatch.setattr(
        dispatch, "load", lambda name: (fast if name == "cuda" else reference, None)
    )
    assert dispatch.BY_NAME == ("cuda",)
    assert not call().eq(7).any() and call(impl="cuda").eq(7).all()


def test_the_environment_names_a_worker_as_strictly(monkeypatch):
    monkeypatch.setenv("FASTMETA_IMPL", "cuda")
    monkeypatch.setitem(dispatch.WORKERS, "cuda", ("fastmeta.no_such_module", None))
    with pytest.raises(ValueError, match="impl='cuda' cannot run this case"):
        call()
    assert call(impl="reference").shape == (4, 3)
    monkeypatch.setenv("FASTMETA_IMPL", "")
    assert call().shape == (4, 3)


def test_a_worker_that_does_not_load_says_why(monkeypatch, tmp_path):
    (tmp_path / "needs_absent.py").write_text("import a_package_that_is_absent\n")
    (tmp_path / "breaks.py").write_text("raise ImportError('undefined symbol: f')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(dispatch.WORKERS, "cpu", ("needs_absent", None))
    assert "needs the package 'a_package_that_is_absent'" in fm.available()["cpu"]
    dispatch.load.cache_clear()
    monkeypatch.setitem(dispatch.WORKERS, "cpu", ("breaks", None))
    assert fm.available()["cpu"] == "breaks does not load: undefined symbol: f"


@pytest.mark.parametrize("order", [1, 2])
def test_the_meta_modules_ask_for_their_case(monkeypatch, order):
    seen = []

    def objections(case):
        seen.append((case.op, case.rule, case.order, case.measure))
        return ["not today"]

    fast = worker(objections=objections)
    monkeypatch.setattr(
        dispatch, "load", lambda name: (fast if name == "triton" else reference, None)
    )
    batch = fm.Batch(torch.rand(9, 2), torch.rand(2, 9, 3))
    fm.MAML(NET, 1, 1e-2, order=order, rule="adam")(batch)
    fm.Reptile(NET, 1, 1e-2)(batch)
    assert seen == [("maml", "adam", order, "none"), ("reptile", "sgd", 1, "none")]
