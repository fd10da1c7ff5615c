"""Files: starting weights and any other tensors, as safetensors with one JSON entry of metadata.

A file holds named tensors and ``{"fastmeta": json}``; the JSON is ``{"format": "fastmeta",
"version": 1, "crc32": a check over all the rest, "meta": what the caller gave}``. A start
(``save_init``) has the tensors ``init`` [P], ``encoding.B`` [D,F] and ``encoding.phi`` [F] where
the network has an encoding, and ``extra.NAME``; its meta is ``{"kind": "start", "net": the
specification, "meta": what the caller gave}``. Nothing in a file is ever executed.
"""

from __future__ import annotations

import json
import os
import uuid
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .spec import MLP, Encoding

FORMAT = "fastmeta"
VERSION = 1
_NET_FIELDS = tuple(field.name for field in fields(MLP))
_ENCODING_TENSORS = ("encoding.B", "encoding.phi")


def save_init(path: str | os.PathLike, net: MLP, init: Tensor) -> None:
    """Writes a specification, with its coordinate convention, and starting weights to one file.

    The file is written beside its final name and moved there when complete: an error, a full disk
    or a killed process leaves whatever was at ``path`` before.

    Args:
        path: the file, safetensors whatever its name; its folder must exist.
        net: the specification.
        init: [P] float32 or float64, finite; stored in its own dtype, without its graph, from any
            device.

    Raises:
        ValueError: init is not [net.num_params], not floating point, or not finite.
        OSError: the file could not be written.

    >>> import tempfile, torch, fastmeta as fm
    >>> net = fm.siren(2, 3, width=16, depth=3)
    >>> init = net.init()[0]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fm.save_init(f"{folder}/start.safetensors", net, init)
    ...     again, same = fm.load_init(f"{folder}/start.safetensors")
    >>> again == net, torch.equal(same, init)
    (True, True)
    """
    save_start(path, net, init)


def load_init(path: str | os.PathLike) -> tuple[MLP, Tensor]:
    """Reads what ``save_init`` wrote: (net, init [P]), on the CPU and in the dtype it was saved in.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the file is cut short, damaged, of another program, of a newer fastmeta, or its
            weights do not belong to its network.

    >>> import fastmeta as fm
    >>> fm.load_init("absent.safetensors")
    Traceback (most recent call last):
    FileNotFoundError: absent.safetensors: no such file; accepted is a file written by fastmeta
    """
    return load_start(path)[:2]


def save_start(
    path: str | os.PathLike,
    net: MLP,
    init: Tensor,
    *,
    extra: Mapping[str, Tensor] | None = None,
    meta: Mapping[str, Any] | None = None,
) -> None:
    """``save_init`` and more: ``extra`` tensors (a learned inner rate), ``meta`` for JSON."""
    reason = _init_fault(net, init)
    if reason:
        raise ValueError(f"save_init: {reason}")
    spec, tensors = spec_to_json(net)
    tensors["init"] = init
    tensors.update({f"extra.{name}": value for name, value in (extra or {}).items()})
    save_tensors(path, tensors, {"kind": "start", "net": spec, "meta": dict(meta or {})})


def load_start(path: str | os.PathLike) -> tuple[MLP, Tensor, dict[str, Tensor], dict]:
    """Reads what ``save_start`` stored: (net, init [P], extra, meta). Errors as ``load_init``."""
    tensors, meta = load_tensors(path)
    if meta.get("kind") != "start":
        raise ValueError(
            f"{path}: a fastmeta file without starting weights; accepted is what save_init wrote"
        )
    extra = {name[6:]: tensors.pop(name) for name in list(tensors) if name.startswith("extra.")}
    init = tensors.pop("init", None)
    try:
        net = spec_from_json(meta.get("net"), tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    reason = _init_fault(net, init)
    if init is None or reason:
        raise ValueError(f"{path}: {reason}")
    stored = meta.get("meta")
    if not isinstance(stored, dict):
        raise ValueError(f"{path}: meta is {type(stored).__name__}; accepted is an object")
    return net, init, extra, stored


def save_tensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> None:
    """Writes named tensors (any shape, dtype, device) and JSON metadata to one file, atomically.

    Tuples in ``meta`` come back as lists and keys as strings, as JSON has it; floats, NaN among
    them, come back exactly.

    Raises:
        ValueError: a value is no tensor, or meta does not fit JSON.
        OSError: the file could not be written.
    """
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"save_tensors: {_short(name)} is {type(value).__name__}; "
                "accepted are tensors named by strings"
            )
    # Copies: safetensors refuses views into one storage, and takes no strides.
    copies = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}
    try:
        stored = json.loads(json.dumps(dict(meta)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"save_tensors: meta does not fit JSON: {_one_line(error)}") from None
    check = _crc32(copies, stored)
    text = json.dumps({"format": FORMAT, "version": VERSION, "crc32": check, "meta": stored})
    from safetensors.torch import save

    data = save(copies, {FORMAT: text})  # save_file would make the file readable to its owner only
    atomic_write(path, lambda temporary: temporary.write_bytes(data))


def load_tensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict]:
    """Reads (tensors on the CPU, meta) as ``save_tensors`` wrote them. Errors as ``load_init``."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        data = Path(path).read_bytes()  # of one open file: a new one may take its place meanwhile
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: no such file; accepted is a file written by fastmeta"
        ) from None
    except IsADirectoryError:
        raise ValueError(f"{path}: a folder; accepted is a file written by fastmeta") from None
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # load checked it
        head = _head(path, header.get("__metadata__", {}), list(tensors))
    except SafetensorError as error:
        raise ValueError(
            f"{path}: not a complete safetensors file ({_one_line(error)}); "
            "accepted is a file written by fastmeta"
        ) from None
    if _crc32(tensors, head["meta"]) != head.get("crc32"):
        raise ValueError(f"{path}: damaged: not what was written into it (the checksum differs)")
    return tensors, head["meta"]


def spec_to_json(net: MLP) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A specification as (every field of ``MLP`` for JSON, the encoding's B [D,F] and φ [F])."""
    spec = {name: getattr(net, name) for name in _NET_FIELDS}
    if net.encoding is None:
        return spec, {}
    spec["encoding"] = {"include_input": bool(net.encoding.include_input)}
    return spec, dict(zip(_ENCODING_TENSORS, (net.encoding.B, net.encoding.phi), strict=True))


