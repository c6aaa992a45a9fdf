"""`kmem bench train`: a training step against plain Transformers, or against another precision."""

import argparse
import statistics
import tempfile
from pathlib import Path

from kmem.bench import options
from kmem.bench.contest import Contestant, ratios, run_in_turn
from kmem.bench.machine import processor, versions
from kmem.config import Config, ConfigError, load_config
from kmem.wording import counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_contest_arguments(parser, "bench/train", rounds=7, steps=4, what="steps")
    parser.add_argument(
        "--peer", choices=("transformers", "fp32"), default="transformers",
        help="transformers: the fastest of its expert implementations. fp32: kmem itself in fp32, for a bf16 config",
    )  # fmt: skip
    parser.add_argument("--profile", action="store_true", help="also print kmem's most expensive operators")


def run(arguments: argparse.Namespace) -> int:
    from kmem.data.reader import resolve_vocab_size

    config = resolve_vocab_size(load_config(arguments.config, arguments.overrides))
    options.check_positive(arguments, "rounds", "steps", "threads")
    train = config.train
    if train.global_batch_size != train.micro_batch_size or config.parallel.pipeline != 1:
        raise ConfigError("kmem bench train: needs one process and one micro-batch per step")
    if config.model.engram is not None:
        raise ConfigError("kmem bench train: model.engram has no peer; `kmem bench tables` measures it")
    if arguments.peer == "fp32" and train.precision != "bf16":
        raise ConfigError("--peer fp32: needs --set train.precision=bf16")
    from kmem.bench.training import kmem_runner

    with tempfile.TemporaryDirectory() as scratch:
        ours = Contestant(f"kmem {train.precision}", kmem_runner, (config.model_dump(mode="json"),))
        theirs, tried = _peer(config, arguments, Path(scratch))
        print(_workload(config, arguments.threads), flush=True)
        for contestant in tried:
            print(f"  tried {contestant.name}: {contestant.median_seconds():.3f} s per step", flush=True)
        options.measure_in_turn([ours, theirs], arguments, 2)
    _report(config, arguments, ours, theirs)
    return 0


def _peer(config: Config, arguments: argparse.Namespace, scratch: Path) -> tuple[Contestant, list[Contestant]]:
    """The contestant to compare with, and the candidates it was chosen from."""
    from kmem.bench.training import EXPERT_IMPLEMENTATIONS, export_initial_model, kmem_runner, transformers_runner

    tree = config.model_dump(mode="json")
    if arguments.peer == "fp32":
        tree["train"]["precision"] = "fp32"
        return Contestant("kmem fp32", kmem_runner, (tree,)), []
    folder = scratch / "model"
    architecture = export_initial_model(config, folder)
    candidates = EXPERT_IMPLEMENTATIONS if config.model.moe else EXPERT_IMPLEMENTATIONS[:1]
    tried = [
        Contestant(f"{architecture} ({experts})", transformers_runner, (tree, str(folder), experts))
        for experts in candidates
    ]
    run_in_turn(tried, threads=arguments.threads, warmup=1, rounds=2, steps=1)
    best = min(tried, key=Contestant.median_seconds)
    return Contestant(best.name, best.build, best.arguments), tried


def _workload(config: Config, threads: int) -> str:
    model, train = config.model, config.train
    moe = model.moe
    experts = f", {moe.num_experts} experts of width {moe.intermediate_size}, top-{moe.top_k}" if moe else ""
    attention = model.attention
    return (
        f"training step: hidden {model.hidden_size}, {counted(model.num_layers, 'layer')}, "
        f"{attention.num_heads} heads{experts}, vocabulary {model.vocab_size}, "
        f"batch {train.global_batch_size} x {config.data.sequence_length}, "
        f"{train.precision}, AdamW, clip {train.optimizer.clip_norm}\n"
        f"{versions('torch', 'transformers')}, {counted(threads, 'thread')}, {processor()}"
    )


def _report(config: Config, arguments: argparse.Namespace, ours: Contestant, theirs: Contestant) -> None:
    tokens = config.train.global_batch_size * config.data.sequence_length * arguments.steps
    first, last = (
        abs(mine["losses"][place] - other["losses"][place])
        for mine, other, place in ((ours.warmup, theirs.warmup, 0), (ours.rounds[-1], theirs.rounds[-1], -1))
    )
    for contestant in (ours, theirs):
        speeds = [tokens / seconds for seconds in contestant.seconds()]
        print(
            f"{contestant.name:<40} {statistics.median(speeds):>9,.0f} tokens/s "
            f"(rounds {min(speeds):,.0f} to {max(speeds):,.0f})"
        )
    print(f"losses differ by {first:.1e} in the first step and by {last:.1e} in the last one")
    phases = _phases(ours)
    print("where kmem's time goes: " + ", ".join(f"{name} {share:.0%}" for name, share in phases.items()))
    options.print_profile(ours)
    by_round = ratios(ours, theirs)
    record = {
        "workload": _workload(config, arguments.threads),
        "steps_per_round": arguments.steps,
        "seconds": {contestant.name: contestant.seconds() for contestant in (ours, theirs)},
        "ratios": by_round,
        "ratio": statistics.median(by_round),
        "phases": phases,
    }
    options.write_record(arguments, record)
    print(f"ratio: {statistics.median(by_round):.3f}")


def _phases(contestant: Contestant) -> dict[str, float]:
    """Phase -> share of the wall clock, largest first."""
    total = sum(contestant.seconds())
    names = contestant.rounds[0]["phases"]
    shares = {name: sum(measured["phases"][name] for measured in contestant.rounds) / total for name in names}
    shares["other"] = 1 - sum(shares.values())
    return {name: share for name, share in sorted(shares.items(), key=lambda item: -item[1]) if share >= 0.005}
