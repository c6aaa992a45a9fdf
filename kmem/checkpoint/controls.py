"""Controls: an evaluation replaces what a memory reads, to show whether the model gains from what it stores.

`ModelKind.controls` lists the controls of each kind. A control is written KIND=CHOICE, such as `engram=off`.
"""

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kmem.checkpoint.bank.options import BankOptions
from kmem.config import ConfigError

if TYPE_CHECKING:
    from kmem.model.shape import Shape


@dataclass(frozen=True)
class Choices:
    """Controls of a model's memories, and how its bank is used."""

    controls: Mapping[str, str] = field(default_factory=dict)
    """Kind -> control. Kinds that are not named read as in training."""
    bank: BankOptions = field(default_factory=BankOptions)

    def given(self, shape: "Shape") -> dict[str, str]:
        """Kind -> control, for every kind that the model has."""
        from kmem.model.memory_kinds import kinds_of

        return {kind.name: self.controls.get(kind.name, kind.trained_control(shape)) for kind in kinds_of(shape)}


def add_control_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of commands that evaluate or run a model with memories."""
    parser.add_argument(
        "--control", action="append", default=[], metavar="KIND=CHOICE",
        help="replace what a memory (model.KIND) reads: KIND=off (layers run without it), KIND=shuffled (every look-up "
        "reads another one's row), engram=single-row (all n-grams read the first row of a head); a bank has instead "
        "bank=generic (generic blocks), bank=none (no blocks), bank=blocked (blocks of the next nearest clusters), "
        "bank=fetched",
    )  # fmt: skip


def parse_controls(words: Iterable[str], option: str) -> dict[str, str]:
    """Kind -> choice.

    Raises:
        ConfigError: names the option and the word that is not KIND=CHOICE, or the kind that is named twice.
    """
    controls: dict[str, str] = {}
    for word in words:
        kind, joined, choice = word.partition("=")
        if not (kind and joined and choice):
            raise ConfigError(f"{option} {word}: write KIND=CHOICE, such as engram=off")
        if kind in controls:
            raise ConfigError(f"{option} {word}: {kind} has two controls; give each kind at most one")
        controls[kind] = choice
    return controls


def check_controls(controls: Mapping[str, str], shape: "Shape", option: str) -> None:
    """Check that the model has these kinds of memory and that they have these controls.

    Raises:
        ConfigError: names the option and the valid choices.
    """
    from kmem.model.memory_kinds import KINDS, kinds_of

    own = {kind.name: kind for kind in kinds_of(shape)}
    for name, choice in controls.items():
        if name not in KINDS:
            raise ConfigError(f"{option} {name}={choice}: unknown kind of memory; the kinds are {', '.join(KINDS)}")
        if name not in own:
            raise ConfigError(f"{option} {name}={choice}: the model has no {name} (model.{name})")
        try:
            own[name].check_control(shape, choice)
        except ValueError as error:
            raise ConfigError(f"{option} {name}={choice}: {error}") from None


def all_controls(shape: "Shape") -> list[dict[str, str]]:
    """Every control of the model, one at a time."""
    from kmem.model.memory_kinds import kinds_of

    return [{kind.name: choice} for kind in kinds_of(shape) for choice in kind.telling_controls(shape)]


def control_name(controls: Mapping[str, str]) -> str:
    """The controls as users write them; "trained" if there are none."""
    return ",".join(f"{kind}={choice}" for kind, choice in controls.items()) or "trained"
