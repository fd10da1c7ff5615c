"""What ops consume, as plain data: a batch of T tasks, rays, and how a network is measured.

A task is ``loss(measure(mlp(params, encode(x))), y)``: images measure nothing more, CT projects
(``Project``), view synthesis composites along rays (``March``).
"""

from __future__ import annotations

import json
import math
from dataclasses import KW_ONLY, dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

LOSSES = ("mse", "l1")
MEASURES = ("none", "project", "march")
DENSITIES = ("relu", "softplus")
_FLOATS = (torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class Rays:
    """``x(t) = o + t d``, near <= t <= far; d need not have length 1, and t counts in units of d.

    Args:
        origins, directions: [T,R,3].
        near, far: numbers, or [T], with near < far.

    >>> import torch, fastmeta as fm
    >>> ahead = torch.tensor([0.0, 0.0, 1.0]).expand(2, 5, 3)  # T = 2 scenes, R = 5 rays
    >>> rays = fm.Rays(torch.zeros(2, 5, 3), ahead, near=2.0, far=torch.tensor([6.0, 8.0]))
    >>> rays.take(slice(1, 2)).far
    tensor([8.])
    """

    origins: Tensor
    directions: Tensor
    near: float | Tensor
    far: float | Tensor

    def __post_init__(self) -> None:
        o, d = self.origins, self.directions
        for name, value in (("origins", o), ("directions", d)):
            _floating("Rays", name, value)
        if o.dim() != 3 or o.shape[-1] != 3 or o.shape != d.shape or o.shape[1] == 0:
            raise ValueError(
                f"Rays: origins {tuple(o.shape)}, directions {tuple(d.shape)}; accepted are "
                "two [T,R,3] with R >= 1"
            )
        if o.dtype != d.dtype or o.device != d.device:
            raise ValueError(
                f"Rays: origins are {o.dtype} on {o.device}, directions {d.dtype} on {d.device}"
            )
        for name in ("near", "far"):
            value = getattr(self, name)
            if isinstance(value, Tensor) and value.dim() > 0 and value.shape != o.shape[:1]:
                raise ValueError(
                    f"Rays: {name} has shape {tuple(value.shape)}; accepted are a number or "
                    f"[{o.shape[0]}]"
                )
        near, far = self.bounds
        if not bool((near < far).all()) or not bool(torch.isfinite(near + far).all()):
            raise ValueError(
                f"Rays: near is {self.near}, far is {self.far}; accepted are finite numbers, "
                "near < far"
            )

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """near [T] and far [T], in the rays' dtype."""
        o = self.origins
        near, far = (
            torch.as_tensor(v).to(o.device, o.dtype).expand(len(o)) for v in (self.near, self.far)
        )
        return near, far

    def to(self, *args: Any, **kwargs: Any) -> Rays:
        """The same rays elsewhere, as ``Tensor.to``."""
        return Rays(**{f.name: _move(getattr(self, f.name), args, kwargs) for f in fields(self)})

    def take(self, tasks: slice) -> Rays:
        """The rays of some tasks."""
        near, far = (
            v[tasks] if isinstance(v, Tensor) and v.dim() else v for v in (self.near, self.far)
        )
        return Rays(self.origins[tasks], self.directions[tasks], near, far)


@dataclass(frozen=True)
class March:
    """How a ray is sampled and composited.

    ``t = linspace(near, far, S)``, end point included, plus U[0, (far−near)/S) where a seed asks
    for jitter; ``α_i = 1 − exp(−ρ(σ_i) δ_i)``, ``T_i = Π_{j<i} min(1, 1 − α_j + 1e-10)``, ``w_i =
    T_i α_i``.

    Args:
        samples: S per ray, at least 2.
        last_interval: δ of the last sample (ShapeNet 1e-3, Phototourism 1e10).
        white_background: add 1 − Σw to the colour.
        density: ρ, one of ``DENSITIES``. relu is the paper's; it can die, softplus cannot.

    Source: Tancik et al. 2021, ShapeNet and Phototourism notebooks.

    >>> import fastmeta as fm
    >>> fm.March(samples=64, last_interval=1e10, white_background=False)  # as in Phototourism
    March(samples=64, last_interval=10000000000.0, white_background=False, density='relu')
    """

    samples: int = 128
    last_interval: float = 1e-3
    white_background: bool = True
    density: str = "relu"
    key: ClassVar[str]  # the four values as a string; set on each instance

    def __post_init__(self) -> None:
        if not isinstance(self.samples, int) or self.samples < 2:
            raise ValueError(f"March: samples is {self.samples!r}; accepted is an integer >= 2")
        if not (self.last_interval > 0 and math.isfinite(self.last_interval)):
            raise ValueError(
                f"March: last_interval is {self.last_interval}; accepted is a finite number above 0"
            )
        if self.density not in DENSITIES:
            raise ValueError(
                f"March: density is {self.density!r}; accepted are {', '.join(DENSITIES)}"
            )
        words = (
            self.samples,
            float(self.last_interval),
            bool(self.white_background),
            self.density,
        )
        object.__setattr__(self, "key", json.dumps(words))

    @classmethod
    @lru_cache(maxsize=1024)
    def from_key(cls, key: str) -> March:
        """The march whose ``key`` this is."""
        return cls(*json.loads(key))


@dataclass(frozen=True, eq=False)
class Project:
    """The network's image, seen as a sinogram: the mean along parallel lines at each angle.

    Args:
        angles: [T,A] in radians; not differentiable.

    Source: Tancik et al. 2021, CT notebook.

    >>> import torch, fastmeta as fm
    >>> measure = fm.Project(torch.tensor([[0.0, 1.5]]))
    >>> measure.pixels(8).shape  # which pixel each sample of each line falls on
    torch.Size([1, 2, 8, 8])
    """

    angles: Tensor

    def __post_init__(self) -> None:
        _floating("Project", "angles", self.angles)
        if self.angles.dim() != 2 or 0 in self.angles.shape:
            raise ValueError(
                f"Project: angles has shape {tuple(self.angles.shape)}; accepted is [T,A] "
                "with A >= 1"
            )
        if not bool(torch.isfinite(self.angles).all()):
            raise ValueError("Project: angles holds NaN or infinity; accepted are finite radians")

    @cached_property
    def _pixels(self) -> dict[int, Tensor]:
        return {}

    def pixels(self, size: int) -> Tensor:
        """[T,A,W,W] int32: ``nearest_pixels`` of the angles for an image of size W, computed
        once."""
        if size not in self._pixels:
            self._pixels[size] = nearest_pixels(self.angles, size)
        return self._pixels[size]


def nearest_pixels(angles: Tensor, size: int) -> Tensor:
    """Which pixel each sample of each line falls on: k [T,A,r,c] int32 into the flat image, -1
    outside.

    ``y, x = arange(N)/N − 0.5`` ('ij'), ``x' = x cos θ − y sin θ``, ``y' = x sin θ + y cos θ``;
    index ``(· + 0.5) N`` rounded to nearest, half away from zero. In float64 on the CPU, on one
    path: rounding ties flip under fused arithmetic, so every worker takes these.

    Source: Tancik et al. 2021, CT notebook.
    """
    theta = angles.detach().to("cpu", torch.float64)[..., None, None]  # [T,A,1,1]
    u = torch.arange(size, dtype=torch.float64) / size - 0.5
    y, x = u[:, None], u[None, :]
    cos, sin = torch.cos(theta), torch.sin(theta)
    column = (x * cos - y * sin + 0.5) * size
    row = (x * sin + y * cos + 0.5) * size
    row, column = (torch.sign(v) * torch.floor(v.abs() + 0.5) for v in (row, column))
    inside = (row >= 0) & (row < size) & (column >= 0) & (column < size)
    index = torch.where(inside, row * size + column, -1.0)
    return index.to(torch.int32).to(angles.device)


class Inverse(NamedTuple):
    """For each pixel, the places of the sinogram that it went to."""

    order: Tensor  # [T,A·W·W] int32: a W + c of the entries (a,r,c), sorted by pixel
    starts: Tensor  # [T,W·W+1] int32: where each pixel's entries begin


def inverse_pixels(pixels: Tensor) -> Inverse:
    """The entries of pixels [T,A,W,W] by pixel, in the order (a,r,c): a stable sort."""
    T, A, W, _ = pixels.shape
    by_pixel, entry = torch.sort(pixels.flatten(1), dim=1, stable=True)
    order = (entry // (W * W) * W + entry % W).to(torch.int32)
    bounds = torch.arange(W * W + 1, device=pixels.device, dtype=by_pixel.dtype).expand(T, -1)
    starts = torch.searchsorted(by_pixel, bounds.contiguous(), out_int32=True)
    return Inverse(order, starts)


@dataclass(frozen=True, eq=False)
class Batch:
    """T tasks: where each is observed, what was seen, and how.

    Args:
        x: coordinates [T,N,D], or [N,D] shared by the tasks, or ``Rays``.
        y: what was seen. No measure: [T,N,C]; ``Project``: [T,A,W] of a W × W grid x; ``March``:
            [T,R,3].
        measure: None, ``Project(angles)`` or ``March(...)``.
        loss: "mse", "l1" or ("l1", clamp): per task the mean over valid points and channels;
            clamped: ``|clip(y, ±clamp) − clip(target, ±clamp)|``. Derivative 0 at the kinks.
        per_step: so many points or rays are drawn anew, with replacement, at each inner step; None:
            all of them.
        seed: [T] int64, the key of every draw. Needed by per_step; with ``March`` it also asks for
            jitter.
        query: another ``Batch`` with the same T for the outer loss; None: the same data.
        counts: [T] integers, how many of the N points (R rays) of each task are real; the rest is
            never read.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, an empty set.

    >>> import math, torch, fastmeta as fm
    >>> x = torch.rand(100, 2)  # shared by the tasks
    >>> batch = fm.Batch(x, torch.rand(8, 100, 3), per_step=32, seed=torch.arange(8))
    >>> batch.tasks, batch.points
    (8, 100)
    >>> angles = math.pi * torch.rand(8, 4)
    >>> scans = fm.Batch(x, torch.rand(8, 4, 10), measure=fm.Project(angles))  # 10 × 10 pixels
    >>> scans.measure_name
    'project'
    """

    x: Tensor | Rays
    y: Tensor
    _: KW_ONLY
    measure: None | Project | March = None
    loss: str | tuple[str, float] = "mse"
    per_step: int | None = None
    seed: Tensor | None = None
    query: Batch | None = None
    counts: Tensor | None = None

    def __post_init__(self) -> None:
        _floating("Batch", "y", self.y)
        self._check_points()
        self._check_measure()
        self._check_draws()
        kind, clamp = self.loss_parts
        if kind not in LOSSES or (clamp is not None and (kind != "l1" or not clamp > 0)):
            raise ValueError(
                f"Batch: loss is {self.loss!r}; accepted are 'mse', 'l1' and ('l1', clamp above 0)"
            )
        if self.query is not None:
            if not isinstance(self.query, Batch) or self.query.query is not None:
                raise TypeError("Batch: query must be a Batch that has no query of its own")
            if self.query.tasks != self.tasks:
                raise ValueError(
                    f"Batch: query has {self.query.tasks} tasks, the batch {self.tasks}"
                )

    def _check_points(self) -> None:
        x = self.x
        if isinstance(x, Tensor):
            _floating("Batch", "x", x)
            if x.dim() not in (2, 3) or 0 in x.shape:
                raise ValueError(
                    f"Batch: x has shape {tuple(x.shape)}; accepted are [T,N,D] and [N,D], "
                    "none empty"
                )
        elif not isinstance(x, Rays):
            raise TypeError(f"Batch: x is a {type(x).__name__}; accepted are a Tensor and Rays")
        where = x.origins if isinstance(x, Rays) else x
        if where.dtype != self.y.dtype or where.device != self.y.device:
            raise ValueError(
                f"Batch: x is {where.dtype} on {where.device}, y is {self.y.dtype} on "
                f"{self.y.device}; "
                "both must agree"
            )
        if self.y.dim() != 3 or 0 in self.y.shape:
            raise ValueError(
                f"Batch: y has shape {tuple(self.y.shape)}; accepted is [T,N,C], none empty"
            )
        if where.dim() == 3 and where.shape[0] != self.y.shape[0]:
            raise ValueError(f"Batch: x has {where.shape[0]} tasks, y has {self.y.shape[0]}")

    def _check_measure(self) -> None:
        T, rows, columns = self.y.shape
        if isinstance(self.measure, March) != isinstance(self.x, Rays):
            raise ValueError("Batch: Rays need measure=March(...), and March needs x to be Rays")
        if self.measure is None and rows != self.points:
            raise ValueError(f"Batch: x has {self.points} points, y has {rows}")
        if isinstance(self.measure, March) and (rows, columns) != (self.points, 3):
            raise ValueError(
                f"Batch: y has shape {tuple(self.y.shape)}; March needs [T,{self.points},3]"
            )
        if isinstance(self.measure, Project):
            angles = self.measure.angles
            if self.points != columns * columns or rows != angles.shape[1] or angles.shape[0] != T:
                raise ValueError(
                    f"Batch: x has {self.points} points, angles {tuple(angles.shape)}, y "
                    f"{tuple(self.y.shape)}; "
                    "Project needs W·W points, angles [T,A] and y [T,A,W]"
                )
            if self.per_step is not None or self.counts is not None:
                raise ValueError(
                    "Batch: per_step and counts do not go with Project, which needs every pixel"
                )
        elif self.measure is not None and not isinstance(self.measure, March):
            raise TypeError(
                f"Batch: measure is {self.measure!r}; accepted are None, Project(angles) and "
                "March(...)"
            )

    def _check_draws(self) -> None:
        for name in ("seed", "counts"):
            value = getattr(self, name)
            if value is not None and (
                not isinstance(value, Tensor) or value.shape != self.y.shape[:1]
            ):
                raise ValueError(
                    f"Batch: {name} is {value!r}; accepted is an integer tensor [{self.tasks}]"
                )
            if value is not None and value.device != self.y.device:
                came = f"{name} is on {value.device}, y on {self.y.device}"
                raise ValueError(f"Batch: {came}; both must agree")
        if self.seed is not None and self.seed.dtype != torch.int64:
            raise TypeError(f"Batch: seed is {self.seed.dtype}; accepted is int64")
        if self.counts is not None:
            if self.counts.dtype not in (torch.int32, torch.int64):
                raise TypeError(
                    f"Batch: counts is {self.counts.dtype}; accepted are int32 and int64"
                )
            low, high = int(self.counts.min()), int(self.counts.max())
            if low < 1 or high > self.points:
                raise ValueError(
                    f"Batch: counts goes from {low} to {high}; accepted are 1 to {self.points}"
                )
        if self.per_step is not None:
            if not isinstance(self.per_step, int) or self.per_step < 1:
                raise ValueError(
                    f"Batch: per_step is {self.per_step!r}; accepted is an integer >= 1"
                )
            if self.seed is None:
                raise ValueError("Batch: per_step draws points, so it needs seed [T]")

    @property
    def tasks(self) -> int:
        """T, how many tasks."""
        return self.y.shape[0]

    @property
    def points(self) -> int:
        """N, or R for rays."""
        return (self.x.origins if isinstance(self.x, Rays) else self.x).shape[-2]

    @property
    def coordinates(self) -> int:
        """D, how many numbers a point has."""
        return 3 if isinstance(self.x, Rays) else self.x.shape[-1]

    @property
    def loss_parts(self) -> tuple[str, float | None]:
        """(kind, clamp or None)."""
        if isinstance(self.loss, str):
            return self.loss, None
        if isinstance(self.loss, tuple) and len(self.loss) == 2:
            return self.loss[0], float(self.loss[1])
        raise ValueError(
            f"Batch: loss is {self.loss!r}; accepted are 'mse', 'l1' and ('l1', clamp above 0)"
        )

    @property
    def measure_name(self) -> str:
        """One of ``MEASURES``."""
        return "none" if self.measure is None else type(self.measure).__name__.lower()

    def to(self, *args: Any, **kwargs: Any) -> Batch:
        """The same batch on another device or in another floating dtype, as ``Tensor.to``."""
        changed = {f.name: _move(getattr(self, f.name), args, kwargs) for f in fields(self)}
        return Batch(**changed)

    def take(self, tasks: slice) -> Batch:
        """The batch of some of the tasks."""
        x, measure = self.x, self.measure
        return replace(
            self,
            x=x.take(tasks) if isinstance(x, Rays) else (x[tasks] if x.dim() == 3 else x),
            y=self.y[tasks],
            measure=Project(measure.angles[tasks]) if isinstance(measure, Project) else measure,
            seed=None if self.seed is None else self.seed[tasks],
            counts=None if self.counts is None else self.counts[tasks],
            query=None if self.query is None else self.query.take(tasks),
        )


def _floating(where: str, name: str, value: Any) -> None:
    if not isinstance(value, Tensor) or value.dtype not in _FLOATS:
        came = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{where}: {name} is {came}; accepted is a float32 or float64 tensor")


def _move(value: Any, args: tuple, kwargs: dict) -> Any:
    """Tensor.to on what holds tensors; integer tensors keep their dtype."""
    if isinstance(value, (Rays, Batch)):
        return value.to(*args, **kwargs)
    if isinstance(value, Project):
        return Project(value.angles.to(*args, **kwargs))
    if isinstance(value, Tensor):
        if value.is_floating_point():
            return value.to(*args, **kwargs)
        where = torch.empty(0, device=value.device).to(*args, **kwargs).device
        return value.to(where)  # through a floating dtype a seed would lose its low bits
    return value
