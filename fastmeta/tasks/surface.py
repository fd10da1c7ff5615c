"""What a distance field looks like, from its grid or from a fitted network: contours of a curve,
pictures of a surface, triangles and the files of them; and how far two fields overlap.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..ops.mlp import mlp
from ..spec import MLP
from .fields import Field
from .grids import lattice

View = tuple[float, float] | Tensor
VIEW = (0.9, 0.4)  # azimuth, elevation in radians
PIXELS = 128


# Pictures


def contours(values: Tensor) -> Tensor:
    """Distances [H,W] as colours [H,W,3]: blue inside, sand outside, darker towards the curve,
    a darker line every 0.1 and a white one at 0."""
    far = values.abs()[..., None]
    ground = values.new_tensor([0.95, 0.75, 0.45]), values.new_tensor([0.40, 0.65, 0.95])
    colour = torch.where(values[..., None] < 0, ground[1], ground[0])
    colour = (
        colour * (1 - 0.6 * torch.exp(-8 * far)) * (0.85 + 0.15 * torch.cos(far * 20 * torch.pi))
    )
    line = (1 - far * min(values.shape) / 2).clamp(0, 1)  # a pixel on either side
    return colour + (1 - colour) * line


def shaded(net: MLP, params: Tensor, view: View = VIEW, size: int = PIXELS, **how: Any) -> Tensor:
    """A picture [size,size,3] of the surface where the network [P] is 0, on white.

    Args:
        view: (azimuth, elevation) in radians, z up; or a pose [4,4], camera to world, as OpenGL's.
        how: impl, precision, as in ``mlp``.
    """
    params = params.detach()
    return _render(lambda x: mlp(net, params, x, **how)[..., 0], view, size, params)


def shaded_grid(field: Field, view: View = VIEW, size: int = PIXELS) -> Tensor:
    """The same picture of a field's own surface."""
    return _render(field.at, view, size, field.values)


def look(azimuth: float, elevation: float, radius: float = 3.2) -> Tensor:
    """[4,4] float64 camera to world (right, up, back, eye), looking at the origin, z up."""
    ca, sa, ce, se = (f(v) for v in (azimuth, elevation) for f in (math.cos, math.sin))
    back = torch.tensor([ce * ca, ce * sa, se], dtype=torch.float64)
    right = torch.tensor([-sa, ca, 0.0], dtype=torch.float64)
    up = torch.linalg.cross(back, right)
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3] = torch.stack([right, up, back, radius * back], 1)
    return pose


def _render(f: Callable[[Tensor], Tensor], view: View, size: int, like: Tensor) -> Tensor:
    """Lambert and ambient light on what ``trace`` finds, rays spreading 0.42 to either side."""
    pose = (view if isinstance(view, Tensor) else look(*view)).to(like)
    if tuple(pose.shape) != (4, 4):
        raise ValueError(f"sdf: view has shape {tuple(pose.shape)}; accepted are two angles, [4,4]")
    across = 0.42 * ((2 * torch.arange(size).to(like) + 1) / size - 1)
    v, u = torch.meshgrid(-across, across, indexing="ij")
    directions = torch.stack([u, v, -torch.ones_like(u)], -1).view(-1, 3) @ pose[:3, :3].mT
    directions = directions / directions.norm(dim=-1, keepdim=True)
    origins = pose[:3, 3].expand_as(directions)
    t, hit = trace(f, origins, directions)
    image = like.new_ones(size * size, 3)
    if bool(hit.any()):
        x = (origins + t[:, None] * directions)[hit]
        light = torch.nn.functional.normalize(
            pose[:3, :3] @ like.new_tensor([-0.5, 0.7, 1.0]), dim=0
        )
        lambert = (_normals(f, x) @ light).clamp(min=0)[:, None]
        image[hit] = like.new_tensor([0.62, 0.70, 0.82]) * (0.3 + 0.9 * lambert)
    return image.clamp(max=1).view(size, size, 3)


