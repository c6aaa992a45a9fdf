"""Texts of different subjects, and addresses made without clustering."""

import ast
import hashlib
import inspect
import json
import shutil
import tarfile
import zipfile
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from kmem.corpora.word_problems import word_problem
from kmem.data.bank_addresses import write_addresses
from kmem.data.indexed import IndexedTokens
from kmem.data.manifest import read_manifest
from kmem.data.units import Unit, UnitMap
from kmem.model.bank_tree import CENTROIDS_FILE, EMBEDDER_FOLDER, TREE_FILE, record_fingerprint
from kmem.model.file_digest import file_digest

REPOSITORY = Path(__file__).parents[2]


def prose(count: int) -> list[str]:
    """Paragraphs of Python's manual: text that does not change with the project's own."""
    paragraphs = [part.strip() for topic in topics.values() for part in topic.split("\n\n")]
    return sorted({part for part in paragraphs if len(part) > 200 and part[0].isalpha()})[:count]


def code(count: int) -> list[str]:
    """Functions of Python's library."""
    files = [module.__file__ for module in (ast, inspect, shutil, tarfile, zipfile)]
    functions = [part for file in files for part in Path(file).read_text(encoding="utf-8").split("\n    def ")[1:]]
    return sorted({part for part in functions if 200 < len(part) < 2000})[:count]


def problems(count: int) -> list[str]:
    return [word_problem(number) for number in range(count)]


def write_tree(folder: Path, children: int, levels: int, unit: str = "document") -> Path:
    """A tree good enough for readers: right in form, its centroids all zero, its embedder a file that none reads."""
    (folder / EMBEDDER_FOLDER).mkdir(parents=True, exist_ok=True)
    embedder = folder / EMBEDDER_FOLDER / "none.json"
    embedder.write_text("{}")
    tensors = {f"level{level}": torch.zeros(children**level, 2) for level in range(1, levels + 1)}
    save_file(tensors, str(folder / CENTROIDS_FILE))
    record = {
        "format": "kmem-cluster-tree",
        "version": 1,
        "children": children,
        "levels": levels,
        "unit": unit,
        "embedder": {"name": "tfidf", "dim": 2, "files": {embedder.name: file_digest(embedder)}},
        "files": {CENTROIDS_FILE: file_digest(folder / CENTROIDS_FILE)},
    }
    record["fingerprint"] = record_fingerprint(record)
    (folder / TREE_FILE).write_text(json.dumps(record))
    return folder


def give_addresses(folder: Path, tree: Path, held_out: NDArray[np.int32] | None = None) -> None:
    """A leaf for each unit of a prepared folder, from the digest of its number; or those of the held-out ones."""
    record = json.loads((tree / TREE_FILE).read_text())
    leaves = {}
    for split in ("train", "validation"):
        units = units_of(folder, split, record["unit"])
        digests = [hashlib.sha256(f"{split}{number}".encode()).digest()[0] for number in range(len(units))]
        leaves[split] = (np.array(digests) % record["children"] ** record["levels"]).astype(np.int32)
    if held_out is not None:
        leaves["validation"] = held_out
    write_addresses(folder, read_manifest(folder), record, leaves)


def units_of(folder: Path, split: str, unit: str) -> UnitMap:
    indexed = IndexedTokens(folder / split)
    return UnitMap(indexed.starts, indexed.lengths, Unit.parse(unit))
