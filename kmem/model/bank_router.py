"""From a context to the leaf whose blocks it uses: the tree and the embedder that the training data's addresses were
made with. Ships beside exported weights."""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .bank_embedder import ContextEmbedder, load_embedder
from .bank_tree import EMBEDDER_FOLDER, TREE_FILE, ClusterPath, ClusterTree
from .file_digest import file_digest

Context = str | Sequence[int] | Tensor
"""Text, or token ids of the model's tokenizer."""


class DeferredTokenizer:
    """A tokenizer that is loaded when text is first read: contexts may be token ids, and embedders that count ids."""

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
        tokenizer: the model's, from Transformers; None: contexts are token ids, and the embedder does not read text.
    """

    def __init__(self, tree: ClusterTree, embedder: ContextEmbedder, tokenizer: Any = None) -> None:
        self.tree, self._embedder, self._tokenizer = tree, embedder, tokenizer
        self._lock = threading.Lock()

    @classmethod
    def load(cls, folder: str | Path, tokenizer: Any = None, device: str = "cpu") -> "ContextRouter":
        """From a tree's folder, as `kmem data cluster` writes it and exports hold it.

        Raises:
            ValueError: missing, damaged, or another embedder than the tree's; names the file.
        """
        tree = tree_with_embedder(folder)
        return cls(tree, load_embedder(Path(folder) / EMBEDDER_FOLDER, tokenizer, device), tokenizer)

    def embed(self, contexts: Sequence[Context]) -> Tensor:
        """float32 [N, D], on the CPU. Of several threads one at a time: an embedder, and the tokenizers that it reads
        with, may not bear more."""
        with self._lock:
            return self._embedder.embed([self._ids(context) for context in contexts])

    def leaves(self, contexts: Sequence[Context], blocked: Iterable[ClusterPath] = ()) -> Tensor:
        """The leaf of each context, int64 [N], on the CPU.

        Args:
            blocked: clusters that may not be entered; the next nearest takes their place.
        """
        return self.tree.descend(self.embed(contexts), blocked)

    def other_leaves(self, contexts: Sequence[Context], blocked: Iterable[ClusterPath] = ()) -> Tensor:
        """The leaf of each context if its own cluster of level 1 is blocked, int64 [N]: the control that fetches what
        the nearest other part of the corpus owns.

        Args:
            blocked: clusters that may not be entered either.
        """
        return descend_elsewhere(self.tree, self.embed(contexts), blocked)

    def _ids(self, context: Context) -> Tensor:
        if isinstance(context, str):
            if self._tokenizer is None:
                raise ValueError("contexts as text need the model's tokenizer; give token ids")
            context = self._tokenizer(context, add_special_tokens=False)["input_ids"]
        return torch.as_tensor(context, dtype=torch.int64).cpu()

    def __deepcopy__(self, memo: dict[int, Any]) -> "ContextRouter":
        return self  # read-only: copies of a model share it

    def __reduce__(self) -> tuple[Any, ...]:
        return ContextRouter, (self.tree, self._embedder, self._tokenizer)


def tree_with_embedder(folder: str | Path) -> ClusterTree:
    """The tree of a folder that also has the files of its embedder.

    Raises:
        ValueError: missing, damaged, or another embedder than the tree's; names the file.
    """
    tree, beside = ClusterTree.load(folder), Path(folder) / EMBEDDER_FOLDER
    for name, digest in embedder_files(tree.record, folder).items():
        if not (beside / name).is_file() or file_digest(beside / name) != digest:
            raise ValueError(
                f"{beside / name}: missing, or not the file of the embedder that the tree was made with; copy the "
                "tree again, with its embedder"
            )
    return tree


def embedder_files(record: Mapping[str, Any], folder: str | Path) -> Mapping[str, str]:
    """The files of the embedder of a tree, and their digests, as its tree.json names them.

    Raises:
        ValueError: it names none.
    """
    files = record["embedder"].get("files")
    if not files:
        raise ValueError(
            f"{Path(folder) / TREE_FILE}: names no files of the embedder, so none can be told from another; run "
            "kmem data cluster anew"
        )
    return dict(files)


def descend_elsewhere(
    tree: ClusterTree, embeddings_ND: Tensor, blocked: Iterable[ClusterPath] = (), leaves_N: Tensor | None = None
) -> Tensor:
    """Leaves of float32 embeddings, each with its own cluster of level 1 blocked, and the clusters named; int64 [N].

    Args:
        leaves_N: their own leaves, int64; default: by descent.
    """
    paths = list(blocked)
    own = tree.level_ids(tree.descend(embeddings_ND) if leaves_N is None else leaves_N, 1)
    found = torch.empty_like(own)
    for cluster in own.unique().tolist():
        here = own == cluster
        found[here] = tree.descend(embeddings_ND[here], [(cluster,), *paths])
    return found
