"""What imports what: `core` is light and knows no task, tasks know `core` alone, heavy libraries wait until used."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Which of the other rooms, or parts of them, each room may import from.
ROOMS: dict[str, set[str]] = {
    "core": set(),
    "classification": {"core"},
    "offline_kd": {"core", "classification"},
    "segmentation": {"core"},
    "diffusion": {"core", "classification.data", "classification.networks"},
    "tools": {"core", "classification", "offline_kd", "segmentation", "diffusion"},
}

HEAVY = {
    "accelerate",
    "diffusers",
    "jsonargparse",
    "matplotlib",
    "mmcv",
    "mmengine",
    "mmseg",
    "onnx",
    "onnxruntime",
    "PIL",
    "safetensors",
    "scipy",
    "sklearn",
    "tensorboard",
    "timm",
    "torch_fidelity",
    "torchvision",
    "tqdm",
    "transformers",
    "yaml",
}

# Where one of these may be imported at module level: what lies there extends it (or, for yaml, reads nothing else).
OWN: dict[str, set[str]] = {
    "classification/networks/timm_models.py": {"timm"},
    "segmentation/": {"mmcv", "mmengine", "mmseg"},
    "diffusion/": {"diffusers", "PIL"},
    "diffusion/tools/": {"jsonargparse"},  # the types of their options
    "tools/": {"yaml"},
}


def files(root: Path) -> Iterator[tuple[str, ast.Module]]:
    """(path from the root, syntax tree) of every source file of every room."""
    for room in ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            yield path.relative_to(root).as_posix(), ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(tree: ast.AST, path: str, *, at_module_level: bool) -> Iterator[tuple[int, str]]:
    """(line, module) of each import: all of them, or those which run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, (node.module or "") if node.level == 0 else path.partition("/")[0]
        elif not (at_module_level and runs_later(node)):
            yield from imported(node, path, at_module_level=at_module_level)


def runs_later(node: ast.AST) -> bool:
    """A function's body, or what is imported for type checkers only."""
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))


def forbidden_edges(root: Path) -> list[str]:
    """Imports from a room to another that it may not know."""
    found = []
    for path, tree in files(root):
        room = path.partition("/")[0]
        for line, module in imported(tree, path, at_module_level=False):
            allowed = any(f"{module}.".startswith(f"{known}.") for known in ROOMS[room] | {room})
            if module.partition(".")[0] in ROOMS and not allowed:
                found.append(f"{path}:{line} imports {module}")
    return found


def early_imports(root: Path) -> list[str]:
    """Heavy libraries imported at module level; for `core`, anything but torch and the standard library."""
    found = []
    for path, tree in files(root):
        own = set().union(*(names for place, names in OWN.items() if path.startswith(place)))
        for line, module in imported(tree, path, at_module_level=True):
            package = module.partition(".")[0]
            light = {"core", "torch", *sys.stdlib_module_names}
            if (package in HEAVY - own) or (path.startswith("core/") and package not in light):
                found.append(f"{path}:{line} imports {package}")
    return found


def loaded(code: str) -> set[str]:
    """The top-level packages in a fresh Python after it ran ``code`` in the checkout."""
    code = f"import sys; {code}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_core_loads_torch_when_its_maths_is_asked_for_and_nothing_heavier() -> None:
    shared = "import core.errors, core.files, core.training.command, core.training.run; from core import InputError"
    assert not {"torch", "numpy", *HEAVY} & loaded(shared)
    names = loaded("import core; assert all(getattr(core, name) for name in core.__all__)")
    assert "torch" in names
    assert not (HEAVY - {"tqdm"}) & names  # torch itself loads tqdm where there is one


def cycles(root: Path) -> list[list[str]]:
    """Modules that import each other in a circle when they are imported (imports for type checkers do not count)."""
    known = {path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path, _ in files(root)}
    edges: dict[str, set[str]] = {}
    for path, tree in files(root):
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        package = module if path.endswith("__init__.py") else module.rpartition(".")[0]
        found: set[str] = set()
        pending = [tree.body]
        while pending:
            for node in pending.pop():
                if isinstance(node, ast.Import):
                    found |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                    base = ".".join([*above, *([node.module] if node.module else [])])
                    names = {f"{base}.{alias.name}" for alias in node.names}
                    found |= (names & known) or {base}
                elif not runs_later(node):
                    pending += [getattr(node, part, []) for part in ("body", "orelse", "finalbody")]
        edges[module] = {name for name in found if name in known and name != module}
    circles = []
    for start in edges:
        reached, todo = set(), [start]
        while todo:
            for following in edges.get(todo.pop(), set()) - reached:
                reached.add(following)
                todo.append(following)
        if start in reached:
            circles.append([start, *sorted(reached & {m for m in edges if start in edges[m]})])
    return circles


def test_no_modules_import_each_other_in_a_circle(tmp_path: Path) -> None:
    assert cycles(ROOT) == []
    (tmp_path / "core").mkdir()
    (tmp_path / "core/a.py").write_text("from .b import f")
    (tmp_path / "core/b.py").write_text("from core.a import g")
    assert [circle[0] for circle in cycles(tmp_path)] == ["core.a", "core.b"]


def test_core_imports_itself_by_relative_names() -> None:
    """So that its folder works under another name."""
    absolute = [
        f"{path}:{node.lineno}"
        for path, tree in files(ROOT)
        if path.startswith("core/")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").partition(".")[0] == "core"
    ]
    assert absolute == []


def test_rooms_import_one_way() -> None:
    assert forbidden_edges(ROOT) == []


def test_heavy_libraries_are_imported_where_they_are_used() -> None:
    assert early_imports(ROOT) == []


@pytest.mark.parametrize(
    ("path", "code", "edges", "early"),
    [
        ("core/a.py", "import classification.methods", ["core/a.py:1 imports classification.methods"], True),
        ("core/a.py", "def f():\n    from tools import b", ["core/a.py:2 imports tools"], False),
        ("core/a.py", "import numpy as np", [], True),
        ("core/a.py", "from core.b import c\nimport torch.nn\nfrom .b import d", [], False),
        ("core/a.py", "if TYPE_CHECKING:\n    import accelerate", [], False),
        ("core/a.py", "class A:\n    import timm", [], True),
        ("core/a.py", "class A:\n    def f(self):\n        import timm", [], False),
        ("offline_kd/methods/a.py", "from classification.data import b", [], False),
        ("classification/a.py", "from offline_kd import b", ["classification/a.py:1 imports offline_kd"], False),
        ("classification/a.py", "try:\n    import matplotlib.pyplot as plt\nexcept ImportError:\n    pass", [], True),
        ("classification/tools/a.py", "from . import b", [], False),
        ("segmentation/a.py", "import mmseg.models", [], False),
        ("diffusion/a.py", "import mmseg", [], True),
        ("diffusion/a.py", "from classification.data.datasets import b", [], False),
        ("diffusion/a.py", "import classification.config", ["diffusion/a.py:1 imports classification.config"], False),
        ("tools/a.py", "import offline_kd, diffusion.dit", [], False),
    ],
)
def test_the_rules_see_what_breaks_them(tmp_path: Path, path: str, code: str, edges: list[str], early: bool) -> None:
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(code)
    assert forbidden_edges(tmp_path) == edges
    assert bool(early_imports(tmp_path)) == early
