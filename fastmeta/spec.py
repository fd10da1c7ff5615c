"""What a coordinate network is: frozen specifications without weights.

``y = h_L + shift``, ``h_l = φ(W_l h_{l-1} + b_l)``, ``h_0 = encode(x)``. One specification stands
for any number of weight sets: parameters are flat rows [T,P], layer by layer, weight [out,in]
row-major and then bias [out], the order in which ``torch.nn.utils.parameters_to_vector`` flattens a
stack of ``nn.Linear``.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

# Every encoding of this process by its key: a compiled graph names a network by a string.
_ENCODINGS: dict[str, Encoding] = {}

# The lists every worker expands. Sine is sin(w0 z); gelu is the exact one (erf); none is the
# identity.
ACTIVATIONS = ("relu", "sine", "tanh", "sigmoid", "softplus", "gelu", "silu", "none")
OUTPUTS = ("linear", "relu", "tanh", "sigmoid", "softplus")

# Coordinate conventions (n samples along an axis, i = 0..n-1). They travel with the weights: with
# w0 = 200 another convention is another model.
COORDS = {
    "unit": "i/n in [0,1), row first: the paper's images",
    "unit_xy": "i/n in [0,1), column first: the paper's CT",
    "centers": "(2i+1)/n - 1 in (-1,1), row first: cell centres",
    "corners": "2i/(n-1) - 1 in [-1,1], row first: end points included",
    "world": "any real coordinates, such as points along rays",
}


@dataclass(frozen=True, eq=False)
class Encoding:
    """Fixed sinusoidal features, ``encode(x) = concat(x if include_input, sin(x B + φ))``.

    Args:
        B: [D,F] frequencies in radians per unit of x. Kept as float32 on the CPU, never trained.
        phi: [F] phases in radians; 0 gives a sine, π/2 a cosine.
        include_input: put the raw coordinates in front of the features.

    Source: Tancik et al. 2020 (Gaussian features), Mildenhall et al. 2020 (ladders of frequencies).

    >>> import fastmeta as fm
    >>> ladder = fm.Encoding.frequencies(1, 3, 2.0, include_input=True)
    >>> ladder
    Encoding(B=[1,6], include_input=True)
    >>> ladder.B  # a sine and a cosine of 1, 2 and 4 times x
    tensor([[1., 1., 2., 2., 4., 4.]])
    >>> ladder.out_features
    7
    """

    B: Tensor
    phi: Tensor
    include_input: bool = False
    key: ClassVar[str]  # of the content; set on each instance

    def __post_init__(self) -> None:
        for name in ("B", "phi"):
            value = torch.as_tensor(getattr(self, name)).detach().to("cpu", torch.float32)
            if not torch.isfinite(value).all():
                raise ValueError(
                    f"Encoding: {name} holds NaN or infinity; every entry must be finite"
                )
            object.__setattr__(self, name, value.contiguous().clone())
        if self.B.dim() != 2 or 0 in self.B.shape or self.phi.shape != self.B.shape[1:]:
            raise ValueError(
                f"Encoding: B has shape {tuple(self.B.shape)} and phi {tuple(self.phi.shape)}; "
                "accepted are B [D,F] and phi [F] with D, F >= 1"
            )
        raw = self.B.numpy().tobytes() + self.phi.numpy().tobytes()
        shape = f"{tuple(self.B.shape)} {bool(self.include_input)} ".encode()
        object.__setattr__(self, "key", hashlib.sha256(shape + raw).hexdigest())
        _ENCODINGS.setdefault(self.key, self)

    def __reduce__(self) -> tuple:
        return Encoding, (self.B, self.phi, self.include_input)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Encoding) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        D, F = self.B.shape
        return f"Encoding(B=[{D},{F}], include_input={self.include_input})"

    @property
    def in_features(self) -> int:
        return self.B.shape[0]

    @property
    def out_features(self) -> int:
        """E, the number of encoded features."""
        return self.B.shape[1] + (self.B.shape[0] if self.include_input else 0)

    @classmethod
    def gaussian(cls, in_features: int, features: int, scale: float, seed: int = 0) -> Encoding:
        """``[sin(xB), cos(xB)]``, ``B = scale · N(0,1)`` [D,features], no 2π: E = 2·features.

        The matrix is ``jax.random.normal(PRNGKey(seed), (D, features)) * scale`` of JAX's original
        (non-partitionable) generator, the one the authors' CT weights were trained with.
        """
        B = torch.from_numpy(_jax_normal(seed, in_features * features)).view(in_features, features)
        return cls(torch.cat([B, B], 1) * scale, _phases(features, 1))

    @classmethod
    def frequencies(
        cls,
        in_features: int,
        count: int,
        max_exponent: float,
        *,
        base: float = 2.0,
        pi: bool = False,
        include_input: bool = False,
    ) -> Encoding:
        """Per frequency f: sin(f x) of all D coordinates, then cos(f x): E = 2·D·count (+ D).

        ``f = base ** linspace(0, max_exponent, count)``, times π when ``pi``.
        The paper's ShapeNet network is ``frequencies(3, 20, 8.0)``.
        """
        if count < 1 or base <= 0:
            raise ValueError(
                f"Encoding.frequencies: count is {count}, base {base}; accepted are count >= "
                "1, base > 0"
            )
        f = base ** np.linspace(0.0, max_exponent, count) * (math.pi if pi else 1.0)
        eye = torch.eye(in_features, dtype=torch.float64)
        B = torch.cat([torch.cat([eye * fi, eye * fi], 1) for fi in f], 1)  # [D,2·D·count]
        return cls(B, _phases(in_features, count), include_input)


@dataclass(frozen=True)
class MLP:
    """A multi-layer perceptron over coordinates; hashable, without weights.

    ``y = out(W_L h_{L-1} + b_L) + output_shift``, ``h_l = φ(W_l h_{l-1} + b_l)``, ``h_0 =
    encode(x)``; a sine layer is ``sin(w0 (W h + b))``: w0 multiplies the bias too, and the last
    layer has none.

    Args:
        in_features, out_features: D and C.
        width: H, neurons in every hidden layer.
        depth: L, the number of linear layers, encoding excluded: "2-256×4-3" has depth 5. At least
            2.
        activation: one of ``ACTIVATIONS``.
        w0, w0_first: sine frequency of the hidden layers and of the first one (None: the same).
            Sine only.
        encoding: an ``Encoding`` in front of the first layer, or None.
        output: one of ``OUTPUTS``.
        output_shift: added to y after the output activation.
        coords: the coordinate convention the weights belong to, one of ``COORDS``.

    Source: Sitzmann et al. 2020 (sine networks); Tancik et al. 2021 and its notebooks.

    >>> import fastmeta as fm
    >>> net = fm.MLP(2, 3, width=16, depth=3)
    >>> net.sizes
    ((2, 16), (16, 16), (16, 3))
    >>> params = net.init(tasks=4)  # [T,P]
    >>> params.shape == (4, net.num_params)
    True
    >>> [list(weight.shape) for weight, bias in net.layers(params)]
    [[4, 16, 2], [4, 16, 16], [4, 3, 16]]
    >>> net == fm.MLP(2, 3, width=16, depth=3)
    True
    """

    in_features: int
    out_features: int
    width: int
    depth: int
    activation: str = "relu"
    w0: float = 1.0
    w0_first: float | None = None
    encoding: Encoding | None = None
    output: str = "linear"
    output_shift: float = 0.0
    coords: str = "unit"
    key: ClassVar[str]  # the specification as a string; set on each instance
    _num_params: ClassVar[int]

    def __post_init__(self) -> None:
        for name, low in (("in_features", 1), ("out_features", 1), ("width", 1), ("depth", 2)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"MLP: {name} is {value!r}; accepted is an integer >= {low}")
        for name, accepted in (
            ("activation", ACTIVATIONS),
            ("output", OUTPUTS),
            ("coords", tuple(COORDS)),
        ):
            if getattr(self, name) not in accepted:
                raise ValueError(
                    f"MLP: {name} is {getattr(self, name)!r}; accepted are {', '.join(accepted)}"
                )
        if self.w0_first is None:
            object.__setattr__(self, "w0_first", self.w0)
        for name in ("w0", "w0_first", "output_shift"):
            value = float(getattr(self, name))
            if not math.isfinite(value) or (name != "output_shift" and value <= 0):
                raise ValueError(
                    f"MLP: {name} is {value}; accepted is a finite number, w0 and w0_first above 0"
                )
            object.__setattr__(self, name, value + 0.0)  # -0.0 is 0.0, in the key too
        if self.activation != "sine" and (self.w0, self.w0_first) != (1.0, 1.0):
            raise ValueError(
                f"MLP: w0 is {self.w0} with activation {self.activation!r}; w0 belongs to "
                "sine layers only"
            )
        if self.encoding is not None and self.encoding.in_features != self.in_features:
            raise ValueError(
                f"MLP: the encoding takes {self.encoding.in_features} coordinates, "
                f"in_features is {self.in_features}"
            )
        values = [getattr(self, field.name) for field in fields(self)]
        words = [v.key if isinstance(v, Encoding) else v for v in values]
        # What compiled graphs and caches read again and again: set here, once.
        object.__setattr__(self, "key", json.dumps(words))
        E, H, C = self.encoded_features, self.width, self.out_features
        inner = (self.depth - 2) * (H + 1) * H  # any depth: a damaged file's must not fill memory
        object.__setattr__(self, "_num_params", (E + 1) * H + inner + (H + 1) * C)

    def __hash__(self) -> int:
        return hash(self.key)

    @classmethod
    @lru_cache(maxsize=1024)
    def from_key(cls, key: str) -> MLP:
        """The network whose ``key`` this is; its encoding must have been made in this process."""
        words = dict(zip((field.name for field in fields(cls)), json.loads(key), strict=True))
        if words["encoding"] is not None:
            words["encoding"] = _ENCODINGS[words["encoding"]]
        return cls(**words)

    @property
    def encoded_features(self) -> int:
        """E: inputs of the first layer."""
        return self.in_features if self.encoding is None else self.encoding.out_features

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of each linear layer."""
        dims = (self.encoded_features, *[self.width] * (self.depth - 1), self.out_features)
        return tuple(zip(dims[:-1], dims[1:], strict=True))

    @property
    def num_params(self) -> int:
        """P: weights and biases of all layers."""
        return self._num_params

    @property
    def frequencies(self) -> tuple[float, ...]:
        """w0 of each hidden layer."""
        assert self.w0_first is not None
        return (self.w0_first, *[self.w0] * (self.depth - 2))

    def init(self, tasks: int = 1, *, generator: torch.Generator | None = None) -> Tensor:
        """Random starting weights [T,P], float32, on the generator's device; every task its own.

        Sine: first layer U(±1/in), every other and the last U(±√(6/in)/w0). Otherwise: a normal of
        std 1/√in, truncated at ±2 std (no variance correction; haiku's default). Biases are 0.
        Row t depends on the generator's state and t only, not on how many tasks are drawn with it.

        Source: Tancik et al. 2021, the authors' notebooks. torch's own default differs.
        """
        if tasks < 1:
            raise ValueError(f"MLP.init: tasks is {tasks}; accepted is an integer >= 1")
        device = "cpu" if generator is None else generator.device
        u = torch.rand(
            tasks, self.num_params, generator=generator, device=device, dtype=torch.float64
        )
        for index, (weight, bias) in enumerate(self.layers(u)):
            fan_in = weight.shape[-1]
            if self.activation == "sine":
                bound = 1.0 / fan_in if index == 0 else math.sqrt(6.0 / fan_in) / self.w0
                weight.mul_(2.0).sub_(1.0).mul_(bound)
            else:
                edge = math.erf(
                    math.sqrt(2.0)
                )  # uniform in (Φ(-2), Φ(2)), through the inverse normal distribution
                weight.mul_(2.0).sub_(1.0).mul_(edge).erfinv_().mul_(math.sqrt(2.0 / fan_in))
            bias.zero_()
        return u.float()

    def layers(self, params: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Views of flat parameters: [T,P] -> [(weight [T,out,in], bias [T,out]), ...]; [P] gives no
        T axis."""
        if params.shape[-1] != self.num_params:
            raise ValueError(
                f"params has {params.shape[-1]} columns, the network has {self.num_params} "
                "parameters"
            )
        views, at = [], 0
        for i, o in self.sizes:
            weight = params[..., at : at + i * o].unflatten(-1, (o, i))
            bias = params[..., at + i * o : at + i * o + o]
            views.append((weight, bias))
            at += i * o + o
        return views


def siren(
    in_features: int,
    out_features: int,
    width: int = 256,
    depth: int = 5,
    w0: float = 30.0,
    w0_first: float | None = None,
    output_shift: float = 0.0,
) -> MLP:
    """A sine network, hidden layers ``sin(w0 (Wh + b))``, last layer linear (+ output_shift),
    coordinates in [0,1).

    The paper's image network is ``siren(2, 3, width=256, depth=5, w0=200.0, output_shift=0.5)``.
    Source: Sitzmann et al. 2020; Tancik et al. 2021.

    >>> import fastmeta as fm
    >>> net = fm.siren(2, 3, width=256, depth=5, w0=200.0, output_shift=0.5)
    >>> net.num_params
    198915
    >>> net.frequencies
    (200.0, 200.0, 200.0, 200.0)
    """
    return MLP(
        in_features, out_features, width, depth, "sine", w0, w0_first, output_shift=output_shift
    )


def fourier_mlp(
    in_features: int,
    out_features: int,
    width: int = 256,
    depth: int = 5,
    features: int = 256,
    scale: float = 30.0,
    seed: int = 0,
) -> MLP:
    """ReLU layers on fixed Gaussian features, sigmoid output: the paper's CT network is
    ``fourier_mlp(2, 1)``.

    ``h_0 = [sin(xB), cos(xB)]``, ``B ~ scale·N(0,1)`` [D,features]; seed 0 is the matrix of the
    authors' weights. Coordinates in [0,1), x first. Source: Tancik et al. 2020; Tancik et al. 2021,
    CT notebook.

    >>> import fastmeta as fm
    >>> fm.fourier_mlp(2, 1).sizes
    ((512, 256), (256, 256), (256, 256), (256, 256), (256, 1))
    """
    encoding = Encoding.gaussian(in_features, features, scale, seed)
    return MLP(
        in_features,
        out_features,
        width,
        depth,
        encoding=encoding,
        output="sigmoid",
        coords="unit_xy",
    )


def nerf_mlp(
    width: int = 256, depth: int = 6, frequencies: int = 20, max_exponent: float = 8.0
) -> MLP:
    """A simple radiance field: xyz -> 4 raw outputs (rgb, density), without view direction, in
    world coordinates.

    Frequencies ``2^linspace(0, max_exponent, frequencies)``, no π, xyz itself not included: E = 120
    by default. ``composite`` applies the sigmoid and the density. Source: Tancik et al. 2021,
    ShapeNet notebook.

    >>> import fastmeta as fm
    >>> net = fm.nerf_mlp()
    >>> net.encoded_features, net.out_features, net.coords
    (120, 4, 'world')
    """
    encoding = Encoding.frequencies(3, frequencies, max_exponent)
    return MLP(3, 4, width, depth, encoding=encoding, coords="world")


def _phases(block: int, count: int) -> Tensor:
    """[0]*block + [π/2]*block, count times."""
    return torch.tensor(([0.0] * block + [math.pi / 2] * block) * count)


def _jax_normal(seed: int, size: int) -> np.ndarray:
    """``jax.random.normal(jax.random.PRNGKey(seed), (size,))`` with
    jax_threefry_partitionable=False, [size] float64.

    Threefry-2x32 (Salmon et al. 2011) over a counter split in halves; uniform from the top 23 bits;
    √2 erfinv(u). JAX evaluates erfinv as a float32 polynomial, so entries agree to a few float32
    units in the last place.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}; accepted is an integer from 0 to 2**63 - 1")
    key = np.array([seed >> 32, seed & 0xFFFFFFFF], dtype=np.uint32)
    schedule = [*key, key[0] ^ key[1] ^ np.uint32(0x1BD11BDA)]
    counter = np.arange(size + size % 2, dtype=np.uint32)
    if size % 2:
        counter[-1] = 0
    a, b = np.split(counter, 2)
    a, b = a + schedule[0], b + schedule[1]
    for group in range(5):
        for r in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            a = a + b
            b = a ^ ((b << np.uint32(r)) | (b >> np.uint32(32 - r)))
        a = a + schedule[(group + 1) % 3]
        b = b + schedule[(group + 2) % 3] + np.uint32(group + 1)
    bits = np.concatenate([a, b])[:size]
    low = np.nextafter(np.float32(-1), np.float32(0))
    u = (bits >> np.uint32(9) | np.uint32(0x3F800000)).view(np.float32) - np.float32(1)
    u = np.maximum(low, u * (np.float32(1) - low) + low)
    return torch.erfinv(torch.from_numpy(u).double()).numpy() * math.sqrt(2.0)


@lru_cache(maxsize=64)
def encoding_tensors(
    encoding: Encoding, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(B, φ) on a device, in a dtype; cached, never to be written to."""
    return encoding.B.to(device, dtype), encoding.phi.to(device, dtype)
