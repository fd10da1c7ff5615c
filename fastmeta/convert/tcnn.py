"""tiny-cuda-nn: JSON configurations and the padded weight vector, in and out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..spec import MLP, Encoding
from .layouts import columns_of, refused, reorder, rows_of

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
    same = sorted(columns_of(features)) == sorted(columns_of(net.encoding))
    if net.encoding.include_input or not same:
        raise refused(
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

    >>> from fastmeta.convert import from_tcnn
    >>> encoding = {"otype": "Frequency", "n_frequencies": 4}
    >>> network = {"otype": "FullyFusedMLP", "activation": "ReLU", "output_activation": "None",
    ...            "n_neurons": 64, "n_hidden_layers": 2}
    >>> net = from_tcnn(3, 4, encoding, network)
    >>> net.sizes
    ((24, 64), (64, 64), (64, 4))
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
    rows = rows_of(op, net, params)
    if dtype not in (torch.float32, torch.float16):
        raise ValueError(f"{op}: dtype is {dtype}; accepted are torch.float32 and torch.float16")
    if reasons := _tcnn_objections(net, rows):
        raise refused(op, "tiny-cuda-nn", reasons)
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
        raise refused(op, "tiny-cuda-nn", [f"weights that are NaN, or no finite number in {dtype}"])
    network = {
        "otype": "FullyFusedMLP" if net.width in _TCNN_WIDTHS else "CutlassMLP",
        "activation": _TCNN_ACTIVATIONS[net.activation],
        "output_activation": _TCNN_OUTPUTS[net.output],
        "n_neurons": net.width,
        "n_hidden_layers": net.depth - 1,
    }
    return TinyCudaNN(config, network, vector)
