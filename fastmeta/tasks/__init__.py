"""The kinds of signal: what a task is, and its physics; one module each, as ``sets.py`` describes.

* ``images``: pixels → colours; also rendered text
* ``ct``: a sinogram of an image
* ``views``: posed photos of one object
* ``phototourism``: one photo of a landmark, its appearance
* ``sdf``: the distance to a curve or a surface
* ``audio``, ``volumes``: samples on a grid in one and three dimensions

Source: Tancik et al. 2021; Sitzmann et al. 2020 (MetaSDF).
"""

from __future__ import annotations

import importlib
from typing import Any

# Kind -> its dataclass of options, in the module of the same name.
KINDS = {
    "images": "Images",
    "ct": "CT",
    "views": "Views",
    "phototourism": "Phototourism",
    "sdf": "SDF",
    "audio": "Audio",
    "volumes": "Volumes",
}


def module(kind: str) -> Any:
    """The module of a kind of signal."""
    if kind not in KINDS:
        raise ValueError(f"the kind of signal is {kind}; accepted are {', '.join(KINDS)}")
    return importlib.import_module(f".{kind}", __name__)


def options(kind: str) -> type:
    """The dataclass of a kind's options."""
    return getattr(module(kind), KINDS[kind])


def kind_of(signal: Any) -> str:
    """The kind that an options object belongs to."""
    for kind, name in KINDS.items():
        if type(signal).__name__ == name and type(signal).__module__ == f"{__name__}.{kind}":
            return kind
    raise TypeError(
        f"signal is a {type(signal).__name__}; accepted are {', '.join(KINDS.values())}"
    )
