"""Finds the leaf of a context, with the tree and the embedder that also made the addresses of the training data. Ships
beside exported weights."""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .bank_embedder import ContextEmbedder, load_embedder
from .bank_tree import EMBEDDER_FOLDER, TREE_FILE, ClusterPath, ClusterTree
from .file_digest import file_digest

# Shape letters: N contexts, D embedding dimension.

Context = str | Sequence[int] | Tensor
"""Text, or token ids of the model's tokenizer."""


class DeferredTokenizer:
    """A tokenizer that is loaded on first use: contexts given as token ids may never need it."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load, self._loaded = load, None

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._tokenizer()(*args, **options)

    def decode(self, *args: Any, **options: Any) -> Any:
        return self._tokenizer().decode(*args, **options)

    def _tokenizer(self) -> Any:
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded


class ContextRouter:
    """A tree with its embedder.

    Args:
        tokenizer: the model's tokenizer, from Transformers. With None, contexts must be token ids.
    """

    def __init__(self, tree: ClusterTree, embedder: ContextEmbedder, tokenizer: Any = None) -> None:
        self.tree, self._embedder, self._tokenizer = tree, embedder, tokenizer
        self._lock = threading.Lock()

    @classmethod
    def load(cls, folder: str | Path, tokenizer: Any = None, device: str = "cpu") -> "ContextRouter":
        """Load it from a tree's folder, as `kmem data cluster` writes it and exports hold it.

        Raises:
            ValueError: a file is missing, damaged, or from another embedder than the tree's; names the file.
        """
        tree = tree_with_embedder(folder)
        return cls(tree, load_embedder(Path(folder) / EMBEDDER_FOLDER, tokenizer, device), tokenizer)

    def embed(self, contexts: Sequence[Context]) -> Tensor:
        """Embeddings float32 [N, D], on the CPU. One thread at a time: embedders and tokenizers need not be
        thread-safe."""
        with self._lock:
            return self._embedder.embed([self._ids(context) for context in contexts])

    def leaves(self, contexts: Sequence[Context], blocked: Iterable[ClusterPath] = ()) -> Tensor:
        """The leaf of each context, int64 [N], on the CPU.

        Args:
            blocked: clusters that may not be entered; the next nearest takes their place.
        """
        return self.tree.descend(self.embed(contexts), blocked)

    def _ids(self, context: Context) -> Tensor:
        if isinstance(context, str):
            if self._tokenizer is None:
                raise ValueError("contexts given as text need the model's tokenizer; give token ids instead")
            context = self._tokenizer(context)["input_ids"]
        return torch.as_tensor(context, dtype=torch.int64).cpu()

    def __deepcopy__(self, memo: dict[int, Any]) -> "ContextRouter":
        return self  # read-only: copies of a model share it

    def __reduce__(self) -> tuple[Any, ...]:
        return ContextRouter, (self.tree, self._embedder, self._tokenizer)


def tree_with_embedder(folder: str | Path) -> ClusterTree:
    """The tree of a folder, after its embedder's files have been verified.

    Raises:
        ValueError: a file is missing, damaged, or from another embedder than the tree's; names the file.
    """
    tree, embedder = ClusterTree.load(folder), Path(folder) / EMBEDDER_FOLDER
    for name, digest in embedder_files(tree.record, folder).items():
        if not (embedder / name).is_file() or file_digest(embedder / name) != digest:
            raise ValueError(
                f"{embedder / name}: missing, or not the file of the embedder that the tree was made with; copy the "
                "tree again, with its embedder"
            )
    return tree


def embedder_files(record: Mapping[str, Any], folder: str | Path) -> Mapping[str, str]:
    """File name -> digest of the tree's embedder, as tree.json records them.

    Raises:
        ValueError: tree.json names none.
    """
    files = record["embedder"].get("files")
    if not files:
        raise ValueError(
            f"{Path(folder) / TREE_FILE}: names no files of the embedder, so the embedder cannot be verified; run "
            "kmem data cluster again"
        )
    return dict(files)


def descend_elsewhere(
    tree: ClusterTree, embeddings_ND: Tensor, blocked: Iterable[ClusterPath] = (), leaves_N: Tensor | None = None
) -> Tensor:
    """Leaves of float32 embeddings when each one's own cluster of level 1 is blocked, as well as `blocked`; int64 [N].
    This is the control `blocked`, which fetches the blocks of the nearest other part of the corpus.

    Args:
        leaves_N: the embeddings' own leaves, int64; default: found by descent.
    """
    paths = list(blocked)
    own_clusters = tree.level_ids(tree.descend(embeddings_ND) if leaves_N is None else leaves_N, 1)
    leaves = torch.empty_like(own_clusters)
    for cluster in own_clusters.unique().tolist():
        members = own_clusters == cluster
        leaves[members] = tree.descend(embeddings_ND[members], [(cluster,), *paths])
    return leaves
