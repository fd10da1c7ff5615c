"""State dictionaries of other packages, in and out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..spec import MLP, OUTPUTS, Encoding
from .modules import MODULES


@dataclass(frozen=True)
class _Layout:
    """Where a package keeps its layers, and what its network computes."""

    hidden: tuple[str, ...]  # name of a layer by its number, as written, then as read besides
    last: tuple[str | None, ...]  # name of the last layer, in step with hidden; None: by its number
    defaults: dict[str, Any]  # fields of MLP
    prefix: str = ""  # as written
    start: int = 0
    step: int = 1
    frequencies: str | None = None  # the buffer with them
    ignored: tuple[str, ...] = ()  # buffers that do not matter
    activations: tuple[str, ...] = ("sine",)
    outputs: tuple[str, ...] = ("linear",)
    fixed: dict[str, Any] = field(default_factory=dict)  # fields the package has written out


_SINE30 = {"activation": "sine", "w0": 30.0, "coords": "corners"}
_GRADNCP: dict[str, Any] = {
    "hidden": ("layers.{}.linear",),
    "defaults": {**_SINE30, "output_shift": 0.5},
    "ignored": ("grid",),
    "fixed": {"output_shift": 0.5},
}
LAYOUTS = {
    "sitzmann": _Layout(
        ("net.{}.0",),
        (None,),
        _SINE30,
        prefix="net.",
        activations=("sine", "relu", "sigmoid", "tanh", "softplus"),
        fixed={"w0": 30.0, "w0_first": 30.0, "output_shift": 0.0},
    ),
    "lucidrains": _Layout(
        ("layers.{}", "net.{}"),  # the second in early versions
        ("last_layer", "last_layer"),
        {**_SINE30, "w0": 1.0, "w0_first": 30.0},
        ignored=("grid",),
        outputs=OUTPUTS,
        fixed={"output_shift": 0.0},
    ),
    "gradncp": _Layout(last=(None,), **_GRADNCP),
    "gradncp_penultimate": _Layout(last=("last_layer.linear",), **_GRADNCP),
    "nerf_meta": _Layout(
        ("net.{}",),
        (None,),
        {"activation": "relu", "coords": "world"},
        start=1,
        step=2,
        frequencies="net.0.freqs",
        activations=("relu",),
        fixed={"output_shift": 0.0},
    ),
}
_OPTIONS = {"activation", "w0", "w0_first", "output", "output_shift", "coords"}


def _layout(op: str, name: str) -> _Layout:
    if name not in LAYOUTS:
        raise ValueError(f"{op}: layout is {name!r}; accepted are {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def rows_of(op: str, net: MLP, params: Any) -> Tensor:
    """params, detached, if they are [P] or [T,P] of floating point."""
    if not isinstance(params, Tensor):
        raise ValueError(f"{op}: params is {type(params).__name__}; accepted is a tensor")
    P = net.num_params
    if params.dim() not in (1, 2) or params.shape[-1] != P or not params.is_floating_point():
        raise ValueError(
            f"{op}: params is {params.dtype} {list(params.shape)}; "
            f"accepted are [{P}] and [T,{P}] of floating point"
        )
    return params.detach()


def refused(op: str, layout: str, reasons: list[str]) -> ValueError:
    """The error that lists why a network does not fit a layout."""
    return ValueError(f"{op}: {layout} cannot represent the network: {'; '.join(reasons)}")


def _objections(net: MLP, plan: _Layout) -> list[str]:
    """Why a package's network cannot compute this one."""
    reasons = []
    for name, accepted in (("activation", plan.activations), ("output", plan.outputs)):
        if getattr(net, name) not in accepted:
            reasons.append(f"{name} is {getattr(net, name)!r}, it has {', '.join(accepted)}")
    for name, value in plan.fixed.items():
        if name.startswith("w0") and net.activation != "sine":
            continue
        if getattr(net, name) != value:
            reasons.append(f"{name} is {getattr(net, name)}, it has {value}")
    if (net.encoding is None) != (plan.frequencies is None):
        has = "none" if plan.frequencies is None else "one of frequencies"
        reasons.append(f"encoding is {net.encoding}, it has {has}")
    return reasons


