"""``sinogram = project(image, angles)``: the CT operator, linear, with its adjoint."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..batch import nearest_pixels
from . import dispatch, doors


def project(
    image: Tensor, angles: Tensor, *, impl: str | None = None, precision: str | None = None
) -> Tensor:
    """The mean of an image along parallel lines at each angle.

    ``sino[a,c] = (1/W) Σ_r image[k(a,r,c)]``, k the nearest pixel of the image rotated by the
    angle, 0 outside.

    Args:
        image: [T,W,W], square.
        angles: [T,A] in radians, in any floating dtype; not differentiable.
        impl, precision: as in ``mlp``.

    Returns:
        sinogram [T,A,W]. Linear in the image, so differentiable any number of times in it, in
        forward mode too; torch.vmap takes images and angles.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit; angles that ask for a gradient.

    Source: Tancik et al. 2021, CT notebook.

    >>> import torch, fastmeta as fm
    >>> image = torch.tensor([[[0.0, 3.0, 6.0], [1.0, 4.0, 7.0], [2.0, 5.0, 8.0]]])  # [T,W,W]
    >>> fm.project(image, torch.tensor([[0.0]]))  # straight down: the mean of each column
    tensor([[[1., 4., 7.]]])
    """
    image = dispatch.tensor("project", "image", image, dims=(3,))
    angles = dispatch.tensor("project", "angles", angles, dims=(2,))
    if image.shape[1] != image.shape[2] or 0 in image.shape:
        raise ValueError(
            f"project: image has shape {tuple(image.shape)}; accepted are square images [T,W,W]"
        )
    if angles.shape[0] != image.shape[0] or angles.shape[1] == 0:
        raise ValueError(
            f"project: angles has shape {tuple(angles.shape)}; accepted is [{image.shape[0]},A]"
        )
    if angles.requires_grad:
        raise ValueError(
            "project: angles asks for a gradient; the nearest-pixel operator has none in the angles"
        )
    return doors.call_linear(_FORM, impl, precision, angles.to(image.device), image)


_LARGEST = 2**22  # indices in one entry of the cache


def _pixels(angles: Tensor, size: int) -> Tensor:
    """``nearest_pixels``, kept for the next call with the same angles, as loops make them."""
    if angles.numel() * size * size > _LARGEST:
        return _finite_pixels(angles, size)
    return _kept(tuple(angles.flatten().tolist()), angles.shape, size, angles.device)


@lru_cache(maxsize=8)
def _kept(angles: tuple[float, ...], shape: torch.Size, size: int, device: torch.device) -> Tensor:
    return _finite_pixels(
        torch.tensor(angles, dtype=torch.float64, device=device).view(shape), size
    )


def _finite_pixels(angles: Tensor, size: int) -> Tensor:
    if not bool(torch.isfinite(angles).all()):
        raise ValueError("project: angles holds NaN or infinity; accepted are finite radians")
    return nearest_pixels(angles, size)


def _ahead(worker: Any, angles: Tensor, image: Tensor) -> Tensor:
    return worker.project(image, _pixels(angles, image.shape[-1]))


def _back(worker: Any, angles: Tensor, sinogram: Tensor) -> Tensor:
    return worker.project_adjoint(sinogram, _pixels(angles, sinogram.shape[-1]))


_FORM = doors.Linear(
    name="project",
    ahead=_ahead,
    back=_back,
    shapes=(
        lambda angles, image: (*angles.shape, image.shape[-1]),
        lambda angles, sino: (sino.shape[0], sino.shape[-1], sino.shape[-1]),
    ),
)
doors.register_linear(_FORM)
