"""Options of the measuring commands, checks of their values, and what they do alike with them."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kmem.bench.contest import Contestant, run_in_turn
from kmem.config import ConfigError
from kmem.files import atomic_write


def add_contest_arguments(parser: argparse.ArgumentParser, config: str, rounds: int, steps: int, what: str) -> None:
    """The options of a command that measures contestants in turn, with their defaults; `what` is done in a step."""
    parser.add_argument("--config", default=config, help="YAML file or packaged config (default: %(default)s)")
    parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="FIELD=VALUE", dest="overrides")
    parser.add_argument("--rounds", type=int, default=rounds, help="rounds of each side in turn (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=steps, help=f"{what} per round (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each side (default: %(default)s)")
    add_record_argument(parser)


def add_record_argument(parser: argparse.ArgumentParser) -> None:
    """The option of `write_record`; a file that cannot be written is refused before anything is measured."""
    parser.add_argument("--json", type=_writable, metavar="FILE", help="also write the measurement as JSON")


def _writable(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text}: give a file in a folder that exists and can be written")
    return path


def check_positive(arguments: argparse.Namespace, *names: str) -> None:
    """Refuse given values below 1 with a ConfigError that names the option."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name}: at least 1")


def measure_in_turn(contestants: Sequence[Contestant], arguments: argparse.Namespace, warmup: int) -> None:
    """`run_in_turn` with the options of `add_contest_arguments`; stderr tells of each finished round."""
    run_in_turn(
        contestants,
        threads=arguments.threads,
        warmup=warmup,
        rounds=arguments.rounds,
        steps=arguments.steps,
        profile="profile" in arguments and arguments.profile,
        on_round=lambda number: print(f"  round {number} of {arguments.rounds}", file=sys.stderr, flush=True),
    )


def print_profile(contestant: Contestant) -> None:
    """Print the most expensive operators of a contestant, if it was profiled."""
    whole = sum(milliseconds for _, milliseconds in contestant.profile)
    for name, milliseconds in contestant.profile[:15]:
        print(f"  {milliseconds:8.2f} ms {milliseconds / whole:5.1%}  {name}")


def write_record(arguments: argparse.Namespace, record: dict[str, Any]) -> None:
    """Write a measurement to the file of `--json`, if there is one."""
    if arguments.json:
        atomic_write(arguments.json, json.dumps(record, indent=1) + "\n")
