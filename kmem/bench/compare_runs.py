"""Train and evaluate the runs of a comparison; finished work is not repeated."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kmem.bench.compare import Comparison, Run
from kmem.checkpoint.controls import Choices, parse_controls
from kmem.checkpoint.pieces import CheckpointError
from kmem.checkpoint.reader import CheckpointReader
from kmem.config import UserError
from kmem.files import atomic_write
from kmem.model.memory_kinds import kinds_of
from kmem.parallel.local_launch import INTERRUPTED, launch_local

HELD_OUT = "held_out.json"
"""File in a run's folder with the checkpoint's figures on the whole held-out split, by state of evaluation."""


def is_finished(run: Run) -> bool:
    """Whether the run has the checkpoint of its last step."""
    try:
        return CheckpointReader(run.folder, verify=False).step == run.config.train.steps
    except CheckpointError:
        return False


def train(run: Run) -> bool:
    """Run `kmem train` in a process of its own, from the run's last checkpoint if it has one; False if interrupted.

    Raises:
        UserError: training failed; the process has printed the reason.
    """
    words = ["train", "--config", str(run.source), *(word for pair in run.overrides for word in ("--set", pair))]
    code = launch_local(words, 1)
    if code not in (0, INTERRUPTED):
        raise UserError(f"{run.folder}: kmem train ended with exit code {code}; the runs before it are kept")
    return is_finished(run)


def evaluate(run: Run, comparison: Comparison, batch: int) -> dict[str, dict[str, Any]]:
    """State -> figures of `kmem eval` on the whole held-out split, for each of `states`; kept in the run's folder.

    With several sources the figures are for all their text together, and `sources` has the figures of each. If the
    comparison has questions, `questions` has the answers.
    """
    from kmem.eval.checkpoint import answered, held_out_figures

    path = run.folder / HELD_OUT
    known: dict[str, Any] = {}
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        known = stored["states"] if stored["step"] == run.config.train.steps else {}
    reader = CheckpointReader(run.folder)
    folders = [source.path for source in run.config.data.sources]
    by_state = {}
    for state, controls in states(run, comparison).items():
        figures = by_state[state] = known.setdefault(state, {})
        if not figures:
            figures |= _whole(held_out_figures(reader, folders, Choices(controls), batch=batch))
        if comparison.questions_file is not None and "questions" not in figures:
            answers = answered(reader, comparison.questions_file, Choices(controls), 4 * batch)
            figures["questions"] = [asdict(group) for group in answers]
        atomic_write(path, json.dumps({"step": reader.step, "states": known}, indent=1) + "\n")
    return by_state


def states(run: Run, comparison: Comparison) -> dict[str, dict[str, str]]:
    """State in which a run is evaluated -> its controls: "trained", then the controls of `kmem eval --control`."""
    shape = run.config.model.shape
    own = {kind.name: kind for kind in kinds_of(shape)}
    by_state: dict[str, dict[str, str]] = {"trained": {}}
    for control in comparison.controls:
        controls = parse_controls([control], "controls")
        for name, choice in controls.items():
            if name in own and choice in own[name].telling_controls(shape):
                by_state[control] = controls
    return by_state


def _whole(figures: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The figures of several texts, combined as if they were one text."""
    if len(figures) == 1:
        return next(iter(figures.values()))
    tokens = sum(text["tokens"] for text in figures.values())
    nats = sum(text["loss"] * text["tokens"] for text in figures.values())
    text_bytes = sum(text["loss"] * text["tokens"] / text["bits_per_byte"] for text in figures.values()) / math.log(2)
    loss = nats / tokens
    return {
        "bits_per_byte": nats / math.log(2) / text_bytes,
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "tokens": tokens,
        "sources": {Path(folder).name: text for folder, text in figures.items()},
    }


def curve(run: Run) -> dict[str, Any]:
    """Losses of steps and evaluations from metrics.jsonl, and the time that steps took, with resumed parts.

    The undisturbed speed is the one that a tenth of the steps reach; pauses or other work on the machine hardly affect
    it.
    """
    lines = (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records: dict[str, list[dict[str, Any]]] = {"step": [], "evaluation": []}
    for record in map(json.loads, lines):
        records[record["kind"]].append(record)
    steps, evaluations = records["step"], records["evaluation"]
    seconds = sum(record["seconds"] for record in steps)
    positions = run.config.train.global_batch_size * run.config.data.sequence_length
    by_speed = sorted(record["seconds"] for record in steps)
    return {
        "steps": [record["step"] for record in steps],
        "losses": [round(record["loss"], 4) for record in steps],
        "held_out": {record["step"]: record["bits_per_byte"] for record in evaluations},
        "trained_tokens": steps[-1]["tokens"],
        "seconds": seconds,
        "tokens_per_second": len(steps) * positions / seconds,
        "undisturbed_tokens_per_second": positions / by_speed[len(steps) // 10],
    }
