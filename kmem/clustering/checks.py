"""Checks that a tree can be made or addresses written, before work begins."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from kmem.clustering.corpus import Corpus
from kmem.clustering.embedders import KINDS
from kmem.config import UserError
from kmem.data.bank_addresses import RECORD_FILE, stored_tree
from kmem.files import check_replaceable, has_format
from kmem.model.bank_tree import TREE_FILE, TREE_FORMAT
from kmem.wording import counted

if TYPE_CHECKING:
    from kmem.clustering.building import TreeRequest


def check_device(embedder: str, device: str) -> None:
    """
    Raises:
        UserError: the embedder does not use this device, or it is not available.
    """
    if device == "cpu":
        return
    if not KINDS[embedder].reads_text:
        raise UserError(f"--device {device}: the embedder {embedder} computes on the CPU; leave it out")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: not usable here ({str(error).splitlines()[0]}); leave it out") from None


def check_sizes(request: "TreeRequest", units: int) -> None:
    """
    Raises:
        UserError: this many units, or the sample of a node, cannot fill the tree.
    """
    if request.sample < request.children:
        raise UserError(
            f"--sample {request.sample}: too few units of a node to make its {request.children} children (--children); "
            f"take at least {request.children}, better some hundreds per child"
        )
    leaves = request.children**request.levels
    if leaves > np.iinfo(np.int32).max:
        raise UserError(
            f"--children {request.children} --levels {request.levels}: more than 2^31 leaves; use fewer of either"
        )
    if units < leaves:
        smaller = "" if request.unit.window else ", or cut documents with --unit window:N"
        raise UserError(
            f"--children {request.children} --levels {request.levels}: {leaves:,} leaves, but the training split has "
            f"{counted(units, 'unit')}, and a leaf without units would never be trained; use fewer children or "
            f"levels{smaller}"
        )


def check_no_tree(out: Path, force: bool) -> None:
    """
    Raises:
        UserError: the folder holds something other than a tree, or a tree that may not be replaced.
    """
    is_tree = has_format(out / TREE_FILE, TREE_FORMAT)
    check_replaceable(out, "a tree", is_tree, force, instead=f"use it with --tree {out}")


def check_unaddressed(corpora: list[Corpus], tree: str | None, force: bool) -> None:
    """
    Raises:
        UserError: a folder has addresses of a tree with another fingerprint, and they may not be replaced.
    """
    for corpus in corpora:
        stored = stored_tree(corpus.folder)
        if stored is not None and stored != tree and not force:
            raise UserError(
                f"{corpus.folder / RECORD_FILE}: the folder has addresses of another tree ({stored[:12]}); replace "
                "them with --force, or use a copy of the folder"
            )
