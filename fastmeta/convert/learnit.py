"""The authors' JAX checkpoints, read without JAX; of a pickle nothing is executed."""

from __future__ import annotations

import io
import math
import os
import pickletools
import re
import zipfile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..spec import MLP, fourier_mlp, nerf_mlp, siren

# Limits on a foreign file: the paper's own are 0.8 MB and about 400 opcodes.
_MAX_BYTES = 256 * 2**20
_MAX_OPCODES = 100_000


def load_learnit(path: str | os.PathLike) -> tuple[MLP, Tensor]:
    """Starting weights of the paper's authors, (net, init [P]), from their .pkl or an .npz.

    A pickle is read as data, never executed: arrays of numpy and jax, dicts and haiku's mappings;
    any other global is refused by name. Layers are ``siren__model/siren_layer*/linear`` (images) or
    ``model/linear*``, leaves w [in,out] and b [out]; an .npz has w0, b0, w1, b1, .... Recognised
    are, by names and shapes, any width and depth:

    * images, 2 -> 3: ``siren(2, 3, width, depth, w0=200, output_shift=0.5)``
    * CT, 512 -> 1: ``fourier_mlp(2, 1, width, depth)``; the frequencies are not in the file but
      drawn from seed 0
    * views, 120 -> 4: ``nerf_mlp(width, depth)``

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the file is none of these; says which part and why.

    Source: Tancik et al. 2021, github.com/tancik/learnit.

    >>> import tempfile, numpy as np, fastmeta as fm
    >>> sizes = [(2, 32), (32, 32), (32, 3)]
    >>> arrays = {f"w{i}": np.zeros(size, np.float32) for i, size in enumerate(sizes)}
    >>> arrays |= {f"b{i}": np.zeros(size[1], np.float32) for i, size in enumerate(sizes)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(f"{folder}/weights.npz", **arrays)
    ...     net, init = fm.load_learnit(f"{folder}/weights.npz")
    >>> net == fm.siren(2, 3, width=32, depth=3, w0=200.0, output_shift=0.5)
    True
    """
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise FileNotFoundError(f"load_learnit: {path}: no such file") from None
    except IsADirectoryError:
        raise ValueError(
            f"load_learnit: {path}: a folder; accepted is a .pkl or .npz file"
        ) from None
    try:
        if len(data) > _MAX_BYTES:
            raise ValueError(f"larger than {_MAX_BYTES} bytes")
        kind, layers = _npz_layers(data) if data[:2] == b"PK" else _haiku_layers(_read_pickle(data))
        if sum(array.nbytes for pair in layers for array in pair) > _MAX_BYTES:
            raise ValueError("its layers repeat one array beyond all bounds")
        net = _recognise(kind, layers)
    except ValueError as error:
        raise ValueError(f"load_learnit: {path}: {error}") from None
    init = torch.from_numpy(np.concatenate([part.ravel() for w, b in layers for part in (w.T, b)]))
    if not torch.isfinite(init).all():
        raise ValueError(f"load_learnit: {path}: the weights hold NaN or infinity")
    return net, init


