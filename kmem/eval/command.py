"""`kmem eval`: held-out loss of a checkpoint, or its answers to questions, in one process."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kmem.checkpoint.actions import add_checkpoint_argument, open_checkpoint
from kmem.checkpoint.bank.options import add_bank_arguments, bank_options
from kmem.checkpoint.controls import (
    Choices,
    add_control_arguments,
    all_controls,
    check_controls,
    control_name,
    parse_controls,
)
from kmem.config import ConfigError

if TYPE_CHECKING:
    from kmem.checkpoint.reader import CheckpointReader

Figures = dict[str, dict[str, float]]
"""Prepared folder -> figures."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_argument(parser, "PATH", "run folder or one of its steps")
    parser.add_argument(
        "--data", nargs="+", metavar="FOLDER", help="prepared folders (default: the folders the run was trained on)"
    )
    parser.add_argument("--sequences", type=int, metavar="N", help="at most N sequences per folder (default: all)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="sequences per forward pass (default: 8)")
    add_control_arguments(parser)
    parser.add_argument(
        "--controls", choices=("all",), help="evaluate as trained, then with every control that the model has"
    )
    add_bank_arguments(parser)
    parser.add_argument(
        "--questions", type=Path, metavar="FILE",
        help="instead of the held-out loss: how often the model continues a prompt with the answer, by how often its "
        "text told it (JSON lines, as `kmem data corpora gazetteer` writes them)",
    )  # fmt: skip
    parser.add_argument(
        "--questions-limit", type=int, metavar="N", help="with --questions: ask at most N, the same sample each "
        "time, with equally many of every group of exposures (default: all)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(arguments: argparse.Namespace) -> int:
    if arguments.batch < 1 or (arguments.sequences is not None and arguments.sequences < 1):
        raise ConfigError("--batch and --sequences: at least 1")
    if arguments.questions_limit is not None and arguments.questions is None:
        raise ConfigError("--questions-limit: needs --questions; --sequences is for the held-out loss")
    if arguments.controls and (arguments.control or arguments.questions):
        raise ConfigError("--controls: cannot be combined with --control or --questions")
    controls = parse_controls(arguments.control, "--control")
    from kmem.eval.checkpoint import held_out_figures  # imports torch, which `--help` does not need

    reader = open_checkpoint(arguments)
    shape, trained_on = reader.config.model.shape, reader.config.data
    check_controls(controls, shape, "--control")
    bank = bank_options(arguments.bank_levels, arguments.blocked, arguments.tree, controls.get("bank"))
    if bank != type(bank)() and reader.config.model.bank is None:
        raise ConfigError("--bank-levels, --blocked and --tree: the model has no bank (model.bank)")
    choices = Choices(controls, bank)
    given = choices.given(shape)
    described = {"checkpoint": str(reader.folder), "step": reader.step, "memories": given, **bank.chosen()}
    if arguments.questions is not None:
        if arguments.data or arguments.sequences:
            raise ConfigError(
                "--questions: cannot be combined with --data or --sequences, which are for the held-out loss"
            )
        _ask(reader, arguments, choices, described)
        return 0
    folders = arguments.data or [source.path for source in trained_on.sources]

    def figures_of(chosen: Mapping[str, str]) -> Figures:
        return held_out_figures(reader, folders, Choices(chosen, bank), arguments.sequences, arguments.batch)

    held_out = figures_of(controls)
    controlled = {
        control_name(control): figures_of(control) for control in (all_controls(shape) if arguments.controls else ())
    }
    if arguments.json:
        print(json.dumps(described | {"held_out": held_out} | ({"controls": controlled} if arguments.controls else {})))
    else:
        rows = [
            (
                folder,
                f"{row['bits_per_byte']:.4f}",
                f"{row['loss']:.4f}",
                f"{row['perplexity']:.2f}",
                f"{row['tokens']:,}",
            )
            for folder, row in held_out.items()
        ]
        columns = ("data", "bits per byte", "loss", "perplexity", "tokens")
        _print(f"held-out loss of {reader.folder}", given | bank.chosen(), columns, rows)
        if arguments.controls:
            _print_controls(held_out, controlled)
    return 0


def _ask(
    reader: "CheckpointReader", arguments: argparse.Namespace, choices: Choices, described: Mapping[str, Any]
) -> None:
    """Print how the model answers a file of questions."""
    from kmem.eval.checkpoint import answered

    answers = answered(reader, arguments.questions, choices, arguments.batch, arguments.questions_limit)
    if arguments.json:
        print(json.dumps({**described, "questions": [asdict(group) for group in answers]}))
        return
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
        described["memories"] | choices.bank.chosen(),
        ("exposures", "questions", "right", "bits per answer"),
        rows,
    )
    if sampled:
        print("a sample of the questions, the same each time; in `all`, groups have the weights of the whole file")


def _print_controls(trained: Figures, controlled: Mapping[str, Figures]) -> None:
    """Bits per byte of every control, and how much worse that is than the model as it was trained."""
    rows = []
    for control, figures in controlled.items():
        for folder, row in figures.items():
            worse = row["bits_per_byte"] - trained[folder]["bits_per_byte"]
            rows.append((control, folder, f"{row['bits_per_byte']:.4f}", f"{worse:+.4f}"))
    if not rows:
        print("controls: the model has no memory")
        return
    _print("controls", {}, ("control", "data", "bits per byte", "minus as trained"), rows)


def _print(subject: str, given: Mapping[str, Any], columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table below its subject. A title of the table would break long paths at the table's width."""
    from rich.console import Console
    from rich.table import Table

    print(subject)
    if given:
        words = {
            name: ", ".join(map(str, value)) if isinstance(value, list) else value for name, value in given.items()
        }
        print("; ".join(f"{name.replace('_', ' ')} {value}" for name, value in words.items()))
    table = Table(*columns)
    for column in table.columns:
        if column.header == "data":
            column.overflow = "fold"  # a path is folded, the numbers stay whole
        elif column is not table.columns[0]:
            column.justify, column.no_wrap = "right", True
    for row in rows:
        table.add_row(*row)
    Console().print(table)
