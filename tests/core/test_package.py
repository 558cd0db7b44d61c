"""``core`` as a distribution of its own, ``adm``: in a project with folders of the same names, with torch alone."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from runs import ROOT, adm_on_path

USE = """
import sys

OTHERS = "timm torchvision transformers accelerate PIL matplotlib safetensors jsonargparse tqdm yaml sklearn".split()

class TorchAlone:  # and what torch itself needs
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in OTHERS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, TorchAlone())
import core, tools.mine, classification, pkgutil, importlib
assert core.OURS and tools.mine.OURS and classification.OURS
import adm
for module in pkgutil.walk_packages(adm.__path__, "adm."):
    if not module.name.startswith("adm.training"):  # the repository's own, in no wheel
        importlib.import_module(module.name)
names = [getattr(adm, name) for name in adm.__all__]

import torch
from torch import nn
student, teacher = (nn.ModuleDict({"body": nn.Conv2d(3, c, 3), "head": nn.Linear(c, 5)}) for c in (4, 6))
x, y = torch.randn(2, 3, 8, 8), torch.tensor([1, 4])
head = lambda network: lambda f: network["head"](f.mean((2, 3)))
loss = adm.ADMLoss(0.2, 0.6, adm.Adapter(4, 6))(student["body"](x), teacher["body"](x), y, head(student), head(teacher))
loss.backward()
assert student["body"].weight.grad.abs().sum() > 0 and teacher["body"].weight.grad.abs().sum() > 0
print(adm.__version__, adm.__file__)
"""


def project(folder: Path) -> Path:
    """Somebody's repository, with ``core``, ``classification`` and a folder ``tools`` without ``__init__.py``."""
    for name in ("core/__init__.py", "tools/mine.py", "classification/__init__.py"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("OURS = True\n")
    (folder / "main.py").write_text(USE)
    return folder


def use(folder: Path, packages: Path) -> list[str]:
    """What the project's script prints: adm's version and where it lies."""
    environment = {**os.environ, "PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "main.py"], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_folder_works_under_another_name_with_torch_alone(tmp_path: Path) -> None:
    packages = adm_on_path(tmp_path)
    assert use(project(tmp_path / "project"), packages)[1].startswith(str(packages))


def pip(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", *map(str, words), "--no-deps", "--no-build-isolation", "--quiet"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


needs_setuptools = pytest.mark.skipif(
    int(version("setuptools").split(".")[0]) < 77, reason="builds with the setuptools of this environment: >= 77"
)


@pytest.mark.slow
@needs_setuptools
@pytest.mark.parametrize("kind", ["folder", "sdist", "git"])
def test_a_project_installs_it_beside_its_own_core_and_tools(tmp_path: Path, kind: str) -> None:
    packages = tmp_path / "packages"
    what = str(tmp_path / "core")
    # A copy: a build leaves folders where it works.
    subprocess.run(["cp", "-r", ROOT / "core", what], check=True)
    if kind == "sdist":
        build = "from setuptools import build_meta; build_meta.build_sdist('dist')"
        subprocess.run([sys.executable, "-c", build], cwd=what, check=True, capture_output=True)
        (file,) = (tmp_path / "core/dist").glob("adm_loss-*.tar.gz")
        what = str(file)
    elif kind == "git":
        if not (ROOT / ".git").exists():
            pytest.skip("this copy of the repository has no history")
        what = f"git+file://{ROOT}#subdirectory=core"
    done = pip("install", "--target", packages, what)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in packages.iterdir() if not p.name.endswith(".dist-info")) == ["adm"]
    assert (packages / "adm/py.typed").is_file() and not (packages / "adm/training").exists()
    number, place = use(project(tmp_path / "project"), packages)
    (metadata,) = packages.glob("adm_loss-*.dist-info")
    assert metadata.name == f"adm_loss-{number}.dist-info" and place.startswith(str(packages))


@pytest.mark.slow
@needs_setuptools
def test_no_wheel_of_the_whole_repository(tmp_path: Path) -> None:
    done = pip("wheel", ROOT, "-w", tmp_path)
    assert done.returncode == 1 and "pip install ./core" in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())
