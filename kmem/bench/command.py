"""`kmem bench`: speed against a named peer, both measured in one run."""

import argparse

# They import torch and what they measure when they run: `--help` takes no second.
from kmem.bench import compare_command, experts_command, fetch_command, rows_command, tables_command, train_command

COMMANDS = {
    "train": (train_command, "a training step against plain Transformers or another precision"),
    "experts": (experts_command, "a layer of experts against Transformers' own, its features and backends"),
    "rows": (rows_command, "gathers and row optimizers of tables on the host against torch's"),
    "compare": (compare_command, "models of equal budgets on the same text: loss over several seeds, with a report"),
    "fetch": (fetch_command, "fetching the blocks of a memory bank's contexts, from memory and from disk"),
    "tables": (tables_command, "a training step with large tables of rows against one with small ones"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, (command, summary) in COMMANDS.items():
        command.add_arguments(actions.add_parser(name, help=summary, description=summary))


def run(arguments: argparse.Namespace) -> int:
    command, _ = COMMANDS[arguments.what]
    return command.run(arguments)
