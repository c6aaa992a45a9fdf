"""`kmem bench plan`: what `kmem plan` predicts for a training step of one rank on one core, against the step."""

import argparse
import statistics
import time
from typing import Any

from kmem.bench import options
from kmem.bench.contest import Contestant, Runner
from kmem.bench.machine import processor, versions
from kmem.config import ConfigError, load_config, parse_config
from kmem.wording import counted

WITHIN = 0.25


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_contest_arguments(parser, "bench/train", rounds=5, steps=3, what="steps")
    parser.set_defaults(threads=1)


def run(arguments: argparse.Namespace) -> int:
    from kmem.bench.training import kmem_runner
    from kmem.data.reader import resolve_vocab_size
    from kmem.parallel.mesh import Mesh
    from kmem.plan.hardware import Hardware, Shares
    from kmem.plan.prediction import predict

    config = resolve_vocab_size(load_config(arguments.config, arguments.overrides))
    options.check_positive(arguments, "rounds", "steps", "threads")
    if config.parallel.pipeline * config.parallel.expert != 1 or config.train.precision != "fp32":
        raise ConfigError("kmem bench plan: needs one rank (parallel.pipeline=1, parallel.expert=1) and fp32")
    tree = config.model_dump(mode="json")
    step, rates = Contestant("step", kmem_runner, (tree,)), Contestant("rates", _rates_runner, (tree,))
    options.measure_in_turn([step, rates], arguments, 1)
    flop, memory = (statistics.median(measured[name] for measured in rates.rounds) for name in ("flop", "memory"))
    core = Hardware("this machine", flop, memory, 1, memory, memory, memory, memory, 0)
    # Rates are measured in operators like those of the step, so all of them is reached.
    shares = Shares(products=1.0, grouped=1.0, attention=1.0, memory=1.0, links=1.0, host=1.0, launch=0.0)
    found = predict(config, Mesh(0, 1, 1, 1), core, shares, with_kernels=False)
    seconds = step.median_seconds() / arguments.steps
    ratio = found.seconds / seconds
    parts = ", ".join(f"{name} {1000 * part:.0f}" for name, part in found.parts.items())
    print(f"{versions('torch')}, {counted(arguments.threads, 'thread')}, {processor()}")
    print(f"rates: {flop / 1e9:.0f} GFLOP/s in products, {memory / 1e9:.1f} GB/s in sums of two tensors")
    print(f"predicted: {1000 * found.seconds:.0f} ms a step ({parts})")
    print(f"measured:  {1000 * seconds:.0f} ms a step")
    print(f"ratio: {ratio:.2f} (goal: within {WITHIN:.0%}, {'met' if abs(ratio - 1) <= WITHIN else 'not met'})")
    record = {"machine": processor(), "flop": flop, "memory": memory, "predicted": found.seconds, "measured": seconds}
    options.write_record(arguments, {**record, "parts": found.parts, "ratio": ratio})
    return 0


def _rates_runner(tree: dict[str, Any]) -> Runner:
    """Rates of a product of the model's size, and of an operator that is bound by memory."""
    import torch

    from kmem.model.matmul import linear

    config = parse_config(tree)
    tokens, hidden = config.train.micro_batch_size * config.data.sequence_length, config.model.hidden_size
    x, weight = torch.randn(tokens, hidden), torch.randn(hidden, hidden)
    values = torch.randn(tokens, 8 * hidden)

    def rate(amount: float, function: Any) -> float:
        function()
        times = []
        for _ in range(7):
            began = time.perf_counter()
            function()
            times.append(time.perf_counter() - began)
        return amount / statistics.median(times)

    def run(steps: int) -> dict[str, Any]:
        began = time.perf_counter()
        with torch.no_grad():
            flop = rate(2 * tokens * hidden * hidden, lambda: linear(x, weight))
            memory = rate(3 * values.nbytes, lambda: values + values)
        return {"seconds": time.perf_counter() - began, "losses": [], "flop": flop, "memory": memory}

    return run
