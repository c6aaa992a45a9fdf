"""Kernels stand below the model: they import nothing of kmem, and their references not even Triton."""

import ast
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "kernels"
ALLOWED = {*sys.stdlib_module_names, "torch", "numpy", "triton"}

PROGRAM = """
import importlib, sys

sys.modules |= {"triton": None, "numba": None, "kmem": None}
for name in sys.argv[1:]:
    importlib.import_module(f"kmem_kernels.{name}.reference")
    try:
        importlib.import_module(f"kmem_kernels.{name}.op")
    except ImportError as error:
        assert "triton>=3.6" in str(error), error
    else:
        raise AssertionError(f"{name}: the op can be imported without its kernel")
"""


def imported(path):
    """Names of the modules that a file imports by their whole names, at any place."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module


def test_kernels_import_nothing_of_kmem():
    found = {(path.name, name) for path in (FOLDER / "kmem_kernels").rglob("*.py") for name in imported(path)}
    assert ("triton.py", "triton") in found
    assert not [place for place in found if place[1].split(".")[0] not in ALLOWED]


def test_benchmarks_time_the_model_and_nothing_above_it():
    found = {(path.name, name) for path in (FOLDER / "benchmarks").glob("*.py") for name in imported(path)}
    of_kmem = {place for place in found if place[1].split(".")[0] == "kmem"}
    assert {name for name, _ in of_kmem} == {"cases.py"}
    assert all(module.startswith("kmem.model.") for _, module in of_kmem)


def test_references_do_without_triton():
    names = sorted(path.parent.name for path in FOLDER.glob("kmem_kernels/*/reference.py"))
    assert "row_update" in names
    subprocess.run([sys.executable, "-c", PROGRAM, *names], check=True)
