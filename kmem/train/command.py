"""`kmem train`: a dry run, one process, local ranks, or a rank of a launcher."""

import argparse
import contextlib
import os
import shutil
import sys
import textwrap
from typing import TYPE_CHECKING

from kmem.config import Config, ConfigError, UserError, dump_config, load_config, packaged_configs, with_vocab_size

if TYPE_CHECKING:
    from kmem.data.reader import PreparedData


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter  # argparse would break names at their hyphens
    parser.epilog = textwrap.fill(
        f"packaged configs: {', '.join(packaged_configs())}. Exit codes: 0 the run has all its steps, "
        "2 an error, 75 interrupted and saved: the same command continues",
        width=shutil.get_terminal_size().columns - 2,
        break_on_hyphens=False,
        break_long_words=False,
    )
    parser.add_argument("--config", required=True, help="YAML file, or the name of a packaged config")
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        dest="overrides",
        help="dotted overrides",
    )
    parser.add_argument("--nproc", type=int, default=None, metavar="N", help="start N local ranks")
    parser.add_argument("--dry-run", action="store_true", help="print parameter counts and memory per rank, and exit")
    parser.add_argument("--print-config", action="store_true", help="print every field of the run as YAML, and exit")
    parser.add_argument("--json", action="store_true", help="with --dry-run: one JSON object")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # given by launchers


def run(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    if arguments.json and not arguments.dry_run:
        raise ConfigError("--json: only with --dry-run")
    if arguments.nproc is not None and arguments.nproc < 1:
        raise ConfigError("--nproc: at least 1")
    if arguments.print_config:
        print(dump_config(config), end="")
        return 0
    if arguments.dry_run:
        from kmem.train.dry_run import print_dry_run

        return print_dry_run(config, arguments.nproc, as_json=arguments.json)
    launched = "RANK" in os.environ
    if arguments.nproc is not None and launched:
        raise ConfigError("--nproc: this process is already a rank of a launcher (RANK is set); leave --nproc out")
    data = None if launched else _checked_data(config, arguments.nproc or 1)
    if arguments.nproc is not None and arguments.nproc > 1:
        from kmem.parallel.local_launch import launch_local

        overrides = ["--set", *arguments.overrides] if arguments.overrides else []
        return launch_local(["train", "--config", arguments.config, *overrides], arguments.nproc)
    from kmem.parallel.joining import open_files_problem
    from kmem.parallel.launch_environment import environment_rank

    rank, _ = environment_rank()
    try:
        return _train(config, data)
    except Exception as error:
        problem = error if isinstance(error, UserError) else open_files_problem(error)
        if problem is None or (rank == 0 and problem is error):
            raise
        if rank == 0:
            raise problem from error
        print(f"kmem train: rank {rank}: {problem}", file=sys.stderr)
        return 2


def _checked_data(config: Config, ranks: int) -> "PreparedData":
    """Open the data and check the tree of a bank. A problem with either, or a mesh that does not fit the ranks, is one
    error, before ranks start and before DeepSpeed is imported, which takes seconds."""
    config.data_parallel_size(ranks)
    from kmem.data.reader import open_data
    from kmem.parallel.memory_kinds import kinds_of

    data = open_data(config.data, config.model.vocab_size)
    config = with_vocab_size(config, data.tokenizer_size)
    for kind in kinds_of(config.model.shape):
        kind.prepare(config, data.tokenizer_path)
    return data


def _train(config: Config, opened: "PreparedData | None") -> int:
    """Train as one rank.

    Args:
        opened: the data; None for ranks of a launcher. They join before they open the data, so that a machine without
            it is an error on all ranks and no rank waits.
    """
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):  # a console without a reader stops no run
            print("importing torch and DeepSpeed ..", flush=True)
    from kmem.data.reader import comparing_seconds, open_data
    from kmem.parallel.joining import join_mesh, leave_mesh
    from kmem.parallel.local_launch import INTERRUPTED
    from kmem.parallel.mesh import limit_waiting, lost_peer, run_on_all_ranks
    from kmem.train.interruption import Interruption
    from kmem.train.reporting import MetricsFile, ProgressReport
    from kmem.train.tracking import WandbTracking
    from kmem.train.trainer import Trainer

    try:
        mesh, data = join_mesh(config), opened
        if data is None:
            # The first rank of each machine may have to compare the data with its digests; the others wait for it.
            limit_waiting(config.parallel.timeout_seconds + comparing_seconds(config.data))
            data = run_on_all_ranks(lambda: open_data(config.data, config.model.vocab_size))
            limit_waiting(config.parallel.timeout_seconds)
        callbacks = [MetricsFile(), WandbTracking(), ProgressReport(config.tracking.log_every)]
        trainer = Trainer(config, mesh, data, callbacks)
    except Exception as error:
        if lost_peer(error):
            raise UserError(
                "before the first step: another rank is gone or does not answer; its own log names the cause. The "
                "checkpoints are as they were: run the same command again"
            ) from error
        raise
    interruption = Interruption()
    try:
        end = trainer.fit(interruption)
        leave_mesh()
    finally:
        interruption.close()
    return INTERRUPTED if end == "interrupted" else 0
