"""The report of a finished comparison: tables for people, JSON, and a plot of all runs."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

import kmem
from kmem.bench.compare import Comparison, Run, Size
from kmem.bench.compare_runs import curve, evaluate
from kmem.data.manifest import read_manifest
from kmem.files import atomic_write
from kmem.wording import counted, print_table

BATCH = 16
"""Sequences per forward pass of the evaluation."""
SMOOTHED_SHARE = 0.02
"""Width of the moving average of plotted losses, as a share of the run."""


class Table(NamedTuple):
    """Rows of text under a heading."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def report(
    comparison: Comparison, out: Path, runs: Sequence[Run], sizes: dict[str, Size], name: str, overrides: Sequence[str]
) -> None:
    """Evaluate the runs on the whole held-out split and write report.md, report.json and report.png into `out`."""
    results = collect(comparison, runs, sizes, name, overrides)
    atomic_write(out / "report.json", json.dumps(results) + "\n")
    plot(comparison, results, out / "report.png")
    tables = result_tables(comparison, results)
    atomic_write(out / "report.md", _markdown(results, tables))
    notice = _notice(results)
    if notice:
        Console(width=max(Console().width, 120)).print(notice, style="bold", highlight=False)
    for table in tables:
        print_table(*table, width=120)
    print(f"wrote {out / 'report.md'}, report.json and report.png")


def collect(
    comparison: Comparison, runs: Sequence[Run], sizes: dict[str, Size], name: str, overrides: Sequence[str]
) -> dict[str, Any]:
    """All figures, as in report.json. Standard deviations are over the sample of seeds; None for one seed."""
    import torch

    from kmem.bench.machine import processor

    manifests = [read_manifest(Path(source)) for source in comparison.data.sources]
    contestants: dict[str, dict[str, Any]] = {
        label: {"size": asdict(sizes[label]), "runs": {}} for label in comparison.contestants
    }
    for run in runs:
        print(f"evaluating {run.label}, seed {run.seed}", flush=True)
        states = evaluate(run, comparison, BATCH)
        figures = {"bits_per_byte": states["trained"]["bits_per_byte"], "states": states, **curve(run)}
        contestants[run.label]["runs"][str(run.seed)] = figures
    seeds = list(dict.fromkeys(str(run.seed) for run in runs))
    for contestant in contestants.values():
        contestant["bits_per_byte"] = _spread([run["bits_per_byte"] for run in contestant["runs"].values()])
        contestant["difference"] = _differences(comparison, contestant, contestants[comparison.baseline])["whole"]
    for one, other in comparison.pairs.items():
        contestants[one]["difference_to"] = {other: _differences(comparison, contestants[one], contestants[other])}
    fewer = [f"{len(seeds)} of {len(comparison.seeds)} seeds"] if len(seeds) < len(comparison.seeds) else []
    return {
        "title": comparison.title,
        "question": comparison.question.strip(),
        "command": f"kmem bench compare {name}",
        "departures": [*fewer, *overrides],  # how the runs differ from what the comparison asks for
        "baseline": comparison.baseline,
        "equal": dict(comparison.equal),
        "seeds": seeds,
        "data": {
            "folder": comparison.data.folder,
            "sources": {
                Path(source.path).name: (source.provenance or {}).get("version")
                for manifest in manifests
                for source in manifest.sources
            },
            "tokenizer": manifests[0].tokenizer.fingerprint,
            "training_tokens": sum(manifest.splits["train"].tokens for manifest in manifests),
            "held_out_tokens": sum(manifest.splits["validation"].tokens for manifest in manifests),
        },
        "machine": f"{processor()}, {counted(torch.get_num_threads(), 'thread')}, torch {torch.__version__}, "
        f"kmem {kmem.__version__}",
        "contestants": contestants,
    }


