"""What pyproject.toml cannot say: the kernels' sources travel inside the package, as fastmeta/csrc.

They are headers that the compiled workers are built from, at install time or on first use.
"""

from pathlib import Path

from setuptools import find_packages, setup

SOURCES = Path("csrc")
FOLDERS = {p.parent for p in SOURCES.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")}
NAMES = {".".join(["fastmeta", *folder.parts]): str(folder) for folder in sorted(FOLDERS)}

setup(
    packages=[*find_packages(include=["fastmeta*"]), *NAMES],
    package_dir=NAMES,
    package_data={
        "fastmeta": ["py.typed", "starts/*.safetensors"],
        **{name: ["*.h", "*.cpp", "*.cu", "*.cuh"] for name in NAMES},
    },
)
