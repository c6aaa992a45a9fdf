"""`kmem bench tables`: the cost of large tables to a training step, in host memory and in mapped files."""

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kmem.bench import options
from kmem.bench.contest import Contestant, ratios
from kmem.bench.machine import processor, versions
from kmem.config import Config, ConfigError, UserError, load_config, parse_config
from kmem.wording import counted, print_table

if TYPE_CHECKING:
    from kmem.train.dry_run import TableBytes

GOALS = {"host": 0.05, "mmap": 0.10}
"""Store -> largest share by which a step may be slower than with small tables."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_contest_arguments(parser, "bench/tables", rounds=7, steps=8, what="steps")
    parser.add_argument("--small-mib", type=float, default=64, help="rows and state to compare with (default: 64)")
    parser.add_argument(
        "--gib", type=float, default=8, help="rows and state in host memory; 0 leaves this out (default: 8)"
    )
    parser.add_argument(
        "--mapped-gib", type=float, default=32, help="rows and state in mapped files; 0 leaves this out (default: 32)"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("runs"), help="folder for the mapped files, on a disk (default: runs)"
    )
    parser.add_argument(
        "--tokens", choices=("zipf", "uniform", "text"), default="zipf",
        help="zipf: tokens as frequent as words, but without phrases, so most n-grams are new. uniform: nearly every "
        "look-up reads another row. text: the prepared corpora of data.sources (default: zipf)",
    )  # fmt: skip
    parser.add_argument("--warmup", type=int, default=8, help="steps before the first round (default: 8)")


def run(arguments: argparse.Namespace) -> int:
    from kmem.bench.tables import table_runner
    from kmem.data.reader import open_data, resolve_vocab_size

    config = resolve_vocab_size(load_config(arguments.config, arguments.overrides))
    options.check_positive(arguments, "rounds", "steps", "warmup", "threads")
    if config.model.engram is None or config.parallel.pipeline != 1:
        raise ConfigError("kmem bench tables: needs one process and a model with model.engram")
    if config.model.engram.compression:
        raise ConfigError("model.engram.compression: the measurement has no tokenizer to compress; set it to false")
    if arguments.tokens == "text":
        open_data(config.data, config.model.vocab_size)  # report missing data here, not in a contestant
    arguments.folder.mkdir(parents=True, exist_ok=True)
    needed, free = int(arguments.mapped_gib * 2**30), shutil.disk_usage(arguments.folder).free
    if needed > free:
        raise UserError(f"--mapped-gib: {needed} bytes are needed in {arguments.folder}, but {free} are free")
    with tempfile.TemporaryDirectory(prefix="bench-memory-", dir=arguments.folder) as scratch:
        trees = _trees(config, arguments, scratch)
        contestants = [Contestant(name, table_runner, (tree, arguments.tokens)) for name, tree in trees.items()]
        print(_workload(config, arguments), flush=True)
        options.measure_in_turn(contestants, arguments, arguments.warmup)
    _report(config, arguments, trees, contestants)
    return 0


def _trees(config: Config, arguments: argparse.Namespace, scratch: str) -> dict[str, dict[str, Any]]:
    """Name -> configuration of each contestant, the small tables first."""
    from kmem.bench.tables import sized

    small, large, mapped = arguments.small_mib, arguments.gib, arguments.mapped_gib
    trees = {f"{small:g} MiB in host memory": sized(config, int(small * 2**20), store="host")}
    if large:
        trees[f"{large:g} GiB in host memory"] = sized(config, int(large * 2**30), store="host")
    if mapped:
        trees[f"{mapped:g} GiB mapped"] = sized(config, int(mapped * 2**30), store="mmap", folder=scratch)
    return trees


def _workload(config: Config, arguments: argparse.Namespace) -> str:
    model, train, kept, engram = config.model, config.train, config.engram, config.model.engram
    assert engram is not None
    assert engram.orders is not None
    return (
        f"training step: hidden {model.hidden_size}, {counted(model.num_layers, 'layer')}, engram before layers "
        f"{list(engram.layers)}, {len(engram.orders)} orders x {engram.heads} heads of {engram.row_dim} values, "
        f"batch {train.global_batch_size} x {config.data.sequence_length}, {arguments.tokens} tokens, "
        f"{train.precision}, {kept.dtype} rows, {kept.optimizer.name}, {kept.prefetch_depth} prefetched\n"
        f"{versions('torch')}, {counted(arguments.threads, 'thread')} and {kept.threads} for rows, {processor()}"
    )


def _report(
    config: Config, arguments: argparse.Namespace, trees: dict[str, dict[str, Any]], contestants: list[Contestant]
) -> None:
    from kmem.bench.tables import tables

    small = contestants[0]
    measured = {
        contestant.name: figures(tables(parse_config(trees[contestant.name])), contestant, small, arguments.steps)
        for contestant in contestants
    }
    columns = (
        "rows and state", "rows", "ms per step", "slower", "goal", "stall ms", "fetch ms", "update ms",
        "rows per step", "moved",
    )  # fmt: skip
    rows = [
        (
            name,
            f"{figures['rows']:,}",
            f"{figures['step_ms']:.1f}",
            f"{figures['median_slower']:+.1%}" if "slower" in figures else "",
            f"{figures['goal']:.0%} {'met' if figures['met'] else 'missed'}" if "slower" in figures else "",
            f"{figures['stall_ms']:.2f} (max {figures['longest_stall_ms']:.1f})",
            f"{figures['fetch_ms']:.1f}",
            f"{figures['owner_ms']:.1f}",
            f"{figures['unique_rows']:,.0f}",
            f"{figures['moved_bytes'] / 2**20:.1f} MiB",
        )
        for name, figures in measured.items()
    ]
    print_table("medians; over rounds for the step and its ratio, over steps for the rest", columns, rows, 140)
    print("moved: rows out of the tables and gradients back; fetch and update run beside the step, a stall delays it")
    record = {"workload": _workload(config, arguments), "steps_per_round": arguments.steps, "measured": measured}
    options.write_record(arguments, record)


def figures(tables: "list[TableBytes]", contestant: Contestant, small: Contestant, steps: int) -> dict[str, Any]:
    """Figures of one contestant: medians over steps, and how much slower its rounds were than with small tables."""
    store = tables[0].store
    figures: dict[str, Any] = {
        "store": store,
        "rows": sum(table.rows for table in tables),
        "bytes": sum(table.bytes for table in tables),
        "seconds_per_step": [seconds / steps for seconds in contestant.seconds()],
        "step_ms": 1e3 * contestant.median_seconds() / steps,
    }
    for name in ("stall_ms", "fetch_ms", "owner_ms", "unique_rows", "bytes"):
        values = [value for measured in contestant.rounds for value in measured[name]]
        figures["moved_bytes" if name == "bytes" else name] = statistics.median(values)
        if name == "stall_ms":
            figures["longest_stall_ms"] = max(values)
    if contestant is not small:
        slower = [1 / ratio - 1 for ratio in ratios(contestant, small)]
        figures |= {"slower": slower, "median_slower": statistics.median(slower), "goal": GOALS[store]}
        figures["met"] = figures["median_slower"] <= GOALS[store]
    return figures
