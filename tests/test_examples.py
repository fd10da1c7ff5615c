"""examples/: what each peer's script computes, its loop around fastmeta's modules, its words and
fm.MAML compute too; in float32 to 1e-5, in float64 to 1e-10.

FASTMETA_TEST_PEERS names peers that must be there (higher,learn2learn,jax,...; 1: all that the
extra ``peers`` installs), so that absence fails instead of skipping.
"""

import importlib
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers import error, generator, plain_mlp

import fastmeta as fm

ROOT = Path(__file__).parents[1]
EXTRA = {"higher", "torchopt", "jax", "haiku"}  # what the extra ``peers`` installs
NEEDS = {"higher": ["higher"], "learn2learn": ["learn2learn"], "torch_func": [], "metasdf": []}
SIZES = 3, 4, 16  # outer steps, tasks, side
# torch's loops and ours sum in another order, through 5 steps and back: some 4e-7 and 1e-15
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-10}

pytestmark = pytest.mark.usefixtures("importable")


@pytest.fixture
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture(params=CLOSE, ids=["float32", "float64"])
def dtype(request):
    """What scripts compute in, since they take torch's default."""
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


def peer(name):
    """The installed package, or a skip with the reason; a failure where it must be there."""
    listed = os.environ.get("FASTMETA_TEST_PEERS", "").split(",")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own imports
            return importlib.import_module(name)
    except Exception as reason:  # learn2learn: RuntimeError where torchvision is not torch's
        said = f"{name} does not import here ({type(reason).__name__}: {reason})"
        if name in listed or ("1" in listed and name in EXTRA):
            pytest.fail(f"{said}, and FASTMETA_TEST_PEERS lists it")
        pytest.skip(said)


def measure():
    return importlib.import_module("examples.measure")


def start():
    """[P] of the network that all scripts start from."""
    torch.manual_seed(0)
    shared = importlib.import_module("examples.shared")
    return torch.cat([p.detach().flatten() for p in shared.Siren().parameters()])


def agree(got, want, begin, close):
    """Losses, the last meta-gradient, and how far the parameters went."""
    assert error(got["losses"], want["losses"]) < close
    assert error(got["gradient"], want["gradient"]) < close
    assert error(got["params"] - begin, want["params"] - begin) < close


@pytest.mark.parametrize("folder", NEEDS)
def test_every_way_is_the_peers_script(folder, dtype):
    """The peer's loop unchanged around our module, its words over fm.compat, fm.MAML."""
    for name in NEEDS[folder]:
        peer(name)
    ways = measure().ways(folder)
    assert {"before", "module", "after", "least"} <= ways.keys()
    assert ("idiom" in ways) == (folder in ("higher", "learn2learn"))
    want, begin = ways["before"](*SIZES), start()
    assert want["losses"].shape == (3,) and (want["losses"][1:] < want["losses"][:-1]).all()
    for way, main in ways.items():
        if way != "before":
            agree(main(*SIZES), want, begin, CLOSE[dtype])


def test_first_order_would_be_seen():
    """The scripts' gradient is of second order, and by far more than the tolerance."""
    shared, ways = importlib.import_module("examples.shared"), measure().ways("torch_func")
    want = ways["before"](1, *SIZES[1:])["gradient"]
    x, y = shared.pictures(*SIZES[1:])
    net = fm.siren(2, 3, 64, 4, 30.0, output_shift=0.5)
    first = fm.MAML(net, 5, 1e-2, order=1, init=start())
    first(fm.Batch(x[0], y)).backward()
    assert error(first.init.grad, want) > 1e-2


def test_torchopts_loop_around_our_module(dtype):
    """``torchopt.MetaSGD`` on a BatchedMLP, its state put back for every task."""
    torchopt = peer("torchopt")
    shared = importlib.import_module("examples.shared")
    x, y = shared.pictures(*SIZES[1:])

    def gradient(net):
        inner = torchopt.MetaSGD(net, lr=1e-2)
        states = [torchopt.extract_state_dict(part) for part in (net, inner)]
        for target in y.split(1):
            for _ in range(5):
                inner.step(torch.nn.functional.mse_loss(net(x), target))
            (torch.nn.functional.mse_loss(net(x), target) / len(y)).backward()
            for part, state in zip((net, inner), states, strict=True):
                torchopt.recover_state_dict(part, state)
        return torch.cat([p.grad.flatten() for p in net.parameters()])

    torch.manual_seed(0)
    want = gradient(shared.Siren())
    got = gradient(measure().module("torchopt"))
    assert error(got, want) < CLOSE[dtype]


# A JAX checkpoint ---


def haiku(net, params):
    """{"siren__model/siren_layer_1/linear": {"w": [in,out], "b": [out]}}, as haiku names them."""
    return {
        f"siren__model/siren_layer{f'_{n}' if n else ''}/linear": {
            "w": w.T.numpy().copy(),
            "b": b.numpy().copy(),
        }
        for n, (w, b) in enumerate(net.layers(params))
    }


def test_a_learnit_checkpoint_without_jax(tmp_path, dtype):
    """after.py from a pickle of numpy arrays, against autograd through plain torch in float64."""
    net = fm.siren(2, 3, 64, 4, 200.0, output_shift=0.5)
    params = net.init(generator=generator())[0].to(dtype)  # more noise is chaos at w0 = 200
    (tmp_path / "start.pkl").write_bytes(pickle.dumps(haiku(net, params)))
    after = importlib.import_module("examples.learnit.after")
    steps, tasks, side = SIZES
    got = after.main(tmp_path / "start.pkl", *SIZES)
    x, y = importlib.import_module("examples.shared").pictures(tasks, side, "unit")
    want = by_autograd(net, params.double(), x[0].double(), y.double(), steps)
    # In float32 phases of up to 200 rad round to 1e-5, and K steps make more of it: the bound is
    # twice what plain torch itself is off.
    far = dict.fromkeys(want, CLOSE[dtype])
    if dtype == torch.float32:
        plain = by_autograd(net, params, x[0], y, steps)
        far = {name: max(2 * error(plain[name], want[name]), 1e-5) for name in want}
    for name in want:
        assert error(got[name], want[name]) < far[name], name


