"""The compiled workers' border: tensors become pointers, strides and plain structs; nothing else.

``cpu`` runs float32 and float64 on the processor, many tasks at once, with torch's number of
threads. The same number of threads gives the same bits; another number adds the points' gradients
in another order. ``cuda`` runs float32 tensors on an NVIDIA GPU, whole inner loops in one launch,
the hidden layers in one of four precisions; its sums have one order.
"""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from functools import cached_property, lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from . import batch as _batch
from . import cuda_build, env
from . import rules as _rules
from . import spec as _spec
from .batch import Batch, Inverse, March, Project, Rays, inverse_pixels
from .rules import Adam, Momentum, Rule
from .spec import MLP

# Bytes of activations kept between the passes of one call where max_memory is None.
DEFAULT_MEMORY = 2**30

_BUILD = (
    "it is compiled when fastmeta is installed and needs GCC 10 or newer (Debian: apt install "
    "g++); then pip install --force-reinstall --no-deps --no-cache-dir fastmeta"
)


@lru_cache(maxsize=1)
def _library() -> ModuleType:
    """The compiled module, its lists compared with ours."""
    library = importlib.import_module("fastmeta._cpu")
    _compare_lists(library, _BUILD)
    return library


def _compare_lists(library: ModuleType, remedy: str) -> None:
    ours = {
        "ACTIVATIONS": _spec.ACTIVATIONS,
        "OUTPUTS": _spec.OUTPUTS,
        "LOSSES": _batch.LOSSES,
        "MEASURES": _batch.MEASURES,
        "RULES": tuple(_rules.RULES),
    }
    for name, names in ours.items():
        if getattr(library, name) != names:
            raise ImportError(
                f"{library.__name__} lists {name} as {getattr(library, name)}, fastmeta {names}: "
                f"it was built from other sources; {remedy}"
            )


class _Cpu:
    """The worker: whether it is there, what it takes, and its passes."""

    def __init__(self) -> None:
        self._passes: Passes | None = None

    def unavailable(self) -> str | None:
        """Why it cannot run on this machine, or None.

        Raises:
            ValueError: FASTMETA_ISA names what this processor does not run.
        """
        try:
            isas = _library().isas()
        except ImportError as error:
            missing = getattr(error, "name", None) == "fastmeta._cpu"
            return f"not compiled: {_BUILD}" if missing else f"fastmeta._cpu does not load: {error}"
        named = env.isa()
        if named is not None and named not in isas:
            raise ValueError(f"FASTMETA_ISA is {named!r}; accepted here are {', '.join(isas)}")
        return None

    def objections(self, case: Any) -> list[str]:
        """Why it cannot run a case of the dispatcher; empty: it can."""
        reasons = []
        if case.device != "cpu":
            reasons.append(f"device {case.device} (cpu only)")
        if case.dtype not in (torch.float32, torch.float64):
            reasons.append(f"dtype {case.dtype} (float32 and float64 only)")
        if case.precision not in (None, "fp32"):
            reasons.append(
                f"precision {case.precision!r} (fp32 only; float64 by the tensors' dtype)"
            )
        if case.net is not None and case.net.depth > _library().MAX_DEPTH:
            reasons.append(f"depth {case.net.depth} ({_library().MAX_DEPTH} at most)")
        return reasons

    def at(self, precision: str | None) -> Passes:
        """The passes; there is one arithmetic for each dtype."""
        return self.passes

    @property
    def passes(self) -> Passes:
        if self._passes is None:
            self._passes = Passes(env.isa() or _library().isas()[0])
        return self._passes


cpu = _Cpu()


