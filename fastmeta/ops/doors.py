"""How autograd reaches an op: ``y = f(a)``, ``ā = Jᵀ ȳ`` and one dual pass, by one of three doors.

* torch.compile, and tensors that are traced: operators ``fastmeta::op``, ``op_grad``, ``op_dual``
  of torch.library, each the derivative of the one before;
* torch.func, and forward-mode tangents: autograd functions with ``setup_context``, ``jvp`` and
  ``vmap``, which folds the vmapped axis into T;
* else: plain autograd functions, a third of the cost.

With the dual pass ``(ẏ, ā̇) = dual(a, u, ȳ)`` of a along u, ȳ held fixed:

| asked for | is |
|---|---|
| tangent of y along u | ẏ |
| tangent of ā along (u, ȳ̇) | ā̇ + Jᵀ ȳ̇ |
| gradient of ⟨u, ā⟩ in (a, ȳ) | (ā̇, ẏ) |
| gradient of ⟨c, ẏ⟩ in (a, u) | (ā̇ with ȳ = c, Jᵀ c) |

What needs more than that (a third derivative, forward mode over forward mode, forward mode or
torch.func's gradients within torch.compile) raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from . import dispatch

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Form:
    """An op of n tensors, each with a leading axis of T rows, or, where ``shared``, of 1 for all.

    ``value(worker, spec, *inputs) -> outputs``; ``grad(worker, spec, inputs, cotangents, wanted)
    -> input gradients``, None where not wanted; ``dual(worker, spec, inputs, tangents, cotangents)
    -> (ẏ..., ā̇...)``, where a tangent may be None; ``shapes(spec, *inputs)``: those of the outputs;
    ``fields(spec)``: net and measure of the dispatcher's case; ``spec(key)``: from its string.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    value: Callable[..., Tensors]
    grad: Callable[..., tuple]
    dual: Callable[..., Tensors]
    shapes: Callable[..., list]
    fields: Callable[[Any], tuple]
    spec: Callable[[str], Any]
    shared: bool = False


def call(form: Form, spec: Any, impl: str | None, precision: str | None, *inputs: Tensor) -> Any:
    """The op's outputs, a tuple, by the door that the moment asks for."""
    if traced():
        out = getattr(torch.ops.fastmeta, form.name)(*inputs, spec.key, impl, precision)
        return (out,) if len(form.outputs) == 1 else out
    worker = _worker(form, spec, impl, precision, inputs[0])
    if transformed():
        return Value.apply(form, (worker, spec), *inputs)
    if torch.is_grad_enabled() and any([a.requires_grad for a in inputs]):
        return Fast.apply(form, (worker, spec), *inputs)
    return form.value(worker, spec, *inputs)


def _worker(form: Form, spec: Any, impl: str | None, precision: str | None, a: Tensor) -> Any:
    return dispatch.choose_for(
        impl, form.name, a.dtype, a.device.type, precision, *form.fields(spec), None, 2
    )


# Private names of torch, looked up once; without them the question is answered the safe way.
_functorch_active = getattr(torch._C, "_are_functorch_transforms_active", None)
_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
_legacy = getattr(getattr(torch._C, "_functorch", None), "is_legacy_batchedtensor", None)


def traced() -> bool:
    """True in torch.compile, and where a mode such as make_fx's or FakeTensorMode sees each
    operator."""
    return torch.compiler.is_compiling() or _modes() > 0


def transformed() -> bool:
    """True within a torch.func transform or a level of forward-mode derivatives."""
    # Without the private name every call takes this door, which is right everywhere, and slower.
    return _functorch_active is None or _functorch_active() or forward_ad._current_level >= 0


def _third(form: Form) -> RuntimeError:
    return RuntimeError(
        f"{form.name}: a third derivative was asked for; it is differentiable twice in "
        + " and ".join(form.inputs)
    )


def _forward_twice(op: str) -> RuntimeError:
    return RuntimeError(
        f"{op}: forward mode over forward mode was asked for; accepted are jvp of grad, grad of "
        "jvp and grad of grad, as jacfwd(jacrev(f)) takes them"
    )


# The third door: plain autograd ---