def _recognise(kind: str, layers: list[tuple[np.ndarray, np.ndarray]]) -> MLP:
    """The paper's network with layers (w [in,out], b [out]); kind: siren, linear, npz (either)."""
    if len(layers) < 2:
        raise ValueError(f"{len(layers)} layers; accepted are two or more")
    for index, (w, b) in enumerate(layers):
        if w.ndim != 2 or b.shape != w.shape[1:] or 0 in w.shape:
            raise ValueError(
                f"layer {index}: w has shape {w.shape} and b {b.shape}; "
                "accepted are [in,out] and [out]"
            )
        if index and w.shape[0] != layers[index - 1][0].shape[1]:
            raise ValueError(
                f"layer {index}: takes {w.shape[0]} inputs, {layers[index - 1][0].shape[1]} come"
            )
    widths = [w.shape[1] for w, _ in layers[:-1]]
    if len(set(widths)) > 1:
        raise ValueError(f"hidden widths are {widths[:20]}; accepted is one width for all")
    dtypes = {array.dtype.newbyteorder("=") for pair in layers for array in pair}
    if len(dtypes) > 1 or dtypes.pop() not in (np.float32, np.float64):
        raise ValueError("the weights are not all float32 or all float64")
    ends, width, depth = (layers[0][0].shape[0], layers[-1][0].shape[1]), widths[0], len(layers)
    if kind in ("siren", "npz") and ends == (2, 3):
        return siren(2, 3, width, depth, w0=200.0, output_shift=0.5)
    if kind in ("linear", "npz") and ends == (512, 1):
        return fourier_mlp(2, 1, width, depth, features=256)
    if kind in ("linear", "npz") and ends == (120, 4):
        return nerf_mlp(width, depth)
    accepted = {"siren": "2 -> 3 (images)", "linear": "512 -> 1 (CT) and 120 -> 4 (views)"}
    named = {"siren": "siren_layer* layers", "linear": "linear* layers"}.get(kind, "layers")
    raise ValueError(
        f"a network of {named}, {ends[0]} -> {ends[1]}, is none of the paper's; "
        f"accepted are {accepted.get(kind, ', '.join(accepted.values()))}"
    )


def _haiku_layers(tree: object) -> tuple[str, list[tuple[np.ndarray, np.ndarray]]]:
    """{module name: {"w": [in,out], "b": [out]}} -> (kind, layers in their numbers' order)."""
    if not isinstance(tree, dict) or not tree:
        raise ValueError(
            f"the pickle holds {type(tree).__name__}; "
            "accepted is a mapping from layer names to w and b"
        )
    patterns = {
        "siren": r"siren__model/siren_layer(?:_(\d+))?/linear",
        "linear": r"model/linear(?:_(\d+))?",
    }
    kind = "siren" if any(name.startswith("siren__model/") for name in tree) else "linear"
    numbered = {}
    for name, leaves in tree.items():
        match = re.fullmatch(patterns[kind], name, re.ASCII)
        if match is None:
            raise ValueError(
                f"layer name {name[:80]!r}; "
                "accepted are siren__model/siren_layer*/linear and model/linear*"
            )
        held = sorted(leaves) if type(leaves) is dict else type(leaves).__name__
        if held != ["b", "w"]:
            raise ValueError(f"layer {name!r} holds {str(held)[:80]}; accepted are w and b")
        w, b = (getattr(leaves[key], "value", None) for key in ("w", "b"))
        if w is None or b is None:
            raise ValueError(f"layer {name!r}: w or b is no array")
        numbered[int((match[1] or "0")[:9])] = (w, b)
    if sorted(numbered) != list(range(len(tree))):
        raise ValueError(
            f"layers are numbered {sorted(numbered)[:20]}; "
            f"accepted is 0 to {len(tree) - 1}, none missing"
        )
    return kind, [numbered[index] for index in range(len(tree))]


