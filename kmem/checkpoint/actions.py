"""Actions of the commands that list and edit what a checkpoint holds."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kmem.checkpoint.reader import CheckpointReader


def add_action(actions: Any, name: str, summary: str) -> argparse.ArgumentParser:
    """The parser of an action that reads a checkpoint."""
    description = f"{summary[0].upper()}{summary[1:]}."
    parser: argparse.ArgumentParser = actions.add_parser(name, help=summary, description=description)
    add_checkpoint_argument(parser)
    return parser


def add_checkpoint_argument(
    parser: argparse.ArgumentParser, metavar: str = "RUN", described: str = "run folder or one of its steps"
) -> None:
    """Add `--checkpoint`, and the option to read it without comparing its files with their digests."""
    parser.add_argument("--checkpoint", required=True, type=Path, metavar=metavar, help=described)
    parser.add_argument(
        "--no-verify", action="store_true", help="read without comparing files with their digests (kmem verify does it)"
    )


def open_checkpoint(arguments: argparse.Namespace) -> "CheckpointReader":
    """The checkpoint that the arguments name."""
    from kmem.checkpoint.reader import CheckpointReader

    reader = CheckpointReader(arguments.checkpoint, verify=not arguments.no_verify)
    if arguments.no_verify:
        print(f"{reader.folder}: not verified", file=sys.stderr)
    return reader
