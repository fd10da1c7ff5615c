"""Cameras: rays of pixels, batches and renderings of rays, poses on an orbit and between others.

A pose is camera-to-world [4,4]: columns right, up, backward (OpenGL; z is up in the world), centre.
Pixels are row-major, i the column, j the row, with no half pixel.
Source: Tancik et al. 2021, ShapeNet and Phototourism notebooks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..batch import Batch, March, Rays
from ..ops.render import render
from ..spec import MLP

_ROTATION = 1e-3  # largest |RᵀR − I| of a pose; matrices printed with four digits pass
_SINGULAR = 1e9  # condition of an intrinsic; 10 000 pixels give about 1e4
_POINTS = 2**17  # points in one rendering call: 0.2 GB where a worker keeps a layer of 256


class Seen(NamedTuple):
    """What one task saw: origins, directions and colours [R,3], and the bounds of its rays."""

    origins: Tensor
    directions: Tensor
    colours: Tensor
    near: float
    far: float


def pinhole(height: int, width: int, focal: float, pose: Tensor) -> tuple[Tensor, Tensor]:
    """``d = R ((i − W/2)/f, −(j − H/2)/f, −1)``, not normalised; ``o`` = the camera's centre.

    Args:
        focal: f in pixels, ``W/2 / tan(camera_angle_x / 2)`` in Blender's files.
        pose: [...,4,4].

    Returns:
        origins, directions [...,H*W,3] in the pose's dtype.

    Raises:
        ValueError: sizes or a focal length that are not above 0, a pose of another shape.

    Source: Tancik et al. 2021, ShapeNet notebook.
    """
    if not (focal > 0 and math.isfinite(focal)):
        raise ValueError(f"pinhole: focal is {focal}; accepted is a finite number above 0")
    i, j = _pixels("pinhole", height, width, pose)
    back = torch.full_like(i, -1.0)
    return _turn(torch.stack([(i - width / 2) / focal, -(j - height / 2) / focal, back], -1), pose)


def rays_from_kinv(height: int, width: int, kinv: Tensor, pose: Tensor) -> tuple[Tensor, Tensor]:
    """``d = R K⁻¹ (i, j, 1)``, not normalised; ``o`` = the camera's centre.

    Args:
        kinv: K⁻¹ [3,3], holding the flips from pixels to the camera's axes (diagonal +, −, −1): a
            ray advances by 1 along the optical axis per unit of t.
        pose: [...,4,4].

    Returns:
        origins, directions [...,H*W,3] in the pose's dtype.

    Raises:
        ValueError: sizes below 1, a pose or kinv of another shape.

    Source: Tancik et al. 2021, Phototourism notebook.
    """
    if kinv.shape != (3, 3):
        raise ValueError(f"rays_from_kinv: kinv has shape {tuple(kinv.shape)}; accepted is [3,3]")
    i, j = _pixels("rays_from_kinv", height, width, pose)
    return _turn(torch.stack([i, j, torch.ones_like(i)], -1) @ kinv.to(pose).mT, pose)


def _pixels(op: str, height: int, width: int, pose: Tensor) -> tuple[Tensor, Tensor]:
    """Columns i and rows j of every pixel, [H*W] each."""
    if min(height, width) < 1 or pose.shape[-2:] != (4, 4) or not pose.is_floating_point():
        came = f"{height} x {width} pixels, pose {pose.dtype} {tuple(pose.shape)}"
        raise ValueError(f"{op}: {came}; accepted are sizes >= 1 and floats [...,4,4]")
    rows = torch.arange(height, dtype=pose.dtype, device=pose.device)
    columns = torch.arange(width, dtype=pose.dtype, device=pose.device)
    j, i = torch.meshgrid(rows, columns, indexing="ij")
    return i.flatten(), j.flatten()


def _turn(local: Tensor, pose: Tensor) -> tuple[Tensor, Tensor]:
    directions = local @ pose[..., :3, :3].mT  # [...,H*W,3]
    return pose[..., None, :3, 3].expand_as(directions).contiguous(), directions


# Batches and renderings


def ray_batch(
    seen: Sequence[Seen],
    march: March,
    *,
    per_step: int | None = None,
    seed: Tensor | None = None,
    query: Batch | None = None,
) -> Batch:
    """T tasks of rays as one batch: y [T,R,3]; where numbers of rays differ, R is the largest and
    ``counts`` is set, with rays from 0 along −z and black behind.

    Args:
        seen: one for each task.
        march, per_step, seed, query: as in ``Batch``.
    """
    counts = torch.tensor([len(part.origins) for part in seen])
    longest = int(counts.max())

    def padded(parts: Sequence[Tensor], filler: Tensor) -> Tensor:
        rows = [torch.cat([p, filler.to(p).expand(longest - len(p), 3)]) for p in parts]
        return torch.stack(rows)  # [T,R,3]

    zero = torch.zeros(3)
    rays = Rays(
        padded([part.origins for part in seen], zero),
        padded([part.directions for part in seen], torch.tensor([0.0, 0.0, -1.0])),
        torch.tensor([part.near for part in seen]),
        torch.tensor([part.far for part in seen]),
    )
    return Batch(
        rays,
        padded([part.colours for part in seen], zero),
        measure=march,
        per_step=per_step,
        seed=seed,
        query=query,
        counts=counts if int(counts.min()) < longest else None,
    )


def render_rays(
    net: MLP, params: Tensor, rays: Rays, march: March, **how: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """``fm.render`` without jitter and without gradients, at most 2¹⁷ points at a time.

    Args:
        net: 3 inputs, 4 raw outputs.
        params: [P] or [T,P].
        rays: T × R rays, any number; moved to where params are.
        how: impl, precision.

    Returns:
        rgb [T,R,3], depth [T,R] in units of t, acc [T,R].
    """
    T, R = rays.origins.shape[:2]
    rays, params = rays.to(params.device, params.dtype), params.detach()
    at_once = max(1, _POINTS // (T * march.samples))
    parts = []
    with torch.no_grad():
        for first in range(0, R, at_once):
            o, d = (v[:, first : first + at_once] for v in (rays.origins, rays.directions))
            some = Rays(o.contiguous(), d.contiguous(), rays.near, rays.far)
            parts.append(render(net, params, some, march, **how))
    rgb, depth, acc = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    return rgb, depth, acc


# Poses


def orbit(
    count: int,
    radius: float,
    elevation: float,
    *,
    start: float = 0.0,
    turn: float = 2 * math.pi,
) -> Tensor:
    """Poses [count,4,4] float32 on a circle about the z axis, looking at the origin.

    ``c_n = radius (cos φ cos e, sin φ cos e, sin e)``, ``φ = start + turn · n / count``: the end
    point is left out, so a whole turn is a closed loop.

    Args:
        radius: above 0. elevation: e in radians, in (−π/2, π/2). start, turn: radians.

    Raises:
        ValueError: a number out of its range.
    """
    finite = all(map(math.isfinite, (radius, start, turn)))
    if count < 1 or not (finite and radius > 0 and abs(elevation) < math.pi / 2):
        came = f"count is {count}, radius {radius}, elevation {elevation}, turn {start} + {turn}"
        accepted = "count >= 1, radius > 0, elevation in (-pi/2, pi/2), finite angles"
        raise ValueError(f"orbit: {came}; accepted are {accepted}")
    angle = start + turn * torch.arange(count, dtype=torch.float64) / count
    cos, sin = angle.cos(), angle.sin()
    level, height = math.cos(elevation), math.sin(elevation)
    back = torch.stack([cos * level, sin * level, torch.full_like(cos, height)], -1)
    right = torch.stack([-sin, cos, torch.zeros_like(cos)], -1)
    up = torch.linalg.cross(back, right)
    poses = torch.eye(4, dtype=torch.float64).repeat(count, 1, 1)
    poses[:, :3] = torch.stack([right, up, back, radius * back], -1)
    return poses.float()


def between(first: Tensor, last: Tensor, count: int) -> Tensor:
    """``count`` >= 2 poses [count,4,4] from one to another, both included: centres on a line,
    rotations at even speed about one axis (slerp). Raises ValueError for what is no pose."""
    if count < 2:
        raise ValueError(f"between: count is {count}; accepted is an integer >= 2")
    from scipy.spatial.transform import Rotation, Slerp

    ends = check_poses("between", torch.stack([first, last]))
    share = np.linspace(0.0, 1.0, count)
    turn = Slerp([0.0, 1.0], Rotation.from_matrix(ends[:, :3, :3].double().numpy()))(share)
    weight = torch.from_numpy(share)[:, None]
    poses = torch.eye(4, dtype=torch.float64).repeat(count, 1, 1)
    poses[:, :3, :3] = torch.from_numpy(turn.as_matrix())
    start, stop = ends[:, :3, 3].double()
    poses[:, :3, 3] = torch.lerp(start, stop, weight)
    return poses.to(first)


# Checks


def check_poses(where: str, value: Any) -> Tensor:
    """[n,4,4] float32 on the CPU, if every one is a rotation and a centre.

    Raises:
        ValueError: ``where``, which pose, and what is wrong: a shape, NaN or infinity, columns that
            are not orthonormal within 1e-3, a mirror image, a last row other than 0 0 0 1.
    """
    poses = _matrices(where, "pose", value, 4)
    turns = poses[:, :3, :3]
    grams = np.abs(turns.transpose(0, 2, 1) @ turns - np.eye(3)).max((1, 2))
    bad = (grams > _ROTATION) | (np.linalg.det(turns) < 0)
    bad |= np.abs(poses[:, 3] - np.array([0, 0, 0, 1])).max(1) > _ROTATION
    if bad.any():
        which = int(bad.argmax())
        accepted = "accepted are a rotation and a centre, last row 0 0 0 1"
        raise ValueError(f"{where}: pose {which} is no camera-to-world matrix; {accepted}")
    return torch.from_numpy(poses).float()


def check_kinv(where: str, value: Any) -> Tensor:
    """[n,3,3] float32 on the CPU, if every one is finite and invertible; else ValueError."""
    matrices = _matrices(where, "kinv", value, 3)
    bad = ~(np.linalg.cond(matrices) < _SINGULAR)
    if bad.any():
        which = int(bad.argmax())
        accepted = "accepted are inverses of intrinsic matrices"
        raise ValueError(f"{where}: kinv {which} is singular; {accepted}")
    return torch.from_numpy(matrices).float()


def _matrices(where: str, name: str, value: Any, size: int) -> np.ndarray:
    try:
        matrices = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        accepted = f"accepted is [n,{size},{size}] of numbers"
        raise ValueError(f"{where}: the {name} matrices are no numbers; {accepted}") from error
    if matrices.ndim != 3 or matrices.shape[1:] != (size, size) or not len(matrices):
        came = f"the {name} matrices have shape {matrices.shape}"
        raise ValueError(f"{where}: {came}; accepted is [n,{size},{size}], n >= 1")
    finite = np.isfinite(matrices).all((1, 2))
    if not finite.all():
        came = f"{name} {int(finite.argmin())} holds NaN or infinity"
        raise ValueError(f"{where}: {came}; accepted are finite numbers")
    return matrices
