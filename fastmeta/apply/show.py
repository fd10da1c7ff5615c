"""What fitted networks show: a file for each from ``fit``, and ``fastmeta render``: orbits, other
poses, appearances in between, meshes, images and sound at any resolution."""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .. import viz
from ..checkpoint import atomic_write, load_tensors, spec_from_json
from ..ops.mlp import mlp
from ..spec import MLP
from ..tasks import audio, cameras, images, module, options, phototourism, surface, views
from ..tasks.grids import lattice
from ..tasks.sets import at_least, refuse_changed
from ..train import make_folder, place

FITS = "fits.safetensors"
NO_RATE = 16000  # samples a second of a sound that came from an array


def export(
    kind: str, stem: Path, net: MLP, params: Tensor, item: Any, signal: Any, how: dict
) -> Path:
    """Write what one fitted network [P] shows, as a file of its kind, and return its path.

    A picture (.png) of the image, the slice, a held-out view, the photo or the 2-D field; a mesh
    (.ply) with a picture of it; a waveform (.wav); a volume (.npy [D,H,W,C] in float32).
    """
    name = stem.name
    if kind == "audio":
        x = lattice((len(item),), net.coords).to(params)
        data = audio.wav_bytes(mlp(net, params, x, **how), signal.rate or NO_RATE)
        return _write(stem.with_name(f"{name}.wav"), data)
    if kind == "volumes":
        return _write(stem.with_name(f"{name}.npy"), _volume(net, params, item.shape[:3], how))
    shown = module(kind).picture(net, params, item, signal, **how)
    path = stem.with_name(f"{name}.png")
    viz.save_png(path, shown)
    if kind == "sdf" and item.dimensions == 3:
        return _mesh(stem.with_name(f"{name}.ply"), net, params, signal.resolution, how) or path
    return path


def describe(kind: str, item: Any, signal: Any) -> dict[str, Any]:
    """What ``render`` needs to know of a task beside its weights, for JSON."""
    if kind == "views":
        H, W = item.images.shape[1:3]
        bounds = {"near": item.near, "far": item.far}
        return {"size": [H, W], "focal": item.focal, "pose": item.poses[0].tolist(), **bounds}
    if kind == "phototourism":
        camera = {"pose": item.pose.tolist(), "kinv": item.kinv.tolist()}
        return {"size": list(item.image.shape[:2]), **camera, "near": item.near, "far": item.far}
    if kind == "ct":
        return {"size": [signal.size] * 2}
    if kind == "audio":
        return {"length": len(item), "rate": signal.rate or NO_RATE}
    if kind == "sdf":
        return {"dimensions": item.dimensions, "size": list(item.values.shape)}
    return {"size": list(item.shape[:-1])}


@dataclass(frozen=True)
class Render:
    """Render networks that `fastmeta fit` fitted: an orbit, other poses, a mesh, any resolution."""

    fits: Path
    """folder that fit wrote; may come first, without --fits"""
    out: Path = Path("renders")
    """folder of the results"""
    name: str | None = None
    """which of the fitted tasks; none: the first"""
    to: str | None = None
    """a second one: a video of the weights in between (phototourism: from one appearance, and its
    camera, to another)"""
    size: int | None = None
    """height of what is drawn, samples of a sound, side of a volume; none: as it was fitted"""
    frames: int = 48
    """of a video"""
    fps: float = 24.0
    """frames a second"""
    elevation: float = 25.0
    """of an orbit, in degrees"""
    resolution: int = 128
    """cells along each side in which a surface is looked for"""
    video: Literal["both", "gif", "mp4"] = "both"
    """mp4 needs imageio-ffmpeg; both: without it the gif alone, and a warning"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: cuda where there is one"""
    threads: int | None = None
    """of torch; none: its own default"""
    impl: Literal["reference", "cpu", "triton", "cuda"] | None = None
    """worker; none: the fastest that accepts the case"""
    precision: Literal["fp32", "tf32", "fp16", "bf16"] | None = None
    """arithmetic of the hidden layers"""


class Fits(NamedTuple):
    """What ``fit`` left: kind, the signal's options, network, weights [n,P], names, and what each
    task's ``describe`` said."""

    kind: str
    signal: Any
    net: MLP
    params: Tensor
    names: list[str]
    tasks: list[dict[str, Any]]


