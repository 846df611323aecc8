"""What importing costs, what may import what, and that the API page is complete."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hespotex as hx

ROOT = Path(__file__).parents[1]
SRC = Path(hx.__file__).parent
HEAVY = {
    "anndata", "cellpose", "dask", "geopandas", "lightning", "matplotlib", "numba", "open_clip", "pandas", "scanpy",
    "scipy", "skimage", "sklearn", "spatialdata", "spatialdata_io", "spatialdata_plot", "squidpy", "timm", "torch",
    "torch_geometric", "torchvision", "xarray", "zarr",
}  # fmt: skip
SCVERSE = {"anndata", "scanpy", "spatialdata", "spatialdata_io", "spatialdata_plot", "squidpy"}


def _loaded_after(code: str) -> set[str]:
    """Top-level packages in ``sys.modules`` after running `code` in a fresh interpreter."""
    script = f"{code}\nimport sys\nprint('LOADED', *sorted({{name.split('.')[0] for name in sys.modules}}))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("LOADED")]
    return set(line.split()[1:])


def test_importing_the_package_loads_nothing_heavy():
    assert not _loaded_after("import hespotex as hx\nhx.settings\nhx.errors\ndir(hx)") & HEAVY


def test_help_of_the_program_loads_nothing_heavy():
    code = "import sys\nsys.argv = ['hespotex', 'demo', '--help']\nfrom hespotex.cli import main\ntry: main()\nexcept SystemExit as e: assert not e.code"
    assert not _loaded_after(code) & HEAVY


def _built_in_models() -> str:
    from hespotex.models import _registry

    return "".join(f"import {module}\n" for module in _registry._BUILTIN.values())


@pytest.mark.parametrize(
    "code", [_built_in_models(), "import hespotex.data.section, hespotex.data.units"], ids=["models", "section"]
)
def test_models_and_sections_import_no_scverse_package(code):
    assert not _loaded_after(code) & SCVERSE


def _imports(path: Path) -> set[str]:
    """Top-level packages imported anywhere in a file, inside functions too, but not for type checkers only."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize(
    "path",
    [*sorted((SRC / "models").rglob("*.py")), SRC / "data" / "section.py", SRC / "data" / "units.py"],
    ids=lambda path: str(path.relative_to(SRC)),
)
def test_no_function_of_the_models_needs_a_scverse_package(path):
    assert not _imports(path) & SCVERSE


# Who may import whom, from the top of the house to its foundations.
FLOORS = [
    {"cli", "_demo", "__main__"},
    {"pp", "tl", "pl", "get", "io", "datasets"},
    {"models", "encoders", "segmentation", "annotation", "metrics"},
    {"data", "image"},
    {"_settings", "_keys", "_device", "_files", "_memory", "_optional", "_tasks", "_logging", "_version", "errors", ""},
]


def _floor(name: str) -> int:
    (floor,) = [level for level, rooms in enumerate(FLOORS) if name in rooms]
    return floor


def _rooms_imported(path: Path) -> set[str]:
    """Rooms of hespotex that a file reaches by relative imports."""
    package = path.relative_to(SRC).parent.parts
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            targets = [node.module.split(".")] if node.module else [[alias.name] for alias in node.names]
            rooms |= {[*base, *target][0] for target in targets}
    return rooms


@pytest.mark.parametrize("path", sorted(SRC.rglob("*.py")), ids=lambda path: str(path.relative_to(SRC)))
def test_imports_run_downwards_only(path):
    room = path.relative_to(SRC).parts[0].removesuffix(".py")
    if room == "__init__":
        return
    above = {name for name in _rooms_imported(path) if name != room and _floor(name) < _floor(room)}
    assert not above, f"{room} imports {above}, which stand above it"


NAMESPACES = [name for name in hx.__all__ if name not in {"__version__", "settings"}]


@pytest.mark.parametrize("namespace", [*NAMESPACES, "data"])
def test_the_api_page_lists_every_public_name(namespace):
    page = (ROOT / "docs" / "api.md").read_text()
    listed = re.findall(rf"^\s+{namespace}\.(\w+)$", page, flags=re.MULTILINE)
    module = importlib.import_module(f"hespotex.{namespace}")
    assert sorted(listed) == sorted(module.__all__)
    assert all(getattr(module, name).__doc__ for name in module.__all__ if callable(getattr(module, name)))


def test_the_lazy_namespaces_are_the_real_ones():
    assert hx.pp is importlib.import_module("hespotex.pp")
    assert set(hx.__all__) <= set(dir(hx))
    with pytest.raises(AttributeError, match="no attribute 'tools'"):
        _ = hx.tools
