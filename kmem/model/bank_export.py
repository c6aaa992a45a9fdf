"""The bank of a Hugging Face folder: its description in config.json, and the files of its rows and its tree."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .bank_layout import BankLayout, bank_table_name, bank_table_part_name
from .bank_router import ContextRouter, embedder_files
from .bank_tree import CENTROIDS_FILE, EMBEDDER_FOLDER, TREE_FILE, ClusterTree, read_tree_record
from .export_tables import ExportedTable, read_parts
from .shape import Shape

BANK_TABLES = r"^bank\.level\d+\.parts\."
"""Regular expression for the start of the names of the tensors that hold rows."""
TREE_FOLDER = "tree"


@dataclass(frozen=True)
class BankDescription:
    """The bank's tables and tree, as config.json describes them."""

    layout: BankLayout
    parts: Mapping[int, list[int]]
    """Level -> rows of each tensor of its table, in the order of the rows."""
    tree: str | None
    """Fingerprint of the tree."""

    @classmethod
    def read(cls, shape: Shape, parts: Mapping[str, list[int]], tree: str | None) -> "BankDescription":
        """The description of a model with a bank, from the contents of config.json.

        Raises:
            ValueError: the parts contradict `model`.
        """
        layout = BankLayout.of(shape)
        cut = {
            level: read_parts(parts.get(str(level)), layout.rows(level), "bank_parts", f"level {level}")
            for level in layout.levels
        }
        return cls(layout, cut, tree)

    def tables(self) -> dict[int, ExportedTable]:
        """Level -> its table in the folder."""
        return {
            level: ExportedTable.cut(
                bank_table_name(level), self.layout.row_values(level), parts, partial(bank_table_part_name, level)
            )
            for level, parts in self.parts.items()
        }

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
