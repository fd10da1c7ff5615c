"""Sphinx configuration: ``make docs``, to docs/_build/html. Needs no network."""

from __future__ import annotations

import contextlib
import io
import os
import shlex

from docutils import nodes
from docutils.parsers.rst import Directive

import fastmeta
from fastmeta import cli

project = "fastmeta"
author = "the fastmeta authors"
copyright = author  # noqa: A001
version = release = fastmeta.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "*_table.md", "gallery", "auto_gallery/*.ipynb", "auto_gallery/*.py"]
html_theme = "furo"
html_title = f"fastmeta {version}"

myst_heading_anchors = 3
default_role = "code"

# Types stand in signatures; what an argument means is in the docstring.
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

# Names of other packages have no page here, and there is no network to look for theirs.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|numpy|collections|typing|pathlib|os)\b.*"),
    (r"py:class", r"Tensor|Params"),
]

sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "auto_gallery",
    "filename_pattern": r"/plot_",
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "min_reported_time": 0,
    "show_memory": False,
    "write_computation_times": False,
}


class CommandLine(Directive):
    """What ``fastmeta ARGUMENTS`` prints."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        os.environ.update(COLUMNS="92", NO_COLOR="1")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            code = cli.main(shlex.split(self.arguments[0]))
        if code:
            raise self.error(f"fastmeta {self.arguments[0]}: exit code {code}")
        text = "\n".join(line.rstrip() for line in printed.getvalue().splitlines())
        return [nodes.literal_block(text, text, language="text")]


def setup(app) -> None:
    app.add_directive("fastmeta", CommandLine)
    written: dict[str, list[str]] = {}

    # napoleon reads "seconds: of each window" behind an attribute as a type and its description.
    def keep(app, what, name, obj, options, lines) -> None:
        if what in ("attribute", "property"):
            written[name] = list(lines)

    def restore(app, what, name, obj, options, lines) -> None:
        lines[:] = written.pop(name, lines)

    app.connect("autodoc-process-docstring", keep, priority=400)
    app.connect("autodoc-process-docstring", restore, priority=600)
