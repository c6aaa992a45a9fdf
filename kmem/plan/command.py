"""`kmem plan`: the time of a step on machines that one does not have, by parts, and which part to attack."""

import argparse
import json
from dataclasses import asdict

from kmem.config import ConfigError, load_config
from kmem.plan.hardware import DEVICES, Shares, find_hardware
from kmem.wording import counted, magnitude, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="YAML file, or the name of a packaged config")
    parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="FIELD=VALUE", dest="overrides")
    parser.add_argument(
        "--hardware", required=True, metavar="NAME", help=f"{', '.join(DEVICES)}; h100x8: 8 of them are a node"
    )
    parser.add_argument("--ranks", type=int, required=True, help="number of devices")
    parser.add_argument("--without-kernels", action="store_true", help="with torch code in place of kmem's kernels")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(arguments: argparse.Namespace) -> int:
    hardware, shares = find_hardware(arguments.hardware), Shares()
    if arguments.ranks < 1:
        raise ConfigError("--ranks: at least 1")
    config = load_config(arguments.config, arguments.overrides)
    from kmem.data.reader import resolve_vocab_size
    from kmem.parallel.mesh import Mesh
    from kmem.plan.prediction import predict

    config = resolve_vocab_size(config)
    data = config.data_parallel_size(arguments.ranks)
    mesh = Mesh(0, config.parallel.pipeline, data, config.parallel.expert)
    found = predict(config, mesh, hardware, shares, not arguments.without_kernels)
    if arguments.json:
        print(json.dumps({**asdict(found), "hardware": asdict(hardware), "assumed": asdict(shares)}))
        return 0
    rows = [
        [name, f"{1000 * part:,.0f}", f"{part / found.seconds:.1%}", f"{found.mfu / (1 - part / found.seconds):.1%}"]
        for name, part in found.parts.items()
        if part < found.seconds
    ]
    title = f"a step of {config.name} on {counted(arguments.ranks, 'rank')} of {hardware.name}: {mesh}"
    print_table(title, ("part", "ms", "share", "MFU without it"), rows)
    speed = found.tokens / found.seconds / mesh.world
    print(
        f"{found.seconds:.2f} s for {magnitude(found.tokens)} tokens: {speed:,.0f} tokens/s per device, "
        f"MFU {found.mfu:.1%} ({found.flop / found.seconds / mesh.world / 1e12:,.0f} TFLOP/s)"
    )
    if found.device_bytes > hardware.bytes:
        print(f"too little memory: the fullest rank needs {found.device_bytes / 1e9:.1f} GB (kmem train --dry-run)")
    necessary = ("matrix products", "products of experts", "attention")
    others = {name: part for name, part in found.parts.items() if name not in necessary}
    if others:
        print(f"largest part besides products and attention: {next(iter(others))}")
    print(
        f"Assumed, not measured: {shares.products:.0%} of the FLOP in products, {shares.grouped:.0%} in those of "
        f"experts, {shares.attention:.0%} in attention;\n"
        f"{shares.memory:.0%} of the memory rate, {shares.links:.0%} of links, {shares.host:.0%} of the host's memory "
        f"for rows; {shares.launch * 1e6:.0f} us of the host per operator.\n"
        "Nothing overlaps; experts get equally many tokens; every look-up is of another row. docs/gpu.md says more."
    )
    return 0