def open_fits(folder: Path, where: torch.device) -> Fits:
    """The fitted networks in a folder, or in a file of that kind.

    Raises:
        ValueError, FileNotFoundError: nothing there, damaged, or not what ``fit`` writes.
    """
    path = folder / FITS if folder.is_dir() else folder
    tensors, meta = load_tensors(path)
    params = tensors.pop("params", None)
    if meta.get("kind") != "fits" or params is None or "signal" not in meta:
        raise ValueError(f"{path}: holds no fits; accepted is the folder that fastmeta fit wrote")
    try:
        net = spec_from_json(meta["net"], tensors)
        stored: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in meta["signal"].items()
        }
        kind = stored.pop("kind")
        found = Fits(kind, options(kind)(**stored), net, params.to(where, torch.float32),
                     list(meta["name"]), list(meta["tasks"]))  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not what fastmeta fit writes: {error}") from None
    if len({len(params), len(found.names), len(found.tasks)}) != 1:
        came = f"{len(params)} weights, {len(found.names)} names, {len(found.tasks)} tasks"
        raise ValueError(f"{path}: damaged, it holds {came}; accepted are as many of each")
    return found


def render(options: Render) -> list[Path]:
    """Draw a fitted network; returns the files written.

    views: orbit.gif and .mp4, the first pose with its depth and opacity; phototourism: the scene
    from every fitted photo's camera; sdf: a mesh (.ply, .obj) and a turntable; images, ct, audio,
    volumes: sampled at another resolution. With ``to``, a video of the weights in between.

    Raises:
        ValueError, OSError: fits or options that do not fit. ImportError: an mp4 asked for without
            imageio-ffmpeg.
    """
    at_least("render", options, 1, "size", "frames")
    at_least("render", options, 4, "resolution")
    where = place(options.device, options.threads)
    found = open_fits(options.fits, where)
    at = _index(found, options.name)
    video = ("frames", "fps", "video")
    used = {"views": (*video, "elevation"), "sdf": (*video, "elevation", "resolution")}
    drawn = video if options.to is not None else used.get(found.kind, ())
    idle = {*video, "elevation", "resolution"} - {*drawn}
    if options.to is not None and found.kind == "sdf":
        idle -= {"elevation"}
    refuse_changed(options, f"{found.kind}{' and to' if options.to else ''}", *sorted(idle))
    make_folder(options.out)
    how = {"impl": options.impl, "precision": options.precision}
    if options.to is not None:
        return _blend(options, found, at, _index(found, options.to), how)
    draw: dict[str, Callable[..., list[Path]]] = {
        "views": _orbit,
        "phototourism": _poses,
        "sdf": _surface,
        "audio": _sound,
        "volumes": _block,
        "images": _plane,
        "ct": _plane,
    }
    return draw[found.kind](options, found, at, how)


def _index(found: Fits, name: str | None) -> int:
    if name is None:
        return 0
    if name not in found.names:
        some = ", ".join(found.names[:5]) + (", ..." if len(found.names) > 5 else "")
        raise ValueError(f"render: name is {name}; accepted are the fitted ones: {some}")
    return found.names.index(name)


# One kind each


def _plane(options: Render, found: Fits, at: int, how: dict) -> list[Path]:
    """An image or a slice on a grid of its own aspect ratio, ``size`` high."""
    x, size = _grid(options, found, at)
    shown = images.to_pixels(mlp(found.net, found.params[at], x.to(found.params), **how), size)
    path = options.out / f"{file_stem(found.names[at])}-{size[0]}.png"
    viz.save_png(path, shown)
    return [path]


def _grid(options: Render, found: Fits, at: int) -> tuple[Tensor, tuple[int, int]]:
    H, W = found.tasks[at]["size"]
    height = options.size or H
    size = (height, max(1, round(W * height / H)))
    return images.grid(*size, found.net.coords), size


