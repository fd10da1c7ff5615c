"""The house: a file imports only from lower floors, and nothing heavy or optional before it is
used."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fastmeta"
# A file or a package -> its floor. Files on one floor do not import each other; a package's members
# may.
FLOORS = {
    "env": 0, "cuda_build": 0, "spec": 0, "batch": 0, "rules": 0, "rng": 0,
    "reference": 0.5,  # the specification, which the other workers may call
    "native": 1, "triton": 1,
    "ops": 2,
    "checkpoint": 3, "convert": 3, "tasks": 3,
    "config": 4, "nn": 4, "meta": 4,
    "compat": 5, "train": 5, "distributed": 5, "viz": 5,
    "apply": 6, "recipes": 6,
    "cli": 7,
    "__main__": 8,
}  # fmt: skip
# May be imported at the top of a file; everything else inside the function that needs it. A room
# that is about a package, and is itself imported only where it is used, may import that one.
ALWAYS_THERE = {"torch", "numpy"}
ABOUT = {"triton": {"triton"}}


def modules() -> list[Path]:
    return [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path, tree: ast.AST) -> set[str]:
    """Rooms of fastmeta that a file imports, at any depth of nesting."""
    package = ["fastmeta", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{prefix}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {n.split(".")[1] for n in names if n.startswith("fastmeta.")}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_only_go_down(path):
    here = room(path)
    assert here in FLOORS, f"{here} has no floor: add it to FLOORS"
    below = imported(path, ast.parse(path.read_text())) - {here, "__version__"}
    wrong = {other for other in below if FLOORS.get(other, 99) >= FLOORS[here]}
    assert not wrong, f"{here} (floor {FLOORS[here]}) imports {wrong}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_optional_packages_are_imported_where_they_are_used(path):
    import sys

    top = ast.parse(path.read_text()).body
    names = set()
    for node in top:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    names -= ABOUT.get(room(path), set())
    heavy = names - ALWAYS_THERE - set(sys.stdlib_module_names) - {"fastmeta"}
    assert not heavy, f"{path.name} imports {heavy} at its top"


def test_the_check_sees_a_wrong_import():
    path = PACKAGE / "ops" / "mlp.py"
    assert imported(path, ast.parse("from ..meta.maml import MAML")) == {"meta"}
    assert imported(path, ast.parse("from .. import train")) == {"train"}
    assert imported(path, ast.parse("def f():\n    import fastmeta.cli")) == {"cli"}
    assert imported(path, ast.parse("from . import dispatch")) == {"ops"}
