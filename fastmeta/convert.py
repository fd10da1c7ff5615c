"""Networks in and out: the paper authors' JAX checkpoints, modules of torch's own parts, the
state_dicts of other packages, tiny-cuda-nn.

A converter never guesses: what it does not know it refuses, naming the part. Layers keep their
order, weights go to [out,in] as ``nn.Linear`` has them, and no value is changed.
"""

from __future__ import annotations

import io
import json
import math
import operator
import os
import pickletools
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn

from .spec import MLP, OUTPUTS, Encoding, fourier_mlp, nerf_mlp, siren

_MODULES = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "none": nn.Identity,
}
_PLAIN_FIELDS = tuple(part.name for part in fields(MLP) if part.name != "encoding")

# Limits on a foreign file: the paper's own are 0.8 MB and about 400 opcodes.
_MAX_BYTES = 256 * 2**20
_MAX_OPCODES = 100_000


def to_module(net: MLP, params: Tensor) -> nn.Module:
    """A module of torch's own parts computing ``y = mlp(net, params, x)``, x [...,D] -> y [...,C].

    It is a ``torch.fx.GraphModule`` over ``nn.Linear`` and torch's activations: saved (state_dict,
    torch.save), copied, trained, exported and run where fastmeta is not installed. Parameters are
    ``layers.0.weight`` [out,in], ``layers.0.bias`` [out], ...; an encoding is the buffers
    ``encoding.B`` [D,F] and ``encoding.phi`` [F]. ``from_module`` gives net and params back,
    exactly.

    Args:
        net: the specification.
        params: [P] floating point, copied; the module takes its dtype and device.

    Raises:
        ValueError: params is not [net.num_params] or not floating point.
    """
    if not isinstance(params, Tensor):
        raise ValueError(f"to_module: params is {type(params).__name__}; accepted is a tensor")
    if tuple(params.shape) != (net.num_params,) or not params.is_floating_point():
        raise ValueError(
            f"to_module: params is {params.dtype} {list(params.shape)}; "
            f"accepted is one row [{net.num_params}] of floating point"
        )
    root: Any = nn.Module()
    # torch.save drops a GraphModule's meta, deepcopy its attributes; both keep what is called.
    root.spec = nn.Identity()
    root.spec.fields = json.dumps({name: getattr(net, name) for name in _PLAIN_FIELDS})
    root.layers = nn.ModuleList(_linear(w, b) for w, b in net.layers(params.detach()))
    for name, kind in _called(net).items():
        root.add_module(name, _MODULES[kind]())
    if net.encoding is not None:
        root.encoding = nn.Module()
        for name in ("B", "phi"):
            root.encoding.register_buffer(name, getattr(net.encoding, name).to(params, copy=True))
    return fx.GraphModule(root, _graph(net), class_name="CoordinateNetwork")


def from_module(module: nn.Module, *, coords: str = "unit") -> tuple[MLP, Tensor]:
    """A torch module as (net, params [P]): its specification and its weights, copied.

    Accepted are ``nn.Sequential`` (nested as well) of at least two ``nn.Linear``, hidden widths
    equal, with one and the same activation after each but the last: ReLU, Tanh, Sigmoid, Softplus,
    GELU, SiLU in their default forms, Identity or nothing; after the last, Identity, ReLU, Tanh,
    Sigmoid or Softplus. A missing bias becomes zeros. And modules made by ``to_module``, which come
    back exactly, trained or not.

    Args:
        module: the module.
        coords: the coordinate convention of a Sequential; a module made by ``to_module`` knows its
            own.

    Raises:
        ValueError: anything else, naming the part and why.
    """
    if isinstance(module, fx.GraphModule):
        net, linears = _net_of_graph(module)
    elif type(module) is nn.Sequential:
        net, linears = _net_of_sequential(module, coords)
    else:
        raise ValueError(
            f"from_module: module is {type(module).__name__}; "
            "accepted are nn.Sequential and what to_module made"
        )
    rows = [
        part.detach().reshape(-1) for linear in linears for part in (linear.weight, _bias(linear))
    ]
    kinds = {(row.dtype, row.device) for row in rows}
    if len(kinds) > 1 or not rows[0].is_floating_point():
        came = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise ValueError(
            f"from_module: weights are {came}; accepted is one floating-point dtype on one device"
        )
    return net, torch.cat(rows)