def _orbit(options: Render, found: Fits, at: int, how: dict) -> list[Path]:
    """A circle about the object at its first view's distance; depth and opacity from there."""
    radius = float(torch.tensor(found.tasks[at]["pose"])[:3, 3].norm())
    poses = cameras.orbit(options.frames, radius, options.elevation * torch.pi / 180)
    drawn = [_view(options, found, at, pose, how) for pose in poses]
    stem, task = options.out / file_stem(found.names[at]), found.tasks[at]
    rgb, depth, acc = drawn[0]
    written = [stem.with_name(f"{stem.name}-{part}.png") for part in ("rgb", "depth", "opacity")]
    viz.save_png(written[0], rgb)
    viz.save_png(written[1], viz.depth_picture(depth, acc, task["near"], task["far"]))
    viz.save_png(written[2], acc[..., None].clamp(0, 1))
    return written + _videos(options, stem.with_name(f"{stem.name}-orbit"), [d[0] for d in drawn])


def _view(
    options: Render, found: Fits, at: int, pose: Tensor, how: dict
) -> tuple[Tensor, Tensor, Tensor]:
    task = found.tasks[at]
    H, W = task["size"]
    height = options.size or H
    width, focal = max(1, round(W * height / H)), task["focal"] * height / H
    bounds, march = (task["near"], task["far"]), views.march(found.signal)
    return views.render_view(
        found.net, found.params[at], pose, height, width, focal, *bounds, march, **how
    )


def _photo(options: Render, found: Fits, camera: int) -> phototourism.Photo:
    """A fitted photo's camera, ``size`` high; its image is blank."""
    task = found.tasks[camera]
    H, W = task["size"]
    height = options.size or H
    width, factor = max(1, round(W * height / H)), H / height
    kinv = torch.tensor(task["kinv"]) @ torch.diag(torch.tensor([factor, factor, 1.0]))
    blank, bounds = torch.zeros(height, width, 3), (task["near"], task["far"])
    return phototourism.Photo(blank, torch.tensor(task["pose"]), kinv, *bounds)


def _poses(options: Render, found: Fits, at: int, how: dict) -> list[Path]:
    """One photo's appearance from the cameras of all fitted photos."""
    written, march = [], phototourism.march(found.signal)
    for camera, name in enumerate(found.names):
        photo = _photo(options, found, camera)
        rgb, _, _ = phototourism.render_photo(found.net, found.params[at], photo, march, **how)
        path = options.out / f"{file_stem(found.names[at])}-from-{file_stem(name)}.png"
        viz.save_png(path, rgb)
        written.append(path)
    return written


def _surface(options: Render, found: Fits, at: int, how: dict) -> list[Path]:
    """A mesh and a turntable; of a 2-D field a picture."""
    net, params, name = found.net, found.params[at], file_stem(found.names[at])
    if found.tasks[at]["dimensions"] == 2:
        H, W = found.tasks[at]["size"]
        height = options.size or H
        size = (height, max(1, round(W * height / H)))
        x = images.grid(*size, "centers").to(params)
        path = options.out / f"{name}-{height}.png"
        viz.save_png(path, surface.contours(mlp(net, params, x, **how)[:, 0].view(size)))
        return [path]
    made = [
        _mesh(options.out / f"{name}.{ending}", net, params, options.resolution, how)
        for ending in ("ply", "obj")
    ]
    written = [path for path in made if path is not None]
    pixels, elevation = options.size or surface.PIXELS, options.elevation * torch.pi / 180
    turns = [2 * torch.pi * i / options.frames for i in range(options.frames)]
    frames = [surface.shaded(net, params, (turn, elevation), pixels, **how) for turn in turns]
    return written + _videos(options, options.out / f"{name}-turn", frames)


def _sound(options: Render, found: Fits, at: int, how: dict) -> list[Path]:
    """The same stretch of time in ``size`` samples."""
    task = found.tasks[at]
    length = options.size or task["length"]
    x = lattice((length,), found.net.coords).to(found.params)
    rate = round(task["rate"] * length / task["length"])
    data = audio.wav_bytes(mlp(found.net, found.params[at], x, **how), rate)
    return [_write(options.out / f"{file_stem(found.names[at])}-{length}.wav", data)]


def _block(options: Render, found: Fits, at: int, how: dict) -> list[Path]:
    size = tuple(found.tasks[at]["size"]) if options.size is None else (options.size,) * 3
    data = _volume(found.net, found.params[at], size, how)
    return [_write(options.out / f"{file_stem(found.names[at])}-{size[0]}.npy", data)]


