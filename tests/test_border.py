"""Borders: what importing fastmeta needs, what csrc may include, and the lists on both sides."""

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from fastmeta import native
from fastmeta.batch import LOSSES, MEASURES
from fastmeta.rules import RULES
from fastmeta.spec import ACTIVATIONS, OUTPUTS

ROOT = Path(__file__).parents[1]
BLOCKED = ("triton", "tyro", "tqdm", "PIL", "matplotlib", "skimage", "safetensors", "tensorboard")


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_and_use_need_neither_compiled_nor_optional_modules():
    out = run(
        f"""
import sys
import tarfile
blocked = {BLOCKED!r} + ("fastmeta._cpu", "fastmeta._cuda", "fastmeta.native", "fastmeta.triton")
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name in blocked or name.split(".")[0] in blocked:
            raise ModuleNotFoundError("no module named " + name, name=name)
sys.meta_path.insert(0, Wall())
import torch
import fastmeta as fm
net = fm.siren(2, 3, 16, 3)
maml = fm.MAML(net, 2, 1e-2)
maml(fm.Batch(torch.rand(9, 2), torch.rand(2, 9, 3))).backward()
print(maml.init.grad.norm() > 0, fm.available()["reference"])
print({{k: v for k, v in fm.available().items() if k != "reference"}})
"""
    )
    assert out.splitlines()[0] == "tensor(True) None"
    assert out.count("no cpu worker") == 1 and out.count("no triton worker") == 1


def test_import_takes_no_notice_of_what_is_not_used():
    loaded = run("import sys, fastmeta; print(sorted({m.split('.')[0] for m in sys.modules}))")
    # torch itself may load some of them; compare with what torch alone loads
    alone = run("import sys, torch; print(sorted({m.split('.')[0] for m in sys.modules}))")
    assert set(eval(loaded)) - set(eval(alone)) - {"fastmeta"} <= set(sys.stdlib_module_names)


def test_csrc_is_free_of_torch():
    sources = [
        p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".hpp", ".cpp", ".cu", ".cuh")
    ]
    assert sources
    for path in sources:
        found = re.findall(
            r'#\s*include\s*[<"]((?:torch|ATen|c10|pybind11/torch)[^>"]*)', path.read_text()
        )
        assert not found, f"{path} includes {found}"


def test_both_sides_of_the_border_list_the_same():
    text = (ROOT / "csrc" / "abi.h").read_text()
    lists = {
        "FM_ACTIVATIONS": ACTIVATIONS,
        "FM_OUTPUTS": OUTPUTS,
        "FM_LOSSES": LOSSES,
        "FM_MEASURES": MEASURES,
        "FM_RULES": tuple(RULES),
        "FM_OPS": tuple(n for n in vars(native.Passes) if n[0] != "_")[:8],
    }
    for macro, names in lists.items():
        body = re.search(rf"#define {macro}\(X\)((?:.*\\\n)*.*)", text)[1]
        assert tuple(re.findall(r"X\((\w+)\)", body)) == names


def test_the_source_distribution_carries_the_kernels_sources(tmp_path):
    names = ".git", ".venv*", "build", "runs", "*.egg-info", "__pycache__", ".*_cache"
    skip = shutil.ignore_patterns(*names)
    shutil.copytree(ROOT, tmp_path / "fastmeta", ignore=skip)
    code = "import setuptools.build_meta as b; print(b.build_sdist('dist'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "fastmeta", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (archive,) = (tmp_path / "fastmeta" / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as files:
        held = {name.split("/", 1)[1] for name in files.getnames() if "/" in name}
    for path in [p for p in (ROOT / "csrc").rglob("*") if p.is_file()]:
        assert path.relative_to(ROOT).as_posix() in held
    assert {"fastmeta/py.typed", "LICENSE", "Makefile", "README.md"} <= held
