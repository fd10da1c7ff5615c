"""DICOM slices as images, by pydicom."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .arrays import skipped
from .files import FORMATS, ImageSet, open_images

_TAGS = [
    "SeriesInstanceUID",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "InstanceNumber",
    "ImageType",
    "Rows",
    "NumberOfFrames",
    "SamplesPerPixel",
    "PhotometricInterpretation",
]
_OTHERS = tuple(f".{name}" for name in (*FORMATS, "npy", "npz"))


def open_dicom(
    source: str | os.PathLike[str],
    *,
    size: int = 64,
    hu_low: float = -1000.0,
    hu_high: float = 1000.0,
) -> ImageSet:
    """DICOM files, one slice each, as images [N,N,1]: the window hu_low..hu_high becomes [0,1].

    ``(slope · stored + intercept − hu_low) / (hu_high − hu_low)``, clipped, cropped about the
    centre to a square and resized. Sorted by series, then by the position along the slices' normal,
    or by the instance number where there is no position. Left out: DICOMDIR, what has no pixels
    (reports, structures), and localizers.

    Args:
        source: a file, or a folder with files that end in .dcm or begin as DICOM does.

    Raises:
        OSError: a file is damaged, or pydicom has no decoder for its compression. ValueError: no
            slice there, files of many frames or in colour. ImportError: no pydicom.
    """
    root, names = list_dicom(Path(source).expanduser())
    if not names:
        raise ValueError(
            f"ct: {source} holds no DICOM file; accepted are .dcm, or DICM at byte 128"
        )
    return from_dicom(root, names, size, (hu_low, hu_high))


def list_dicom(path: Path) -> tuple[Path, list[str]]:
    """(folder, DICOM files below it), or of the one file; hidden ones are left out."""
    if path.is_file():
        return path.parent, [path.name] if _is_dicom(path) else []
    names = []
    for folder, below, files in os.walk(path):
        below[:] = [d for d in below if d[0] != "."]
        here = Path(folder)
        fitting = (f for f in files if f[0] != "." and f != "DICOMDIR" and _is_dicom(here / f))
        names += [(here.relative_to(path) / f).as_posix() for f in fitting]
    return path, sorted(names)


def _is_dicom(path: Path) -> bool:
    if path.suffix.lower() == ".dcm":
        return True
    if path.name.lower().endswith(_OTHERS) or not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def from_dicom(
    root: Path,
    names: list[str],
    size: int,
    window: tuple[float, float],
    skip_bad: bool = False,
) -> ImageSet:
    """The slices among files, in order; with skip_bad without those whose header is damaged."""
    keys = {}
    for name in names:
        try:
            keys[name] = _with_dicom(root, name, _key, stop_before_pixels=True)
        except (ValueError, OSError) as error:
            skipped("ct", error, skip_bad)
    slices = sorted((n for n, key in keys.items() if key is not None), key=lambda n: (*keys[n], n))
    if not slices:
        raise ValueError(f"ct: {root} holds DICOM files, but no slice; accepted is one at least")

    def read(row: int) -> np.ndarray:
        unit = _with_dicom(root, slices[row], partial(_window, window=window))  # [h,w]
        return open_images(unit[None], size=size, channels=1, memory=0)[0].numpy()

    return ImageSet(read, tuple(slices), (size, size), 1)


def _with_dicom(root: Path, name: str, use: Callable[[Any, str], Any], **how: Any) -> Any:
    """``use(data, name)`` of a file; whatever goes wrong in a decoder becomes one line."""
    try:
        pydicom = importlib.import_module("pydicom")
    except ImportError as error:
        came = f"{name} is a DICOM file, and pydicom is not installed"
        raise ImportError(f"ct: {came}; accepted is with it: pip install pydicom") from error
    packed = None
    try:
        data = pydicom.dcmread(root / name, specific_tags=_TAGS if how else None, **how)
        syntax = data.file_meta.TransferSyntaxUID
        packed = syntax.name if syntax.is_encapsulated else None
        return use(data, name)
    except _Unfit:
        raise
    except (FileNotFoundError, PermissionError) as error:
        raise type(error)(f"ct: {name} cannot be opened ({error.strerror})") from error
    except Exception as error:  # pydicom raises AttributeError, struct.error, ... on damage
        reason = " ".join(str(error).split()) or type(error).__name__
        if packed is not None:
            came = f"{name} is compressed ({packed}) and was not decoded (pydicom: {reason})"
            accepted = "not compressed, or with a decoder: pip install 'pylibjpeg[all]'"
            raise OSError(f"ct: {came}; accepted are slices {accepted}") from error
        what = f"ct: {name} is truncated or not DICOM (pydicom: {reason})"
        raise OSError(f"{what}; accepted are DICOM files of one slice") from error


class _Unfit(ValueError):
    """A DICOM file that is whole, but no slice in grey."""


def _key(data: Any, name: str) -> tuple[str, bool, float] | None:
    """What a slice is sorted by: series, has no position, position or number; None: no slice."""
    if data.get("Rows") is None or "LOCALIZER" in (data.get("ImageType") or ()):
        return None
    frames, samples = int(data.get("NumberOfFrames") or 1), int(data.get("SamplesPerPixel") or 1)
    colours = data.get("PhotometricInterpretation", "MONOCHROME2")
    if (frames, samples, colours) != (1, 1, "MONOCHROME2"):
        came = f"{name} has {frames} frames of {samples} samples, {colours}"
        raise _Unfit(f"ct: {came}; accepted is one frame of one sample, MONOCHROME2")
    series = str(data.get("SeriesInstanceUID", ""))
    position, axes = data.get("ImagePositionPatient"), data.get("ImageOrientationPatient")
    if position is None or axes is None:
        return series, True, float(data.get("InstanceNumber") or 0)
    along, down = np.array(axes, float).reshape(2, 3)
    return series, False, float(np.cross(along, down) @ np.array(position, float))


def _window(data: Any, name: str, *, window: tuple[float, float]) -> np.ndarray:
    """[h,w] float32 in [0,1]."""
    slope, intercept = data.get("RescaleSlope"), data.get("RescaleIntercept")
    units = data.pixel_array * float(1 if slope is None else slope) + float(intercept or 0)
    low, high = window
    return np.clip((units - low) / (high - low), 0, 1).astype(np.float32)
