"""Files: bit-equal round trips, and what happens to a file that is cut, damaged or half written."""

import errno
import json
import os
import pathlib
import struct
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fastmeta.checkpoint import (
    atomic_write,
    load_init,
    load_start,
    load_tensors,
    save_init,
    save_start,
    save_tensors,
    spec_from_json,
    spec_to_json,
)
from fastmeta.spec import ACTIVATIONS, COORDS, MLP, OUTPUTS, Encoding, fourier_mlp, nerf_mlp, siren

SPECS = [
    siren(2, 3, 8, 3, w0=200.0, output_shift=0.5),
    fourier_mlp(2, 1, 5, 2, features=7),
    nerf_mlp(6, 4, frequencies=3),
    MLP(1, 1, 1, 2, "sine", w0=0.1, w0_first=1 / 3, coords="corners"),
    MLP(3, 2, 4, 3, "gelu", encoding=Encoding.frequencies(3, 2, 1.0, include_input=True)),
]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@st.composite
def specs(draw) -> MLP:
    """Any network: every activation, output and convention, encodings of arbitrary float32."""
    D, encoding = draw(st.integers(1, 3)), None
    if draw(st.booleans()):
        F = draw(st.integers(1, 4))
        numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
        rows = draw(st.lists(numbers, min_size=D * F + F, max_size=D * F + F))
        values = torch.tensor(rows)
        encoding = Encoding(values[: D * F].view(D, F), values[D * F :], draw(st.booleans()))
    activation = draw(st.sampled_from(ACTIVATIONS))
    w0 = st.floats(1e-3, 1e3) if activation == "sine" else st.just(1.0)
    return MLP(
        D,
        draw(st.integers(1, 3)),
        draw(st.integers(1, 5)),
        draw(st.integers(2, 4)),
        activation,
        draw(w0),
        draw(w0),
        encoding,
        draw(st.sampled_from(OUTPUTS)),
        draw(st.floats(-1e6, 1e6)),
        draw(st.sampled_from(sorted(COORDS))),
    )


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(net=specs(), double=st.booleans(), seed=st.integers(0, 2**31))
def test_round_trip_is_bit_equal(net, double, seed, tmp_path):
    dtype = torch.float64 if double else torch.float32
    init = torch.randn(net.num_params, generator=torch.Generator().manual_seed(seed)).to(dtype)
    init[0], init[-1] = -0.0, torch.finfo(dtype).smallest_normal / 4
    save_init(tmp_path / "a", net, init)
    back, weights = load_init(tmp_path / "a")
    assert back == net and hash(back) == hash(net)
    assert weights.dtype == dtype and bits(weights) == bits(init)
    if net.encoding is not None:
        assert bits(back.encoding.B) == bits(net.encoding.B)
        assert bits(back.encoding.phi) == bits(net.encoding.phi)


@settings(deadline=None)
@given(net=specs())
def test_spec_survives_json_text(net):
    spec, tensors = spec_to_json(net)
    assert spec_from_json(json.loads(json.dumps(spec)), tensors) == net


def test_extra_tensors_and_meta_come_back(tmp_path):
    net = SPECS[0]
    init = torch.nn.Parameter(net.init()[0])
    rate = torch.rand(net.num_params, 3).mT  # strided
    extra = {
        "inner_lr": rate,
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 2),
        "mask": torch.tensor([True, False]),
        "half": torch.rand(5).bfloat16(),
        "shared": rate[0],
        "constant": torch.tensor(2.5).expand(4),
    }
    meta = {"inner_steps": 2, "rate": 0.1 + 0.2, "loss": float("nan"), "list": [1, "ü", None]}
    save_start(tmp_path / "a", net, init, extra=extra, meta=meta)
    back, weights, found, stored = load_start(tmp_path / "a")
    assert back == net and torch.equal(weights, init) and not weights.requires_grad
    assert set(found) == set(extra)
    for name, value in extra.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        assert bits(found[name]) == bits(value)
    assert stored.pop("loss") != meta.pop("loss")  # NaN
    assert stored == meta and stored["rate"] == 0.1 + 0.2
    assert torch.equal(load_init(tmp_path / "a")[1], init)


