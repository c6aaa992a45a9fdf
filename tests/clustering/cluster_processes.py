"""Clustering in processes of its own: killed at chosen points and begun again, and watched for its memory.

`main` takes a prepared folder, a tree of it, an empty folder, and cases. `make:STEP` and `apply:STEP` make or apply a
tree, and are killed before every STEP-th change of the file system (a file opened for writing, a renaming, a removal)
by SIGKILL from themselves; what the repeated command leaves is compared. `memory:UNITS` makes trees of so many short
documents and of five times as many. Each process is a fork of this one, which has imported everything and computed
nothing. `main` prints one JSON object by cases.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sklearn.cluster
import sklearn.decomposition  # noqa: F401
import torch

from kmem.clustering import building, tfidf, workspace
from kmem.clustering.applying import apply_tree
from kmem.clustering.building import TreeRequest, make_tree
from kmem.clustering.embedders import KINDS
from kmem.config import UserError
from kmem.data.indexed import IndexedWriter
from kmem.data.manifest import read_manifest
from kmem.data.tokenizer import load_tokenizer
from kmem.model.file_digest import file_digest

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}


def main(corpus: Path, tree: Path, folder: Path, cases: list[str]) -> None:
    load_tokenizer(corpus / "tokenizer")  # imported here, for all forks
    KINDS["tfidf"] = dataclasses.replace(KINDS["tfidf"], chunk_tokens=6000)
    workspace._SECONDS_BETWEEN_MARKS = 0
    found: dict[str, Any] = {}
    for case in cases:
        kind, number = case.split(":")
        mine = folder / case
        if kind == "memory":
            found[case] = [peak_bytes(corpus, mine / str(units), units) for units in (int(number), 5 * int(number))]
        else:
            found[case] = killed_everywhere(kind, corpus, tree, mine, int(number))
    print(json.dumps(found))


def killed_everywhere(kind: str, corpus: Path, tree: Path, folder: Path, step: int) -> dict[str, Any]:
    """How many changes there are, and where what was left differs from that of an undisturbed command."""

    def killed_and_repeated(point: int | None) -> dict[str, str]:
        mine = folder / str(point)
        shutil.copytree(corpus, mine / "data")
        if point is not None:

            def until_killed() -> None:
                count_changes(point)
                command(kind, mine, tree)

            assert os.WTERMSIG(in_a_fork(until_killed)) == signal.SIGKILL, point

        def whole() -> None:
            seen = count_changes(None)
            command(kind, mine, tree)
            (folder / "changes").write_text(str(seen[0]))

        assert in_a_fork(whole) == 0, point
        return content(mine)

    undisturbed = killed_and_repeated(None)
    changes = int((folder / "changes").read_text())
    different = {}
    for point in range(1, changes + 1, step):
        found = killed_and_repeated(point)
        if found != undisturbed:
            different[point] = sorted(found.items() ^ undisturbed.items())
    return {"changes": changes, "files": list(undisturbed), "different": different}


def command(kind: str, folder: Path, tree: Path) -> None:
    if kind == "apply":
        apply_tree([folder / "data"], tree)
        return
    request = TreeRequest([folder / "data"], folder / "tree", 3, 2, embedder="tfidf", options={"dim": 16})
    try:
        make_tree(request)
    except UserError as error:
        if f"--tree {request.out}" not in str(error):  # that of a command that was killed while it tidied up
            raise


def count_changes(killed_before: int | None) -> list[int]:
    """A list whose one number grows with each change; the process ends by SIGKILL before the one of that number."""
    seen = [0]

    def hook(event: str, arguments: tuple) -> None:
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if writes or event in CHANGES:
            seen[0] += 1
            if seen[0] == killed_before:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return seen


def content(folder: Path) -> dict[str, str]:
    """Digests of all files."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files}


def peak_bytes(corpus: Path, folder: Path, units: int) -> int:
    """Most memory, beside mapped files, that making a tree of so many documents takes."""
    data = short_documents(corpus, folder / "data", units)

    def watched() -> None:
        KINDS["tfidf"] = dataclasses.replace(KINDS["tfidf"], chunk_tokens=1 << 14)
        # What is held for a moment, whatever the corpus, is seen by chance, and must be small beside what is compared.
        tfidf.SVD_UNITS, building._UNITS_AT_A_TIME, workspace._SECONDS_BETWEEN_MARKS = 1000, 128, 2
        torch.set_num_threads(1)
        peak, done, before = [0], threading.Event(), own_bytes()

        def watch() -> None:
            while not done.is_set():
                peak[0] = max(peak[0], own_bytes() - before)
                time.sleep(0.001)

        watcher = threading.Thread(target=watch)
        watcher.start()
        make_tree(TreeRequest([data], folder / "tree", 4, 2, embedder="tfidf", options={"dim": 512}, sample=1000))
        done.set()
        watcher.join()
        (folder / "peak").write_text(str(peak[0]))

    assert in_a_fork(watched) == 0
    return int((folder / "peak").read_text())


def own_bytes() -> int:
    """Of the process's pages in memory those that no file backs."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def short_documents(corpus: Path, folder: Path, count: int) -> Path:
    """A prepared folder like `corpus`, but of documents of eight tokens each."""
    shutil.copytree(corpus, folder)
    manifest = read_manifest(folder)
    splits = dict(manifest.splits)
    draw = np.random.default_rng(0)
    for split, documents in (("train", count), ("validation", 50)):
        ids = draw.zipf(1.2, (documents, 8)) % manifest.tokenizer.size
        writer = IndexedWriter(folder / split, manifest.dtype)
        for row in ids:
            writer.add(row)
        writer.close()
        splits[split] = splits[split].model_copy(update={"documents": documents, "tokens": 8 * documents})
    files = {
        name: record.model_copy(update={"bytes": (folder / name).stat().st_size, "sha256": file_digest(folder / name)})
        for name, record in manifest.files.items()
    }
    manifest.model_copy(update={"splits": splits, "files": files}).write(folder)
    return folder


def in_a_fork(work: Callable[[], None]) -> int:
    """The wait status of a process that does it."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
