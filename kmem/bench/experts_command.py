"""`kmem bench experts`: a layer of experts against the one of Transformers, the cost of its features, its backends."""

import argparse
import statistics
import sys
from dataclasses import asdict
from itertools import groupby
from typing import Any

from kmem.bench import options
from kmem.bench.contest import Contestant, ratios, run_in_turn
from kmem.bench.machine import processor, torch_threads, versions
from kmem.config import Config, ConfigError, UserError, load_config
from kmem.wording import counted, print_table

GOAL = 1.5
"""Speed as a multiple of Transformers' fastest implementation, at the shape of bench/train."""
GOAL_CONFIG = "bench/train"
FINALISTS = 2
"""Implementations of the peer that take at most this many times as long as the fastest are measured beside kmem."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_contest_arguments(parser, GOAL_CONFIG, rounds=15, steps=4, what="passes of the comparison")
    parser.add_argument(
        "--features", action="store_true", help="instead, measure the cost of each feature against a plain layer"
    )
    parser.add_argument(
        "--backends",
        action="store_true",
        help="instead, measure the backends of train.expert_backend with groups of rows of several sizes",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device for --backends (default: cpu)")
    parser.add_argument("--profile", action="store_true", help="also print kmem's most expensive operators")


def run(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    options.check_positive(arguments, "rounds", "steps", "threads")
    if config.model.moe is None:
        raise ConfigError("kmem bench experts: needs a model with model.moe")
    if config.train.precision != "fp32" and (arguments.features or not arguments.backends):
        raise ConfigError("train.precision: kmem bench experts measures in fp32, and only --backends in bf16, too")
    if arguments.device != "cpu" and (arguments.features or not arguments.backends):
        raise ConfigError("--device: only for --backends; the other measurements run on the CPU")
    workload = _workload(config, arguments)
    print(workload, flush=True)
    record: dict[str, Any] = {"workload": workload}
    if arguments.features:
        record |= _features(config, arguments)
    if arguments.backends:
        record |= _backends(config, arguments)
    if not (arguments.features or arguments.backends):
        record |= _compare(config, arguments)
    options.write_record(arguments, record)
    return 0


def _workload(config: Config, arguments: argparse.Namespace) -> str:
    import torch

    model, moe = config.model, config.model.moe
    assert moe is not None
    return (
        f"layer of experts, forward and backward: hidden {model.hidden_size}, {moe.num_experts} experts of width "
        f"{moe.intermediate_size}, top-{moe.top_k}, batch {config.train.micro_batch_size} x "
        f"{config.data.sequence_length}, {config.train.precision}\n"
        f"{versions('torch', 'transformers')}, {counted(arguments.threads, 'thread')}, "
        + (torch.cuda.get_device_name() if arguments.device == "cuda" else processor())
    )


def _compare(config: Config, arguments: argparse.Namespace) -> dict[str, Any]:
    from kmem.bench.experts import check_equal, layer_runner, peer_layer
    from kmem.bench.training import EXPERT_IMPLEMENTATIONS

    tree = config.model_dump(mode="json")
    names = {experts: f"Qwen3MoeSparseMoeBlock ({experts})" for experts in EXPERT_IMPLEMENTATIONS}
    differences = check_equal(config, {name: peer_layer(config, experts) for experts, name in names.items()})
    tried = [Contestant(name, layer_runner, (tree, experts)) for experts, name in names.items()]
    run_in_turn(tried, threads=arguments.threads, warmup=1, rounds=3, steps=1)
    # A few rounds rule out the slow ones. The others are all measured beside kmem, and the best is the peer.
    shortest = min(contestant.median_seconds() for contestant in tried)
    ours = Contestant("kmem", layer_runner, (tree, None))
    rivals = [
        Contestant(contestant.name, layer_runner, contestant.arguments)
        for contestant in tried
        if contestant.median_seconds() <= FINALISTS * shortest
    ]
    options.measure_in_turn([ours, *rivals], arguments, 3)
    by_rival = {rival.name: ratios(ours, rival) for rival in rivals}
    peer = min(by_rival, key=lambda name: statistics.median(by_rival[name]))
    ratio = statistics.median(by_rival[peer])
    met = ratio >= GOAL if _layer(config) == _layer(load_config(GOAL_CONFIG)) else None
    rows = []
    slow = [contestant for contestant in tried if contestant.name not in by_rival]
    for contestant in (ours, *rivals, *slow):
        steps = 1 if contestant in slow else arguments.steps
        milliseconds = [1e3 * seconds / steps for seconds in contestant.seconds()]
        name = contestant.name
        rows.append(
            (
                name,
                f"{statistics.median(milliseconds):.2f}",
                f"{min(milliseconds):.2f} to {max(milliseconds):.2f}",
                f"{statistics.median(by_rival[name]):.2f}" if name in by_rival else "",
                f"{differences[name]:.1e}" if name in differences else "",
            )
        )
    columns = ("layer", "ms", "rounds", "x kmem", "largest difference")
    print_table("medians of rounds taken in turn", columns, rows, 120)
    if slow:
        print(f"without a ratio: took over {FINALISTS} times as long as the fastest in the first rounds")
    options.print_profile(ours)
    judged = {None: "", True: f" (goal {GOAL}: met)", False: f" (goal {GOAL}: missed)"}[met]
    print(f"ratio: {ratio:.3f}{judged} to {peer}, rounds {min(by_rival[peer]):.2f} to {max(by_rival[peer]):.2f}")
    return {
        "differences": differences,
        "tried_seconds": {contestant.name: contestant.seconds() for contestant in tried},
        "steps_per_round": arguments.steps,
        "seconds": {contestant.name: contestant.seconds() for contestant in (ours, *rivals)},
        "ratios": by_rival,
        "peer": peer,
        "ratio": ratio,
        "goal": GOAL,
        "met": met,
    }


def _layer(config: Config) -> tuple[Any, ...]:
    return (config.model.hidden_size, config.model.moe, config.train.micro_batch_size, config.data.sequence_length)


def _features(config: Config, arguments: argparse.Namespace) -> dict[str, Any]:
    from kmem.bench.expert_features import feature_costs, features

    with torch_threads(arguments.threads):
        costs = feature_costs(config, features(config), arguments.rounds, _say)
    rows: list[tuple[str, ...]] = []
    for subject, group in groupby(costs, key=lambda cost: cost.subject):
        for place, cost in enumerate(group):
            rows.append(
                (
                    "" if place else subject,
                    cost.feature,
                    f"{cost.ms:.1f}",
                    f"{cost.times:.2f}",
                    f"{cost.spread[0]:.2f} to {cost.spread[1]:.2f}",
                    str(cost.expert_calls),
                    f"{cost.parameters:,}",
                    f"{cost.active_parameters:,}",
                    f"{cost.saved_bytes / 2**20:.1f}",
                )
            )
        rows.append(())
    title = f"norm, experts and residual connection, forward and backward; medians of {arguments.rounds} rounds in turn"
    columns = ("", "feature", "ms", "x plain", "quartiles", "expert calls", "parameters", "active", "saved MiB")
    print_table(title, columns, rows, 140, words=(0, 1))
    print("expert calls and active parameters are per token; saved: memory held from forward for backward")
    return {"rounds": arguments.rounds, "costs": [asdict(cost) for cost in costs]}


def _backends(config: Config, arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from kmem.bench.expert_backends import backend_times
    from kmem.model.expert_backends import NAMES, available, problem

    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no CUDA device here")
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    names = available(device, dtype)
    problems = {name: problem(name, device, dtype) for name in NAMES if name not in names}
    with torch_threads(arguments.threads):
        times = backend_times(config, names, device, arguments.rounds, on_size=_say)
    rows: list[tuple[str, ...]] = []
    for time in times:
        if time.backend == times[0].backend:
            rows.append(())
        figures = (f"{time.ms:.3f}", f"{time.gflops:.0f}", f"{time.times:.2f}")
        rows.append((str(time.rows), time.groups, time.backend, *figures))
    title = f"experts alone, forward and backward; medians of {arguments.rounds} rounds in turn"
    columns = ("rows per expert", "groups", "backend", "ms", "GFLOP/s", f"x {times[0].backend}")
    print_table(title, columns, rows, 100, words=(1, 2))
    for name, reason in problems.items():
        print(f"{name} was not measured: {reason}")
    return {"rounds": arguments.rounds, "backends": [asdict(time) for time in times], "not_measured": problems}


def _say(what: str) -> None:
    print(f"  {what}", file=sys.stderr, flush=True)