def test_a_loaded_tensor_outlives_its_file(tmp_path):
    path = tmp_path / "a"
    save_init(path, SPECS[0], SPECS[0].init()[0])
    _, init = load_init(path)
    before = init.clone()
    with open(path, "rb+") as file:
        file.write(bytes(path.stat().st_size))
        file.truncate(1)
    assert torch.equal(init, before)


def test_mode_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        save_init(tmp_path / "a", SPECS[0], SPECS[0].init()[0])
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


# ---- what must not be written


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda w: w[:-1], "shape"),
        (lambda w: w[None], "shape"),
        (lambda w: w.half(), "torch.float16"),
        (lambda w: w.long(), "torch.int64"),
        (lambda w: w.index_fill(0, torch.tensor([3]), float("nan")), "NaN or infinity in 1 of"),
        (lambda w: w * float("inf"), "NaN or infinity"),
        (lambda w: w.numpy(), "ndarray"),
    ],
)
def test_wrong_weights_are_not_written(spoil, said, tmp_path):
    net = SPECS[1]
    path = tmp_path / "a"
    with pytest.raises(ValueError, match=said) as caught:
        save_init(path, net, spoil(net.init()[0] + 1))
    assert "save_init: init" in str(caught.value) and not list(tmp_path.iterdir())