def result_tables(comparison: Comparison, results: dict[str, Any]) -> list[Table]:
    """The tables of the report."""
    seeds, contestants = results["seeds"], results["contestants"]
    sizes = Table(
        "Size of each contestant (parameters without embeddings)",
        (
            "contestant", "total", "active", "in tables", "table values read at a time", "expert calls per token",
            "embedding and head", "tokens",
        ),
        [
            (label, *(f"{contestant['size'][quantity]:,}" for quantity in (
                "non_embedding", "active_non_embedding", "tables", "table_read", "expert_calls", "embedding", "tokens"
            )))
            for label, contestant in contestants.items()
        ],
    )  # fmt: skip
    held_out = Table(
        "Held-out bits per byte, whole split",
        ("contestant", *(f"seed {seed}" for seed in seeds), "mean ± std", f"minus {results['baseline']}, paired"),
        [
            (
                label,
                *(f"{value:.4f}" for value in contestant["bits_per_byte"]["values"]),
                _pm(contestant["bits_per_byte"]),
                "" if label == results["baseline"] else _pm(contestant["difference"], sign="+"),
            )
            for label, contestant in contestants.items()
        ],
    )
    speed = Table(
        "Training",
        ("contestant", "wall clock of a run", "of all seeds", "tokens/s", "tokens/s, undisturbed"),
        [
            (
                label,
                f"{statistics.mean(run['seconds'] for run in runs) / 60:.1f} min",
                f"{sum(run['seconds'] for run in runs) / 60:.1f} min",
                f"{statistics.mean(run['tokens_per_second'] for run in runs):,.0f}",
                f"{max(run['undisturbed_tokens_per_second'] for run in runs):,.0f}",
            )
            for label, runs in ((label, contestant["runs"].values()) for label, contestant in contestants.items())
        ],
    )
    tables = [sizes, held_out, _horizon_table(comparison, results), _source_table(results), speed]
    tables += [_pair_table(comparison, results), _control_table(results), _question_table(results)]
    return [table for table in tables if table.rows]


