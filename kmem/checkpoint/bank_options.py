"""Options of the commands that run a checkpoint's memory bank."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from kmem.config import UserError


def add_bank_arguments(parser: argparse.ArgumentParser, controls: Sequence[str]) -> None:
    """Options of commands that run a model with a memory bank.

    Args:
        controls: what `--bank` can be, the default first.
    """
    parser.add_argument(
        "--bank", choices=controls, help=f"what a memory bank gives contexts: {', '.join(controls)} (default: fetched)"
    )
    parser.add_argument(
        "--bank-levels", metavar="L,L", help="levels of a memory bank that are on, such as 1,2 (default: all)"
    )
    parser.add_argument(
        "--tree", type=Path, metavar="TREE", help="cluster tree of a run's memory bank (default: that of the run)"
    )


def chosen_levels(text: str | None) -> tuple[int, ...] | None:
    """Levels of `--bank-levels`.

    Raises:
        UserError: not numbers joined by commas.
    """
    if text is None:
        return None
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise UserError(f"--bank-levels {text}: write levels joined by commas, such as 1,2")
    return tuple(int(part) for part in text.split(","))
