"""Write and copy the folder of a tree."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save

import kmem
from kmem.files import atomic_write
from kmem.model.bank_embedder import read_embedder_record
from kmem.model.bank_tree import (
    CENTROIDS_FILE,
    EMBEDDER_FOLDER,
    TREE_FILE,
    TREE_FORMAT,
    TREE_VERSION,
    record_fingerprint,
)
from kmem.model.file_digest import file_digest


def write_tree(
    folder: Path,
    centroids: list[NDArray[np.float32]],
    leaf_sizes: NDArray[np.int64],
    embedder_folder: Path,
    described: Mapping[str, Any],
) -> None:
    """Write the folder of a tree; tree.json comes last.

    Args:
        centroids: of each level, float32 [k^level, D].
        leaf_sizes: [k^p] training units of each leaf.
        embedder_folder: copied into the tree's folder.
        described: children, levels, unit, tokenizer, and further entries of tree.json.
    """
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(embedder_folder, folder / EMBEDDER_FOLDER)
    tensors = {f"level{level}": torch.from_numpy(np.array(rows)) for level, rows in enumerate(centroids, 1)}
    atomic_write(folder / CENTROIDS_FILE, save({**tensors, "leaf_sizes": torch.from_numpy(leaf_sizes)}))
    embedder = read_embedder_record(embedder_folder)
    files = {path.name: file_digest(path) for path in sorted(embedder_folder.iterdir())}
    children, levels = described["children"], described["levels"]
    record = {
        "format": TREE_FORMAT,
        "version": TREE_VERSION,
        "kmem_version": kmem.__version__,
        **described,
        "embedder": {
            "name": embedder["name"],
            **({"encoder": embedder["encoder"]} if "encoder" in embedder else {}),
            "dim": embedder["dim"],
            "fingerprint": hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest(),
            "files": files,
        },
        "units": int(leaf_sizes.sum()),
        "sizes": [level_sizes(leaf_sizes, children ** (levels - level)) for level in range(1, levels + 1)],
        "files": {CENTROIDS_FILE: file_digest(folder / CENTROIDS_FILE)},
    }
    record["fingerprint"] = record_fingerprint(record)
    atomic_write(folder / TREE_FILE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def copy_tree(source: Path, target: Path) -> None:
    """Copy the files that tree.json names and the licences beside the embedder, with modes that follow the umask."""
    (target / EMBEDDER_FOLDER).mkdir(parents=True, exist_ok=True)
    embedder = (f"{EMBEDDER_FOLDER}/{file.name}" for file in (source / EMBEDDER_FOLDER).iterdir())
    for name in (TREE_FILE, CENTROIDS_FILE, *embedder):
        shutil.copyfile(source / name, target / name)


def level_sizes(leaf_sizes: NDArray[np.int64], leaves_per_cluster: int) -> dict[str, Any]:
    """Number of clusters of a level; units in the smallest, median and largest; Gini coefficient of the sizes."""
    sizes = leaf_sizes.reshape(-1, leaves_per_cluster).sum(axis=1)
    return {
        "clusters": len(sizes),
        "smallest": int(sizes.min()),
        "median": float(np.median(sizes)),
        "largest": int(sizes.max()),
        "gini": round(gini(sizes), 4),
    }


def gini(sizes: NDArray[np.int64]) -> float:
    """Gini coefficient: 0 if all sizes are equal, near 1 if one cluster has everything."""
    ordered = np.sort(sizes).astype(np.float64)
    count = len(ordered)
    if ordered.sum() == 0:
        return 0.0
    return float((2 * np.arange(1, count + 1) - count - 1) @ ordered / (count * ordered.sum()))
