"""How memories go into Hugging Face folders and come out of them, and how the rows of a checkpoint are read in one
process."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kmem.checkpoint.bank.layout import check_tokenizer_of_tree, checkpoint_router, checkpoint_tree
from kmem.checkpoint.engram.rows import checkpoint_addresses
from kmem.checkpoint.manifest import check_addressing
from kmem.checkpoint.reader import CheckpointReader
from kmem.clustering.encoder_folder import LICENCES
from kmem.clustering.tree_folder import copy_tree
from kmem.config import ModelConfig, UserError
from kmem.data.bank_addresses import tree_record
from kmem.data.engram_addresses import model_addresses
from kmem.data.tokenizer import load_tokenizer
from kmem.hf.custom_code import embedder_class, write_embedder
from kmem.model.bank_embedder import read_embedder_record
from kmem.model.bank_export import TREE_FOLDER, ExportedBank
from kmem.model.bank_tree import EMBEDDER_FOLDER, read_tree_record
from kmem.model.decoder import Decoder
from kmem.model.engram_export import COMPRESSION, ExportedEngram
from kmem.model.export_tables import RowSource
from kmem.model.exported_memory import ExportedMemory, modules_of
from kmem.model.memory_kind import ModelKind
from kmem.model.parameter_counts import ParameterCounts


@dataclass(frozen=True)
class FolderParts:
    """What a memory needs in a folder besides its rows."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    """The fields of config.json that `ModelKind.exported_fields` names."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """The tensors of `ModelKind.exported_tensors`."""
    card: Callable[[ParameterCounts], str] | None = None
    """A paragraph of the README."""
    write: Callable[[Path], None] | None = None
    """Write further files into the folder, after the model's code."""
    notes: tuple[str, ...] = ()
    """What the user should know about those files."""


class MemoryFolder:
    """How a kind of memory goes into folders and comes out of them. This base is for kinds whose rows need nothing
    else."""

    takes_tree = False
    """Whether it takes the folder of a cluster tree (`--tree`)."""

    def __init__(self, kind: ModelKind) -> None:
        self.kind = kind

    def described(self, reader: CheckpointReader) -> FolderParts:
        """Fields and tensors of a checkpoint's memory.

        Raises:
            CheckpointError: what addresses its rows is missing, or another than it was trained with.
        """
        return FolderParts()

    def exported(self, reader: CheckpointReader, tree: Path | None) -> FolderParts:
        """As `described`, with everything else that an export needs."""
        return replace(self.described(reader), card=partial(table_card, self.kind))

    def open(self, reader: CheckpointReader, memory: ExportedMemory, tree: Path | None) -> None:
        """Let a memory read the rows of the checkpoint, which stay in its mapped files."""
        rows = self.kind.exported_rows(memory.shape)
        tables = {key: [reader.map_rows(name) for name in table.columns] for key, table in rows.items()}
        memory.use(
            {key: parts[0] if len(parts) == 1 else partial(_side_by_side, parts) for key, parts in tables.items()}
        )

    def imported(self, source: Path, memory: ExportedMemory, model: ModelConfig, run: Path) -> dict[str, Any] | None:
        """The manifest of the rows of a folder, for a run with this model. Its tokenizer has been copied to the run.

        Raises:
            UserError: what addresses the rows is missing, or another than they were trained with.
        """
        return None


class EngramFolder(MemoryFolder):
    """Rows are addressed by n-grams of the tokenizer's ids."""

    def described(self, reader: CheckpointReader) -> FolderParts:
        addresses = checkpoint_addresses(reader)
        compression = addresses.compression
        return FolderParts(
            {"addressing": addresses.addressing.to_manifest()},
            {} if compression is None else {COMPRESSION: compression.lookup},
        )

    def imported(self, source: Path, memory: ExportedMemory, model: ModelConfig, run: Path) -> dict[str, Any] | None:
        assert isinstance(memory, ExportedEngram)
        tokenizer, manifest = run / "tokenizer", memory.addressing.to_manifest()
        if not tokenizer.is_dir():
            raise UserError(f"{source}: has no tokenizer, but its engram's rows are addressed by one; add its files")
        check_addressing(source, manifest, model_addresses(model, tokenizer))
        return manifest


