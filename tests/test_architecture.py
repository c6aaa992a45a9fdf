"""Imports point one way. The rooms and their order are those of docs/draw_architecture.py."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "docs" / "draw_architecture.py"


@pytest.fixture(scope="module")
def drawing():
    spec = importlib.util.spec_from_file_location("draw_architecture", SCRIPT)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def modules(drawing):
    return drawing.read_modules()


def test_every_room_has_a_place(drawing, modules):
    rooms = {module.room for module in modules.values()} - {""}
    assert rooms == set(drawing.ORDER) == drawing.PLACES.keys() == drawing.SUBJECTS.keys()


def test_no_import_points_up(drawing, modules):
    assert drawing.upward(modules) == []


def test_no_cycle_of_rooms(drawing, modules):
    assert drawing.room_cycles(modules) == []


def test_no_cycle_of_modules_at_import_time(drawing, modules):
    assert drawing.module_cycles(modules) == []


def test_the_model_imports_itself_and_kernels_alone(drawing, modules):
    found = {
        f"{module.name} -> {other}"
        for module in modules.values()
        for other in module.at_import | module.later
        if module.room == "model" and drawing.room_of(other) not in ("model", "kmem_kernels")
    }
    assert found == set()


def test_the_picture_has_room_for_every_arrow(drawing, modules, tmp_path):
    drawing.draw(modules, tmp_path / "rooms.png")
    assert (tmp_path / "rooms.png").stat().st_size > 0


def test_what_is_found(drawing, tmp_path):
    """An import against the order, one in a function, one for types, and cycles."""
    files = {
        "kmem/__init__.py": "",
        "kmem/cli.py": '"""The command."""\nCOMMANDS = {"train": "kmem.train.loop"}\n',
        "kmem/train/__init__.py": "",
        "kmem/train/loop.py": "from kmem.data import reader\nfrom .pace import pace\n",
        "kmem/train/pace.py": "import kmem.train.loop\n",
        "kmem/data/__init__.py": "from kmem.data.order import order\n",
        "kmem/data/order.py": "",
        "kmem/data/reader.py": (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from kmem.train.pace import pace\n"
            "def read():\n    from ..train import loop\n"
        ),
        "kernels/kmem_kernels/__init__.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = drawing.read_modules(tmp_path)
    assert drawing.arrows(found) == {("cli", "train"): 1, ("train", "data"): 1, ("data", "train"): 1}
    assert drawing.upward(found) == ["kmem.data.reader -> kmem.train.loop"]
    assert drawing.module_cycles(found) == [["kmem.train.loop", "kmem.train.pace"]]
    assert drawing.room_cycles(found) == [["data", "train"]]
    assert found["kmem.data.reader"].at_import == set()
