"""What stands in the way of a tree, or of addresses, found before work begins."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from kmem.clustering.corpus import Corpus
from kmem.clustering.embedders import KINDS, check_options
from kmem.config import UserError
from kmem.data.bank_addresses import RECORD_FILE, stored_tree
from kmem.files import check_replaceable, has_format
from kmem.model.bank_tree import TREE_FILE, TREE_FORMAT
from kmem.wording import counted

if TYPE_CHECKING:
    from kmem.clustering.building import TreeRequest


def check_embedder(request: "TreeRequest") -> None:
    """
    Raises:
        UserError: no such kind of embedder, or one without the options given.
    """
    if request.embedder not in KINDS:
        raise UserError(f"--embedder {request.embedder}: no such kind; there are {', '.join(KINDS)}")
    check_options(request.embedder, request.options)


def check_device(embedder: str, device: str) -> None:
    """
    Raises:
        UserError: a device that the embedder does not use, or that is not there.
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
        UserError: a tree that so many units, or the samples of a node, cannot fill.
    """
    if request.sample < request.children:
        raise UserError(
            f"--sample {request.sample}: so many units of a node make its {request.children} children (--children); "
            f"take {request.children} at least, better some hundreds for each child"
        )
    leaves = request.children**request.levels
    if leaves > np.iinfo(np.int32).max:
        raise UserError(
            f"--children {request.children} --levels {request.levels}: more leaves than 2^31; use fewer of either"
        )
    if units < leaves:
        smaller = "" if request.unit.window else ", or cut documents with --unit window:N"
        raise UserError(
            f"--children {request.children} --levels {request.levels}: {leaves:,} leaves, but the training split has "
            f"{counted(units, 'unit')}, and a leaf without any would never be trained; use fewer children or "
            f"levels{smaller}"
        )


def check_no_tree(out: Path, force: bool) -> None:
    """
    Raises:
        UserError: the folder holds something else than a tree, or a tree that may not be replaced.
    """
    is_tree = has_format(out / TREE_FILE, TREE_FORMAT)
    check_replaceable(out, "a tree", is_tree, force, instead=f"use it with --tree {out}")


def check_unaddressed(corpora: list[Corpus], tree: str | None, force: bool) -> None:
    """
    Raises:
        UserError: a folder has addresses of another tree than the one of this fingerprint, which may not be replaced.
    """
    for corpus in corpora:
        found = stored_tree(corpus.folder)
        if found is not None and found != tree and not force:
            raise UserError(
                f"{corpus.folder / RECORD_FILE}: the folder has addresses of another tree ({found[:12]}); replace them "
                "with --force, or copy the folder"
            )
