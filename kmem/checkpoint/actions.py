"""Actions of the commands that list and edit what a checkpoint holds."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kmem.checkpoint.reader import CheckpointReader


def add_action(actions: Any, name: str, summary: str) -> argparse.ArgumentParser:
    """The parser of an action that reads a checkpoint."""
    description = f"{summary[0].upper()}{summary[1:]}."
    parser: argparse.ArgumentParser = actions.add_parser(name, help=summary, description=description)
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="RUN", help="run folder or one of its steps")
    return parser


def open_verified(path: Path) -> "CheckpointReader":
    """A checkpoint whose files match their digests."""
    from kmem.checkpoint.reader import CheckpointReader

    reader = CheckpointReader(path)
    reader.verify()
    return reader
