"""The bank of a whole model in one process: its description in config.json, its rows, its contexts, and the tree that
looks contexts up. Ships beside exported weights."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from .bank_blocks import BankInput
from .bank_contexts import as_contexts
from .bank_inference import InferenceBank, InferenceSession
from .bank_layout import BankLayout
from .bank_router import ContextRouter, DeferredTokenizer, embedder_files
from .bank_tree import CENTROIDS_FILE, EMBEDDER_FOLDER, TREE_FILE, ClusterTree, read_tree_record
from .exported_memory import Carried, ExportedMemory, ForwardTokens
from .memory_kind import ModelKind
from .shape import Shape

# Shape letters: B sequences, T tokens, n contexts.

TREE_FOLDER = "tree"


@dataclass(frozen=True)
class BankDescription:
    """The bank's layout and tree."""

    layout: BankLayout
    tree: str | None
    """Fingerprint of the tree."""

    def check_tree(self, tree: ClusterTree | Mapping[str, Any], where: str | Path) -> None:
        """Refuse a tree other than the one that the bank was trained with.

        Raises:
            ValueError: names the tree and the difference.
        """
        record = tree.record if isinstance(tree, ClusterTree) else tree
        self.layout.check_tree(record, where)
        if self.tree is not None and record["fingerprint"] != self.tree:
            raise ValueError(
                f"{where}: this is not the tree that the bank was trained with ({str(record['fingerprint'])[:12]} "
                f"instead of {self.tree[:12]}): its leaves or its embedder differ; use the tree of the training data"
            )

    def find_tree(self, find: Callable[[str], str | None]) -> Path:
        """The folder of the tree, after all its files have been fetched.

        Args:
            find: gives the path of a file of the model's folder, None if it is missing.

        Raises:
            ValueError: names the file that is missing.
        """

        def path(file: str) -> Path:
            local = find(f"{TREE_FOLDER}/{file}")
            if local is None:
                raise ValueError(f"{TREE_FOLDER}/{file}: missing beside the weights; fetch or export the folder again")
            return Path(local)

        folder = path(TREE_FILE).parent
        record = read_tree_record(folder)
        for file in (CENTROIDS_FILE, *(f"{EMBEDDER_FOLDER}/{name}" for name in embedder_files(record, folder))):
            path(file)
        return folder

    def router(self, folder: Path, tokenizer: Any) -> ContextRouter:
        """The tree and the embedder of a folder.

        Raises:
            ValueError: they are damaged, or belong to another bank.
        """
        router = ContextRouter.load(folder, tokenizer)
        self.check_tree(router.tree, folder)
        return router


class BankState:
    """The contexts of a cache. It keeps the contexts with which it began, since its keys were computed with their
    blocks."""

    def __init__(self, leaves: Tensor) -> None:
        self.leaves = leaves
        """int64 [n] on the host."""

    @property
    def batch(self) -> int:
        return len(self.leaves)

    def record(self, on: bool) -> None:
        """Nothing to do: removing tokens does not change the context."""

    def crop(self, tokens: int) -> None:
        """Nothing to do, as in `record`."""

    def reorder(self, order: Tensor) -> None:
        self.leaves = self.leaves[order.cpu()]


class ExportedBank(ExportedMemory):
    """Field of config.json: `bank_tree`, the fingerprint of the cluster tree that the bank was trained with; the folder
    `tree` holds the tree."""

    tables_kept = "mmap"
    keeps_state = True

    def __init__(self, kind: ModelKind, shape: Shape, fields: Mapping[str, Any]) -> None:
        super().__init__(kind, shape, fields)
        self.description = BankDescription(BankLayout.of(shape), fields.get("tree"))
        self.contexts = InferenceBank(self.description.layout, self.sources)
        self.contexts.choose(self._control, None)
        self._tree: Callable[[], Path] | None = None

    @property
    def control(self) -> str:
        """What all contexts are given: "fetched", "generic" or "none". Can be set."""
        return self.contexts.control

    @control.setter
    def control(self, value: str) -> None:
        self.contexts.choose_control(value)

    def loaded(self, folder: Any, config: Any, mapped: bool) -> None:
        super().loaded(folder, config, mapped)
        self._tree = partial(self.description.find_tree, folder.find)
        self.contexts.router = partial(_router, self.description, folder, config)

    def inputs(self, tokens: ForwardTokens, carried: Carried | None = None) -> dict[int, Any]:
        return self.read(tokens, carried)

    def read(self, tokens: ForwardTokens, carried: Carried | None) -> dict[int, BankInput]:
        session, (batch, length) = self.contexts.session(), tokens.like.shape[:2]
        leaves = None
        if session.controls.control == "fetched":
            leaves = _leaves(session, tokens, carried)
            if leaves.dim() == 1 and len(leaves) != batch:
                leaves = _spread(leaves, batch)
            if leaves.shape not in ((batch,), (batch, length)):
                raise ValueError(
                    f"addresses of shape {list(leaves.shape)}: give one for each of the {batch} sequences, [{batch}], "
                    f"or one for each of their tokens, [{batch}, {length}]"
                )
            if carried is not None and carried.state is None and leaves.dim() == 1:
                carried.state = BankState(leaves)
        return session.inputs(leaves, batch, length, tokens.like)

    def initialise_rows_(self, part: Tensor, key: int, start: int, seed: int) -> None:
        part.copy_(self.description.layout.initial_rows(seed, key, start, start + len(part)))

    def saved(self, folder: Path) -> None:
        """Save the tree."""
        if self._tree is not None:
            tree, target = self._tree(), folder / TREE_FOLDER
            if tree.resolve() != target.resolve():
                shutil.rmtree(target, ignore_errors=True)  # an earlier tree's embedder may have other files
                shutil.copytree(tree, target)


def _router(bank: BankDescription, folder: Any, config: Any) -> ContextRouter:
    return bank.router(bank.find_tree(folder.find), DeferredTokenizer(partial(folder.tokenizer, config)))


def _leaves(session: InferenceSession, tokens: ForwardTokens, carried: Carried | None) -> Tensor:
    """Leaves [n] or [B, T], on the host."""
    if tokens.addresses is not None:
        return tokens.addresses.cpu()
    if session.controls.leaves is not None:
        return session.controls.leaves
    if carried is not None and carried.state is not None:
        return carried.state.leaves
    prompt = session.prompt_leaves()
    if prompt is not None:
        return prompt
    if tokens.continued:
        raise ValueError(
            "past_key_values holds tokens whose contexts this model has not looked up: continue a cache that this "
            "model filled, or call fetch(context) first"
        )
    if tokens.input_ids is None:
        raise ValueError("a bank looks up token ids: give input_ids or addresses, or call fetch(context) first")
    return session.route(as_contexts(tokens.input_ids, tokens.present))


def _spread(leaves: Tensor, batch: int) -> Tensor:
    """Leaves [n] repeated for a batch, each for B / n consecutive sequences; int64 [B]."""
    if batch % len(leaves):
        raise ValueError(
            f"{len(leaves)} contexts were fetched, but {batch} sequences are given: fetch the contexts of these "
            "sequences, or call forget()"
        )
    return leaves.repeat_interleave(batch // len(leaves))