def spec_from_json(spec: Any, tensors: Mapping[str, Tensor]) -> MLP:
    """The specification that ``spec_to_json`` took apart, bit for bit; a field or tensor too many
    or too few is a ValueError."""
    if not isinstance(spec, dict):
        raise ValueError(f"net is {type(spec).__name__}; accepted is an object")
    _same_names("net", spec, _NET_FIELDS)
    values, encoding = dict(spec), spec["encoding"]
    _same_names("tensors", tensors, () if encoding is None else _ENCODING_TENSORS)
    if encoding is not None:
        if not isinstance(encoding, dict) or not isinstance(encoding.get("include_input"), bool):
            raise ValueError(
                f"net: encoding is {_short(encoding)}; accepted are null and include_input: bool"
            )
        _same_names("net: encoding", encoding, ("include_input",))
        B, phi = (tensors[name] for name in _ENCODING_TENSORS)
        if {B.dtype, phi.dtype} != {torch.float32}:
            raise ValueError(
                f"net: encoding has B {B.dtype} and phi {phi.dtype}; accepted is float32"
            )
        values["encoding"] = Encoding(B, phi, encoding["include_input"])
    try:
        return MLP(**values)
    except TypeError as error:
        raise ValueError(f"net: {_one_line(error)}") from None


def atomic_write(path: str | os.PathLike, write: Callable[[Path], object]) -> None:
    """``write(temporary)`` in the same folder, fsync, rename onto ``path``: all of it or nothing.

    A link at ``path`` stays one; the file it points to is replaced.

    Raises:
        OSError: writing failed (whatever ``write`` raised); ``path`` is as it was, and no temporary
            file is left.
    """
    target = Path(os.path.realpath(path))
    temporary = target.parent / f".fastmeta-{uuid.uuid4().hex}.tmp"
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if not isinstance(error, Exception):  # Ctrl-C and the like go through as they are
            raise
        message = f"{path}: could not be written, what was there is unchanged"
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, f"{message}: {error.strerror}") from error
        raise OSError(f"{message}: {_one_line(error)}") from error
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Makes a rename outlive a power cut, where the system can fsync a folder."""
    with suppress(OSError):  # Windows and some network file systems do not; the file itself is safe
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _head(path: str | os.PathLike, metadata: Mapping[str, str], names: list[str]) -> dict:
    """The JSON entry of a file, checked up to its meta."""
    if FORMAT not in metadata:
        raise ValueError(
            f"{path}: a safetensors file of another program, with tensors {_short(sorted(names))}; "
            "accepted is a file written by fastmeta"
        )
    try:
        head = json.loads(metadata[FORMAT])
    except (ValueError, RecursionError):
        head = None
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise ValueError(
            f"{path}: damaged: the metadata entry {FORMAT!r} is not the JSON that fastmeta writes"
        )
    version = head.get("version")
    if type(version) is not int or version < 1:
        raise ValueError(f"{path}: format version is {_short(version)}; accepted is 1 to {VERSION}")
    if version > VERSION:
        raise ValueError(
            f"{path}: written by a newer fastmeta, in format version {version}; "
            f"accepted is 1 to {VERSION}, so a newer fastmeta is needed to read it"
        )
    if not isinstance(head.get("meta"), dict):
        raise ValueError(f"{path}: damaged: the metadata entry {FORMAT!r} has no meta")
    return head


def _init_fault(net: MLP, init: object) -> str | None:
    """Why init cannot be the weights of net, or None."""
    if not isinstance(init, Tensor):
        return f"init is {'absent' if init is None else type(init).__name__}; accepted is a tensor"
    if init.numel() < net.depth:  # first: P of a damaged depth would take for ever to add up
        return f"init has {init.numel()} entries, the network has {net.depth} layers"
    if tuple(init.shape) != (net.num_params,):
        return f"init has shape {list(init.shape)}, the network has {net.num_params} parameters"
    if init.dtype not in (torch.float32, torch.float64):
        return f"init is {init.dtype}; accepted are float32 and float64"
    bad = int((~torch.isfinite(init)).sum())
    return f"init holds NaN or infinity in {bad} of {net.num_params} entries" if bad else None


def _crc32(tensors: Mapping[str, Tensor], meta: dict) -> int:
    """CRC-32 over tensors and meta: finds flipped bits, and zeros where a copy broke off."""
    total = zlib.crc32(json.dumps(meta, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        total = zlib.crc32(f"{name} {value.dtype} {list(value.shape)}".encode(), total)
        total = zlib.crc32(value.reshape(-1).view(torch.uint8).numpy().data, total)
    return total


def _same_names(what: str, got: Mapping[str, Any], accepted: tuple[str, ...]) -> None:
    unknown, missing = sorted(set(got) - set(accepted)), sorted(set(accepted) - set(got))
    if unknown:
        raise ValueError(
            f"{what}: unknown {_short(unknown)}; accepted are {', '.join(accepted) or 'none'}"
        )
    if missing:
        raise ValueError(f"{what}: {_short(missing)} missing")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
