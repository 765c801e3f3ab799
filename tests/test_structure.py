"""The layout of the repository: sizes of files, and imports that go one way."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lbgm_compress"
FILES = sorted(PACKAGE.rglob("*.py"))
# A module imports from its own layer and from those before it.
LAYERS = [
    {"_util"},
    {"wire"},
    {"decoded", "algorithm", "compressor", "reducible", "wrapper"},
    {"compressors", "reducibles"},
    {"endpoints"},
    {"collective"},
    {"adapters", "analysis", "probe", "install_horovod"},
]


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for file in FILES}


def imported(module: str) -> set[str]:
    """Return the package's modules that a module imports, wherever in the file it does."""
    names = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} has a relative import"
            # A name may be a module itself.
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            names |= inner or {node.module}
    return {name for name in names if name in MODULES and name != module}


def layer_of(module: str) -> int:
    room = module.split(".")[1]
    return next(number for number, rooms in enumerate(LAYERS) if room in rooms)


def test_no_module_imports_itself_by_way_of_others():
    graph = {module: imported(module) for module in MODULES}
    # The package's own __init__ is imported first whatever else is.
    graph.pop("lbgm_compress")
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert set(MODULES) - {"lbgm_compress"} <= set(order)


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"lbgm_compress"}))
def test_imports_go_one_way(module):
    for other in imported(module):
        assert other != "lbgm_compress", f"{module} imports from the package's own __init__"
        assert layer_of(other) <= layer_of(module), f"{module} imports {other}"


def test_no_file_of_the_package_is_too_long_to_read():
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in FILES}
    assert {file: length for file, length in lengths.items() if length > 550} == {}


def test_the_package_s_root_has_few_modules():
    assert len(list(PACKAGE.glob("*.py"))) <= 8


def test_the_benchmarks_folder_has_few_files():
    assert sum(path.is_file() for path in (ROOT / "benchmarks").iterdir()) <= 16