def _npz_layers(data: bytes) -> tuple[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Arrays w0, b0, w1, b1, ... of an .npz -> ("npz", layers)."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = [info.filename.removesuffix(".npy") for info in archive.infolist()]
            size = sum(info.file_size for info in archive.infolist())
        depth = len(names) // 2
        if sorted(names) != sorted(f"{kind}{index}" for kind in "wb" for index in range(depth)):
            raise ValueError(
                f"the .npz holds {str(names[:6])[:80]}; accepted are w0, b0, w1, b1, ..."
            )
        if size > _MAX_BYTES:
            raise ValueError(f"the .npz unpacks to {size} bytes, accepted are {_MAX_BYTES}")
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            layers = [(arrays[f"w{index}"], arrays[f"b{index}"]) for index in range(depth)]
        if not all(isinstance(array, np.ndarray) for pair in layers for array in pair):
            raise ValueError("the .npz holds something that is no array")
        return "npz", layers
    except ValueError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise many kinds on a damaged file
        raise ValueError(f"a damaged .npz ({type(error).__name__}: {error})") from None


# What a pickle may name. The names stay names: nothing is imported, and nothing but the few lines
# of _call runs.
_RECONSTRUCT = {"numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"}
_FROMBUFFER = {"numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer"}
_JAX_ARRAY = {"jax._src.array._reconstruct_array", "jax._src.device_array.reconstruct_device_array"}
_MAPPING = {"collections.OrderedDict"} | {
    f"haiku._src.data_structures.{name}" for name in ("FlatMapping", "FlatMap", "frozendict")
}
_KNOWN = (
    _RECONSTRUCT
    | _FROMBUFFER
    | _JAX_ARRAY
    | _MAPPING
    | {"numpy.ndarray", "numpy.dtype", "_codecs.encode"}
)

_CONSTANTS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
_CONSTANTS |= {"UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
_CONSTANTS |= {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_FIXED = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


class _Name(str):
    """module.name of a global in a pickle."""


class _Array:
    """An array in the making: numpy pickles an empty one first, then its state."""

    value: np.ndarray | None = None


class _Dtype:
    """A dtype in the making: its code ("f4") first, then its byte order."""

    def __init__(self, code: object) -> None:
        if code not in ("f4", "f8"):
            raise ValueError(
                f"an array of dtype {str(code)[:20]!r}, which is refused; accepted are f4 and f8"
            )
        self.code, self.order = code, "="


def _read_pickle(data: bytes) -> object:
    """What a pickle of dicts and arrays holds, read as data: containers, constants, and ``_call``.

    pickle.Unpickler with a find_class that refuses was the alternative: it still hashes, sets
    attributes and allocates as the file tells it to.
    """
    stack: list = []
    memo: dict = {}
    mark = object()
    text_left = len(data)  # each text is encoded once in an honest file

    def to_mark() -> list:
        items = []
        while (item := stack.pop()) is not mark:
            items.append(item)
        return items[::-1]

    def setitems(target: object, items: list) -> None:
        named = all(type(key) is str for key in items[::2])  # anything else could be slow to hash
        if type(target) is not dict or len(items) % 2 or not named:
            raise ValueError("a mapping whose keys are not names")
        target.update(zip(items[::2], items[1::2], strict=True))

    position = 0
    try:
        for count, (opcode, arg, at) in enumerate(pickletools.genops(data)):
            name, position = opcode.name, at or 0
            if count >= _MAX_OPCODES:
                raise ValueError(f"more than {_MAX_OPCODES} opcodes")
            if name in _CONSTANTS:
                stack.append(arg)
            elif name in ("PROTO", "FRAME"):
                pass
            elif name in _FIXED:
                stack.append(_FIXED[name])
            elif name in _EMPTY:
                stack.append(_EMPTY[name]())
            elif name == "MARK":
                stack.append(mark)
            elif name == "TUPLE":
                stack.append(tuple(to_mark()))
            elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
                stack.append(tuple([stack.pop() for _ in range(int(name[-1]))][::-1]))
            elif name == "LIST":
                stack.append(to_mark())
            elif name in ("APPEND", "APPENDS"):
                items = [stack.pop()] if name == "APPEND" else to_mark()
                if type(stack[-1]) is not list:
                    raise ValueError("a list that is none")
                stack[-1].extend(items)
            elif name in ("DICT", "SETITEMS", "SETITEM"):
                items = [stack.pop() for _ in range(2)][::-1] if name == "SETITEM" else to_mark()
                if name == "DICT":
                    stack.append({})
                setitems(stack[-1], items)
            elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
                memo[len(memo) if name == "MEMOIZE" else arg] = stack[-1]
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                stack.append(memo[arg])
            elif name in ("GLOBAL", "STACK_GLOBAL"):
                named = str(arg).split(" ", 1) if name == "GLOBAL" else [stack.pop(), stack.pop()]
                parts = named if name == "GLOBAL" else named[::-1]
                if [type(part) for part in parts] != [str, str]:
                    raise ValueError("a global without a name")
                full = ".".join(parts)
                if full not in _KNOWN:
                    raise ValueError(
                        f"the pickle asks for {full[:80]!r}, which is refused and was not run; "
                        "accepted are dicts and numpy or jax arrays"
                    )
                stack.append(_Name(full))
            elif name == "REDUCE":
                args, function = stack.pop(), stack.pop()
                stack.append(_call(function, args))
                text_left -= len(stack[-1]) if type(stack[-1]) is bytes else 0
                if text_left < 0:
                    raise ValueError("its texts repeat beyond all bounds")
            elif name == "BUILD":
                state = stack.pop()
                _build(stack[-1], state)
            elif name == "STOP":
                return stack.pop()
            else:
                raise ValueError(
                    f"opcode {name} is refused; accepted are containers, constants and arrays"
                )
    except ValueError as error:
        raise ValueError(f"{str(error)[:300]} (byte {position} of the pickle)") from None
    except (LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"a damaged pickle ({type(error).__name__} at byte {position})") from None
    raise ValueError("a pickle without an end")


def _call(function: object, args: Any) -> Any:
    """What a known global gives for its arguments."""
    if type(function) is not _Name or type(args) is not tuple:
        raise ValueError("a call of something that is not a known global")
    name = str(function)
    if name == "_codecs.encode" and [type(a) for a in args] == [str, str] and args[1] == "latin1":
        return args[0].encode("latin1")  # how protocols 0 to 2 write bytes
    if name in _MAPPING and (not args or [type(a) for a in args] == [dict]):
        return args[0] if args else {}
    if name == "numpy.dtype" and args and type(args[0]) is str:
        return _Dtype(args[0])
    if name in _RECONSTRUCT and len(args) == 3:
        if args[0] != _Name("numpy.ndarray"):
            came = str(args[0])[:80] if type(args[0]) is _Name else type(args[0]).__name__
            raise ValueError(f"an array of class {came!r}; accepted is numpy.ndarray")
        return _Array()
    if name in _FROMBUFFER and len(args) == 4 and args[3] in ("C", "F"):
        array = _Array()
        array.value = _filled(args[2], args[1], args[3] == "F", args[0])
        return array
    if name in _JAX_ARRAY and len(args) == 4 and type(args[0]) is _Name and args[0] in _RECONSTRUCT:
        array = _call(args[0], args[1])
        _build(array, args[2])
        return array
    raise ValueError(
        f"a call of {name!r} with arguments that numpy, jax and haiku do not give it, refused"
    )


def _build(target: object, state: Any) -> None:
    """Gives an array (version, shape, dtype, fortran, bytes), a dtype (version, order, ...)."""
    parts = len(state) if type(state) is tuple else 0
    if type(target) is _Array and target.value is None and parts == 5:
        target.value = _filled(*state[1:])
    elif type(target) is _Dtype and parts == 8 and type(state[1]) is str:
        if state[1] not in ("<", ">", "=") or any(part is not None for part in state[2:5]):
            raise ValueError("a dtype of several parts, which is refused")
        target.order = state[1]
    else:
        raise ValueError(f"a state for {type(target).__name__.strip('_')!r}, which is refused")


def _filled(shape: Any, dtype: Any, fortran: Any, raw: Any) -> np.ndarray:
    """A view of the file's bytes as f4 or f8."""
    if type(shape) is not tuple or not all(type(n) is int and 0 <= n < 2**40 for n in shape[:9]):
        raise ValueError("an array without a shape")
    if type(dtype) is not _Dtype or type(fortran) is not bool or len(shape) > 8:
        raise ValueError("an array that is not as numpy pickles one")
    if type(raw) not in (bytes, bytearray):
        raise ValueError(f"an array of {type(raw).__name__}; accepted are bytes")
    kind = np.dtype(dtype.order + dtype.code)
    if math.prod(shape) * kind.itemsize != len(raw):
        raise ValueError(f"an array {shape} of {kind.name} with {len(raw)} bytes")
    return np.frombuffer(raw, kind).reshape(shape, order="F" if fortran else "C")