def _layer_names(state: Mapping[str, Any], plan: _Layout) -> tuple[list[str], set[str]]:
    """(names of the layers in order, keys used besides theirs)."""
    if not isinstance(state, Mapping):
        raise ValueError(f"state is {type(state).__name__}; accepted is a mapping to tensors")
    looked_for = []
    for hidden, last in zip(plan.hidden, plan.last, strict=True):
        first = f"{hidden.format(plan.start)}.weight"
        looked_for.append(first)
        found = [key for key in state if f".{key}".endswith(f".{first}")]
        if len(found) > 1:
            raise ValueError(f"two networks, {found[0]!r} and {found[1]!r}; accepted is one")
        if not found:
            continue
        prefix, names, at = found[0].removesuffix(first), [], plan.start
        while f"{prefix}{hidden.format(at)}.weight" in state:
            names.append(prefix + hidden.format(at))
            at += plan.step
        names += [] if last is None else [prefix + last]
        used = set() if plan.frequencies is None else {prefix + plan.frequencies}
        if missing := [key for key in used if key not in state]:
            raise ValueError(f"{missing[0]!r} is missing")
        if len(names) < 2:
            raise ValueError(f"{len(names)} layers; accepted are two or more")
        return names, used
    raise ValueError(f"no {' or '.join(looked_for)}; it holds {str([*state][:6])[:200]}")


def _named_pairs(
    state: Mapping[str, Any], names: list[str], used: set[str]
) -> tuple[list[tuple[Tensor, Tensor]], set[str]]:
    """((weight [...,out,in], bias [...,out]) of each layer, all keys used)."""
    pairs, kinds = [], set()
    for name in names:
        parts = {part: state.get(f"{name}.{part}") for part in ("weight", "bias")}
        used = used | {f"{name}.{part}" for part, value in parts.items() if value is not None}
        weight, bias = parts["weight"], parts["bias"]
        if weight is None:
            raise ValueError(f"{name}.weight is missing")
        if not isinstance(weight, Tensor) or weight.dim() not in (2, 3) or 0 in weight.shape:
            came = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
            raise ValueError(f"{name}.weight is {came}; accepted are [out,in] and [T,out,in]")
        bias = weight.new_zeros(weight.shape[:-1]) if bias is None else bias
        if not isinstance(bias, Tensor) or bias.shape != weight.shape[:-1]:
            came = list(bias.shape) if isinstance(bias, Tensor) else type(bias).__name__
            raise ValueError(f"{name}.bias is {came}; accepted is {list(weight.shape[:-1])}")
        pairs.append((weight, bias))
        kinds |= {(part.dtype, part.device, part.shape[: weight.dim() - 2]) for part in pairs[-1]}
    if len(kinds) > 1 or not pairs[0][0].is_floating_point():
        came = ", ".join(sorted(f"{d} on {v}, tasks {list(t)}" for d, v, t in kinds))
        raise ValueError(
            f"weights are {came}; accepted is one floating-point dtype, one device and one T"
        )
    return pairs, used


def columns_of(encoding: Encoding) -> list[tuple]:
    """(*column of B, φ) of each feature."""
    return [tuple(c) for c in torch.cat([encoding.B, encoding.phi[None]]).T.tolist()]


def _nerf_meta_encodings(freqs: Any, E: int) -> tuple[Encoding, Encoding]:
    """(nerf-meta's order, all sines then all cosines; nerf_mlp's, per frequency) of f x."""
    if not isinstance(freqs, Tensor) or freqs.dim() != 1 or len(freqs) == 0:
        raise ValueError("the frequencies are no tensor [F]")
    if not torch.equal(freqs.float().to(freqs), freqs):
        raise ValueError("the frequencies are no float32 numbers, and an encoding holds such")
    F = len(freqs)
    if E % (2 * F):
        raise ValueError(f"the first layer takes {E} features of {F} frequencies, no multiple")
    D = E // (2 * F)
    eye = torch.eye(D)
    block = torch.cat([eye * f for f in freqs.detach().float().cpu()], 1)  # [D,F·D]
    phase = torch.full((F * D,), math.pi / 2)
    theirs = Encoding(torch.cat([block, block], 1), torch.cat([phase * 0, phase]))
    order = torch.arange(2 * F * D).view(2, F, D).transpose(0, 1).flatten()
    return theirs, Encoding(theirs.B[:, order], theirs.phi[order])


def _ladder(op: str, net: MLP) -> tuple[Tensor, Encoding]:
    """(frequencies f [F] of an encoding of sin and cos of f x_d, nerf-meta's order of it)."""
    assert net.encoding is not None
    row = net.encoding.B[0]
    freqs = torch.tensor(list(dict.fromkeys(row[row > 0].tolist())))
    if len(freqs) and net.encoded_features == 2 * len(freqs) * net.in_features:
        theirs, _ = _nerf_meta_encodings(freqs, net.encoded_features)
        if sorted(columns_of(theirs)) == sorted(columns_of(net.encoding)):
            return freqs, theirs
    raise refused(op, "nerf_meta", [f"{net.encoding} is not sin and cos of f x alone"])


