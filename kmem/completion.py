"""Completion of `kmem` commands in a shell, by argcomplete: `eval "$(register-python-argcomplete kmem)"`."""

import argparse
import importlib
import os
from collections.abc import Sequence

import argcomplete

from kmem.cli import COMMANDS, Table
from kmem.config import packaged_configs


def complete() -> None:
    """Answer the shell that asks for completions of the environment's COMP_LINE, and end the process."""
    words = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])].split()
    parser = argparse.ArgumentParser(prog="kmem", allow_abbrev=False)
    _add_commands(parser, COMMANDS, words[1:])
    argcomplete.autocomplete(parser)


def _add_commands(parser: argparse.ArgumentParser, commands: Table, words: Sequence[str]) -> None:
    """Only the command that the line names is imported."""
    added = parser.add_subparsers()
    for name, (target, purpose) in commands.items():
        inner = added.add_parser(name, help=purpose, allow_abbrev=False)
        if not words or words[0] != name:
            continue
        if not isinstance(target, str):
            _add_commands(inner, target, words[1:])
            continue
        importlib.import_module(target).add_arguments(inner)
        for action in inner._actions:
            if action.dest == "config":
                action.completer = _configs  # type: ignore[attr-defined]  # where argcomplete looks for it


def _configs(prefix: str, **_: object) -> list[str]:
    """Packaged configs and files."""
    return [*packaged_configs(), *argcomplete.completers.FilesCompleter(("yaml", "yml"))(prefix)]
