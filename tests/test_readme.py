"""The README's example runs as it stands, on smaller numbers."""

import re
from pathlib import Path

import torch
from helpers import error

import fastmeta as fm
from fastmeta import recipes, viz

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SMALLER = {"width=256": "width=16", "size=178": "size=12", "stop=1000": "stop=3"}


def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for i in range(4):
        viz.save_png(f"photos/{i}.png", torch.rand(14, 20, 3))
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    for long, short in SMALLER.items():
        assert long in code
        code = code.replace(long, short)
    names: dict = {}
    exec(code, names)
    assert names["step"] == 2 and names["y"].shape == (3, 144, 3)
    assert names["fit"].losses.shape == (5, 3)
    assert (names["fit"].losses[-1] < names["fit"].losses[0]).all()
    # the exported module computes what the op does
    assert error(names["module"](names["batch"].x), names["y"][0]) < 1e-5
    assert fm.load_init("faces.safetensors")[0] == names["net"]


def test_every_option_it_names_exists():
    from fastmeta.apply import Eval, Fit, Render, builtin
    from fastmeta.config import Config
    from fastmeta.tasks import KINDS, options

    forms = (Config, Fit, Eval, Render, *map(options, KINDS))
    fields = {name.replace("_", "-") for form in forms for name in form.__dataclass_fields__}
    named = set(re.findall(r"--([a-z][a-z0-9-]+)", README)) - {"help", "version"}
    assert named and named <= fields | {"recipe", "scale"}
    assert "text64" in builtin()
    for recipe in re.findall(r"--recipe ([a-z]+)", README):
        assert recipe in recipes.RECIPES
    for kind in re.findall(r"fastmeta train ([a-z]+)", README):
        assert kind in KINDS
