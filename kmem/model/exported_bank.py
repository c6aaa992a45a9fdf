"""The memory bank of a Hugging Face folder: what its config.json says of it, and where its rows and its tree lie."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .bank_layout import BankLayout, bank_table_name, bank_table_part_name
from .cluster_tree import CENTROIDS_FILE, EMBEDDER_FOLDER, TREE_FILE, ClusterTree, read_tree_record
from .context_router import ContextRouter, embedder_files
from .exported_memory import weight_files
from .mapped_rows import MappedRows
from .shape import Shape

BANK_TABLES = r"^bank\.level\d+\.parts\."
"""Beginning of the names of the tensors that hold rows, as a pattern."""
TREE_FOLDER = "tree"


@dataclass(frozen=True)
class BankDescription:
    """Tables and tree of a model."""

    layout: BankLayout
    parts: Mapping[int, list[int]]
    """Level -> rows of each tensor of its table, in the order of the rows."""
    tree: str | None
    """Fingerprint of the tree."""

    @classmethod
    def read(cls, shape: Shape, parts: Mapping[str, list[int]], tree: str | None) -> "BankDescription":
        """The description of a model with a bank; what config.json holds.

        Raises:
            ValueError: the parts contradict `model`.
        """
        layout = BankLayout.of(shape)
        cut = {level: list(parts.get(str(level), [layout.rows(level)])) for level in layout.levels}
        for level, rows in cut.items():
            if sum(rows) != layout.rows(level) or min(rows) < 1:
                raise ValueError(
                    f"config.json: bank_parts of level {level} do not add up to the {layout.rows(level)} rows of "
                    "`model`; export the model again"
                )
        return cls(layout, cut, tree)

    def tensors(self) -> dict[str, tuple[int, int]]:
        """Name -> shape of the tensors that hold the rows."""
        return {
            bank_table_part_name(level, part): (rows, self.layout.row_values(level))
            for level, parts in self.parts.items()
            for part, rows in enumerate(parts)
        }

    def mapped(self, find: Callable[[str], str | None]) -> dict[int, MappedRows]:
        """Every level's rows in the folder's weight files.

        Args:
            find: path of a file of the folder, None where there is none.

        Raises:
            ValueError: names the file or tensor that is missing or damaged.
        """
        places = weight_files(self.tensors(), find)

        def ranges(level: int) -> Iterator[tuple[str, str, int]]:
            for part, rows in enumerate(self.parts[level]):
                name = bank_table_part_name(level, part)
                yield places[name], name, rows

        return {
            level: MappedRows.open(bank_table_name(level), self.layout.row_values(level), ranges(level))
            for level in self.parts
        }

    def check_tree(self, tree: ClusterTree | Mapping[str, Any], where: str | Path) -> None:
        """Refuse a tree whose leaves are not those that the rows were trained with.

        Raises:
            ValueError: names the tree and what differs.
        """
        record = tree.record if isinstance(tree, ClusterTree) else tree
        check_tree_shape(self.layout, record, where)
        if self.tree is not None and record["fingerprint"] != self.tree:
            raise ValueError(
                f"{where}: this is not the tree that the bank was trained with ({str(record['fingerprint'])[:12]} "
                f"instead of {self.tree[:12]}): its leaves, or its embedder, are others; bring the tree of the "
                "training data"
            )

    def find_tree(self, find: Callable[[str], str | None]) -> Path:
        """The folder of the tree, all files of which have been fetched.

        Raises:
            ValueError: names the file that is missing.
        """

        def path(file: str) -> Path:
            found = find(f"{TREE_FOLDER}/{file}")
            if found is None:
                raise ValueError(f"{TREE_FOLDER}/{file}: missing beside the weights; fetch or export the folder again")
            return Path(found)

        folder = path(TREE_FILE).parent
        record = read_tree_record(folder)
        for file in (CENTROIDS_FILE, *(f"{EMBEDDER_FOLDER}/{name}" for name in embedder_files(record, folder))):
            path(file)
        return folder

    def router(self, folder: Path, tokenizer: Any) -> ContextRouter:
        """The tree and the embedder of a folder.

        Raises:
            ValueError: damaged, or not those of this bank.
        """
        router = ContextRouter.load(folder, tokenizer)
        self.check_tree(router.tree, folder)
        return router


def check_tree_shape(layout: BankLayout, record: Mapping[str, Any], where: str | Path) -> None:
    """Refuse a tree.json of another form than the bank's.

    Raises:
        ValueError: names both.
    """
    form = (record["children"], record["levels"])
    if form != (layout.children, len(layout.ranks)):
        raise ValueError(
            f"{where}: a tree of {form[1]} levels with {form[0]} children, and the bank's has {len(layout.ranks)} with "
            f"{layout.children} (model.memory_bank); bring the tree of the training data"
        )
