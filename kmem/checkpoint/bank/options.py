"""Options of the commands that run a checkpoint's memory bank."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kmem.config import UserError

if TYPE_CHECKING:
    from kmem.model.bank_inference import InferenceBank

BANK = ("fetched", "generic", "none", "blocked")
"""What a memory bank gives contexts: the blocks of their own clusters; generic blocks; nothing; or the blocks of the
next nearest clusters, as if all of the bank that their own cluster of level 1 owns were not there."""
FETCHING = ("fetched", "blocked")
"""Of `--bank`: what looks up the clusters of contexts."""


def add_bank_arguments(parser: argparse.ArgumentParser, controls: Sequence[str]) -> None:
    """Options of commands that run a model with a memory bank.

    Args:
        controls: what `--bank` can be, the default first.
    """
    parser.add_argument(
        "--bank", choices=controls, help=f"what a memory bank gives contexts: {', '.join(controls)} (default: fetched, "
        "or generic of a model that was trained with nothing else)",
    )  # fmt: skip
    parser.add_argument(
        "--bank-levels", metavar="L,L", help="levels of a memory bank that are on, such as 1,2 (default: all)"
    )
    parser.add_argument(
        "--blocked", metavar="PATH,PATH", help="clusters of a memory bank that contexts may not use, such as 3,7.2; "
        "the next nearest take their place",
    )  # fmt: skip
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


def set_controls(bank: "InferenceBank", control: str, levels: Sequence[int] | None) -> None:
    """Give contexts what `--bank` and `--bank-levels` say.

    Raises:
        UserError: names the option that does not go with this bank.
    """
    try:
        bank.choose(control, None)
    except ValueError as error:
        raise UserError(f"--bank {control}: {error}") from None
    try:
        bank.choose(control, levels)
    except ValueError as error:
        raise UserError(f"--bank-levels {','.join(map(str, levels or ()))}: {error}") from None


def blocked_clusters(text: str | None, control: str | None) -> tuple[tuple[int, ...], ...]:
    """Paths of `--blocked`; whether the tree has them is for the bank to say.

    Args:
        control: what `--bank` says, None for its default.

    Raises:
        UserError: not paths joined by commas, or `--bank` fetches nothing that could be blocked.
    """
    if text is None:
        return ()
    from kmem.model.bank_tree import parse_path

    if control not in (None, *FETCHING):
        raise UserError(f"--blocked {text}: --bank {control} looks up no clusters; leave one of them out")
    try:
        return tuple(parse_path(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"--blocked {text}: {error}") from None
