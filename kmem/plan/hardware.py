"""Devices and their links as their makers publish them, and the shares of these that programs reach."""

from dataclasses import dataclass, replace

from kmem.config import ConfigError


@dataclass(frozen=True)
class Hardware:
    """One device, and what connects it. All rates are per second, in FLOP or bytes."""

    name: str
    flop: float
    """Dense products of the training precision."""
    memory: float
    """The device's memory, reads and writes together."""
    per_node: int
    node_link: float
    """Between devices of a node, in one direction."""
    network: float
    """Between nodes, in one direction, per device."""
    bus: float
    """Between a device and host memory, in one direction."""
    host_memory: float
    """Memory of the host, per device: reads and writes together."""
    bytes: int
    """Of the device's memory."""


DEVICES = {
    # NVIDIA's data sheets (SXM modules, dense bf16), and DGX systems for what is around them.
    "a100": Hardware("a100", 312e12, 2.04e12, 8, 300e9, 25e9, 32e9, 51e9, 80 * 10**9),
    "h100": Hardware("h100", 989e12, 3.35e12, 8, 450e9, 50e9, 64e9, 76e9, 80 * 10**9),
    "h200": Hardware("h200", 989e12, 4.8e12, 8, 450e9, 50e9, 64e9, 76e9, 141 * 10**9),
    "b200": Hardware("b200", 2250e12, 8e12, 8, 900e9, 50e9, 64e9, 76e9, 180 * 10**9),
}


@dataclass(frozen=True)
class Shares:
    """Assumptions: the shares of published rates that are reached. None of them is measured here."""

    products: float = 0.65
    """Of the FLOP, by large matrix products."""
    grouped: float = 0.5
    """Of the FLOP, by grouped products of experts."""
    attention: float = 0.45
    """Of the FLOP, by fused attention, forward and backward together."""
    memory: float = 0.75
    """Of the device's memory, by operators that are bound by it."""
    links: float = 0.75
    """Of links, network and bus."""
    host: float = 0.3
    """Of the host's memory, by gathers and updates of rows."""
    launch: float = 6e-6
    """Seconds of the host per operator; device time that is shorter than this does not count."""


def find_hardware(name: str) -> Hardware:
    """`h100x8`: nodes of 8 of the known devices; the number may be left out.

    Raises:
        ConfigError: the name is unknown.
    """
    device, _, number = name.lower().partition("x")
    if device not in DEVICES or (number and not (number.isdigit() and int(number) > 0)):
        raise ConfigError(f"--hardware {name}: name one of {', '.join(DEVICES)}, then x and the devices of a node")
    return replace(DEVICES[device], name=name, per_node=int(number or DEVICES[device].per_node))