def load_learnit(path: str | os.PathLike) -> tuple[MLP, Tensor]:
    """Starting weights of the paper's authors, (net, init [P]), from their .pkl or an .npz.

    A pickle is read as data, never executed: arrays of numpy and jax, dicts and haiku's mappings;
    any other global is refused by name. Layers are ``siren__model/siren_layer*/linear`` (images) or
    ``model/linear*``, leaves w [in,out] and b [out]; an .npz has w0, b0, w1, b1, .... Recognised
    are, by names and shapes, any width and depth:

    * images, 2 -> 3: ``siren(2, 3, width, depth, w0=200, output_shift=0.5)``
    * CT, 512 -> 1: ``fourier_mlp(2, 1, width, depth)``; the frequencies are not in the file but
      drawn from seed 0
    * views, 120 -> 4: ``nerf_mlp(width, depth)``

    Raises:
        FileNotFoundError: nothing is there. ValueError: the file is none of these; says which part
            and why.

    Source: Tancik et al. 2021, github.com/tancik/learnit.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise FileNotFoundError(f"load_learnit: {path}: no such file") from None
    except IsADirectoryError:
        raise ValueError(
            f"load_learnit: {path}: a folder; accepted is a .pkl or .npz file"
        ) from None
    try:
        if len(data) > _MAX_BYTES:
            raise ValueError(f"larger than {_MAX_BYTES} bytes")
        kind, layers = _npz_layers(data) if data[:2] == b"PK" else _haiku_layers(_read_pickle(data))
        if sum(array.nbytes for pair in layers for array in pair) > _MAX_BYTES:
            raise ValueError("its layers repeat one array beyond all bounds")
        net = _recognise(kind, layers)
    except ValueError as error:
        raise ValueError(f"load_learnit: {path}: {error}") from None
    init = torch.from_numpy(np.concatenate([part.ravel() for w, b in layers for part in (w.T, b)]))
    if not torch.isfinite(init).all():
        raise ValueError(f"load_learnit: {path}: the weights hold NaN or infinity")
    return net, init


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
    rows = _rows(op, net, params)
    if reasons := _objections(net, plan):
        raise _refused(op, layout, reasons)
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
        raise _refused("peer_arguments", layout, reasons)
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
        final = nn.Identity if net.output == "linear" else _MODULES[net.output]
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
    rows = _rows("reorder", net, params)
    own = net.encoding
    if own is None:
        raise ValueError("reorder: net has no encoding; accepted is one with the same features")
    if own.include_input != encoding.include_input or own.B.shape != encoding.B.shape:
        raise ValueError(
            f"reorder: net has {own}; encoding is {encoding}; accepted are equal sizes"
        )
    places: dict[tuple, list[int]] = {}
    for place, column in enumerate(_columns(own)):
        places.setdefault(column, []).append(place)
    order = []
    for place, column in enumerate(_columns(encoding)):
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


class TinyCudaNN(NamedTuple):
    """``tcnn.NetworkWithInputEncoding(D, C, encoding, network)``, whose ``params`` takes these."""

    encoding: dict[str, Any]
    network: dict[str, Any]
    params: Tensor  # [...,n], padded as tiny-cuda-nn has them


def from_tcnn(
    n_input_dims: int,
    n_output_dims: int,
    encoding: Mapping[str, Any] | None,
    network: Mapping[str, Any],
    *,
    coords: str = "unit",
) -> MLP:
    """The network that a tiny-cuda-nn configuration stands for; ``load_tcnn`` reads its weights.

    ``h_l = φ(W_l h_{l-1})`` with ones in place of the inputs that pad E to a multiple of 16, which
    is a bias of the first layer; no other layer has one there, while here each has.

    Args:
        n_input_dims, n_output_dims: D and C.
        encoding: ``{"otype": "Identity"}``, ``{"otype": "Frequency", "n_frequencies": F}``
            (sin, cos of 2^k π x, coordinate by coordinate), or None for ``tcnn.Network``.
        network: otype FullyFusedMLP, CutlassMLP or MLP; activation None, ReLU, Sine (without w0),
            Sigmoid, Tanh or SiLU; output_activation None, ReLU, Sigmoid or Tanh.
        coords: the coordinate convention.

    Raises:
        ValueError: any other encoding, network, activation or key; says which and why.

    Source: github.com/NVlabs/tiny-cuda-nn, DOCUMENTATION.md and the kernels.
    """
    taken = _Config(
        "from_tcnn", "encoding", {"otype": "Identity"} if encoding is None else encoding
    )
    kind = taken.choice("otype", "OneBlob", ("Identity", "Frequency"))
    taken.fixed("n_dims_to_encode", n_input_dims)
    features = None
    if kind == "identity":
        for key, value in (("scale", 1.0), ("offset", 0.0)):
            taken.fixed(key, value, "apply it to the coordinates")
    else:
        features = _tcnn_frequencies(n_input_dims, taken.number("n_frequencies", 12))
    taken.done()

    taken = _Config("from_tcnn", "network", network)
    kind = taken.choice("otype", "MLP", ("FullyFusedMLP", "MegakernelMLP", "CutlassMLP", "MLP"))
    activation = taken.choice("activation", "ReLU", _TCNN_ACTIVATIONS)
    output = taken.choice("output_activation", "None", _TCNN_OUTPUTS)
    width, hidden = taken.number("n_neurons", 128), taken.number("n_hidden_layers", 5)
    taken.fixed("feedback_alignment", False)
    taken.done()
    fused = kind in ("fullyfusedmlp", "megakernelmlp")
    if width not in (*_TCNN_WIDTHS, 256) if fused else width % 8:
        accepted = "16, 32, 64, 128, 256" if fused else "multiples of 8"
        raise ValueError(f"from_tcnn: network: n_neurons is {width}; accepted are {accepted}")
    return MLP(
        n_input_dims,
        n_output_dims,
        width,
        hidden + 1,
        activation,
        encoding=features,
        output="linear" if output == "none" else output,
        coords=coords,
    )


def load_tcnn(net: MLP, params: Tensor) -> Tensor:
    """[P] of the weights of a tiny-cuda-nn network, float32 as it is, float16 as float32.

    The columns of the padding add up to the bias of the first layer; the other biases are 0; rows
    that pad the outputs are left out. Exact where one column of the padding holds it all, as
    ``to_tcnn`` writes it.

    Args:
        net: from ``from_tcnn``; or with the same features in another order.
        params: [n] or [T,n], ``module.params`` of tiny-cuda-nn.

    Raises:
        ValueError: a length or dtype that does not fit, or a network that tiny-cuda-nn has not.
    """
    theirs = net
    if net.encoding is not None:
        theirs = replace(net, encoding=_tcnn_features("load_tcnn", net))
    sizes = _tcnn_sizes(net)
    n = sum(rows * columns for rows, columns in sizes)
    if not isinstance(params, Tensor) or params.dtype not in (torch.float16, torch.float32):
        came = params.dtype if isinstance(params, Tensor) else type(params).__name__
        raise ValueError(f"load_tcnn: params is {came}; accepted is a float16 or float32 tensor")
    if params.dim() not in (1, 2) or params.shape[-1] != n:
        raise ValueError(
            f"load_tcnn: params has shape {list(params.shape)}; accepted are [{n}] and [T,{n}]"
        )
    parts, at = [], 0
    for index, ((rows, columns), (i, o)) in enumerate(zip(sizes, net.sizes, strict=True)):
        matrix = params.detach()[..., at : at + rows * columns].unflatten(-1, (rows, columns))
        at += rows * columns
        matrix = matrix[..., :o, :].float()
        bias = matrix[..., i:].sum(-1) if index == 0 else torch.zeros_like(matrix[..., 0])
        parts += [matrix[..., :i].flatten(-2), bias]
    row = torch.cat(parts, -1)
    return row if net.encoding is None else reorder(theirs, row, net.encoding)[1]


def to_tcnn(net: MLP, params: Tensor, *, dtype: torch.dtype = torch.float32) -> TinyCudaNN:
    """The network as tiny-cuda-nn's configuration and padded weights.

    Sine layers have no w0 there: weights come multiplied by it (one rounding, in float64 before
    the dtype's), so that the way back gives w0 = 1. All else is exact in float32.

    Args:
        net: the specification; without an encoding, or with sin and cos of 2^k π x, in any order.
        params: [P] or [T,P].
        dtype: of the result, torch.float32 or torch.float16.

    Raises:
        ValueError: what tiny-cuda-nn cannot represent: a bias behind the first layer, a bias of the
            first where E is a multiple of 16, other activations, outputs, widths or encodings, an
            output shift, numbers beyond float16; names the parts.
    """
    op = "to_tcnn"
    rows = _rows(op, net, params)
    if dtype not in (torch.float32, torch.float16):
        raise ValueError(f"{op}: dtype is {dtype}; accepted are torch.float32 and torch.float16")
    if reasons := _tcnn_objections(net, rows):
        raise _refused(op, "tiny-cuda-nn", reasons)
    config: dict[str, Any] = {"otype": "Identity"}
    if net.encoding is not None:
        features = _tcnn_features(op, net)
        net, rows = reorder(net, rows, features)
        config = {
            "otype": "Frequency",
            "n_frequencies": features.out_features // (2 * net.in_features),
        }
    pieces = []
    frequencies = (*net.frequencies, 1.0)  # of the last layer, none
    for index, ((weight, bias), (high, wide)) in enumerate(
        zip(net.layers(rows.double()), _tcnn_sizes(net), strict=True)
    ):
        o, i = weight.shape[-2:]
        matrix = weight.new_zeros(*weight.shape[:-2], high, wide)
        matrix[..., :o, :i] = weight
        if wide > i and index == 0:
            matrix[..., :o, i] = bias
        pieces.append((matrix * frequencies[index]).flatten(-2))
    vector = torch.cat(pieces, -1).to(dtype)
    if not torch.isfinite(vector).all():
        raise _refused(
            op, "tiny-cuda-nn", [f"weights that are NaN, or no finite number in {dtype}"]
        )
    network = {
        "otype": "FullyFusedMLP" if net.width in _TCNN_WIDTHS else "CutlassMLP",
        "activation": _TCNN_ACTIVATIONS[net.activation],
        "output_activation": _TCNN_OUTPUTS[net.output],
        "n_neurons": net.width,
        "n_hidden_layers": net.depth - 1,
    }
    return TinyCudaNN(config, network, vector)


# ---- modules


def _graph(net: MLP) -> fx.Graph:
    """The forward pass of ``to_module``, over its submodules."""
    graph = fx.Graph()
    h = x = graph.call_module("spec", (graph.placeholder("x"),))  # [...,D]
    if net.encoding is not None:
        h = graph.call_function(torch.matmul, (x, graph.get_attr("encoding.B")))  # [...,F]
        h = graph.call_function(operator.add, (h, graph.get_attr("encoding.phi")))
        h = graph.call_function(torch.sin, (h,))
        if net.encoding.include_input:
            h = graph.call_function(torch.cat, ([x, h], -1))  # [...,E]
    for index, w0 in enumerate(net.frequencies):
        h = graph.call_module(f"layers.{index}", (h,))  # [...,H]
        if net.activation == "sine":
            h = graph.call_function(torch.sin, (graph.call_function(operator.mul, (h, w0)),))
        elif net.activation != "none":
            h = graph.call_module("activation", (h,))
    h = graph.call_module(f"layers.{net.depth - 1}", (h,))  # [...,C]
    if net.output != "linear":
        h = graph.call_module("output", (h,))
    if net.output_shift != 0.0:
        h = graph.call_function(operator.add, (h, net.output_shift))
    graph.output(h)
    return graph


def _called(net: MLP) -> dict[str, str]:
    """Submodule name -> kind of activation; a sine is written out, an identity left out."""
    named = {"activation": net.activation, "output": net.output}
    return {name: kind for name, kind in named.items() if kind not in ("sine", "none", "linear")}


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, device="meta")  # meta: draws no random numbers
    linear.weight, linear.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
    return linear


def _bias(linear: nn.Linear) -> Tensor:
    return linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias


def _net_of_graph(module: fx.GraphModule) -> tuple[MLP, list[nn.Linear]]:
    """(net, linear layers) of what ``to_module`` made; a graph changed since then is refused."""
    foreign = "from_module: the GraphModule was not made by to_module, or was changed since"
    _no_hooks("module", module)
    try:
        values = json.loads(str(module.get_submodule("spec").fields))
        if hasattr(module, "encoding"):
            encoding: Any = module.encoding
            joined = any(node.target is torch.cat for node in module.graph.nodes)
            values["encoding"] = Encoding(encoding.B, encoding.phi, joined)
        net = MLP(**values)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{foreign}: it holds no specification ({error})") from None
    if _shape_of(module.graph) != _shape_of(_graph(net)):
        raise ValueError(f"{foreign}: its graph does not compute {net}")
    for name, kind in _called(net).items():
        part = module.get_submodule(name)
        if _activation(name, part) != kind:
            raise ValueError(f"{foreign}: {name} is {_shown(part)}, not {kind}")
    linears = [
        _checked_linear(f"layers.{i}", module.get_submodule(f"layers.{i}"))
        for i in range(net.depth)
    ]
    sizes = tuple((linear.in_features, linear.out_features) for linear in linears)
    if sizes != net.sizes:
        raise ValueError(f"{foreign}: its layers have sizes {sizes}, not {net.sizes}")
    return net, linears


def _shape_of(graph: fx.Graph) -> list[tuple]:
    """A graph without its node names: (op, target, arguments), nodes by their position."""
    place = {node: f"%{index}" for index, node in enumerate(graph.nodes)}
    return [
        (node.op, node.target, fx.node.map_arg((node.args, dict(node.kwargs)), place.__getitem__))
        for node in graph.nodes
    ]


def _net_of_sequential(module: nn.Sequential, coords: str) -> tuple[MLP, list[nn.Linear]]:
    linears: list[nn.Linear] = []
    after: list[str] = []  # the activation behind each linear layer
    for name, part in _parts(module, ""):
        if isinstance(part, nn.Linear):
            linears.append(_checked_linear(name, part))
            after.append("none")
            continue
        activation = _activation(name, part)
        if activation != "none" and (not linears or after[-1] != "none"):
            place = f"another activation, {after[-1]}" if linears else "nothing"
            raise ValueError(
                f"from_module: {name} is {_shown(part)} and follows {place}; "
                "accepted is one activation behind an nn.Linear"
            )
        if activation != "none":
            after[-1] = activation
    if len(linears) < 2:
        raise ValueError(
            f"from_module: the module has {len(linears)} nn.Linear; accepted are two or more"
        )
    widths = [linear.out_features for linear in linears[:-1]]
    if len(set(widths)) > 1:
        raise ValueError(f"from_module: hidden widths are {widths}; accepted is one width for all")
    for before, linear in zip(linears[:-1], linears[1:], strict=True):
        if before.out_features != linear.in_features:
            raise ValueError(
                f"from_module: {linear} follows a layer with {before.out_features} outputs"
            )
    if len(set(after[:-1])) > 1:
        raise ValueError(
            f"from_module: hidden activations are {after[:-1]}; accepted is one for all"
        )
    output = "linear" if after[-1] == "none" else after[-1]
    if output not in OUTPUTS:
        raise ValueError(
            f"from_module: the output activation is {output}; accepted are {', '.join(OUTPUTS)}"
        )
    D, C = linears[0].in_features, linears[-1].out_features
    return MLP(D, C, widths[0], len(linears), after[0], output=output, coords=coords), linears


def _parts(module: nn.Sequential, prefix: str) -> list[tuple[str, nn.Module]]:
    """Leaves in order; a part that stands there twice (one nn.ReLU for all) is there twice."""
    _no_hooks(prefix or "module", module)
    parts = []
    for name, part in module._modules.items():
        name = f"{prefix}{name}"
        parts += _parts(part, f"{name}.") if type(part) is nn.Sequential else [(name, part)]
    return parts


def _checked_linear(name: str, part: nn.Module) -> nn.Linear:
    if type(part) is not nn.Linear:
        raise ValueError(
            f"from_module: {name} is {type(part).__name__}; accepted is nn.Linear itself"
        )
    _no_hooks(name, part)
    return part


def _activation(name: str, part: nn.Module) -> str:
    """The name in spec.py of a torch activation module; any other module is refused."""
    _no_hooks(name, part)
    for kind, accepted in _MODULES.items():
        if type(part) is accepted:
            if kind == "softplus" and (part.beta, part.threshold) != (1, 20):
                raise ValueError(
                    f"from_module: {name} is {_shown(part)}; "
                    "accepted is Softplus(beta=1, threshold=20)"
                )
            if kind == "gelu" and part.approximate != "none":
                raise ValueError(
                    f"from_module: {name} is {_shown(part)}; accepted is GELU(approximate='none')"
                )
            return kind
    names = ", ".join(accepted.__name__ for accepted in _MODULES.values())
    raise ValueError(
        f"from_module: {name} is {_shown(part)}; "
        f"accepted are Linear, {names} and Sequential of these"
    )


def _shown(part: nn.Module) -> str:
    return " ".join(str(part).split())[:100]


def _no_hooks(name: str, part: nn.Module) -> None:
    """A hook can change what a module computes (spectral_norm is one), and would be lost."""
    if part._forward_hooks or part._forward_pre_hooks:
        raise ValueError(
            f"from_module: {name} has forward hooks, which a specification cannot hold"
        )


# ---- state_dicts of other packages


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


def _rows(op: str, net: MLP, params: Any) -> Tensor:
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


def _refused(op: str, layout: str, reasons: list[str]) -> ValueError:
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


def _columns(encoding: Encoding) -> list[tuple]:
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
        if sorted(_columns(theirs)) == sorted(_columns(net.encoding)):
            return freqs, theirs
    raise _refused(op, "nerf_meta", [f"{net.encoding} is not sin and cos of f x alone"])


# ---- tiny-cuda-nn

_TCNN_ACTIVATIONS = {
    "none": "None",
    "relu": "ReLU",
    "sine": "Sine",
    "sigmoid": "Sigmoid",
    "tanh": "Tanh",
    "silu": "SiLU",
}
_TCNN_OUTPUTS = {"linear": "None", "relu": "ReLU", "sigmoid": "Sigmoid", "tanh": "Tanh"}
_TCNN_WIDTHS = (16, 32, 64, 128)
_TCNN_WHY = {"softplus": " (tiny-cuda-nn's is log(1 + exp(10 z)) / 10)"}


class _Config:
    """A JSON object of tiny-cuda-nn; each key is taken once, and what is left is refused."""

    def __init__(self, op: str, name: str, values: Mapping[str, Any]) -> None:
        if not isinstance(values, Mapping):
            raise ValueError(f"{op}: {name} is {type(values).__name__}; accepted is a mapping")
        self.where, self.left = f"{op}: {name}", dict(values)

    def choice(self, key: str, default: str, accepted: Any) -> str:
        """The value in lower case, where tiny-cuda-nn does not mind the case."""
        value = str(self.left.pop(key, default))
        names = [*accepted.values()] if isinstance(accepted, Mapping) else [*accepted]
        if value.lower() not in [name.lower() for name in names]:
            why = _TCNN_WHY.get(value.lower(), "")
            raise ValueError(
                f"{self.where}: {key} is {value!r}{why}; accepted are {', '.join(names)}"
            )
        return value.lower()

    def number(self, key: str, default: int) -> int:
        value = self.left.pop(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{self.where}: {key} is {value!r}; accepted is an integer >= 1")
        return value

    def fixed(self, key: str, only: Any, hint: str = "") -> None:
        if (value := self.left.pop(key, only)) != only:
            raise ValueError(
                f"{self.where}: {key} is {value!r}; accepted is {only!r}{hint and ', '}{hint}"
            )

    def done(self) -> None:
        if self.left:
            raise ValueError(f"{self.where}: {next(iter(self.left))!r} is unknown")


def _tcnn_frequencies(D: int, F: int) -> Encoding:
    """sin(2^k π x_d), cos(2^k π x_d): coordinate by coordinate, then frequency by frequency."""
    ladder = math.pi * 2.0 ** torch.arange(F, dtype=torch.float64)
    B = torch.block_diag(*[ladder.repeat_interleave(2)[None]] * D)  # [D,2·D·F]
    return Encoding(B, torch.tensor([0.0, math.pi / 2]).repeat(D * F))


def _tcnn_features(op: str, net: MLP) -> Encoding:
    """tiny-cuda-nn's order of the features of net's encoding, which must be the same."""
    assert net.encoding is not None
    D = net.in_features
    features = _tcnn_frequencies(D, max(1, net.encoded_features // (2 * D)))
    same = sorted(_columns(features)) == sorted(_columns(net.encoding))
    if net.encoding.include_input or not same:
        raise _refused(
            op, "tiny-cuda-nn", [f"{net.encoding} is not sin and cos of 2^k π x, k from 0, alone"]
        )
    return features


def _tcnn_sizes(net: MLP) -> list[tuple[int, int]]:
    """(rows, columns) of each matrix: inputs and outputs in multiples of 16."""
    sizes = [(o, i) for i, o in net.sizes]
    sizes[0] = (sizes[0][0], -(-sizes[0][1] // 16) * 16)
    sizes[-1] = (-(-sizes[-1][0] // 16) * 16, sizes[-1][1])
    return sizes


def _tcnn_objections(net: MLP, rows: Tensor) -> list[str]:
    reasons = []
    for name, accepted in (("activation", _TCNN_ACTIVATIONS), ("output", _TCNN_OUTPUTS)):
        value = getattr(net, name)
        if value not in accepted:
            why = _TCNN_WHY.get(value, "")
            reasons.append(f"{name} is {value!r}{why}, it has {', '.join(accepted)}")
    if net.output_shift:
        reasons.append(f"output_shift is {net.output_shift}, it has none")
    if net.width % 8:
        reasons.append(f"width is {net.width}, it has multiples of 8")
    for index, (_, bias) in enumerate(net.layers(rows)):
        if not bias.any():
            continue
        if index:
            reasons.append(f"layer {index} has a bias, it has one in layer 0 only")
        elif net.encoded_features % 16 == 0:
            reasons.append(
                f"layer 0 has a bias, and {net.encoded_features} features leave no padding for it"
            )
    return reasons


# ---- the authors' checkpoints


def _recognise(kind: str, layers: list[tuple[np.ndarray, np.ndarray]]) -> MLP:
    """The paper's network with layers (w [in,out], b [out]); kind: siren, linear, npz (either)."""
    if len(layers) < 2:
        raise ValueError(f"{len(layers)} layers; accepted are two or more")
    for index, (w, b) in enumerate(layers):
        if w.ndim != 2 or b.shape != w.shape[1:] or 0 in w.shape:
            raise ValueError(
                f"layer {index}: w has shape {w.shape} and b {b.shape}; "
                "accepted are [in,out] and [out]"
            )
        if index and w.shape[0] != layers[index - 1][0].shape[1]:
            raise ValueError(
                f"layer {index}: takes {w.shape[0]} inputs, {layers[index - 1][0].shape[1]} come"
            )
    widths = [w.shape[1] for w, _ in layers[:-1]]
    if len(set(widths)) > 1:
        raise ValueError(f"hidden widths are {widths[:20]}; accepted is one width for all")
    dtypes = {array.dtype.newbyteorder("=") for pair in layers for array in pair}
    if len(dtypes) > 1 or dtypes.pop() not in (np.float32, np.float64):
        raise ValueError("the weights are not all float32 or all float64")
    ends, width, depth = (layers[0][0].shape[0], layers[-1][0].shape[1]), widths[0], len(layers)
    if kind in ("siren", "npz") and ends == (2, 3):
        return siren(2, 3, width, depth, w0=200.0, output_shift=0.5)
    if kind in ("linear", "npz") and ends == (512, 1):
        return fourier_mlp(2, 1, width, depth, features=256)
    if kind in ("linear", "npz") and ends == (120, 4):
        return nerf_mlp(width, depth)
    accepted = {"siren": "2 -> 3 (images)", "linear": "512 -> 1 (CT) and 120 -> 4 (views)"}
    named = {"siren": "siren_layer* layers", "linear": "linear* layers"}.get(kind, "layers")
    raise ValueError(
        f"a network of {named}, {ends[0]} -> {ends[1]}, is none of the paper's; "
        f"accepted are {accepted.get(kind, ', '.join(accepted.values()))}"
    )


def _haiku_layers(tree: object) -> tuple[str, list[tuple[np.ndarray, np.ndarray]]]:
    """{module name: {"w": [in,out], "b": [out]}} -> (kind, layers in their numbers' order)."""
    if not isinstance(tree, dict) or not tree:
        raise ValueError(
            f"the pickle holds {type(tree).__name__}; "
            "accepted is a mapping from layer names to w and b"
        )
    patterns = {
        "siren": r"siren__model/siren_layer(?:_(\d+))?/linear",
        "linear": r"model/linear(?:_(\d+))?",
    }
    kind = "siren" if any(name.startswith("siren__model/") for name in tree) else "linear"
    numbered = {}
    for name, leaves in tree.items():
        match = re.fullmatch(patterns[kind], name, re.ASCII)
        if match is None:
            raise ValueError(
                f"layer name {name[:80]!r}; "
                "accepted are siren__model/siren_layer*/linear and model/linear*"
            )
        held = sorted(leaves) if type(leaves) is dict else type(leaves).__name__
        if held != ["b", "w"]:
            raise ValueError(f"layer {name!r} holds {str(held)[:80]}; accepted are w and b")
        w, b = (getattr(leaves[key], "value", None) for key in ("w", "b"))
        if w is None or b is None:
            raise ValueError(f"layer {name!r}: w or b is no array")
        numbered[int((match[1] or "0")[:9])] = (w, b)
    if sorted(numbered) != list(range(len(tree))):
        raise ValueError(
            f"layers are numbered {sorted(numbered)[:20]}; "
            f"accepted is 0 to {len(tree) - 1}, none missing"
        )
    return kind, [numbered[index] for index in range(len(tree))]


def _npz_layers(data: bytes) -> tuple[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Arrays w0, b0, w1, b1, ... of an .npz -> ("npz", layers)."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = [info.filename.removesuffix(".npy") for info in archive.infolist()]
            size = sum(info.file_size for info in archive.infolist())
        depth = len(names) // 2
        if sorted(names) != sorted(f"{kind}{index}" for kind in "wb" for index in range(depth)):
            raise ValueError(
                f"the .npz holds {str(names[:6])[:80]}; accepted are w0, b0, w1, b1, ..."
            )
        if size > _MAX_BYTES:
            raise ValueError(f"the .npz unpacks to {size} bytes, accepted are {_MAX_BYTES}")
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            layers = [(arrays[f"w{index}"], arrays[f"b{index}"]) for index in range(depth)]
        if not all(isinstance(array, np.ndarray) for pair in layers for array in pair):
            raise ValueError("the .npz holds something that is no array")
        return "npz", layers
    except ValueError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise many kinds on a damaged file
        raise ValueError(f"a damaged .npz ({type(error).__name__}: {error})") from None


# What a pickle may name. The names stay names: nothing is imported, and nothing but the few lines
# of _call runs.
_RECONSTRUCT = {"numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"}
_FROMBUFFER = {"numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer"}
_JAX_ARRAY = {"jax._src.array._reconstruct_array", "jax._src.device_array.reconstruct_device_array"}
_MAPPING = {"collections.OrderedDict"} | {
    f"haiku._src.data_structures.{name}" for name in ("FlatMapping", "FlatMap", "frozendict")
}
_KNOWN = (
    _RECONSTRUCT
    | _FROMBUFFER
    | _JAX_ARRAY
    | _MAPPING
    | {"numpy.ndarray", "numpy.dtype", "_codecs.encode"}
)

_CONSTANTS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
_CONSTANTS |= {"UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
_CONSTANTS |= {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_FIXED = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


class _Name(str):
    """module.name of a global in a pickle."""


class _Array:
    """An array in the making: numpy pickles an empty one first, then its state."""

    value: np.ndarray | None = None


class _Dtype:
    """A dtype in the making: its code ("f4") first, then its byte order."""

    def __init__(self, code: object) -> None:
        if code not in ("f4", "f8"):
            raise ValueError(
                f"an array of dtype {str(code)[:20]!r}, which is refused; accepted are f4 and f8"
            )
        self.code, self.order = code, "="


def _read_pickle(data: bytes) -> object:
    """What a pickle of dicts and arrays holds, read as data: containers, constants, and ``_call``.

    pickle.Unpickler with a find_class that refuses was the alternative: it still hashes, sets
    attributes and allocates as the file tells it to.
    """
    stack: list = []
    memo: dict = {}
    mark = object()
    text_left = len(data)  # each text is encoded once in an honest file

    def to_mark() -> list:
        items = []
        while (item := stack.pop()) is not mark:
            items.append(item)
        return items[::-1]

    def setitems(target: object, items: list) -> None:
        named = all(type(key) is str for key in items[::2])  # anything else could be slow to hash
        if type(target) is not dict or len(items) % 2 or not named:
            raise ValueError("a mapping whose keys are not names")
        target.update(zip(items[::2], items[1::2], strict=True))

    position = 0
    try:
        for count, (opcode, arg, at) in enumerate(pickletools.genops(data)):
            name, position = opcode.name, at or 0
            if count >= _MAX_OPCODES:
                raise ValueError(f"more than {_MAX_OPCODES} opcodes")
            if name in _CONSTANTS:
                stack.append(arg)
            elif name in ("PROTO", "FRAME"):
                pass
            elif name in _FIXED:
                stack.append(_FIXED[name])
            elif name in _EMPTY:
                stack.append(_EMPTY[name]())
            elif name == "MARK":
                stack.append(mark)
            elif name == "TUPLE":
                stack.append(tuple(to_mark()))
            elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
                stack.append(tuple([stack.pop() for _ in range(int(name[-1]))][::-1]))
            elif name == "LIST":
                stack.append(to_mark())
            elif name in ("APPEND", "APPENDS"):
                items = [stack.pop()] if name == "APPEND" else to_mark()
                if type(stack[-1]) is not list:
                    raise ValueError("a list that is none")
                stack[-1].extend(items)
            elif name in ("DICT", "SETITEMS", "SETITEM"):
                items = [stack.pop() for _ in range(2)][::-1] if name == "SETITEM" else to_mark()
                if name == "DICT":
                    stack.append({})
                setitems(stack[-1], items)
            elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
                memo[len(memo) if name == "MEMOIZE" else arg] = stack[-1]
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                stack.append(memo[arg])
            elif name in ("GLOBAL", "STACK_GLOBAL"):
                named = str(arg).split(" ", 1) if name == "GLOBAL" else [stack.pop(), stack.pop()]
                parts = named if name == "GLOBAL" else named[::-1]
                if [type(part) for part in parts] != [str, str]:
                    raise ValueError("a global without a name")
                full = ".".join(parts)
                if full not in _KNOWN:
                    raise ValueError(
                        f"the pickle asks for {full[:80]!r}, which is refused and was not run; "
                        "accepted are dicts and numpy or jax arrays"
                    )
                stack.append(_Name(full))
            elif name == "REDUCE":
                args, function = stack.pop(), stack.pop()
                stack.append(_call(function, args))
                text_left -= len(stack[-1]) if type(stack[-1]) is bytes else 0
                if text_left < 0:
                    raise ValueError("its texts repeat beyond all bounds")
            elif name == "BUILD":
                state = stack.pop()
                _build(stack[-1], state)
            elif name == "STOP":
                return stack.pop()
            else:
                raise ValueError(
                    f"opcode {name} is refused; accepted are containers, constants and arrays"
                )
    except ValueError as error:
        raise ValueError(f"{str(error)[:300]} (byte {position} of the pickle)") from None
    except (LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"a damaged pickle ({type(error).__name__} at byte {position})") from None
    raise ValueError("a pickle without an end")


def _call(function: object, args: Any) -> Any:
    """What a known global gives for its arguments."""
    if type(function) is not _Name or type(args) is not tuple:
        raise ValueError("a call of something that is not a known global")
    name = str(function)
    if name == "_codecs.encode" and [type(a) for a in args] == [str, str] and args[1] == "latin1":
        return args[0].encode("latin1")  # how protocols 0 to 2 write bytes
    if name in _MAPPING and (not args or [type(a) for a in args] == [dict]):
        return args[0] if args else {}
    if name == "numpy.dtype" and args and type(args[0]) is str:
        return _Dtype(args[0])
    if name in _RECONSTRUCT and len(args) == 3:
        if args[0] != _Name("numpy.ndarray"):
            came = str(args[0])[:80] if type(args[0]) is _Name else type(args[0]).__name__
            raise ValueError(f"an array of class {came!r}; accepted is numpy.ndarray")
        return _Array()
    if name in _FROMBUFFER and len(args) == 4 and args[3] in ("C", "F"):
        array = _Array()
        array.value = _filled(args[2], args[1], args[3] == "F", args[0])
        return array
    if name in _JAX_ARRAY and len(args) == 4 and type(args[0]) is _Name and args[0] in _RECONSTRUCT:
        array = _call(args[0], args[1])
        _build(array, args[2])
        return array
    raise ValueError(
        f"a call of {name!r} with arguments that numpy, jax and haiku do not give it, refused"
    )


def _build(target: object, state: Any) -> None:
    """Gives an array (version, shape, dtype, fortran, bytes), a dtype (version, order, ...)."""
    parts = len(state) if type(state) is tuple else 0
    if type(target) is _Array and target.value is None and parts == 5:
        target.value = _filled(*state[1:])
    elif type(target) is _Dtype and parts == 8 and type(state[1]) is str:
        if state[1] not in ("<", ">", "=") or any(part is not None for part in state[2:5]):
            raise ValueError("a dtype of several parts, which is refused")
        target.order = state[1]
    else:
        raise ValueError(f"a state for {type(target).__name__.strip('_')!r}, which is refused")


def _filled(shape: Any, dtype: Any, fortran: Any, raw: Any) -> np.ndarray:
    """A view of the file's bytes as f4 or f8."""
    if type(shape) is not tuple or not all(type(n) is int and 0 <= n < 2**40 for n in shape[:9]):
        raise ValueError("an array without a shape")
    if type(dtype) is not _Dtype or type(fortran) is not bool or len(shape) > 8:
        raise ValueError("an array that is not as numpy pickles one")
    if type(raw) not in (bytes, bytearray):
        raise ValueError(f"an array of {type(raw).__name__}; accepted are bytes")
    kind = np.dtype(dtype.order + dtype.code)
    if math.prod(shape) * kind.itemsize != len(raw):
        raise ValueError(f"an array {shape} of {kind.name} with {len(raw)} bytes")
    return np.frombuffer(raw, kind).reshape(shape, order="F" if fortran else "C")
