"""Networks as modules of torch's own parts, and back."""

from __future__ import annotations

import json
import operator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..spec import MLP, OUTPUTS, Encoding

MODULES = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "none": nn.Identity,
}
_PLAIN_FIELDS = tuple(part.name for part in fields(MLP) if part.name != "encoding")


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

    >>> import torch, fastmeta as fm
    >>> net = fm.siren(2, 3, width=16, depth=3)
    >>> params = net.init()[0]
    >>> module = fm.to_module(net, params)
    >>> [name for name, _ in module.named_parameters()][:2]
    ['layers.0.weight', 'layers.0.bias']
    >>> x = torch.rand(10, 2)
    >>> torch.allclose(module(x), fm.mlp(net, params, x), atol=1e-5)
    True
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
        root.add_module(name, MODULES[kind]())
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

    >>> import torch, fastmeta as fm
    >>> from torch import nn
    >>> net, params = fm.from_module(nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 3)))
    >>> net.sizes, net.activation, params.shape
    (((2, 16), (16, 3)), 'tanh', torch.Size([99]))
    >>> fm.from_module(nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Dropout(), nn.Linear(16, 3)))
    Traceback (most recent call last):
    ValueError: from_module: 2 is Dropout(p=0.5, inplace=False); accepted are ...
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
    for kind, accepted in MODULES.items():
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
    names = ", ".join(accepted.__name__ for accepted in MODULES.values())
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