def from_state_dict(state: Mapping[str, Tensor], layout: str, **options: Any) -> tuple[MLP, Tensor]:
    """Another package's weights as (net, params [P]): a state_dict in one of ``LAYOUTS``, copied.

    * sitzmann: vsitzmann/siren, SingleBVPNet and FCBlock; sin(30 z), coords "corners"
    * lucidrains: siren-pytorch, SirenNet and SirenWrapper; sin(30 z) in the first layer, sin(1 z)
      in the others, coords "corners"; early versions put a sine behind the last layer too unless
      they were given a final activation, which is not converted
    * gradncp, gradncp_penultimate: GradNCP, MetaSiren and MetaSirenPenultimate; sin(30 z), output
      shifted by 0.5, coords "corners"
    * nerf_meta: nerf-meta, SimpleNeRF; ReLU, output raw, coords "world"; its density is
      ``March(density="softplus")``, in early versions "relu"

    Weights stacked over tasks, [T,out,in], give params [T,P]. Keys may stand behind any common
    prefix, as inside a wrapper. A missing bias becomes zeros.

    What a package keeps in its constructor is not in the file. The list has its defaults;
    ``options`` (activation, w0, w0_first, output, output_shift, coords, encoding) name other
    values: ``from_state_dict(state, "lucidrains", w0=30.0)``. An ``encoding`` is one in front of a
    sitzmann network (mode "nerf"). That of nerf_meta is in the file: all sines, then all cosines
    there, frequency by frequency here, as in ``nerf_mlp``; the first layer's columns move with it.

    Raises:
        ValueError, TypeError: an unknown layout or option, a key that is missing or belongs to
            nothing, shapes or dtypes that do not fit; says which.

    Source: github.com/vsitzmann/siren, lucidrains/siren-pytorch, jihoontack/GradNCP,
    sanowar-raihan/nerf-meta.

    >>> import torch, fastmeta as fm
    >>> from fastmeta.convert import from_state_dict, to_state_dict
    >>> net = fm.MLP(2, 3, 16, 3, "sine", 30.0, output_shift=0.5, coords="corners")
    >>> params = net.init()[0]
    >>> again, same = from_state_dict(to_state_dict(net, params, "gradncp"), "gradncp")
    >>> again == net, torch.equal(same, params)
    (True, True)
    """
    op = "from_state_dict"
    plan = _layout(op, layout)
    accepted = _OPTIONS | ({"encoding"} if plan.frequencies is None else set())
    if unknown := sorted(options.keys() - accepted):
        raise TypeError(f"{op}: option {unknown[0]!r}; accepted are {', '.join(sorted(accepted))}")
    try:
        names, used = _layer_names(state, plan)
        pairs, used = _named_pairs(state, names, used)
        if extra := [
            key for key in state if key not in used and key.split(".")[-1] not in plan.ignored
        ]:
            raise ValueError(f"{extra[0]!r} is no part of such a network")
        values = {**plan.defaults, **options}
        if "activation" in options and options["activation"] != "sine":
            values = {k: v for k, v in values.items() if k in options or not k.startswith("w0")}
        if plan.frequencies is not None:
            key = names[0].removesuffix(plan.hidden[0].format(plan.start)) + plan.frequencies
            theirs, own = _nerf_meta_encodings(state[key], pairs[0][0].shape[-1])
            values["encoding"] = theirs
        widths = [w.shape[-2] for w, _ in pairs[:-1]]
        if len(set(widths)) > 1:
            raise ValueError(f"hidden widths are {widths}; accepted is one width for all")
        encoding = values.get("encoding")
        D = pairs[0][0].shape[-1] if encoding is None else encoding.in_features
        net = MLP(D, pairs[-1][0].shape[-2], widths[0], len(pairs), **values)
        for name, (w, _), (i, o) in zip(names, pairs, net.sizes, strict=True):
            if tuple(w.shape[-2:]) != (o, i):
                raise ValueError(f"{name}.weight is {list(w.shape)}; accepted is [{o},{i}]")
    except ValueError as error:
        raise ValueError(f"{op}: layout {layout!r}: {error}") from None
    flat = [part for w, b in pairs for part in (w.flatten(-2), b)]
    params = torch.cat([part.detach() for part in flat], -1)
    return (net, params) if plan.frequencies is None else reorder(net, params, own)