class Fast(Function):
    """y of a."""

    @staticmethod
    def forward(ctx: Any, form: Form, how: tuple, *inputs: Tensor) -> Tensors:
        ctx.form, ctx.how = form, how
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return form.value(*how, *inputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple:
        _no_batches(ctx.form.name, cotangents)
        inputs, wanted = ctx.saved_tensors, ctx.needs_input_grad[2:]
        given = _filled(ctx.form, ctx.how, inputs, cotangents)
        if transformed():  # of the cotangents, where y was computed outside
            grads = Grad.apply(ctx.form, ctx.how, wanted, *inputs, *given)
            return None, None, *[g if want else None for g, want in zip(grads, wanted, strict=True)]
        if not torch.is_grad_enabled():
            return None, None, *ctx.form.grad(*ctx.how, inputs, given, wanted)
        return None, None, *FastGrad.apply(ctx.form, ctx.how, wanted, *inputs, *given)


class FastGrad(Function):
    """ā of (a, ȳ); its own derivative is one dual pass."""

    @staticmethod
    def forward(ctx: Any, form: Form, how: tuple, wanted: tuple, *tensors: Tensor) -> tuple:
        n = len(form.inputs)
        ctx.form, ctx.how = form, how
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return form.grad(*how, tensors[:n], tensors[n:], wanted)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> tuple:
        if all(u is None for u in tangents):
            return (None,) * (3 + len(ctx.saved_tensors))
        _no_batches(ctx.form.name, tangents)
        dual = Dual if transformed() else FastDual
        return None, None, None, *_dual(dual, ctx.form, ctx.how, ctx.saved_tensors, tangents)


class FastDual(Function):
    """(ẏ, ā̇) of (a, u, ȳ): ``⟨u, ā⟩`` differentiated."""

    @staticmethod
    def forward(ctx: Any, form: Form, how: tuple, *tensors: Tensor | None) -> Tensors:
        ctx.form, n = form, len(form.inputs)
        return form.dual(*how, tensors[:n], tensors[n : 2 * n], tensors[2 * n :])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple:
        raise _third(ctx.form)


def _filled(form: Form, how: tuple, inputs: Tensors, cotangents: Sequence) -> list[Tensor]:
    """Cotangents with zeros where an output was not used."""
    if all(g is not None for g in cotangents):
        return list(cotangents)
    shapes = form.shapes(how[1], *inputs)
    return [
        inputs[0].new_zeros(s) if g is None else g for g, s in zip(cotangents, shapes, strict=True)
    ]


def _no_batches(name: str, tensors: Sequence) -> None:
    """Raise for tensors of torch's older vmap, which autograd functions cannot take apart."""
    if _legacy is not None and any([g is not None and _legacy(g) for g in tensors]):
        raise NotImplementedError(
            f"{name}: a batch of cotangents came, by is_grads_batched or vectorize=True; accepted "
            "are torch.func.vmap, jacrev and hessian"
        )


def _dual(function: Any, form: Form, how: tuple, tensors: Tensors, tangents: tuple) -> tuple:
    """The gradient of ``⟨u, ā⟩`` in (a, ȳ), given (a, ȳ) and u."""
    n, m = len(form.inputs), len(form.outputs)
    out = function.apply(form, how, *tensors[:n], *tangents, *tensors[n:])
    return (*out[m:], *out[:m])


# The second door: torch.func ---


class Value(Function):
    """y of a."""

    @staticmethod
    def forward(form: Form, how: tuple, *inputs: Tensor) -> Tensors:
        return form.value(*how, *inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.form, ctx.how, *tensors = inputs
        _save(ctx, tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple:
        inputs, wanted = ctx.saved_tensors, tuple(ctx.needs_input_grad[2:])
        given = _filled(ctx.form, ctx.how, inputs, cotangents)
        grads = Grad.apply(ctx.form, ctx.how, wanted, *inputs, *given)
        return None, None, *[g if want else None for g, want in zip(grads, wanted, strict=True)]

    @staticmethod
    def jvp(ctx: Any, _: Any, __: Any, *tangents: Tensor | None) -> Tensors:
        return Tangent.apply(ctx.form, ctx.how, *ctx.saved_tensors, *tangents)

    @staticmethod
    def vmap(info: Any, dims: tuple, form: Form, how: tuple, *inputs: Tensor) -> tuple:
        rows, tasks, _ = fold(info.batch_size, dims[2:], inputs, share=form.shared)
        return unfold(info.batch_size, Value.apply(form, how, *rows), [tasks] * len(form.outputs))


class Grad(Function):
    """ā of (a, ȳ); zeros where not wanted, since torch.func takes tensors only."""

    @staticmethod
    def forward(form: Form, how: tuple, wanted: tuple, *tensors: Tensor) -> Tensors:
        n = len(form.inputs)
        grads = form.grad(*how, tensors[:n], tensors[n:], wanted)
        return tuple(
            torch.zeros_like(a) if g is None or not want else g
            for g, a, want in zip(grads, tensors[:n], wanted, strict=True)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.form, ctx.how, ctx.wanted, *tensors = inputs
        _save(ctx, tensors)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> tuple:
        if all(u is None for u in tangents):
            return (None,) * (3 + len(ctx.saved_tensors))
        return None, None, None, *_dual(Dual, ctx.form, ctx.how, ctx.saved_tensors, tangents)

    @staticmethod
    def jvp(ctx: Any, _: Any, __: Any, ___: Any, *tangents: Tensor | None) -> tuple:
        form, how, n, tensors = ctx.form, ctx.how, len(ctx.form.inputs), ctx.saved_tensors
        parts = []
        if any(u is not None for u in tangents[:n]):
            parts.append(_dual(Dual, form, how, tensors, tangents[:n])[:n])
        if any(g is not None for g in tangents[n:]):
            given = _filled(form, how, tensors[:n], tangents[n:])
            parts.append(Grad.apply(form, how, ctx.wanted, *tensors[:n], *given))
        return tuple(sum(p[1:], p[0]) for p in zip(*parts, strict=True))

    @staticmethod
    def vmap(info: Any, dims: tuple, form: Form, how: tuple, wanted: tuple, *tensors: Any) -> tuple:
        rows, tasks, own = fold(info.batch_size, dims[3:], tensors)
        grads = Grad.apply(form, how, wanted, *rows)
        return unfold(info.batch_size, grads, own[: len(form.inputs)], tasks)


class Tangent(Function):
    """ẏ of (a, u)."""

    @staticmethod
    def forward(form: Form, how: tuple, *tensors: Tensor | None) -> Tensors:
        n, m = len(form.inputs), len(form.outputs)
        inputs: Any = tensors[:n]
        zero = _filled(form, how, inputs, [None] * m)
        return form.dual(*how, inputs, tensors[n:], zero)[:m]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.form, ctx.how, *tensors = inputs
        _save(ctx, tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple:
        form, how, n, tensors = ctx.form, ctx.how, len(ctx.form.inputs), ctx.saved_tensors
        given = _filled(form, how, tensors[:n], cotangents)
        a = _dual(Dual, form, how, (*tensors[:n], *given), tensors[n:])[:n]
        wanted = tuple(ctx.needs_input_grad[2 + n :])
        u = Grad.apply(form, how, wanted, *tensors[:n], *given) if any(wanted) else [None] * n
        return None, None, *a, *[g if want else None for g, want in zip(u, wanted, strict=True)]

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise _forward_twice(ctx.form.name)

    @staticmethod
    def vmap(info: Any, dims: tuple, form: Form, how: tuple, *tensors: Any) -> tuple:
        rows, tasks, _ = fold(info.batch_size, dims[2:], tensors)
        return unfold(info.batch_size, Tangent.apply(form, how, *rows), [tasks] * len(form.outputs))


class Dual(Function):
    """(ẏ, ā̇) of (a, u, ȳ)."""

    @staticmethod
    def forward(form: Form, how: tuple, *tensors: Tensor | None) -> Tensors:
        n = len(form.inputs)
        return form.dual(*how, tensors[:n], tensors[n : 2 * n], tensors[2 * n :])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.form = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise _third(ctx.form)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise _third(ctx.form)

    @staticmethod
    def vmap(info: Any, dims: tuple, form: Form, how: tuple, *tensors: Any) -> tuple:
        rows, tasks, own = fold(info.batch_size, dims[2:], tensors)
        owners = [tasks] * len(form.outputs) + own[: len(form.inputs)]
        return unfold(info.batch_size, Dual.apply(form, how, *rows), owners, tasks)


def _save(ctx: Any, tensors: Sequence[Tensor | None]) -> None:
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)
    ctx.set_materialize_grads(False)


def fold(
    size: int, dims: Sequence, tensors: Sequence, *, share: bool = False
) -> tuple[list, int, list[int]]:
    """Each tensor [R,...] with a vmapped axis of B, R in (1, T) -> ([B·T,...], T, each R).

    A view where torch can make one; with ``share`` what has neither axis stays one row.
    """
    own = [
        0 if t is None else t.shape[1 if d == 0 else 0] for t, d in zip(tensors, dims, strict=True)
    ]
    T, rows = max(own), []
    for i, (t, d) in enumerate(zip(tensors, dims, strict=True)):
        if t is None or (share and d is None and own[i] == 1):
            rows.append(t)
            continue
        t = t[None].expand(size, *t.shape) if d is None else t.movedim(d, 0)  # [B,R,...]
        rows.append(t.expand(size, T, *t.shape[2:]).reshape(size * T, *t.shape[2:]))
    return rows, T, own


def unfold(size: int, outputs: Any, own: Sequence[int], tasks: int = 0) -> tuple:
    """Outputs [B·T,...] -> [B,R,...], summed over the T rows that shared one, and their axes."""
    made = []
    for y, R in zip(outputs, own, strict=True):
        y = y.unflatten(0, (size, -1))
        made.append(y.sum(1, keepdim=True) if R == 1 and tasks > 1 else y)
    return tuple(made), (0,) * len(made)


# Linear ops: y = A a, and the adjoint, each the derivative of the other ---


@dataclass(frozen=True, eq=False)
class Linear:
    """``ahead(worker, fixed, a) -> A a`` and ``back(worker, fixed, y) -> Aᵀ y``, each one tensor
    with a leading axis of T; ``fixed`` [T,...] says which A and has no derivative."""

    name: str
    ahead: Callable[..., Tensor]
    back: Callable[..., Tensor]
    shapes: tuple[Callable, Callable]  # (fixed, tensor) -> the result's, ahead and back


def call_linear(
    form: Linear, impl: str | None, precision: str | None, fixed: Tensor, a: Tensor
) -> Tensor:
    """A a, by the door that the moment asks for."""
    if traced():
        return getattr(torch.ops.fastmeta, form.name)(fixed, a, impl, precision)
    worker = _linear_worker(form, impl, precision, a)
    if transformed():
        return Apply.apply(form, worker, False, fixed, a)
    if torch.is_grad_enabled() and a.requires_grad:
        return FastApply.apply(form, worker, False, fixed, a)
    return form.ahead(worker, fixed, a)


def _linear_worker(form: Linear, impl: str | None, precision: str | None, a: Tensor) -> Any:
    return dispatch.choose_for(
        impl, form.name, a.dtype, a.device.type, precision, None, "none", None, 2
    )


class FastApply(Function):
    """A a, or Aᵀ a."""

    @staticmethod
    def forward(
        ctx: Any, form: Linear, worker: Any, adjoint: bool, fixed: Tensor, a: Tensor
    ) -> Tensor:
        ctx.how = form, worker, not adjoint, fixed
        return (form.back if adjoint else form.ahead)(worker, fixed, a)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple:
        _no_batches(ctx.how[0].name, [gy])
        way = Apply if transformed() else FastApply
        return None, None, None, None, way.apply(*ctx.how, gy)


class Apply(Function):
    """A a, or Aᵀ a, for torch.func."""

    @staticmethod
    def forward(form: Linear, worker: Any, adjoint: bool, fixed: Tensor, a: Tensor) -> Tensor:
        return (form.back if adjoint else form.ahead)(worker, fixed, a)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.form, ctx.worker, ctx.adjoint, fixed, _ = inputs
        _save(ctx, [fixed])

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple:
        (fixed,) = ctx.saved_tensors
        return None, None, None, None, Apply.apply(ctx.form, ctx.worker, not ctx.adjoint, fixed, gy)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (fixed,), (*_, of_fixed, u) = ctx.saved_tensors, tangents
        if of_fixed is not None:
            raise RuntimeError(f"{ctx.form.name}: a tangent came for what has no derivative")
        return Apply.apply(ctx.form, ctx.worker, ctx.adjoint, fixed, u)

    @staticmethod
    def vmap(
        info: Any, dims: tuple, form: Linear, worker: Any, adjoint: bool, *tensors: Tensor
    ) -> tuple:
        rows, _, _ = fold(info.batch_size, dims[3:], tensors)
        return Apply.apply(form, worker, adjoint, *rows).unflatten(0, (info.batch_size, -1)), 0


# The first door: operators of torch.library, for torch.compile ---

_LIBRARY = torch.library.Library("fastmeta", "FRAGMENT")


def register(form: Form) -> None:
    """Makes ``fastmeta::name``, ``name_grad`` and ``name_dual``, each the derivative of the one
    before."""
    n, m, name = len(form.inputs), len(form.outputs), form.name
    ops = torch.ops.fastmeta
    a = ", ".join(f"Tensor {i}" for i in form.inputs)
    u = ", ".join(f"Tensor? v_{i}" for i in form.inputs)
    g = ", ".join(f"Tensor g_{o}" for o in form.outputs)
    static = "str spec, str? impl, str? precision"

    def run(args: Sequence) -> tuple[Any, Any]:
        *_, key, impl, precision = args
        spec = form.spec(key)
        return _worker(form, spec, impl, precision, args[0]), spec

    def value(*args: Any) -> Any:
        return _one(tuple(y.contiguous() for y in form.value(*run(args), *args[:n])))

    def value_fake(*args: Any) -> Any:
        shapes = form.shapes(form.spec(args[n]), *args[:n])
        return _one(tuple(args[0].new_empty(s) for s in shapes))

    def value_backward(args: tuple, wanted: tuple, *cotangents: Tensor | None) -> tuple:
        given = _filled(form, (None, form.spec(args[n])), args[:n], cotangents)
        grads = getattr(ops, f"{name}_grad")(*args[:n], *given, list(wanted[:n]), *args[n:])
        kept = [q if want else None for q, want in zip(_many(grads), wanted, strict=False)]
        return (*kept, *[None] * 3)

    def value_vmap(info: Any, dims: tuple, *args: Any) -> tuple:
        rows, T, _ = fold(info.batch_size, dims[:n], args[:n], share=form.shared)
        out = _many(getattr(ops, name)(*rows, *args[n:]))
        return _one_and_axes(unfold(info.batch_size, out, [T] * m))

    def grad(*args: Any) -> Any:
        wanted = args[n + m]
        grads = form.grad(*run(args), args[:n], args[n : n + m], tuple(wanted))
        return _one(
            tuple(
                q.contiguous() if want and q is not None else args[0].new_empty(0)
                for q, want in zip(grads, wanted, strict=True)
            )
        )

    def grad_fake(*args: Any) -> Any:
        pairs = zip(args[:n], args[n + m], strict=True)
        return _one(tuple(q.new_empty(q.shape if want else 0) for q, want in pairs))

    def grad_backward(args: tuple, wanted: tuple, *tangents: Tensor | None) -> tuple:
        if all(v is None for v in tangents):
            return (None,) * len(args)
        along = [v if want else None for v, want in zip(tangents, args[n + m], strict=True)]
        dual = getattr(ops, f"{name}_dual")(*args[:n], *along, *args[n : n + m], *args[n + m + 1 :])
        return (*dual[m:], *dual[:m], *[None] * 4)

    def grad_vmap(info: Any, dims: tuple, *args: Any) -> tuple:
        rows, T, own = fold(info.batch_size, dims[: n + m], args[: n + m])
        out = _many(getattr(ops, f"{name}_grad")(*rows, *args[n + m :]))
        pairs = list(zip(out, own[:n], args[n + m], strict=True))
        sums = unfold(
            info.batch_size, [q for q, _, w in pairs if w], [r for _, r, w in pairs if w], T
        )
        left = list(sums[0])
        made = tuple(left.pop(0) if w else q for q, _, w in pairs)
        return _one_and_axes((made, tuple(0 if w else None for _, _, w in pairs)))

    def dual(*args: Any) -> Any:
        a, v, g = args[:n], args[n : 2 * n], args[2 * n : 2 * n + m]
        return tuple(q.contiguous() for q in form.dual(*run(args), a, v, g))

    def dual_fake(*args: Any) -> Any:
        return tuple(q.new_empty(q.shape) for q in (*args[2 * n : 2 * n + m], *args[:n]))

    def dual_backward(args: tuple, wanted: tuple, *_: Any) -> tuple:
        raise _third(form)

    def dual_vmap(info: Any, dims: tuple, *args: Any) -> tuple:
        k = 2 * n + m
        rows, T, own = fold(info.batch_size, dims[:k], args[:k])
        out = getattr(ops, f"{name}_dual")(*rows, *args[k:])
        return unfold(info.batch_size, out, [T] * m + own[:n], T)

    outs = [_tensors(m), _tensors(n), _tensors(m + n)]
    operator(f"{name}({a}, {static}) -> {outs[0]}", value, value_fake, value_backward, value_vmap)
    operator(
        f"{name}_grad({a}, {g}, bool[] wanted, {static}) -> {outs[1]}",
        grad, grad_fake, grad_backward, grad_vmap,
    )  # fmt: skip
    operator(
        f"{name}_dual({a}, {u}, {g}, {static}) -> {outs[2]}",
        dual, dual_fake, dual_backward, dual_vmap,
    )  # fmt: skip


def register_linear(form: Linear) -> None:
    """Makes ``fastmeta::name`` and ``name_adjoint``, each the derivative of the other."""
    names = (form.name, f"{form.name}_adjoint")
    for side, run in enumerate((form.ahead, form.back)):

        def body(fixed: Tensor, a: Tensor, impl: Any, precision: Any, run: Any = run) -> Tensor:
            return run(_linear_worker(form, impl, precision, a), fixed, a).contiguous()

        def fake(fixed: Tensor, a: Tensor, impl: Any, precision: Any, side: int = side) -> Tensor:
            return a.new_empty(form.shapes[side](fixed, a))

        def backward(args: tuple, wanted: tuple, gy: Tensor | None, side: int = side) -> tuple:
            other = getattr(torch.ops.fastmeta, names[1 - side])
            ga = None if gy is None else other(args[0], gy, *args[2:])
            return None, ga, None, None

        def vmap(info: Any, dims: tuple, *args: Any, side: int = side) -> tuple:
            rows, _, _ = fold(info.batch_size, dims[:2], args[:2])
            out = getattr(torch.ops.fastmeta, names[side])(*rows, *args[2:])
            return out.unflatten(0, (info.batch_size, -1)), 0

        schema = f"{names[side]}(Tensor fixed, Tensor a, str? impl, str? precision) -> Tensor"
        operator(schema, body, fake, backward, vmap)


def operator(
    schema: str, body: Callable, fake: Callable, backward: Callable, vmap: Callable
) -> None:
    """One operator: ``backward(args, wanted, *cotangents)`` gives one gradient or None for each
    argument."""
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.fastmeta, name).default

    def kernel(*args: Any) -> Any:
        tensors = [q for q in args if isinstance(q, Tensor)]
        if any(torch._VF._unpack_dual(q, level=0)[1] is not None for q in tensors):
            raise NotImplementedError(
                f"{name}: a forward-mode tangent reached the operator fastmeta::{name}, as in a "
                "compiled jvp; accepted is forward mode outside torch.compile"
            )
        if torch.is_grad_enabled() and any(q.requires_grad for q in tensors):
            if _functorch_active is not None and _functorch_active():
                raise NotImplementedError(
                    f"{name}: a torch.func gradient reached the operator fastmeta::{name}, as in a "
                    "compiled torch.func.grad; accepted are torch.func outside torch.compile, and "
                    "torch.autograd.grad or backward in it"
                )
            return _Operator.apply(op, backward, *args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    # torch.compile looks into every Python frame below a compiled call, an operator's own too.
    opaque = getattr(torch, "_disable_dynamo", lambda f: f)
    _LIBRARY.impl(name, opaque(body), "CompositeExplicitAutograd")
    _LIBRARY.impl(name, opaque(kernel), "Autograd")
    torch.library.register_fake(f"fastmeta::{name}", fake, lib=_LIBRARY)
    torch.library.register_vmap(f"fastmeta::{name}", vmap, lib=_LIBRARY)


class _Operator(Function):
    """An operator's autograd: its backward calls operators again."""

    @staticmethod
    def forward(ctx: Any, op: Any, backward: Callable, *args: Any) -> Any:
        where = [isinstance(q, Tensor) for q in args]
        ctx.way, ctx.where = backward, where
        ctx.rest = [None if there else q for q, there in zip(args, where, strict=True)]
        ctx.save_for_backward(*[q for q, there in zip(args, where, strict=True) if there])
        ctx.set_materialize_grads(False)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple:
        saved = iter(ctx.saved_tensors)
        args = tuple(
            next(saved) if there else q for q, there in zip(ctx.rest, ctx.where, strict=True)
        )
        return None, None, *ctx.way(args, ctx.needs_input_grad[2:], *cotangents)


def _tensors(count: int) -> str:
    return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"


def _one(outputs: tuple) -> Any:
    return outputs[0] if len(outputs) == 1 else outputs


def _many(outputs: Any) -> tuple:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _one_and_axes(made: tuple) -> tuple:
    outputs, axes = made
    return (outputs[0], axes[0]) if len(outputs) == 1 else made
