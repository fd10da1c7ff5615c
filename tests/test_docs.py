"""The documentation: what it shows runs, what it names exists, what is public is in it."""

import ast
import doctest
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastmeta as fm
from fastmeta import convert, tasks

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [
    page
    for page in sorted(DOCS.rglob("*.md"))
    if not {"_build", "auto_gallery"} & set(page.relative_to(DOCS).parts)
    and not page.name.endswith("_table.md")
]
GALLERY = sorted((DOCS / "gallery").glob("plot_*.py"))
MODULES = [
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    for path in sorted((ROOT / "fastmeta").rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
pages = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(DOCS)))


def run(test: doctest.DocTest, names: dict) -> int:
    """How many examples passed; fails with what came in place of what was said."""
    report: list[str] = []
    test.globs = names
    runner = doctest.DocTestRunner(optionflags=FLAGS, verbose=False)
    result = runner.run(test, out=report.append, clear_globs=False)
    assert result.failed == 0, "".join(report)
    return result.attempted


# What runs ---


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    found = doctest.DocTestFinder(exclude_empty=True).find(module, name)
    assert sum(run(test, dict(test.globs)) for test in found if test.examples)


def blocks(page: Path) -> list[tuple[str, str, int]]:
    """(python or pycon, code, line) of a page's blocks."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(python|pycon)\n(.*?)^```$", text, re.S | re.M)
    return [(m[1], m[2], text.count("\n", 0, m.start(2))) for m in found]


def imported(code: str) -> set[str]:
    """Packages that a block imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module).split(".")[0])
    return names


@pages
@pytest.mark.filterwarnings("default")  # other packages' own warnings
def test_pages_run(page, tmp_path, monkeypatch):
    """A page's blocks, one after the other; those over a package that is not there are left out."""
    monkeypatch.chdir(tmp_path)
    one = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    if sys.platform == "linux":
        one["GLOO_SOCKET_IFNAME"] = "lo"
    names: dict = {}
    for kind, code, line in blocks(page):
        if kind == "pycon":
            test = doctest.DocTestParser().get_doctest(code, {}, page.name, str(page), line)
            assert run(test, names)
            continue
        if any(importlib.util.find_spec(package) is None for package in imported(code)):
            continue
        if "init_process_group" in code:
            in_a_process_of_its_own(code, one)
        else:
            exec(compile("\n" * line + code, str(page), "exec"), names)


def in_a_process_of_its_own(code: str, variables: dict[str, str]) -> None:
    """Runs a block over a process group. Freed with the interpreter's lock held, a group of gloo
    can wait for its own thread for ever, so the process ends before anything is freed."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        return
    environment = {**os.environ, **variables, "PYTHONPATH": str(ROOT)}
    code += "\nimport os\nos._exit(0)\n"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


# What is in it ---


def documented() -> set[str]:
    """Full names that the API pages document, each of which exists."""
    found: set[str] = set()
    for page in sorted((DOCS / "api").glob("*.md")):
        module = ""
        for line in page.read_text(encoding="utf-8").splitlines():
            if current := re.match(r"\.\. currentmodule:: (\S+)", line):
                module = current[1]
            if named := re.match(r"\.\. (?:auto(\w+)|py:data):: (\S+)", line):
                whole = named[1] == "module" or named[2].startswith("fastmeta.")
                found.add(named[2] if whole else f"{module}.{named[2]}")
    return found


def public(module) -> set[str]:
    """Classes and functions that a module defines under a name without underscore."""
    return {
        f"{module.__name__}.{name}"
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    }


def resolve(name: str):
    module, _, attribute = name.rpartition(".")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return getattr(importlib.import_module(module), attribute)


def test_every_public_name_is_in_the_api():
    found = documented()
    wanted = {f"fastmeta.{name}" for name in fm.__all__}
    wanted |= {f"fastmeta.convert.{name}" for name in convert.__all__ if name not in fm.__all__}
    for module in (fm.nn, fm.compat, fm.rules):
        wanted |= public(module)
    wanted |= {f"fastmeta.tasks.{kind}.{name}" for kind, name in tasks.KINDS.items()}
    assert wanted - found == set()
    for name in found:
        resolve(name)


@pytest.mark.parametrize("name", sorted(set(fm.__all__) - {"Adapted", "compat", "nn", "rules"}))
def test_every_public_name_has_an_example(name):
    assert f"fm.{name}" in re.sub(r"\s", "", getattr(fm, name).__doc__ or "").partition(">>>")[2]


# What it names ---


def targets(page: Path) -> list[str]:
    """Relative files that a page links to, shows, includes, or lists in a toctree."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    found += re.findall(r"^```\{(?:include|literalinclude)\} (\S+)", text, re.M)
    found += [f"{name}.rst" for name in re.findall(r"\{doc\}`[^`<]*<([^>]+)>`", text)]
    found += listed(page)
    return [t.partition("#")[0] for t in found if not t.startswith(("http", "#"))]


def listed(page: Path) -> list[str]:
    """Files in a page's toctrees."""
    found: list[str] = []
    text = page.read_text(encoding="utf-8")
    for tree in re.findall(r"^```\{toctree\}\n(.*?)^```$", text, re.S | re.M):
        entries = [line for line in tree.split() if not line.startswith(":")]
        found += [f"{e}.rst" if e.startswith("auto_gallery/") else f"{e}.md" for e in entries]
    return found


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda p: p.name)
def test_what_pages_point_to_exists(page):
    for target in targets(page):
        path = (page.parent / target).resolve()
        if path.parent == DOCS / "auto_gallery":  # made from docs/gallery by the build
            sources = DOCS / "gallery"
            index, program = sources / "README.rst", sources / f"{path.stem}.py"
            path = index if path.stem == "index" else program
        assert path.exists(), f"{page.name} points to {target}"


