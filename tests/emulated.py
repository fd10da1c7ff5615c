"""The CUDA worker's own source, compiled for the emulator: a Python module like fastmeta._cuda."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from fastmeta import cuda_build

CSRC = Path(__file__).parents[1] / "csrc"
MODES = ("fp32", "tf32", "fp16", "bf16")
VARIANTS = [(width, mode) for width in (16, 32, 64) for mode in MODES]


def why_not() -> str | None:
    """Why it cannot be built here, or None."""
    if shutil.which("g++") is None:
        return "no g++"
    if importlib.util.find_spec("pybind11") is None:
        return "no pybind11"
    return None


def build(folder: Path, variants: list[tuple[int, str]], *flags: str, jobs: int = 2) -> Path:
    """Compile some variants; the module's path. A second call finds the first one's."""
    import pybind11
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    name = "_".join(f"{w}{m}" for w, m in variants)
    made = folder / name / "_emulated.so"
    compiler = ["g++", "-std=c++17", "-O1", "-g0", "-Wall", "-Wextra", "-U_FORTIFY_SOURCE", *flags]
    compiler += ["-DFM_EMULATE", "-fPIC", "-fvisibility=hidden"]
    compiler += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]

    def run(command):
        done = subprocess.run(command, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0 and not done.stderr, done.stderr

    with FileLock(f"{folder / name}.lock"):
        if made.is_file():
            return made
        made.parent.mkdir()
        commands = []
        for width, mode in variants:
            which = [f"-DFM_WIDTH={width}", f"-DFM_MODE={MODES.index(mode)}"]
            which += [f"-DFM_MODE_NAME={mode}", "-x", "c++", "-c", str(CSRC / "cuda/variant.cu")]
            commands.append([*compiler, *which, "-o", str(made.parent / f"{width}{mode}.o")])
        for i, mode in enumerate(MODES):
            which = [f"-DFM_MODE={i}", f"-DFM_MODE_NAME={mode}", "-x", "c++", "-c"]
            source = str(CSRC / "cuda/layered.cu")
            commands.append(
                [*compiler, *which, source, "-o", str(made.parent / f"layered_{mode}.o")]
            )
        for name in cuda_build.COMMON:
            source = ["-x", "c++", "-c", str(CSRC / f"cuda/{name}.cu")]
            commands.append([*compiler, *source, "-o", str(made.parent / f"{name}.o")])
        listed = ",".join(f"&kVariant_{w}_{m}" for w, m in variants)
        which = ["-DFM_MODULE=_emulated", f"-DFM_ONLY={listed}", "-c"]
        binding = str(CSRC / "cuda/binding.cpp")
        commands.append([*compiler, *which, binding, "-o", str(made.parent / "binding.o")])
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(run, commands))
        objects = [str(p) for p in made.parent.glob("*.o")]
        run(["g++", "-shared", *flags, *objects, "-o", f"{made}.part"])
        Path(f"{made}.part").rename(made)
    return made


@functools.cache
def load(path: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader("_emulated", str(path))
    spec = importlib.util.spec_from_file_location("_emulated", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules.setdefault("_emulated", module)
    return module


def run_sanitized(build, variant: tuple[int, str], code: str) -> None:
    """Runs code, to which ``library`` is a module built with AddressSanitizer and UBSan, in
    a process of its own."""
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    flags += ["-fno-omit-frame-pointer", "-Wno-maybe-uninitialized", "-D_GLIBCXX_ASSERTIONS"]
    path = build([variant], *flags)
    before = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import emulated
from fastmeta import native
library = emulated.load({str(path)!r})
"""
    find = ["g++", "-print-file-name=libasan.so"], ["g++", "-print-file-name=libubsan.so"]
    preload = " ".join(subprocess.check_output(f, text=True).strip() for f in find)
    env = {**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [sys.executable, "-c", f"{before}{code}\nprint('clean')"],
        env=env,
        capture_output=True,
        text=True,
        timeout=280,
        cwd=CSRC.parent,
    )
    assert done.returncode == 0 and "clean" in done.stdout, done.stderr[-3000:]