def test_meta_that_is_not_json_is_not_written(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(ValueError, match="meta does not fit JSON"):
        save_start(tmp_path / "a", SPECS[0], SPECS[0].init()[0], meta={"rate": torch.rand(2)})
    with pytest.raises(ValueError, match="accepted are tensors"):
        save_tensors(tmp_path / "a", {"x": [1.0]}, {})
    assert (tmp_path / "a").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


# ---- a write that does not end


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def half_then_no_space(path):
    path.write_bytes(b"half")
    no_space()


def raises(error):
    def write(path):
        path.write_bytes(b"half")
        raise error

    return write


@pytest.mark.parametrize(
    "write",
    [no_space, half_then_no_space, raises(ValueError("two\nlines")), raises(RuntimeError())],
)
def test_an_error_leaves_the_old_file(write, tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(OSError) as caught:
        atomic_write(path, write)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a"]
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    if write in (no_space, half_then_no_space):
        assert caught.value.errno == errno.ENOSPC and "No space left" in str(caught.value)


@pytest.mark.parametrize("name", ["replace", "fsync"])
def test_an_error_of_the_system_leaves_the_old_checkpoint(name, tmp_path, monkeypatch):
    net, path = SPECS[0], tmp_path / "a"
    old, new = net.init(2)
    save_init(path, net, old)
    with monkeypatch.context() as patch:
        patch.setattr(os, name, no_space)
        with pytest.raises(OSError, match="could not be written"):
            save_init(path, net, new)
    assert torch.equal(load_init(path)[1], old) and [p.name for p in tmp_path.iterdir()] == ["a"]
    save_init(path, net, new)
    assert torch.equal(load_init(path)[1], new)


def test_a_full_disk_while_writing_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    net, path = SPECS[0], tmp_path / "a"
    old, new = net.init(2)
    save_init(path, net, old)
    whole = pathlib.Path.write_bytes

    def partly(self, data):
        whole(self, data[: len(data) // 2])
        no_space()

    monkeypatch.setattr(pathlib.Path, "write_bytes", partly)
    with pytest.raises(OSError) as caught:
        save_init(path, net, new)
    assert caught.value.errno == errno.ENOSPC
    assert torch.equal(load_init(path)[1], old) and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_ctrl_c_goes_through_and_leaves_the_old_file(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "a", raises(KeyboardInterrupt()))
    assert (tmp_path / "a").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_a_killed_process_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    script = (
        "import os, sys; from fastmeta.checkpoint import atomic_write\n"
        "atomic_write(sys.argv[1], lambda p: (p.write_bytes(b'half'), os.kill(os.getpid(), 9)))"
    )
    root = pathlib.Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", script, str(path)], cwd=root, capture_output=True)
    assert done.returncode == -9, done.stderr.decode()
    assert path.read_bytes() == b"old"


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"old")
    for path in (tmp_path / "none" / "a", tmp_path / "folder", tmp_path / "file" / "a"):
        with pytest.raises(OSError) as caught:
            save_init(path, SPECS[0], SPECS[0].init()[0])
        assert str(path) in str(caught.value) and "tmp" not in pathlib.Path(str(caught.value)).name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save_init(tmp_path / "link", SPECS[0], SPECS[0].init()[0])
    assert (tmp_path / "link").is_symlink() and not (tmp_path / "real").is_symlink()
    assert load_init(tmp_path / "real")[0] == SPECS[0]


# ---- files that are not what they should be


def refused(path, said="", error=ValueError):
    with pytest.raises(error) as caught:
        load_init(path)
    text = str(caught.value)
    assert str(path) in text and said in text and "\n" not in text and len(text) < 600, text


@pytest.mark.parametrize("net", SPECS, ids=range(len(SPECS)))
def test_a_file_cut_short_is_refused(net, tmp_path):
    path = tmp_path / "a"
    save_init(path, net, net.init()[0])
    data = path.read_bytes()
    for tenth in range(10):
        path.write_bytes(data[: len(data) * tenth // 10])
        refused(path, "not a complete safetensors file")
    for size in (1, 7, 8, 9, len(data) - 1):
        path.write_bytes(data[:size])
        refused(path, "not a complete safetensors file")
    path.write_bytes(data + b"\0")
    refused(path)
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    refused(path)  # a copy that broke off in a file of the full length


@pytest.mark.parametrize("flip", [0x01, 0x80])
def test_every_flipped_bit_is_noticed(flip, tmp_path):
    net, path = SPECS[3], tmp_path / "a"
    save_init(path, net, net.init()[0])
    data = path.read_bytes()
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= flip
        path.write_bytes(damaged)
        refused(path)


def test_hostile_headers(tmp_path):
    path = tmp_path / "a"
    for head in (
        struct.pack("<Q", 2**63),
        struct.pack("<Q", 2**64 - 1) + b"{}",
        struct.pack("<Q", 10**12) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 20000) + b"[" * 20000,
        struct.pack("<Q", 0),
        b"\x80\x04cos\nsystem\n(X\x04\x00\x00\x00trueR.",
        b"PK\x03\x04" + bytes(100),
    ):
        path.write_bytes(head)
        refused(path, "not a complete safetensors file")
    for entry in (
        {"w": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 4]}},
        {"w": {"dtype": "F32", "shape": [2**31, 2**31, 4], "data_offsets": [0, 0]}},
        {"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {"w": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}},
        {"__metadata__": {"fastmeta": 1}},
    ):
        text = json.dumps(entry).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
        refused(path, "not a complete safetensors file")


def test_nothing_or_a_folder(tmp_path):
    refused(tmp_path / "none", "no such file", FileNotFoundError)
    refused(tmp_path, "a folder")


def test_files_of_other_programs(tmp_path):
    path = tmp_path / "a"
    save_file(
        {"layer.weight\n": torch.rand(2), **{f"t{i}": torch.rand(1) for i in range(99)}}, path
    )
    refused(path, "another program")
    save_file({"w": torch.rand(2)}, path, {"fastmeta": "hello"})
    refused(path, "damaged")
    save_file({"w": torch.rand(2)}, path, {"fastmeta": "[" * 200000})
    refused(path, "damaged")
    save_tensors(path, {"w": torch.rand(2)}, {"kind": "run"})
    refused(path, "without starting weights")


@pytest.mark.parametrize(
    "version, said",
    [(2, "newer fastmeta"), (10**9, "newer fastmeta")]
    + [(v, "format version is") for v in (0, -1, "1", 1.0, True, None)],
)
def test_other_versions(version, said, tmp_path):
    head = {"format": "fastmeta", "version": version, "crc32": 0, "meta": {}, "later": []}
    save_file({"w": torch.rand(2)}, tmp_path / "a", {"fastmeta": json.dumps(head)})
    refused(tmp_path / "a", said)


def start_meta(net, **changes):
    spec, tensors = spec_to_json(net)
    return {"kind": "start", "net": {**spec, **changes}, "meta": {}}, tensors


@pytest.mark.parametrize("other", SPECS[1:], ids=range(1, len(SPECS)))
def test_weights_of_another_network_are_refused(other, tmp_path):
    net, path = SPECS[0], tmp_path / "a"
    for spec, weights in ((net, other), (other, net)):
        meta, tensors = start_meta(spec)
        save_tensors(path, {"init": weights.init()[0], **tensors}, meta)
        refused(path, f"the network has {spec.num_params} parameters")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"skip": 2}, "unknown ['skip']"),
        ({"width": 0}, "width is 0"),
        ({"width": "8"}, "width is '8'"),
        ({"width": 8.0}, "width is 8.0"),
        ({"depth": 10**9}, "1000000000 layers"),
        ({"activation": "swish"}, "activation is 'swish'"),
        ({"activation": ["relu"]}, "activation is ['relu']"),
        ({"w0": [1]}, "net: "),
        ({"w0": {}}, "net: "),
        ({"w0": -1.0}, "w0 is -1.0"),
        ({"coords": "mars"}, "coords is 'mars'"),
        ({"output_shift": float("nan")}, "output_shift is nan"),
        ({"encoding": {"include_input": False}}, "['encoding.B', 'encoding.phi'] missing"),
    ],
)
def test_damaged_specifications(changes, said, tmp_path):
    net, path = SPECS[0], tmp_path / "a"
    meta, tensors = start_meta(net, **changes)
    save_tensors(path, {"init": net.init()[0], **tensors}, meta)
    refused(path, said)


