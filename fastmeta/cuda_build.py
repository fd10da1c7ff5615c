"""Building the CUDA kernels: nvcc once per width and precision and once for what any of them needs,
side by side under ninja, linked to a module that needs neither torch nor a CUDA runtime library.

A build is kept in ``$XDG_CACHE_HOME/fastmeta`` (``~/.cache/fastmeta``), in a folder named after all
that it depends on: fastmeta's version, the sources, the GPU's architecture, Python's ABI. It is
made aside and renamed, so that a half-written one is never found; a lock keeps processes that start
together from building twice. With FASTMETA_BUILD_CUDA=1 ``pip install`` builds it ahead of time,
for the architectures of FASTMETA_CUDA_ARCHS.

Only the standard library is imported here: setup.py runs this file before the package is there.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.machinery
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

WIDTHS = (16, 32, 64)
MODES = ("fp32", "tf32", "fp16", "bf16")
COMMON = ("layered_loop", "measure", "sums")  # sources compiled once, whatever width and precision
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


def ninja() -> str | None:
    """The build tool: of the path, or where pip puts the package of that name."""
    folders = [os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")]
    folders.append(sysconfig.get_path("scripts", f"{os.name}_user"))
    return shutil.which("ninja", path=os.pathsep.join(folders))


def toolkit(compiler: str) -> tuple[int, int] | None:
    """The CUDA that a compiler is of; None where it does not say."""
    try:
        done = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"release (\d+)\.(\d+)", done.stdout)
    return (int(found[1]), int(found[2])) if found else None


def driver() -> tuple[int, int] | None:
    """The newest CUDA that the NVIDIA driver runs; None where there is no driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)):
        return None
    return version.value // 1000, version.value % 1000 // 10


def _versions(compiler: str) -> str | None:
    """Why what a compiler makes would not run here, or None."""
    runs = driver()
    made = toolkit(compiler) if runs is not None else None
    if runs is None or made is None:
        return None
    if made[0] < 12:
        return f"not compiled: {compiler} is of CUDA {made[0]}.{made[1]} (12 or newer)"
    if runs[0] < made[0]:  # within a major version older drivers run what newer toolkits make
        return (
            f"not compiled: {compiler} is of CUDA {made[0]}.{made[1]}, the driver runs CUDA "
            f"{runs[0]}.{runs[1]}; a newer driver, or a toolkit of CUDA {runs[0]} (set CUDA_HOME)"
        )
    return None


def missing() -> str | None:
    """Why the kernels can be neither found nor built here, or None."""
    if _ahead_of_time() is not None:
        return None
    if sources() is None:
        return "the kernels' sources are not installed; reinstall fastmeta"
    compiler = nvcc()
    if compiler is None:
        return "not compiled, and no nvcc is found (CUDA toolkit 12 or newer; set CUDA_HOME)"
    if importlib.util.find_spec("pybind11") is None:
        return "not compiled, which needs the package 'pybind11': pip install pybind11"
    if ninja() is None:
        return "not compiled, which needs the package 'ninja': pip install ninja"
    return _versions(compiler)


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
    """Compile csrc/cuda of a folder into a Python module at target; MAX_JOBS compilers at a time.
    What lies in objects already is compiled again where its sources or its command changed.

    Raises:
        RuntimeError: a compiler failed; the message holds its last lines.
    """
    compiler, tool = nvcc(), ninja()
    if compiler is None or tool is None:
        raise RuntimeError("cuda: no nvcc (set CUDA_HOME) or no ninja is found")
    objects.mkdir(parents=True, exist_ok=True)
    rules = ninja_file(compiler, folder.resolve(), archs, target.resolve())
    (objects / "build.ninja").write_text(rules)
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    command = [tool, "-C", str(objects), "-j", jobs]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-20:])
        raise RuntimeError(f"cuda: compiling failed: {' '.join(command)}\n{tail}")


def ninja_file(compiler: str, folder: Path, archs: tuple[str, ...], target: Path) -> str:
    """The text of build.ninja: an object for each width and precision, the binding, the link."""
    import pybind11

    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    compile_ = "$nvcc $flags $more -MD -MF $out.d -c $in -o $out"
    text = f"""\
nvcc = {_words([compiler])}
flags = {_words(_NVCC)}
rule compile
  command = {compile_}
  depfile = $out.d
  deps = gcc
rule link
  command = $nvcc -shared -cudart static $in -o $out
"""
    objects = []

    def add(name: str, source: str, more: list[str]) -> None:
        objects.append(name)
        path = _path(folder / "cuda" / source)
        nonlocal text
        text += f"build {name}: compile {path}\n  more = {_words(more)}\n"

    for width in reversed(WIDTHS):  # the widest take longest
        for i, mode in enumerate(MODES):
            which = [f"-DFM_WIDTH={width}", f"-DFM_MODE={i}", f"-DFM_MODE_NAME={mode}"]
            add(f"{width}_{mode}.o", "variant.cu", [*gencode(archs), *which])
    for i, mode in enumerate(MODES):
        which = [f"-DFM_MODE={i}", f"-DFM_MODE_NAME={mode}"]
        add(f"layered_{mode}.o", "layered.cu", [*gencode(archs), *which])
    for name in COMMON:
        add(f"{name}.o", f"{name}.cu", gencode(archs))
    add("binding.o", "binding.cpp", includes)
    return text + f"build {_path(target)}: link {' '.join(objects)}\n"


def _words(words: list[str]) -> str:
    """Words of a command in a ninja file."""
    return shlex.join(words).replace("$", "$$")


def _path(path: Path) -> str:
    """A path on a build line of a ninja file."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def gencode(archs: tuple[str, ...]) -> list[str]:
    """Machine code for each architecture, and PTX of the last where there are several."""
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    if len(archs) > 1:
        flags.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    return flags
