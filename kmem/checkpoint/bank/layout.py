"""The bank of a checkpoint for use in one process: its tree is checked, its rows stay in the checkpoint's files."""

from pathlib import Path

from kmem.checkpoint.pieces import CheckpointError
from kmem.checkpoint.reader import CheckpointReader
from kmem.data.bank_addresses import tree_record
from kmem.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from kmem.model.bank_export import TREE_FOLDER
from kmem.model.bank_layout import BankLayout
from kmem.model.bank_router import ContextRouter


def bank_layout(reader: CheckpointReader) -> BankLayout:
    """The layout of a checkpoint's bank.

    Raises:
        CheckpointError: it has no bank.
    """
    if reader.config.model.bank is None:
        raise CheckpointError(f"{reader.folder}: has no bank (model.bank)")
    return BankLayout.of(reader.config.model.shape)


def checkpoint_tree(reader: CheckpointReader, given: Path | None = None) -> Path:
    """The folder of the tree that a checkpoint's bank was trained with.

    Args:
        given: `--tree`; default: `tree` in the run folder, else the tree that addressed the run's data.

    Raises:
        CheckpointError: there is no tree, it is another tree, or it belongs to another tokenizer.
    """
    layout = BankLayout.of(reader.config.model.shape)
    folder = given or _known_tree(reader)
    record = tree_record(folder)
    try:
        layout.check_tree(record, folder)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if reader.tree is not None and record["fingerprint"] != reader.tree:
        raise CheckpointError(
            f"{folder}: not the tree that {reader.folder} was trained with ({record['fingerprint'][:12]} instead of "
            f"{reader.tree[:12]}): its leaves or its embedder differ; name the tree of the training data with --tree"
        )
    check_tokenizer_of_tree(folder, reader.tokenizer_path, "name the tree of the training data with --tree")
    return folder


def check_tokenizer_of_tree(tree: Path, tokenizer: Path, remedy: str) -> None:
    """Refuse a tree whose embedder counts ids of another tokenizer, if it counts any and the tokenizer exists.

    Raises:
        CheckpointError: names both.
    """
    counted = tree_record(tree).get("tokenizer")
    if counted is not None and tokenizer.is_dir():
        fingerprint = tokenizer_fingerprint(tokenizer)
        if fingerprint != counted:
            raise CheckpointError(
                f"{tree}: its embedder counts token ids of another tokenizer ({counted[:12]}) than {tokenizer} "
                f"({fingerprint[:12]}); {remedy}"
            )


def _known_tree(reader: CheckpointReader) -> Path:
    own, addresses = reader.run_folder / TREE_FOLDER, reader.config.data.addresses
    candidates = [own] if addresses is None else [own, Path(addresses.tree).expanduser()]
    for folder in candidates:
        if folder.is_dir():
            return folder
    looked = " and ".join(map(str, candidates))
    raise CheckpointError(
        f"{reader.folder}: the cluster tree of its bank was looked for in {looked}, and is not there; name the tree of "
        "the training data with --tree"
    )


def checkpoint_router(reader: CheckpointReader, given: Path | None = None) -> ContextRouter:
    """The tree of a checkpoint's bank, with its embedder.

    Raises:
        CheckpointError: as `checkpoint_tree`, or the embedder is damaged.
    """
    folder = checkpoint_tree(reader, given)
    try:
        return ContextRouter.load(folder, load_tokenizer(reader.tokenizer_path))
    except ValueError as error:
        raise CheckpointError(str(error)) from error