def to_state_dict(net: MLP, params: Tensor, layout: str) -> dict[str, Tensor]:
    """The state_dict that another package's network of the same values loads, copied.

    ``from_state_dict`` gives net and params back, exactly, where its options name what the package
    keeps elsewhere (and the features of an encoding stand as in ``nerf_mlp``).
    ``peer_arguments(net, layout)`` has the arguments of the package's constructor.

    Args:
        net: the specification.
        params: [P]; or [T,P], which gives weights stacked over tasks.
        layout: one of ``LAYOUTS``.

    Raises:
        ValueError: params do not fit, or the package cannot represent the network; says which
            parts and why.
    """
    op = "to_state_dict"
    plan = _layout(op, layout)
    rows = rows_of(op, net, params)
    if reasons := _objections(net, plan):
        raise refused(op, layout, reasons)
    state = {}
    if plan.frequencies is not None:
        freqs, theirs = _ladder(op, net)
        net, rows = reorder(net, rows, theirs)
        state[plan.prefix + plan.frequencies] = freqs.to(rows.device)
    for index, (w, b) in enumerate(net.layers(rows)):
        last = plan.last[0] if index == net.depth - 1 else None
        name = plan.prefix + (last or plan.hidden[0].format(plan.start + index * plan.step))
        state[f"{name}.weight"], state[f"{name}.bias"] = w.clone(), b.clone()
    return state


def peer_arguments(net: MLP, layout: str) -> dict[str, Any]:
    """The keyword arguments with which the package of a layout builds the network's twin.

    ``twin = SirenNet(**peer_arguments(net, "lucidrains"))``, then ``load_state_dict``.

    Raises:
        ValueError: an unknown layout, or a network that the package cannot represent.
    """
    plan = _layout("peer_arguments", layout)
    if reasons := _objections(net, plan):
        raise refused("peer_arguments", layout, reasons)
    D, H, C, L = net.in_features, net.width, net.out_features, net.depth
    if layout == "sitzmann":
        return {
            "in_features": D,
            "out_features": C,
            "hidden_features": H,
            "num_hidden_layers": L - 2,
            "type": net.activation,
        }
    if layout == "nerf_meta":
        freqs, _ = _ladder("peer_arguments", net)
        return {
            "in_features": D,
            "max_freq": math.log2(freqs[-1]),
            "num_freqs": len(freqs),
            "hidden_features": H,
            "hidden_layers": L - 1,
            "out_features": C,
        }
    values: dict[str, Any] = {"dim_in": D, "dim_hidden": H, "dim_out": C}
    values |= {"num_layers": L, "w0": net.w0, "w0_initial": net.w0_first}
    if layout == "lucidrains":
        final = nn.Identity if net.output == "linear" else MODULES[net.output]
        values |= {"num_layers": L - 1, "final_activation": final()}
    return values


def reorder(net: MLP, params: Tensor, encoding: Encoding) -> tuple[MLP, Tensor]:
    """(net, params) of the same function with the features of its encoding in another order.

    ``y = mlp(net, params, x)`` does not change: columns of the first layer's weight move with the
    features.

    Args:
        net: a network with an encoding.
        params: [P] or [T,P].
        encoding: the same pairs of a column of B and an entry of φ, in another order.

    Raises:
        ValueError: params do not fit, or the features are not the same.
    """
    rows = rows_of("reorder", net, params)
    own = net.encoding
    if own is None:
        raise ValueError("reorder: net has no encoding; accepted is one with the same features")
    if own.include_input != encoding.include_input or own.B.shape != encoding.B.shape:
        raise ValueError(
            f"reorder: net has {own}; encoding is {encoding}; accepted are equal sizes"
        )
    places: dict[tuple, list[int]] = {}
    for place, column in enumerate(columns_of(own)):
        places.setdefault(column, []).append(place)
    order = []
    for place, column in enumerate(columns_of(encoding)):
        if not places.get(column):
            raise ValueError(
                f"reorder: column {place} of encoding, sin(x·{list(column[:-1])} + {column[-1]}), "
                "is no feature of net.encoding, or comes more often"
            )
        order.append(places[column].pop(0))
    D = net.in_features if own.include_input else 0
    columns = torch.tensor([*range(D), *(D + place for place in order)], device=rows.device)
    E, H = net.encoded_features, net.width
    first = rows[..., : E * H].unflatten(-1, (H, E))[..., columns].flatten(-2)  # [...,H·E]
    return replace(net, encoding=encoding), torch.cat([first, rows[..., E * H :]], -1)