@pytest.mark.parametrize(
    "encoding, tensors, said",
    [
        ({"include_input": 1}, {}, "include_input"),
        ({"include_input": False, "log": 2}, {}, "unknown ['log']"),
        ([], {}, "include_input"),
        (None, {}, "unknown ['encoding.B', 'encoding.phi']"),
        ({"include_input": False}, {"encoding.C": torch.rand(1)}, "unknown ['encoding.C']"),
        ({"include_input": False}, {"encoding.B": torch.rand(3, 14)}, "takes 3 coordinates"),
        ({"include_input": False}, {"encoding.B": torch.rand(2, 13)}, "Encoding: B has shape"),
        ({"include_input": False}, {"encoding.B": torch.rand(2, 14).double()}, "torch.float64"),
        ({"include_input": False}, {"encoding.phi": torch.full((14,), torch.nan)}, "phi holds NaN"),
    ],
)
def test_damaged_encodings(encoding, tensors, said, tmp_path):
    net, path = SPECS[1], tmp_path / "a"
    meta, own = start_meta(net, encoding=encoding)
    save_tensors(path, {"init": net.init()[0], **own, **tensors}, meta)
    refused(path, said)


def test_missing_parts(tmp_path):
    net, path = SPECS[0], tmp_path / "a"
    meta, _ = start_meta(net)
    save_tensors(path, {}, meta)
    refused(path, "init is absent")
    save_tensors(path, {"init": net.init()[0], "stray": torch.rand(1)}, meta)
    refused(path, "unknown ['stray']")
    for name in meta["net"]:
        short = {key: value for key, value in meta["net"].items() if key != name}
        save_tensors(path, {"init": net.init()[0]}, {**meta, "net": short})
        refused(path, f"['{name}'] missing")
    for spoiled, said in (({"net": []}, "net is list"), ({"meta": 3}, "meta is int")):
        save_tensors(path, {"init": net.init()[0]}, {**meta, **spoiled})
        refused(path, said)
    save_tensors(path, {"init": torch.full((net.num_params,), torch.inf)}, meta)
    refused(path, "NaN or infinity")
    save_tensors(path, {"init": net.init()[0].half()}, meta)
    refused(path, "float16")


def test_tensors_of_every_kind(tmp_path):
    kinds = [torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.uint8, torch.bool]
    tensors = {str(kind): torch.arange(6).view(2, 3).to(kind) for kind in kinds}
    save_tensors(tmp_path / "a", tensors, {"step": 3})
    back, meta = load_tensors(tmp_path / "a")
    assert meta == {"step": 3} and back.keys() == tensors.keys()
    assert all(torch.equal(back[k], v) and back[k].dtype == v.dtype for k, v in tensors.items())
