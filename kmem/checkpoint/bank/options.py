"""Options of the commands that run a model with a bank."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kmem.config import UserError

if TYPE_CHECKING:
    from kmem.model.bank_inference import InferenceBank
    from kmem.model.bank_tree import ClusterPath

FETCHING = (None, "fetched", "blocked")
"""Controls of a bank under which contexts look up clusters."""


@dataclass(frozen=True)
class BankOptions:
    """How a bank is used, under any control."""

    levels: tuple[int, ...] | None = None
    """Levels in use; None: all."""
    blocked: "tuple[ClusterPath, ...]" = ()
    """Clusters that contexts may not use; the next nearest take their place."""
    tree: Path | None = None
    """Folder of the tree; None: the tree of the run or export."""

    def chosen(self) -> dict[str, list[Any]]:
        """`bank_levels` and `blocked` as plain data, without defaults."""
        from kmem.model.bank_tree import format_path

        levels = {} if self.levels is None else {"bank_levels": list(self.levels)}
        return levels | ({"blocked": [format_path(path) for path in self.blocked]} if self.blocked else {})


def add_bank_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of commands that run a model with a bank."""
    parser.add_argument("--bank-levels", metavar="L,L", help="levels of a bank to use, such as 1,2 (default: all)")
    parser.add_argument(
        "--blocked", metavar="PATH,PATH", help="clusters of a bank that contexts may not use, such as 3,7.2; "
        "the next nearest take their place",
    )  # fmt: skip
    parser.add_argument(
        "--tree", type=Path, metavar="TREE", help="cluster tree of a run's bank (default: the run's own)"
    )


def bank_options(levels: str | None, blocked: str | None, tree: Path | None, control: str | None) -> BankOptions:
    """Parse `--bank-levels`, `--blocked` and `--tree`. Whether the bank has these levels and clusters is checked later.

    Args:
        control: control of the bank; None: as it was trained.

    Raises:
        UserError: names the option.
    """
    if levels is not None and not all(part.strip().isdecimal() for part in levels.split(",")):
        raise UserError(f"--bank-levels {levels}: write levels joined by commas, such as 1,2")
    chosen = None if levels is None else tuple(int(part) for part in levels.split(","))
    if blocked is None:
        return BankOptions(chosen, (), tree)
    from kmem.model.bank_tree import parse_path

    if control not in FETCHING:
        raise UserError(f"--blocked {blocked}: --control bank={control} looks up no clusters; leave one of them out")
    try:
        return BankOptions(chosen, tuple(parse_path(part) for part in blocked.split(",")), tree)
    except ValueError as error:
        raise UserError(f"--blocked {blocked}: {error}") from None


def set_controls(bank: "InferenceBank", control: str, levels: Sequence[int] | None) -> None:
    """Set the control and the levels of a bank.

    Raises:
        UserError: names the option that does not fit this bank.
    """
    try:
        bank.choose(control, None)
    except ValueError as error:
        raise UserError(f"--control bank={control}: {error}") from None
    try:
        bank.choose(control, levels)
    except ValueError as error:
        raise UserError(f"--bank-levels {','.join(map(str, levels or ()))}: {error}") from None