def by_autograd(net, begin, x, y, outer_steps):
    """What after.py returns, by create_graph over an independent network."""
    theta = begin.clone().requires_grad_()
    outer, losses = torch.optim.Adam([theta], 1e-4), []

    def loss(p, target):
        return (plain_mlp(net, p, x) - target).square().mean()

    def stepped(p, target, graph):
        (g,) = torch.autograd.grad(loss(p, target), p, create_graph=graph)
        return p - 1e-2 * g

    for _ in range(outer_steps):
        outer.zero_grad()
        total = 0.0
        for target in y:
            p = stepped(stepped(theta, target, True), target, True)
            total = total + loss(p, target) / len(y)
        total.backward()
        outer.step()
        losses.append(total.detach())
    fit, p = [], theta.detach().requires_grad_()
    for _ in range(3):
        fit.append(loss(p, y[0]).detach())
        p = stepped(p, y[0], False).detach().requires_grad_()
    values = {"losses": torch.stack(losses), "gradient": theta.grad, "params": theta.detach()}
    return {**values, "fit": torch.stack(fit)}


def test_a_learnit_checkpoint_against_jax(tmp_path):
    """before.py, JAX and haiku in float64, writes the checkpoint; both scripts go on from it."""
    jax = peer("jax")
    peer("haiku")
    torch.set_default_dtype(torch.float64)
    jax.config.update("jax_enable_x64", True)
    try:
        before, after = (
            importlib.import_module(f"examples.learnit.{n}") for n in ("before", "after")
        )
        want = before.main(tmp_path / "start.pkl", *SIZES)
        got = after.main(tmp_path / "start.pkl", *SIZES)
    finally:
        jax.config.update("jax_enable_x64", False)
        torch.set_default_dtype(torch.float32)
    begin = fm.load_learnit(tmp_path / "start.pkl")[1]
    assert begin.dtype == torch.float64
    want = {name: torch.from_numpy(values) for name, values in want.items()}
    agree(got, want, begin, 1e-10)
    assert error(got["fit"], want["fit"]) < 1e-10


# Memory ---


@pytest.mark.parametrize("folder", [name for name in NEEDS if name != "torch_func"])
def test_a_peers_loop_around_our_module_saves_a_fifth(folder):
    """Bytes saved for backward, counted, of one outer step at T = 16, N = 1024, K = 5, width 64."""
    for name in NEEDS[folder]:
        peer(name)
    m = measure()
    most = {}
    for way, main in m.ways(folder).items():
        with m.saved() as held:
            got = main(1)
        most[way] = held()
        agree(got, main(1), start(), 1e-5)  # counting changes nothing
    # K + 1 forward passes of one task of N points, three sines [N,64] in each, at the very least
    assert most["before"] > 6 * 3 * 1024 * 64 * 4
    assert most["module"] < most["before"] / 5
    assert most["after"] < most["before"] / 5
    assert 4 * 8707 <= most["after"] < 1e6  # the meta-gradient, and no graph


def test_saved_bytes_are_counted():
    a, b = torch.ones(1000, requires_grad=True), torch.ones(1000)
    with measure().saved() as held:
        (a * b * b).sum().backward()  # b twice, and a product's other factor only
        assert held() == 4000
        c = (a * a).exp()  # a, and the exponential
        assert held() == 8000
        del c
        (a * b).sum()
    assert held() == 8000


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the peak of memory")
@pytest.mark.skipif(fm.available()["cpu"] is not None, reason="the cpu worker does not run here")
def test_maml_with_the_workers_own_memory_takes_a_fifth(monkeypatch):
    """Resident memory, the worker's included: 475 against 7 MB, in float32 at the same sizes."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    before, after = (measure().memory("metasdf", way, 1)["resident"] for way in ("before", "after"))
    if before is None:
        pytest.skip("this system does not reset the peak of memory")
    assert before > 100  # T tasks' graphs of 20 MB or more
    assert after < before / 5


# Processes ---


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch has no gloo",
)
def test_ddp_under_torchrun(tmp_path, monkeypatch):
    """Two processes of half the tasks each end where one with all of them ends."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        env["GLOO_SOCKET_IFNAME"] = "lo"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
    ]
    done = subprocess.run(
        [*command, "-m", "examples.ddp", str(tmp_path / "out")],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    ddp = importlib.import_module("examples.ddp")
    want = ddp.main()
    torch.manual_seed(0)
    begin = fm.siren(2, 3, 64, 4, 30.0, output_shift=0.5).init()[0]
    both = [torch.load(tmp_path / f"out.{rank}") for rank in range(2)]
    assert all(torch.equal(both[0][name], both[1][name]) for name in want)
    agree(both[0], want, begin, 1e-5)
    half = ddp.main(tasks=8)  # other tasks: another gradient
    assert error(half["gradient"], want["gradient"]) > 1e-2


def test_the_table_names_every_example():
    text = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    folders = {path.parent.name for path in (ROOT / "examples").glob("*/before.py")}
    assert folders == {*NEEDS, "learnit"}
    for folder in folders:
        assert f"{folder}/before.py" in text
