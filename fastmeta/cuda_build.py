"""Building the CUDA kernels: nvcc once per width and precision and once for what any of
them needs, side by side, linked to a module that needs neither torch nor a CUDA runtime library.

A build is kept in ``$XDG_CACHE_HOME/fastmeta`` (``~/.cache/fastmeta``), in a folder named after all
that it depends on: fastmeta's version, the sources, the GPU's architecture, Python's ABI. It is
made aside and renamed, so that a half-written one is never found; a lock keeps processes that start
together from building twice. With FASTMETA_BUILD_CUDA=1 ``pip install`` builds it ahead of time,
for the architectures of FASTMETA_CUDA_ARCHS.

Only the standard library is imported here: setup.py runs this file before the package is there.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

WIDTHS = (16, 32, 64)
MODES = ("fp32", "tf32", "fp16", "bf16")
COMMON = (
    "layered_loop",
    "measure",
    "sums",
)  # sources compiled once, whatever the width and precision
# What a wheel holds; the last one as PTX too, which newer devices compile for themselves.
ARCHS = ("80", "86", "89", "90", "100", "120")

_HERE = Path(__file__).resolve().parent
# without -use_fast_math: square roots, divisions and subnormals are those of the other workers
_NVCC = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-cudart", "static"]


def sources() -> Path | None:
    """The folder csrc: inside an installed package, or beside it in a checkout."""
    for folder in (_HERE / "csrc", _HERE.parent / "csrc"):
        if (folder / "cuda" / "variant.cu").is_file():
            return folder
    return None


def nvcc() -> str | None:
    """The CUDA compiler: of CUDA_HOME, of the path, or where installers put it."""
    home = os.environ.get("CUDA_HOME")
    candidates = [f"{home}/bin/nvcc"] if home else []
    candidates += [shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    return next((c for c in candidates if c and os.access(c, os.X_OK)), None)


def missing() -> str | None:
    """Why the kernels can be neither found nor built here, or None."""
    if _ahead_of_time() is not None:
        return None
    if sources() is None:
        return "the kernels' sources are not installed; reinstall fastmeta"
    if nvcc() is None:
        return "not compiled, and no nvcc is found (CUDA toolkit 12 or newer; set CUDA_HOME)"
    if importlib.util.find_spec("pybind11") is None:
        return "not compiled, which needs the package 'pybind11': pip install pybind11"
    return None


def _ahead_of_time() -> Path | None:
    path = _HERE / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    return path if path.is_file() else None


def _import(path: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader("fastmeta._cuda", str(path))
    spec = importlib.util.spec_from_file_location("fastmeta._cuda", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def load(capability: tuple[int, int]) -> ModuleType:
    """The compiled module for a device, built where there is none yet: minutes, once.

    Raises:
        RuntimeError: it cannot be built; the message holds the compiler's last lines.
    """
    ready = _ahead_of_time()
    if ready is not None:
        return _import(ready)
    reason, folder = missing(), sources()
    if reason is not None or folder is None:
        raise RuntimeError(f"cuda: {reason}")
    arch = f"{capability[0]}{capability[1]}"
    made = cache_folder(folder, (arch,)) / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not made.is_file():
        from filelock import FileLock

        made.parent.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{made.parent}.lock"):
            if not made.is_file():
                _build_aside(folder, (arch,), made)
    return _import(made)


def cache_folder(folder: Path, archs: tuple[str, ...]) -> Path:
    """Where a build of these sources belongs."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".h", ".cpp", ".cu")):
        if path.parent.name != "cpu":
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    digest.update(repr((_NVCC, archs, sysconfig.get_config_var("SOABI"))).encode())
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "fastmeta" / f"cuda-{_version()}-{digest.hexdigest()[:16]}"


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("fastmeta")
    except PackageNotFoundError:
        return "0"


def _build_aside(folder: Path, archs: tuple[str, ...], made: Path) -> None:
    aside = Path(tempfile.mkdtemp(prefix="building-", dir=made.parent.parent))
    try:
        build(folder, archs, aside / made.name, aside / "objects")
        shutil.rmtree(aside / "objects")
        shutil.rmtree(made.parent, ignore_errors=True)
        aside.rename(made.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def build(folder: Path, archs: tuple[str, ...], target: Path, objects: Path) -> None:
    """Compile csrc/cuda of a folder into a Python module at target.

    Raises:
        RuntimeError: a compiler failed; the message holds its last lines.
    """
    import pybind11

    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("cuda: no nvcc is found (set CUDA_HOME)")
    objects.mkdir(parents=True, exist_ok=True)
    cuda = folder / "cuda"
    commands = [
        [
            *(compiler, *_NVCC, *gencode(archs)),
            *(f"-DFM_WIDTH={width}", f"-DFM_MODE={i}", f"-DFM_MODE_NAME={mode}"),
            *("-c", str(cuda / "variant.cu"), "-o", str(objects / f"{width}_{mode}.o")),
        ]
        for width in reversed(WIDTHS)
        for i, mode in enumerate(MODES)
    ]
    for i, mode in enumerate(MODES):
        one = [f"-DFM_MODE={i}", f"-DFM_MODE_NAME={mode}", "-c", str(cuda / "layered.cu")]
        commands.append(
            [compiler, *_NVCC, *gencode(archs), *one, "-o", str(objects / f"layered_{mode}.o")]
        )
    for name in COMMON:
        source = [str(cuda / f"{name}.cu"), "-o", str(objects / f"{name}.o")]
        commands.append([compiler, *_NVCC, *gencode(archs), "-c", *source])
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    binding = [str(cuda / "binding.cpp"), "-o", str(objects / "binding.o")]
    commands.append([compiler, *_NVCC, *includes, "-c", *binding])
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(_run, commands))
    linked = [str(p) for p in sorted(objects.glob("*.o"))]
    _run([compiler, "-shared", "-cudart", "static", *linked, "-o", str(target)])


def gencode(archs: tuple[str, ...]) -> list[str]:
    """Machine code for each architecture, and PTX of the last where there are several."""
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    if len(archs) > 1:
        flags.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    return flags


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-20:])
        raise RuntimeError(f"cuda: compiling failed: {' '.join(command)}\n{tail}")
