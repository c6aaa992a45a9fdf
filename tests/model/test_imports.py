"""kmem/model ships with every export, so it must run where only torch is installed."""

import subprocess
import sys
from pathlib import Path

import kmem.model

FOLDER = Path(kmem.model.__file__).parent
NEEDS_TRANSFORMERS = {"modeling_kmem", "configuration_kmem", "carried_cache", "bank_modeling", "pretrained_folder"}

PROGRAM = """
import importlib, importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        allowed = ("kmem", "kmem.model", "kmem_kernels")
        if name.split(".")[0] in ("transformers", "deepspeed", "megatron", "pydantic", "omegaconf"):
            raise AssertionError(f"kmem.model imports {name}")
        if name.startswith("kmem.") and name not in allowed and not name.startswith("kmem.model."):
            raise AssertionError(f"kmem.model imports {name}")

sys.meta_path.insert(0, Blocked())
for name in sys.argv[1:]:
    importlib.import_module(f"kmem.model.{name}")
"""


def test_imports_with_torch_alone():
    modules = sorted({path.stem for path in FOLDER.glob("*.py")} - NEEDS_TRANSFORMERS - {"__init__"})
    assert {"decoder", "moe", "loss", "init", "mask"} <= set(modules)
    subprocess.run([sys.executable, "-c", PROGRAM, *modules], check=True)
