"""Bank addresses of a prepared folder: the leaf of a cluster tree that each document, or window, belongs to.

They are stored beside the tokens: `train.addresses.npy` and `validation.addresses.npy` (int32, one leaf per unit in
document order) and `addresses.json`, which names the tree and the data that they belong to and is written last.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kmem.config import UserError
from kmem.data.manifest import Manifest
from kmem.data.units import Unit, UnitMap
from kmem.files import AtomicFile, atomic_write
from kmem.model.bank_tree import cluster_of, parse_path, read_tree_record
from kmem.model.file_digest import file_digest
from kmem.wording import counted

RECORD_FILE, LEAVES_SUFFIX = "addresses.json", ".addresses.npy"
FORMAT, VERSION = "kmem-addresses", 1


@dataclass(frozen=True)
class SplitAddresses:
    """The addresses of a split."""

    leaves: NDArray[np.int32]
    """[units] memory-mapped."""
    units: UnitMap
    continued: NDArray[np.bool_]
    """[units] whether a unit's document continues after it."""
    digest: str
    """Identity of the addresses."""


def data_fingerprint(manifest: Manifest) -> str:
    """Identity of a prepared folder's tokens and documents, both splits."""
    content = {name: file.sha256 for name, file in manifest.files.items()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def tree_record(tree: Path) -> dict[str, Any]:
    """Content of a tree's tree.json.

    Raises:
        UserError: there is no such tree, or it is damaged.
    """
    try:
        return read_tree_record(tree)
    except ValueError as error:
        raise UserError(str(error)) from None


def write_addresses(
    folder: Path, manifest: Manifest, tree: Mapping[str, Any], leaves: Mapping[str, NDArray[np.int32]]
) -> None:
    """Store the addresses of both splits beside a prepared folder's tokens and replace earlier ones.

    If the process is killed meanwhile, the folder has no addresses.

    Args:
        tree: content of the tree's tree.json.
        leaves: split -> int32 [units].
    """
    (folder / RECORD_FILE).unlink(missing_ok=True)
    splits = {}
    for split, values in leaves.items():
        path = folder / f"{split}{LEAVES_SUFFIX}"
        assert values.dtype == np.int32
        with AtomicFile(path) as file:
            np.save(file.stream, values, allow_pickle=False)
        splits[split] = {"units": len(values), "sha256": file_digest(path)}
    record = {
        "format": FORMAT,
        "version": VERSION,
        "tree": tree["fingerprint"],
        "data": data_fingerprint(manifest),
        "unit": tree["unit"],
        "children": tree["children"],
        "levels": tree["levels"],
        "splits": splits,
    }
    atomic_write(folder / RECORD_FILE, json.dumps(record, indent=2) + "\n")


def stored_tree(folder: Path) -> str | None:
    """Fingerprint of the tree whose addresses a prepared folder holds; None if it holds no readable addresses."""
    try:
        return str(json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))["tree"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_addresses(
    folder: Path, manifest: Manifest, split: str, starts: NDArray[np.int64], lengths: NDArray[np.int64], tree: Path
) -> SplitAddresses:
    """The addresses of a split.

    Args:
        starts, lengths: [documents] of the split, from its indexed dataset.
        tree: folder of the tree that the addresses must belong to.

    Raises:
        UserError: there are no addresses, or they are damaged or belong to another tree or to other data.
    """
    record, remedy = tree_record(tree), f"run kmem data cluster --data {folder} --tree {tree}"
    path = folder / RECORD_FILE
    if not path.is_file():
        raise UserError(f"{path}: missing, so the documents have no bank addresses; {remedy}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = (content["format"], content["version"]) == (FORMAT, VERSION)
        of_tree, of_data, described = content["tree"], content["data"], content["splits"][split]
        expected, digest = int(described["units"]), str(described["sha256"])
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise UserError(f"{path}: damaged, or not of format {FORMAT} {VERSION}; {remedy} --force")
    if of_tree != record["fingerprint"]:
        raise UserError(
            f"{path}: addresses of another tree ({of_tree[:12]}) than {tree} ({record['fingerprint'][:12]}); name the "
            f"former, or {remedy} --force"
        )
    if of_data != data_fingerprint(manifest):
        raise UserError(f"{path}: the addresses belong to other data than the folder holds; {remedy} --force")
    units = UnitMap(starts, lengths, Unit.parse(record["unit"]))
    file = folder / f"{split}{LEAVES_SUFFIX}"
    try:
        leaves = np.load(file, mmap_mode="r", allow_pickle=False)
        fits = leaves.dtype == np.int32 and leaves.shape == (len(units),) == (expected,)
        fits = fits and file_digest(file) == digest
    except (OSError, ValueError, EOFError):
        fits = False
    if not fits or (
        len(leaves) and not 0 <= int(leaves.min()) <= int(leaves.max()) < record["children"] ** record["levels"]
    ):
        raise UserError(
            f"{file}: missing, damaged, or not the leaves of {counted(len(units), 'unit')} that were written; "
            f"{remedy} --force"
        )
    return SplitAddresses(leaves, units, units.continued(), f"{record['fingerprint']}/{digest}")


def chosen_leaves(tree: Mapping[str, Any], paths: Sequence[str]) -> NDArray[np.bool_]:
    """[leaves] whether a leaf lies below one of the clusters.

    Raises:
        UserError: the tree has no such cluster.
    """
    children, levels = tree["children"], tree["levels"]
    chosen = np.zeros(children**levels, np.bool_)
    for path in paths:
        try:
            level, number = cluster_of(parse_path(path), children, levels)
        except ValueError as error:
            raise UserError(f"data.addresses.subtrees: {error}") from None
        below = children ** (levels - level)
        chosen[number * below : (number + 1) * below] = True
    return chosen
