"""`kmem eval`: held-out loss of a checkpoint, or how it answers questions, in one process."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kmem.checkpoint.bank.options import BANK, add_bank_arguments, blocked_clusters, chosen_levels
from kmem.config import ConfigError

if TYPE_CHECKING:
    from kmem.checkpoint.reader import CheckpointReader
    from kmem.eval.bank import BankChoice

MEMORY = ("on", "off", "shuffled", "single-row")
"""What a model's n-gram memory gives it; all but `on` are controls: does memory act as memory?"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="PATH", help="run folder or one of its steps")
    parser.add_argument(
        "--data", nargs="+", metavar="FOLDER", help="prepared folders (default: those the run was trained on)"
    )
    parser.add_argument("--sequences", type=int, metavar="N", help="at most N sequences per folder (default: all)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="sequences per forward pass (default: 8)")
    parser.add_argument(
        "--memory", choices=MEMORY, default="on",
        help="n-gram memory on (default); off: layers go without; shuffled: every n-gram reads another one's row; "
        "single-row: all read the first row of a head",
    )  # fmt: skip
    add_bank_arguments(parser, BANK)
    parser.add_argument(
        "--questions", type=Path, metavar="FILE",
        help="instead of the held-out loss: how often the model continues a prompt by the answer, by how often its "
        "text said so (JSON lines, as `kmem data corpora gazetteer` writes them)",
    )  # fmt: skip
    parser.add_argument(
        "--questions-limit", type=int, metavar="N", help="of --questions: ask at most N, a sample that is the same "
        "each time and has as many of every group of exposures (default: all)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(arguments: argparse.Namespace) -> int:
    if arguments.batch < 1 or (arguments.sequences is not None and arguments.sequences < 1):
        raise ConfigError("--batch and --sequences: at least 1")
    if arguments.questions_limit is not None and arguments.questions is None:
        raise ConfigError("--questions-limit: goes with --questions; --sequences is for the held-out loss")
    from kmem.checkpoint.reader import CheckpointReader  # torch and all that evaluates: not for `--help`
    from kmem.eval.checkpoint import held_out_figures

    reader = CheckpointReader(arguments.checkpoint)
    reader.verify()
    trained_on = reader.config.data
    if arguments.memory != "on" and reader.config.model.engram is None:
        raise ConfigError(f"--memory {arguments.memory}: the model has no n-gram memory (model.engram)")
    bank = _bank_choice(reader, arguments)
    if arguments.questions is not None:
        if arguments.data or arguments.sequences:
            raise ConfigError("--questions: goes without --data and --sequences, which are for the held-out loss")
        return _ask(reader, arguments, bank)
    folders = arguments.data or [source.path for source in trained_on.sources]
    figures = held_out_figures(reader, folders, arguments.memory, arguments.sequences, arguments.batch, bank)
    control = _controls(reader, arguments.memory, bank)
    if arguments.json:
        print(json.dumps({"checkpoint": str(reader.folder), "step": reader.step, **control, "held_out": figures}))
    else:
        _print_table(reader, figures, control)
    return 0


def _bank_choice(reader: "CheckpointReader", arguments: argparse.Namespace) -> "BankChoice | None":
    """How the model's memory bank is evaluated, None for a model without."""
    from kmem.eval.bank import BankChoice

    levels, blocked = chosen_levels(arguments.bank_levels), blocked_clusters(arguments.blocked, arguments.bank)
    if reader.config.model.bank is not None:
        default = "fetched" if blocked else reader.config.model.bank.default_control
        chosen = arguments.bank or default
        return BankChoice(chosen, levels, arguments.tree, blocked)
    if (arguments.bank, levels, arguments.tree, blocked) != (None, None, None, ()):
        raise ConfigError("--bank, --bank-levels, --blocked and --tree: the model has no memory bank (model.bank)")
    return None


def _controls(reader: "CheckpointReader", memory: str, bank: "BankChoice | None") -> dict[str, Any]:
    """What the model's memories give it."""
    from kmem.model.bank_tree import format_path

    found: dict[str, Any] = {} if reader.config.model.engram is None else {"memory": memory}
    if bank is not None:
        found["bank"] = bank.control
        if bank.levels is not None:
            found["bank_levels"] = list(bank.levels)
        if bank.blocked:
            found["blocked"] = [format_path(path) for path in bank.blocked]
    return found


def _ask(reader: "CheckpointReader", arguments: argparse.Namespace, choice: "BankChoice | None") -> int:
    """Print how the model answers a file of questions."""
    from kmem.eval.checkpoint import answered

    limit = arguments.questions_limit
    answers = answered(reader, arguments.questions, arguments.memory, arguments.batch, choice, limit)
    control = _controls(reader, arguments.memory, choice)
    if arguments.json:
        tree = {"checkpoint": str(reader.folder), "step": reader.step, **control}
        print(json.dumps({**tree, "questions": [asdict(group) for group in answers]}))
        return 0
    sampled = answers[-1].questions < answers[-1].of
    rows = [
        (
            group.group,
            f"{group.questions:,}" + (f" of {group.of:,}" if sampled else ""),
            f"{group.right:.1%}",
            f"{group.bits:.2f}",
        )
        for group in answers
    ]
    _print(
        f"{arguments.questions.name}, answered by {reader.folder}",
        control,
        ("exposures", "questions", "right", "bits per answer"),
        rows,
    )
    if sampled:
        print("a sample of the questions, the same each time; in `all`, groups weigh what they do in the file")
    return 0


def _print_table(reader: "CheckpointReader", figures: dict[str, dict[str, float]], control: dict[str, Any]) -> None:
    rows = [
        (
            folder,
            f"{row['bits_per_byte']:.4f}",
            f"{row['loss']:.4f}",
            f"{row['perplexity']:.2f}",
            f"{row['tokens']:,}",
        )
        for folder, row in figures.items()
    ]
    columns = ("data", "bits per byte", "loss", "perplexity", "tokens")
    _print(f"held-out loss of {reader.folder}", control, columns, rows)


def _print(subject: str, control: dict[str, Any], columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table below its subject, whose long paths a title would break into lines of the table's width."""
    from rich.console import Console
    from rich.table import Table

    def text(value: Any) -> str:
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

    print(subject)
    if control:
        print("; ".join(f"{name.replace('_', ' ')} {text(value)}" for name, value in control.items()))
    table = Table(*columns)
    table.columns[0].overflow = "fold"  # a path is folded, the numbers stay whole
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for row in rows:
        table.add_row(*row)
    Console().print(table)