class BankFolder(MemoryFolder):
    """Rows are addressed by the leaves of a tree, which comes along with its embedder."""

    takes_tree = True

    def exported(self, reader: CheckpointReader, tree: Path | None) -> FolderParts:
        checkpoint_router(reader, tree)  # a damaged embedder is noticed here
        folder = checkpoint_tree(reader, tree)
        embedder = read_embedder_record(folder / EMBEDDER_FOLDER)
        embedder_class(embedder["name"])

        def write(out: Path) -> None:
            copy_tree(folder, out / TREE_FOLDER)
            write_embedder(out, embedder["name"])

        notes: tuple[str, ...] = ()
        if embedder.get("licences") == []:
            notes = (f"{TREE_FOLDER}/{EMBEDDER_FOLDER}: the encoder {embedder['encoder']} has no LICENSE file",)
        return FolderParts(
            {"tree": tree_record(folder)["fingerprint"]},
            card=partial(bank_card, folder),
            write=write,
            notes=notes,
        )

    def open(self, reader: CheckpointReader, memory: ExportedMemory, tree: Path | None) -> None:
        assert isinstance(memory, ExportedBank)
        super().open(reader, memory, tree)
        memory.contexts.router = partial(checkpoint_router, reader, tree)

    def imported(self, source: Path, memory: ExportedMemory, model: ModelConfig, run: Path) -> dict[str, Any] | None:
        assert isinstance(memory, ExportedBank)
        folder, tokenizer = source / TREE_FOLDER, run / "tokenizer"
        if not folder.is_dir():
            raise UserError(
                f"{folder}: missing, but this tree addresses the bank's rows; fetch or export the folder again"
            )
        try:
            memory.description.router(folder, load_tokenizer(tokenizer) if tokenizer.is_dir() else None)
            copy_tree(folder, run / TREE_FOLDER)
        except ValueError as error:
            raise UserError(str(error)) from error
        check_tokenizer_of_tree(folder, tokenizer, "fetch or export the folder again")
        return tree_record(folder)


_FOLDERS: dict[str, type[MemoryFolder]] = {"engram": EngramFolder, "bank": BankFolder}


def folder_of(kind: ModelKind) -> MemoryFolder:
    """How this kind goes into folders and comes out of them."""
    return _FOLDERS.get(kind.name, MemoryFolder)(kind)


def open_memory(
    reader: CheckpointReader, kind: ModelKind, decoder: Decoder, tree: Path | None = None
) -> tuple[ExportedMemory, Mapping[str, Tensor]]:
    """(a memory of a checkpoint, for the modules of this decoder; the tensors of `ModelKind.exported_tensors`).

    Raises:
        CheckpointError: as `MemoryFolder.described`, or a file is missing or damaged.
    """
    shape, folder = reader.config.model.shape, folder_of(kind)
    parts = folder.described(reader)
    memory = kind.exported(kind, shape, parts.fields)
    memory.attach(modules_of(decoder.layers, kind, shape))
    folder.open(reader, memory, tree)
    return memory, parts.tensors


def _side_by_side(tables: Sequence[RowSource], rows: Tensor) -> Tensor:
    """Rows of tables that are joined into one."""
    return torch.cat([table(rows) for table in tables], dim=-1)


def table_card(kind: ModelKind, counts: ParameterCounts) -> str:
    """The paragraph of the README on a memory whose tokens read a few rows."""
    rows = counts.components[f"{kind.name}_table"]
    return (
        f"Of its parameters {rows:,} are rows of {kind.title}; a token reads a few of them. With "
        '`tables="mmap"` in `from_pretrained` the rows stay in the weight files.'
    )


def bank_card(tree: Path, counts: ParameterCounts) -> str:
    """The bank's paragraph of the README; `tree` is the folder of its tree."""
    generic = counts.components.get("generic", 0)
    embedder = str(read_tree_record(tree)["embedder"]["name"])
    beside = (path.name for path in (tree / EMBEDDER_FOLDER).iterdir())
    licences = [f"`{name}`" for name in sorted(beside) if name.upper().startswith(LICENCES)]
    return (
        f"Of its parameters {counts.anchor:,} are the anchor, the model without memory, and "
        f"{counts.components['bank']:,} are a memory bank: blocks of parameters, one block for each cluster of contexts"
        + (f"; {generic:,} more are generic blocks, which belong to no cluster" if generic else "")
        + f". A context fetches {counts.fetched:,} of the bank's parameters: `generate` fetches for its prompts, "
        "`model.fetch(context)` for contexts that you name. Blocks stay in the weight files until they are fetched. "
        f"`{TREE_FOLDER}/` holds the clusters and the embedder of contexts, {embedder}"
        + (f", with its licence: {', '.join(licences)} in `{TREE_FOLDER}/{EMBEDDER_FOLDER}/`" if licences else "")
        + "."
    )