def _differences(comparison: Comparison, one: dict[str, Any], other: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Held-out bits per byte of one contestant minus the other's with the same seed: whole split, and by step."""
    runs = list(zip(one["runs"].values(), other["runs"].values(), strict=True))
    whole = [mine["bits_per_byte"] - theirs["bits_per_byte"] for mine, theirs in runs]
    steps = {
        str(step): _spread([mine["held_out"][step] - theirs["held_out"][step] for mine, theirs in runs])
        for step in comparison.horizons
    }
    return {"whole": _spread(whole), **steps}


def _pair_table(comparison: Comparison, results: dict[str, Any]) -> Table:
    rows = []
    for one, other in comparison.pairs.items():
        differences = results["contestants"][one]["difference_to"][other]
        rows.append((f"{one} minus {other}", *(_pm(spread, sign="+") for spread in differences.values())))
    columns = ("", "whole split", *(f"step {step:,}" for step in comparison.horizons))
    return Table("Further differences in held-out bits per byte, paired", columns, rows)


def _states(results: dict[str, Any]) -> dict[str, list[str]]:
    """Contestant -> the states it was evaluated in; the first is as it was trained."""
    return {
        label: list(next(iter(contestant["runs"].values()))["states"])
        for label, contestant in results["contestants"].items()
    }


def _control_table(results: dict[str, Any]) -> Table:
    states = {label: own for label, own in _states(results).items() if len(own) > 1}
    columns = list(dict.fromkeys(state for own in states.values() for state in own))
    rows = []
    for label, own in states.items():
        runs = results["contestants"][label]["runs"].values()
        spreads = {state: _spread([run["states"][state]["bits_per_byte"] for run in runs]) for state in own}
        rows.append((label, *(_pm(spreads[state]) if state in spreads else "" for state in columns)))
    title = "Controls: held-out bits per byte of the same weights, by what their memories return"
    return Table(title, ("contestant", *columns), rows)


def _question_table(results: dict[str, Any]) -> Table:
    """Share of questions that are answered correctly, by how many documents tell the answer."""
    answers = _answers(results)
    groups = next(map(list, answers.values()), [])
    rows = [(label, *(_pm(own[group], digits=1) for group in groups)) for label, own in answers.items()]
    title = "Questions answered correctly, in %, by how many documents tell the answer"
    return Table(title, ("contestant", *groups), rows)


def _answers(results: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Contestant and control -> group of questions -> share of correct answers over the seeds, in %."""
    answers = {}
    for label, own in _states(results).items():
        runs = list(results["contestants"][label]["runs"].values())
        for state in own:
            asked = [run["states"][state].get("questions") for run in runs]
            if all(asked):
                name = label if len(own) == 1 else f"{label}, {state}"
                answers[name] = {
                    group["group"]: _spread([100 * run[place]["right"] for run in asked])
                    for place, group in enumerate(asked[0])
                }
    return answers


def plot(comparison: Comparison, results: dict[str, Any], path: Path) -> None:
    """Plot the training losses of all runs, and their differences from the baseline's run with the same seed, which
    reads the same text in the same order."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    base = results["contestants"][comparison.baseline]["runs"]
    answers = _answers(results)
    panels = 3 if answers else 2
    figure, axes = pyplot.subplots(1, panels, figsize=(5.5 * panels, 4.2), layout="constrained")
    losses, differences = axes[:2]
    if answers:
        for name, groups in answers.items():
            shares = {group: share["mean"] for group, share in groups.items() if group != "all"}
            axes[2].plot(list(shares), list(shares.values()), marker="o", markersize=3, label=name)
        axes[2].set(title="questions answered correctly", ylabel="%", xlabel="documents that tell the answer")
        axes[2].legend(frameon=False, fontsize="small")
    for number, (label, contestant) in enumerate(results["contestants"].items()):
        for seed, run in contestant["runs"].items():
            steps, smooth = _smoothed(run)
            style = {"color": f"C{number}", "linewidth": 0.9, "label": label if seed == results["seeds"][0] else None}
            losses.plot(steps, smooth, **style)
            if label != comparison.baseline:
                differences.plot(steps, smooth - _smoothed(base[seed])[1], **style)
    differences.axhline(0, color="C0", linewidth=0.9)
    figure.suptitle(comparison.title)
    losses.set(title="training loss", ylabel="nats per token", xlabel="step", xscale="log")
    losses.legend(frameon=False)
    differences.set(title=f"minus {comparison.baseline} of the same seed", xlabel="step")
    if any(label != comparison.baseline for label in results["contestants"]):
        differences.legend(frameon=False)
    # The first steps are alike for all, and their scale would hide later differences.
    late = np.concatenate([line.get_ydata()[len(line.get_ydata()) // 10 :] for line in differences.get_lines()])
    margin = 0.1 * (late.max() - late.min()) + 1e-3
    differences.set_ylim(late.min() - margin, late.max() + margin)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _source_table(results: dict[str, Any]) -> Table:
    """Held-out figures of each source, if there are several."""
    rows, names = [], []
    for label, contestant in results["contestants"].items():
        by_run = [run["states"]["trained"].get("sources", {}) for run in contestant["runs"].values()]
        names = list(by_run[0])
        spreads = [_spread([sources[name]["bits_per_byte"] for sources in by_run]) for name in names]
        rows.append((label, *map(_pm, spreads)))
    return Table("Held-out bits per byte by source", ("contestant", *names), rows if names else [])


def _horizon_table(comparison: Comparison, results: dict[str, Any]) -> Table:
    rows = []
    base = results["contestants"][results["baseline"]]
    for step in comparison.horizons:
        for label, contestant in results["contestants"].items():
            own = _spread([run["held_out"][step] for run in contestant["runs"].values()])
            paired = _pm(_differences(comparison, contestant, base)[str(step)], sign="+")
            rows.append((label, f"{step:,}", _pm(own), "" if contestant is base else paired))
    return Table(
        "Held-out bits per byte during training (the sequences of evaluation.sequences)",
        ("contestant", "step", "mean ± std", f"minus {results['baseline']}, paired"),
        rows,
    )


def _smoothed(run: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(steps, moving average of the losses)."""
    width = max(1, round(SMOOTHED_SHARE * len(run["losses"])))
    return np.array(run["steps"][width - 1 :]), np.convolve(run["losses"], np.full(width, 1 / width), "valid")


def _spread(values: Sequence[float]) -> dict[str, Any]:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"values": list(values), "mean": statistics.mean(values), "std": deviation}


def _pm(spread: dict[str, Any], sign: str = "", digits: int = 4) -> str:
    deviation = "" if spread["std"] is None else f" ± {spread['std']:.{digits}f}"
    return f"{spread['mean']:{sign}.{digits}f}{deviation}"


def _notice(results: dict[str, Any]) -> str:
    departures = results["departures"]
    return f"A quick look, not the comparison: {', '.join(departures)}." if departures else ""


def _markdown(results: dict[str, Any], tables: Sequence[Table]) -> str:
    data, notice = results["data"], _notice(results)
    equal = ", ".join(f"{quantity} ({tolerance:.1%})" for quantity, tolerance in results["equal"].items())
    lines = [f"# {results['title']}", "", results["question"], "", *([f"**{notice}**", ""] if notice else [])]
    lines += [f"Command: `{results['command']}`. Held equal, with tolerance: {equal}.", ""]
    lines += [
        f"Text: {', '.join(data['sources'])}; {data['training_tokens']:,} training tokens, "
        f"{data['held_out_tokens']:,} held out. Machine: {results['machine']}. The wall clock covers the steps, also "
        "when the machine was busy with other work; undisturbed is the speed that a tenth of the steps reached in the "
        "fastest run.",
        "",
    ]
    for table in tables:
        lines += [f"## {table.title}", "", _markdown_row(table.columns)]
        lines += [_markdown_row(["---", *("---:" for _ in table.columns[1:])])]
        lines += [*map(_markdown_row, table.rows), ""]
    return "\n".join([*lines, "![losses of all runs](report.png)", ""])


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
