"""What pyproject.toml cannot say: the CPU kernels, compiled once per instruction set; and their
sources, which travel inside the package as fastmeta/csrc.

Without a C++ compiler the package installs all the same, and ``fastmeta info`` says what is
missing. FASTMETA_SANITIZE=1 builds with AddressSanitizer and UndefinedBehaviorSanitizer (see ``make
asan``); MAX_JOBS bounds the compilers that run at a time. FASTMETA_BUILD_CUDA=1 compiles the CUDA
kernels too, which otherwise happens when they are first used; FASTMETA_CUDA_ARCHS names the
architectures ("80;90"), without it all that a wheel holds.
"""

import importlib.util
import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = Path("csrc")
FOLDERS = {p.parent for p in SOURCES.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")}
NAMES = {".".join(["fastmeta", *folder.parts]): str(folder) for folder in sorted(FOLDERS)}

SANITIZE = os.environ.get("FASTMETA_SANITIZE", "0") not in ("", "0")
# no -ffast-math: the argument reductions count on the order of operations
FLAGS = [
    "-std=c++17",
    "-fopenmp",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
]
# every report ends the process; the instrumented code gives GCC false alarms of uninitialized reads
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
CHECKED = ["-O1", "-g", "-fno-omit-frame-pointer", "-Wno-maybe-uninitialized", *SANITIZERS]
FLAGS += CHECKED if SANITIZE else ["-O3", "-g0"]
# never -march=native: the instruction set is chosen when the module runs
ISAS = {
    "isa_baseline.cpp": [],
    "isa_avx2.cpp": ["-march=x86-64-v3"],
    "isa_avx512.cpp": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
}
if platform.machine() not in ("x86_64", "AMD64"):
    ISAS = {"isa_baseline.cpp": []}


class BuildKernels(build_ext):
    """Compiles each file with its own flags, several at a time."""

    def build_extension(self, ext):
        if ext.name == "fastmeta._cuda":
            return self.build_cuda(ext)
        try:
            import pybind11
        except ImportError as error:  # installs without build isolation bring their own
            raise CompileError(f"the CPU kernels need pybind11: {error}") from error

        flags = {str(SOURCES / "cpu" / name): extra for name, extra in ISAS.items()}
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)

        def one(source):
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                include_dirs=[pybind11.get_include()],
                extra_postargs=[*FLAGS, *flags.get(source, [])],
                depends=ext.depends,
            )

        with ThreadPoolExecutor(jobs) as pool:
            objects = [o for made in pool.map(one, ext.sources) for o in made]
        extra = ["-fopenmp", *(SANITIZERS if SANITIZE else [])]
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), extra_postargs=extra, target_lang="c++"
        )

    def build_cuda(self, ext):
        spec = importlib.util.spec_from_file_location("cuda_build", "fastmeta/cuda_build.py")
        cuda_build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(cuda_build)
        named = os.environ.get("FASTMETA_CUDA_ARCHS")
        archs = tuple(named.split(";")) if named else cuda_build.ARCHS
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        cuda_build.build(SOURCES, archs, target, Path(self.build_temp) / "cuda")


KERNELS = Extension(
    "fastmeta._cpu",
    sorted([str(SOURCES / "cpu" / name) for name in ISAS] + [str(SOURCES / "cpu" / "binding.cpp")]),
    depends=sorted(str(p) for p in SOURCES.rglob("*.h")),
    optional=True,
)

# asked for by name, so a failure to compile fails the installation
CUDA = Extension("fastmeta._cuda", ["csrc/cuda/variant.cu"], optional=False)
WITH_CUDA = os.environ.get("FASTMETA_BUILD_CUDA", "0") not in ("", "0")

setup(
    packages=[*find_packages(include=["fastmeta*"]), *NAMES],
    package_dir=NAMES,
    package_data={
        "fastmeta": ["py.typed", "starts/*.safetensors"],
        **{name: ["*.h", "*.cpp", "*.cu", "*.cuh"] for name in NAMES},
    },
    ext_modules=[KERNELS, CUDA] if WITH_CUDA else [KERNELS],
    cmdclass={"build_ext": BuildKernels},
)