def test_every_page_is_in_a_toctree():
    found = {(page.parent / entry).resolve() for page in PAGES for entry in listed(page)}
    assert set(PAGES) - found == {DOCS / "index.md"}


def test_what_the_command_line_is_asked_for_exists():
    from fastmeta.apply import Eval, Fit, Render
    from fastmeta.config import Config
    from fastmeta.recipes import RECIPES

    forms = (Config, Fit, Eval, Render, *map(tasks.options, tasks.KINDS))
    fields = {name.replace("_", "-") for form in forms for name in form.__dataclass_fields__}
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    shells = "\n".join(re.findall(r"^```sh\n(.*?)^```$", text, re.S | re.M))
    options = set(re.findall(r"--([a-z][a-z0-9-]+)", shells))
    assert options and options <= fields | {"recipe", "scale"}
    commands = set(re.findall(r"^fastmeta ([a-z]+)", shells, re.M))
    assert commands and commands <= {"train", "fit", "eval", "render", "info"}
    assert set(re.findall(r"^fastmeta train ([a-z]+)", shells, re.M)) <= set(tasks.KINDS)
    assert set(re.findall(r"--recipe `?([a-z]+)", text)) <= set(RECIPES)
    rules = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert set(re.findall(r"`make ([a-z-]+)`", text)) <= set(rules)


# The build ---


@pytest.mark.parametrize("program", GALLERY, ids=lambda p: p.stem)
def test_gallery_programs_are_sound(program):
    """Compiled, not run; head and figure are there. The build runs them."""
    code = program.read_text(encoding="utf-8")
    compile(code, str(program), "exec")
    assert re.match(r'"""\n(.+)\n(=+)\n\n', code) and "plt.subplots" in code


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_build_has_no_warnings(tmp_path):
    for package in ("sphinx", "furo", "myst_parser", "sphinx_gallery"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    ignored = shutil.ignore_patterns("_build", "auto_gallery")
    shutil.copytree(DOCS, tmp_path / "docs", ignore=ignored)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    done = subprocess.run(
        [*command, "docs", "html"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    html = tmp_path / "html"
    for name in ("index.html", "api/ops.html", "auto_gallery/index.html", "dropin/higher.html"):
        assert (html / name).exists()
    for program in GALLERY:
        assert list((html / "_images").glob(f"sphx_glr_{program.stem}_*.png"))
    assert "loss_hvp" in (html / "api/ops.html").read_text(encoding="utf-8")