class _Cuda:
    """The worker on NVIDIA GPUs: compiled by nvcc when it is first used, or ahead of time.

    Small networks, on points or along rays, run whole inner loops in one launch, others layer by
    layer; the compiled module decides.
    """

    precisions = ("fp32", "tf32", "fp16", "bf16")
    max_depth = 64  # kMaxDepth of csrc/abi.h
    ops = ("mlp", "loss_grad", "loss_hvp", "adapt", "maml", "reptile", "composite", "project")

    def unavailable(self) -> str | None:
        """Why it cannot run on this machine, or None. Compiles nothing."""
        if not torch.cuda.is_available():
            return "no CUDA device (torch.cuda.is_available() is False)"
        if torch.version.hip is not None:
            return "torch is built for ROCm; accepted is CUDA"
        major, minor = torch.cuda.get_device_capability()
        if major < 8:
            return f"compute capability {major}.{minor} (8.0 or newer)"
        return cuda_build.missing()

    def objections(self, case: Any) -> list[str]:
        """Why it cannot run a case of the dispatcher; empty: it can."""
        reasons = []
        if case.device != "cuda":
            reasons.append(f"device {case.device} (cuda only)")
        if case.dtype != torch.float32:
            reasons.append(f"dtype {case.dtype} (float32 only)")
        if case.op not in self.ops:
            reasons.append(f"{case.op} ({', '.join(self.ops)} only)")
        if case.net is not None and case.net.depth > self.max_depth:
            reasons.append(f"depth {case.net.depth} ({self.max_depth} at most)")
        return reasons

    @cached_property
    def library(self) -> ModuleType:
        """The compiled module; compiles it where no build of these sources is found."""
        library = cuda_build.load(torch.cuda.get_device_capability())
        _compare_lists(library, "remove that build")
        return library

    @lru_cache(maxsize=8)  # noqa: B019  one worker lives as long as the process
    def at(self, precision: str | None) -> Passes:
        """The passes in a precision; none is fp32."""
        return Passes("cuda", Device(self.library, precision or "fp32"))


cuda = _Cuda()


class Host:
    """Where the cpu worker's jobs run: an instruction set."""

    def __init__(self, isa: str) -> None:
        self.library, self.isa = _library(), isa

    def run(self, job: Any, like: Tensor) -> None:
        job.run(self.isa, like.dtype == torch.float64)


class Device:
    """Where the cuda worker's jobs run: the tensors' device and its current stream, in a
    precision."""

    def __init__(self, library: ModuleType, precision: str) -> None:
        self.library, self.mode = library, library.MODES.index(precision)

    def run(self, job: Any, like: Tensor) -> None:
        on_gpu = like.is_cuda
        stream = torch.cuda.current_stream(like.device).cuda_stream if on_gpu else 0
        with torch.cuda.device_of(like) if on_gpu else nullcontext():
            # freed while the kernel may still run: the allocator gives it to the same stream again
            room = torch.empty(job.room(self.mode), dtype=torch.uint8, device=like.device)
            job.run(self.mode, room.data_ptr(), stream)


def fma_peak(threads: int, isa: str | None = None, seconds: float = 0.3) -> float:
    """GFLOP/s of float32 multiply-adds in registers: the roof of the CPU kernels, measured now."""
    return _library().fma_peak(isa or cpu.passes.isa, threads, seconds)


# Structs ---


@lru_cache(maxsize=256)
def _network(
    library: ModuleType, net: MLP, dtype: torch.dtype, device: torch.device
) -> tuple[Any, tuple]:
    """The specification as a struct, and the tensors it points to."""
    n = library.Network()
    n.out, n.width, n.depth = net.out_features, net.width, net.depth
    setattr(n, "in", net.in_features)
    n.activation = _spec.ACTIVATIONS.index(net.activation)
    n.output = _spec.OUTPUTS.index(net.output)
    n.w0, n.w0_first, n.shift = net.w0, net.w0_first, net.output_shift
    if net.encoding is None:
        return n, ()
    B, phi, D = net.encoding.B, net.encoding.phi, net.in_features
    if net.encoding.include_input:  # coordinates are features too: the first D columns
        B, phi = torch.cat([torch.eye(D), B], 1), torch.cat([B.new_zeros(D), phi])
        n.identity = D
    B, phi = B.to(device, dtype).contiguous(), phi.to(device, dtype).contiguous()
    n.encoded, n.basis, n.phase = net.encoded_features, B.data_ptr(), phi.data_ptr()
    return n, (B, phi)