def _blend(options: Render, found: Fits, first: int, last: int, how: dict) -> list[Path]:
    """``(1 − u) θ_a + u θ_b``, u = 0 .. 1; the camera of a photo goes along."""
    if found.kind in ("audio", "volumes"):
        came = f"render: to is {found.names[last]} with {found.kind}"
        raise ValueError(f"{came}; accepted with what can be seen: images, ct, views, photos, sdf")
    weights = phototourism.blend(found.params[first], found.params[last], max(2, options.frames))
    steps = [found._replace(params=w[None].expand(len(found.params), -1)) for w in weights]
    if found.kind == "phototourism":
        a, b = (_photo(options, found, i) for i in (first, last))
        path, march = (
            cameras.between(a.pose, b.pose, len(weights)),
            phototourism.march(found.signal),
        )
        frames = [
            phototourism.render_photo(
                found.net, w, dataclasses.replace(a, pose=pose), march, **how
            )[0]
            for w, pose in zip(weights, path, strict=True)
        ]
    elif found.kind == "views":
        pose = torch.tensor(found.tasks[first]["pose"])
        frames = [_view(options, part, first, pose, how)[0] for part in steps]
    elif found.kind == "sdf":
        frames = [_field(options, part, first, how) for part in steps]
    else:
        x, size = _grid(options, found, first)
        x = x.to(found.params)
        frames = [images.to_pixels(mlp(found.net, w, x, **how), size) for w in weights]
    name = f"{file_stem(found.names[first])}-to-{file_stem(found.names[last])}"
    return _videos(options, options.out / name, frames)


def _field(options: Render, found: Fits, at: int, how: dict) -> Tensor:
    if found.tasks[at]["dimensions"] == 3:
        view = (surface.VIEW[0], options.elevation * torch.pi / 180)
        return surface.shaded(
            found.net, found.params[at], view, options.size or surface.PIXELS, **how
        )
    H, W = size = tuple(found.tasks[at]["size"])
    x = images.grid(H, W, "centers").to(found.params)
    return surface.contours(mlp(found.net, found.params[at], x, **how)[:, 0].view(size))


# Files


def _videos(options: Render, stem: Path, frames: Sequence[Tensor]) -> list[Path]:
    endings = ("gif", "mp4") if options.video == "both" else (options.video,)
    written = []
    for ending in endings:
        path = stem.with_name(f"{stem.name}.{ending}")
        try:
            viz.save_video(path, frames, options.fps)
        except ImportError as error:
            if options.video != "both":
                raise
            warnings.warn(f"{path.name} left out: {error}", stacklevel=2)
            continue
        written.append(path)
    return written


def _mesh(path: Path, net: MLP, params: Tensor, resolution: int, how: dict) -> Path | None:
    """A mesh file; None where the field has no surface yet."""
    try:
        vertices, faces = surface.mesh(net, params, resolution, **how)
    except ValueError as error:
        if "surface" not in str(error):
            raise
        return None
    return _write(path, surface.mesh_bytes(vertices, faces, path.suffix[1:]))  # type: ignore[arg-type]


def _volume(net: MLP, params: Tensor, size: Sequence[int], how: dict) -> bytes:
    """A .npy [D,H,W,C] of a network on a lattice, in slabs of bounded memory."""
    import io

    import numpy as np

    x = lattice(tuple(size), net.coords).to(params)
    values = torch.cat([mlp(net, params, part, **how) for part in x.split(2**17)])
    buffer = io.BytesIO()
    np.save(buffer, values.view(*size, -1).cpu().numpy(), allow_pickle=False)
    return buffer.getvalue()


def _write(path: Path, data: bytes) -> Path:
    atomic_write(path, lambda beside: beside.write_bytes(data))
    return path


def file_stem(name: str) -> str:
    """A task's name as that of a file without ending, folders flattened; a window's or a block's
    number, behind #, stays."""
    whole, mark, piece = name.partition("#")
    return re.sub(r"[/\\:\0]", "_", os.path.splitext(whole)[0] + mark + piece)
