"""The place of a process among the ranks, as torchrun, deepspeed or `kmem train --nproc` set it in the environment."""

import os

from kmem.config import ConfigError


def environment_rank() -> tuple[int, int]:
    """(rank, world size); (0, 1) for a process without a launcher.

    Raises:
        ConfigError: names the variable.
    """
    rank, world = environment_number("RANK", "0"), environment_number("WORLD_SIZE", "1")
    if not 0 <= rank < world:
        raise ConfigError(f"RANK: {rank} is not one of WORLD_SIZE={world} ranks, which count from 0")
    return rank, world


def environment_number(name: str, default: str = "") -> int:
    """A variable whose value is a whole number.

    Raises:
        ConfigError: names the variable.
    """
    text = os.environ.get(name, default)
    if not text.strip().isdecimal():
        raise ConfigError(f"{name}: {text!r} in the environment is not a number; start the ranks with a launcher")
    return int(text)