class _Call:
    """A job under construction, and the tensors it points to."""

    def __init__(self, place: Host | Device, op: str, net: MLP, like: Tensor) -> None:
        self.place, library = place, place.library
        self.job = library.Job()
        self.job.op = library.OPS.index(op)
        self.job.threads = torch.get_num_threads()
        self.job.net, tensors = _network(library, net, like.dtype, like.device)
        self.alive = list(tensors)
        self.like = like

    def hold(self, tensor: Tensor) -> int:
        """The address of a dense tensor, which lives as long as the call."""
        self.alive.append(tensor)
        return tensor.data_ptr()

    def dense(self, tensor: Tensor) -> int:
        return self.hold(tensor.contiguous())

    def rows(self, name: str, tensor: Tensor) -> None:
        """Sets a field to [T or 1, ...]: dense rows; one row, or one repeated, has stride 0."""
        tensor = _dense_rows(tensor)
        setattr(self.job, name, self.hold(tensor))
        setattr(self.job, f"{name}_stride", tensor.stride(0) if tensor.shape[0] > 1 else 0)

    def out(self, name: str, *shape: int) -> Tensor:
        """A result of that shape."""
        result = torch.empty(shape, dtype=self.like.dtype, device=self.like.device)
        setattr(self.job, name, self.hold(result))
        return result

    def points(self, x: Tensor, tasks: int) -> None:
        """Coordinates [T or 1,N,D] without targets."""
        data = self.job.data
        x = _dense_rows(x)
        data.tasks, data.points = tasks, x.shape[1]
        data.x, data.x_stride = self.hold(x), x.stride(0) if x.shape[0] > 1 else 0

    def batch(self, data: Any, batch: Batch) -> None:
        """Fills the struct of a batch's data."""
        data.tasks, data.points = batch.tasks, batch.points
        data.per_step = batch.per_step or 0
        data.y = self.dense(batch.y)
        if batch.counts is not None:
            data.counts = self.dense(batch.counts.to(torch.int64))
        if batch.seed is not None:
            data.seed = self.dense(batch.seed)
        kind, clamp = batch.loss_parts
        data.loss, data.clamp = _batch.LOSSES.index(kind), clamp or 0.0
        data.measure = _batch.MEASURES.index(batch.measure_name)
        if isinstance(batch.x, Rays):
            assert isinstance(batch.measure, March)
            near, far = batch.x.bounds
            data.march = _march(self.place.library, batch.measure)
            data.origins, data.directions = (
                self.dense(batch.x.origins),
                self.dense(batch.x.directions),
            )
            data.near, data.far = self.dense(near), self.dense(far)
            return
        x = _dense_rows(batch.x if batch.x.dim() == 3 else batch.x[None])
        data.x, data.x_stride = self.hold(x), x.stride(0) if x.shape[0] > 1 else 0
        if isinstance(batch.measure, Project):
            data.angles, data.size = batch.y.shape[1], batch.y.shape[2]
            pixels = batch.measure.pixels(data.size)
            data.pixels = self.dense(pixels)
            if isinstance(self.place, Device):
                data.order, data.starts = map(self.hold, _inverse(pixels))

    def loop(self, lr: Tensor, rule: Rule, max_memory: int | None) -> None:
        """The inner loop's part: rates [K,T,P], a view, rule and budget."""
        job = self.job
        if lr.stride(2) not in (0, 1) or lr.numel() == 0:
            lr = lr.contiguous()
        job.steps, job.lr, job.lr_stride = lr.shape[0], self.hold(lr), lr.stride()
        job.budget = DEFAULT_MEMORY if max_memory is None else max_memory
        job.rule = _rule(self.place.library, rule)

    def run(self) -> None:
        self.place.run(self.job, self.like)


def _dense_rows(tensor: Tensor) -> Tensor:
    """[T or 1,...] as it is where each row is dense, whatever lies between rows."""
    if tensor.is_contiguous() or tensor[0].is_contiguous():  # the first alone is 0.7 us faster
        return tensor
    return tensor.contiguous()


_inverses: WeakIdKeyDictionary = WeakIdKeyDictionary()  # pixels -> {stream: their inverse}


def _inverse(pixels: Tensor) -> Inverse:
    """Which entries of the sinogram each pixel went to, sorted once for a tensor of pixels and a
    stream; a CUDA graph sorts its own, which is there when it is replayed."""
    if pixels[0].numel() >= 2**31:
        raise ValueError(
            f"project: {pixels.shape[1]} angles of {pixels.shape[2]} x {pixels.shape[3]} samples; "
            "the cuda worker takes fewer than 2^31 of a task"
        )
    if pixels.is_cuda and torch.cuda.is_current_stream_capturing():
        return inverse_pixels(pixels)
    stream = torch.cuda.current_stream(pixels.device).cuda_stream if pixels.is_cuda else 0
    kept = _inverses.setdefault(pixels, {})
    if stream not in kept:
        kept[stream] = inverse_pixels(pixels)
    return kept[stream]


def _march(library: ModuleType, march: March) -> Any:
    m = library.March()
    m.samples, m.last_interval = march.samples, march.last_interval
    m.white, m.softplus = int(march.white_background), int(march.density == "softplus")
    return m


def _rule(library: ModuleType, rule: Rule) -> Any:
    r = library.Rule()
    r.kind = list(_rules.RULES).index(rule.name)
    if isinstance(rule, Momentum):
        r.mu, r.nesterov, r.weight_decay = rule.mu, int(rule.nesterov), rule.weight_decay
    elif isinstance(rule, Adam):
        r.beta1, r.beta2, r.eps = rule.beta1, rule.beta2, rule.eps
    return r