def _normals(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``∇f / ‖∇f‖`` [N,3]; 0 where ∇f is."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(f(x).sum(), x)
    return torch.nn.functional.normalize(gradient, dim=-1)


@torch.no_grad()
def trace(
    f: Callable[[Tensor], Tensor], origins: Tensor, directions: Tensor, *, bound: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Where rays first see f < 0 within [-bound,bound]³: (t [R], whether they do [R]).

    Steps of 0.8 f, at least 0.01 and at most 0.1 of the bound, so that a field which is no true
    distance is crossed all the same; the crossing is then halved 16 times. A part thinner than a
    hundredth of the bound may be missed.

    Args:
        f: x [N,3] -> [N].
        origins, directions: [R,3], directions of length 1.
    """
    slabs = ((s * bound - origins) / directions for s in (-1, 1))  # ±inf along an axis is right
    a, b = (torch.where(s.isnan(), 0, s) for s in slabs)
    near = torch.minimum(a, b).amax(-1).clamp(min=0)
    far = torch.maximum(a, b).amin(-1)
    before, t, hit = near.clone(), near.clone(), torch.zeros_like(near, dtype=torch.bool)
    alive = (near < far).nonzero()[:, 0]
    while len(alive):
        distance = f(origins[alive] + t[alive, None] * directions[alive])
        inside = distance < 0
        hit[alive[inside]] = True
        alive, distance = alive[~inside], distance[~inside]
        alive, distance = (q[t[alive] < far[alive]] for q in (alive, distance))
        before[alive] = t[alive]
        step = (0.8 * distance).clamp(0.01 * bound, 0.1 * bound)
        t[alive] = torch.minimum(t[alive] + step, far[alive])
    low, high, o, d = before[hit], t[hit], origins[hit], directions[hit]
    for _ in range(16 if len(low) else 0):
        middle = (low + high) / 2
        inside = f(o + middle[:, None] * d) < 0
        low, high = torch.where(inside, low, middle), torch.where(inside, middle, high)
    t[hit] = high
    return t, hit


# Results


@torch.no_grad()
def distances(net: MLP, params: Tensor, x: Tensor, **how: Any) -> Tensor:
    """The network [P] at x [N,D], 65536 points at a time: [N]."""
    return torch.cat([mlp(net, params, part, **how)[..., 0] for part in x.split(1 << 16)])


def mesh(
    net: MLP, params: Tensor, resolution: int = 128, bound: float = 1.0, **how: Any
) -> tuple[Tensor, Tensor]:
    """The surface where a network [P] is 0, by marching cubes: (vertices [V,3] float32 in the
    network's coordinates, faces [F,3] int64, their normals outward).

    Args:
        resolution: samples along each axis of [-bound,bound]³, end points included, at least 2.
        how: impl, precision, as in ``mlp``.

    Raises:
        ValueError: a network of other features, a number out of range, no surface in the box.

    Source: Lewiner et al. 2003, through scikit-image.
    """
    from skimage.measure import marching_cubes

    if (net.in_features, net.out_features) != (3, 1):
        came = f"net goes from {net.in_features} to {net.out_features} features"
        raise ValueError(f"mesh: {came}; accepted is 3 to 1")
    if resolution < 2 or not 0 < bound < math.inf:
        came = f"resolution is {resolution}, bound {bound}"
        raise ValueError(f"mesh: {came}; accepted are resolution >= 2 and bound > 0")
    axis = torch.linspace(-bound, bound, resolution, dtype=params.dtype, device=params.device)
    x = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).view(-1, 3)
    values = distances(net, params, x, **how).view(resolution, resolution, resolution)
    low, high = (float(v) for v in values.aminmax())
    if not low < 0 < high:
        came = f"the network goes from {low:g} to {high:g} in the box"
        raise ValueError(f"mesh: {came}, so there is no surface; accepted are both signs")
    vertices, faces, *_ = marching_cubes(
        values.float().cpu().numpy(),
        0.0,
        spacing=(2 * bound / (resolution - 1),) * 3,
        gradient_direction="descent",
    )
    placed, flipped = (vertices - bound).astype(np.float32), np.ascontiguousarray(faces, np.int64)
    return torch.from_numpy(placed), torch.from_numpy(flipped)


def mesh_bytes(vertices: Tensor, faces: Tensor, kind: Literal["ply", "obj"]) -> bytes:
    """A file of triangles: binary little-endian PLY, or OBJ text with six decimals.

    Args:
        vertices: [V,3] finite floats. faces: [F,3] integers in [0,V).

    Raises:
        ValueError: another kind, shapes or indices that do not fit, NaN.
    """
    if kind not in ("ply", "obj"):
        raise ValueError(f"mesh_bytes: kind is {kind!r}; accepted are ply and obj")
    v, f = vertices.detach().cpu().numpy().astype("<f4"), faces.cpu().numpy().astype("<i4")
    if v.shape != (len(v), 3) or f.shape != (len(f), 3) or not np.isfinite(v).all():
        came = f"vertices {v.shape} and faces {f.shape}"
        raise ValueError(f"mesh_bytes: {came}; accepted are finite [V,3] and [F,3]")
    if len(f) and not 0 <= f.min() <= f.max() < len(v):
        came = f"faces go from {f.min()} to {f.max()}"
        raise ValueError(f"mesh_bytes: {came}; accepted are 0 to {len(v) - 1}")
    if kind == "obj":
        lines = [f"v {x:.6f} {y:.6f} {z:.6f}" for x, y, z in v.tolist()]
        lines += [f"f {a} {b} {c}" for a, b, c in (f + 1).tolist()]
        return ("\n".join(lines) + "\n").encode()
    head = [
        "ply",
        "format binary_little_endian 1.0",
        f"element vertex {len(v)}",
        *(f"property float {axis}" for axis in "xyz"),
        f"element face {len(f)}",
        "property list uchar int vertex_indices",
        "end_header\n",
    ]
    rows = np.empty(len(f), [("n", "u1"), ("corners", "<i4", 3)])
    rows["n"], rows["corners"] = 3, f
    return "\n".join(head).encode() + v.tobytes() + rows.tobytes()


def iou(net: MLP, params: Tensor, field: Field, **how: Any) -> float:
    """``|A ∩ B| / |A ∪ B|`` of the cells where the network [P], and where the field, is below 0."""
    x = lattice(tuple(field.values.shape), "centers").to(params)
    a = distances(net, params, x, **how) < 0
    b = (field.values.flatten() < 0).to(a.device)
    return float((a & b).sum() / (a | b).sum())