# Passes ---


class Passes:
    """The passes of ``fastmeta.reference``, by the kernels of one instruction set, or at another
    place."""

    def __init__(self, isa: str, place: Host | Device | None = None) -> None:
        self.isa = isa
        self.place = Host(isa) if place is None else place

    def mlp(self, net: MLP, params: Tensor, x: Tensor) -> Tensor:
        call, T, N = self._points("mlp", net, params, x)
        y = call.out("y", T, N, net.out_features)
        call.run()
        return y

    def mlp_grad(
        self, net: MLP, params: Tensor, x: Tensor, gy: Tensor, *, want_x: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        call, _, _ = self._points("mlp_grad", net, params, x)
        tasks, points = call.job.data.tasks, call.job.data.points
        call.job.gy = call.dense(gy)
        gp = call.out("grad", tasks, net.num_params)
        gx = call.out("gx", tasks, points, net.in_features) if want_x else None
        call.run()
        return gp, None if gx is None else _like(gx, x)

    def mlp_dual(
        self, net: MLP, params: Tensor, x: Tensor, v: Tensor | None, w: Tensor | None, gy: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        call, _, _ = self._points("mlp_dual", net, params, x)
        tasks, points = call.job.data.tasks, call.job.data.points
        call.rows("v", torch.zeros_like(params) if v is None else v)
        if w is not None:
            call.rows("w", w.reshape(-1, points, net.in_features))
        call.job.gy = call.dense(gy)
        dy = call.out("y", tasks, points, net.out_features)
        dp = call.out("grad", tasks, net.num_params)
        dx = call.out("gx", tasks, points, net.in_features)
        call.run()
        return dy.view(gy.shape), dp, _like(dx, x)

    def _points(self, op: str, net: MLP, params: Tensor, x: Tensor) -> tuple[_Call, int, int]:
        """A call on points alone, and (T, N). One network at T tasks' points is one task of T·N."""
        T, N = max(params.shape[0], x.shape[0]), x.shape[1]
        call = _Call(self.place, op, net, x)
        if params.shape[0] == 1 and T > 1:
            x = x.reshape(1, T * N, -1)
        call.points(x, params.shape[0] if x.shape[0] == 1 else T)
        call.job.budget = DEFAULT_MEMORY
        call.rows("params", params)
        return call, T, N

    def _task(
        self, op: str, net: MLP, params: Tensor, batch: Batch, step: int, memory: int | None
    ) -> _Call:
        call = _Call(self.place, op, net, params)
        call.batch(call.job.data, batch)
        call.rows("params", params)
        call.job.step = step
        call.job.budget = DEFAULT_MEMORY if memory is None else memory
        return call

    def loss(
        self, net: MLP, params: Tensor, batch: Batch, step: int = 0, max_memory: int | None = None
    ) -> Tensor:
        call = self._task("loss", net, params, batch, step, max_memory)
        loss = call.out("loss", batch.tasks)
        call.run()
        return loss

    def loss_grad(
        self, net: MLP, params: Tensor, batch: Batch, step: int = 0, max_memory: int | None = None
    ) -> tuple[Tensor, Tensor]:
        call = self._task("loss_grad", net, params, batch, step, max_memory)
        loss, grad = call.out("loss", batch.tasks), call.out("grad", batch.tasks, net.num_params)
        call.run()
        return loss, grad

    def loss_hvp(
        self,
        net: MLP,
        params: Tensor,
        v: Tensor,
        batch: Batch,
        step: int = 0,
        max_memory: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        call = self._task("loss_hvp", net, params, batch, step, max_memory)
        call.rows("v", v)
        grad, hv = (call.out(name, batch.tasks, net.num_params) for name in ("grad", "hv"))
        call.run()
        return grad, hv

    def adapt(
        self,
        net: MLP,
        params: Tensor,
        batch: Batch,
        lr: Tensor,
        rule: Rule,
        *,
        keep: bool = False,
        max_memory: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        call = self._task("adapt", net, params, batch, 0, max_memory)
        call.loop(lr, rule, max_memory)
        K, T, P = lr.shape
        theta, losses = call.out("theta", T, P), call.out("loss", K, T)
        thetas = call.out("thetas", K + 1, T, P) if keep else None
        call.run()
        return theta, losses, thetas

    def maml(
        self,
        net: MLP,
        init: Tensor,
        batch: Batch,
        lr: Tensor,
        rule: Rule,
        *,
        order: int,
        learned: Tensor | None = None,
        max_memory: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        call = self._task("maml", net, init, batch, 0, max_memory)
        call.loop(lr, rule, max_memory)
        call.job.order = order
        if batch.query is not None:
            call.batch(call.job.query, batch.query)
        loss, grad = call.out("loss", batch.tasks), call.out("grad", net.num_params)
        rates = (
            None
            if learned is None
            else torch.zeros_like(learned, memory_format=torch.contiguous_format)
        )
        if rates is not None:
            call.job.rates = call.hold(rates)
            call.job.rates_size = (1,) * (3 - rates.dim()) + tuple(rates.shape)
        call.run()
        return loss, grad, rates

    def composite(self, raw: Tensor, t: Tensor, march: March) -> tuple[Tensor, Tensor, Tensor]:
        job, alive = self._rays(raw, t, march)
        shown = _shown(job, raw)
        self.place.run(job, raw)
        return shown

    def composite_grad(
        self, raw: Tensor, t: Tensor, march: March, grgb: Tensor, gdepth: Tensor, gacc: Tensor
    ) -> tuple[Tensor, Tensor]:
        job, alive = self._rays(raw, t, march, grgb=grgb, gdepth=gdepth, gacc=gacc)
        graw, gt = _adjoints(job, raw, t)
        self.place.run(job, raw)
        return graw, gt

    def composite_dual(
        self,
        raw: Tensor,
        t: Tensor,
        march: March,
        vraw: Tensor,
        vt: Tensor,
        grgb: Tensor,
        gdepth: Tensor,
        gacc: Tensor,
    ) -> tuple[Tensor, ...]:
        job, alive = self._rays(
            raw, t, march, vraw=vraw, vt=vt, grgb=grgb, gdepth=gdepth, gacc=gacc
        )
        shown, adjoints = _shown(job, raw), _adjoints(job, raw, t)
        self.place.run(job, raw)
        return (*shown, *adjoints)

    def _rays(
        self, raw: Tensor, t: Tensor, march: March, **more: Tensor
    ) -> tuple[Any, list[Tensor]]:
        library = self.place.library
        job = library.CompositeJob()
        job.march, job.threads = _march(library, march), torch.get_num_threads()
        job.rays, job.march.samples = t.numel() // t.shape[-1], t.shape[-1]
        alive = []
        for name, tensor in {"raw": raw, "t": t, **more}.items():
            alive.append(tensor.contiguous())
            setattr(job, name, alive[-1].data_ptr())
        return job, alive

    def project(self, image: Tensor, pixels: Tensor) -> Tensor:
        T, A, W, _ = pixels.shape
        return self._project(image, pixels, image.new_empty(T, A, W), 0)

    def project_adjoint(self, sinogram: Tensor, pixels: Tensor) -> Tensor:
        T, _, W, _ = pixels.shape
        return self._project(sinogram, pixels, sinogram.new_empty(T, W, W), 1)

    def _project(self, source: Tensor, pixels: Tensor, result: Tensor, adjoint: int) -> Tensor:
        mapping, source, pixels = pixels, source.contiguous(), pixels.contiguous()
        job = self.place.library.ProjectJob()
        job.threads, job.adjoint = torch.get_num_threads(), adjoint
        job.tasks, job.angles, job.size = pixels.shape[:3]
        job.pixels, job.to = pixels.data_ptr(), result.data_ptr()
        setattr(job, "from", source.data_ptr())
        if adjoint and isinstance(self.place, Device):
            alive = _inverse(mapping)
            job.order, job.starts = (tensor.data_ptr() for tensor in alive)
        self.place.run(job, source)
        return result


def _like(gradient: Tensor, x: Tensor) -> Tensor:
    """x̄ [T,N,D] in the shape of x [T or 1,N,D]: summed over tasks where they share x."""
    if x.shape[0] == 1 and gradient.shape[0] > 1:
        return gradient.sum(0, keepdim=True)
    return gradient.view(x.shape)


def _shown(job: Any, raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where (rgb, depth, acc) of raw [...,S,4] go."""
    rays = raw.shape[:-2]
    rgb, depth, acc = raw.new_empty(*rays, 3), raw.new_empty(rays), raw.new_empty(rays)
    job.rgb, job.depth, job.acc = rgb.data_ptr(), depth.data_ptr(), acc.data_ptr()
    return rgb, depth, acc


def _adjoints(job: Any, raw: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Where (r̄aw, t̄) go."""
    graw, gt = raw.new_empty(raw.shape), t.new_empty(t.shape)
    job.graw, job.gt = graw.data_ptr(), gt.data_ptr()
    return graw, gt
