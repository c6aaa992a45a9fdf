"""`kmem bench compare`: models with equal budgets on the same text, over several seeds, with a report."""

import argparse
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from kmem.bench import options
from kmem.config import ConfigError, UserError

if TYPE_CHECKING:
    from kmem.bench.compare import Comparison, Run, Size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "comparison", metavar="NAME_OR_FOLDER", help="a folder with compare.yaml, or its name under configs/compare"
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="only the first N seeds, for a quick look")
    parser.add_argument(
        "--set", action="extend", nargs="+", default=[], metavar="FIELD=VALUE", dest="overrides",
        help="overrides for all contestants, for a quick look",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="folder for the runs and the report (default: runs/compare/NAME, with --set runs/compare/NAME-altered)",
    )  # fmt: skip
    parser.add_argument("--check", action="store_true", help="only check and print the contestants' sizes and stop")


def run(arguments: argparse.Namespace) -> int:
    from kmem.bench.compare import find_comparisons

    options.check_positive(arguments, "seeds")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("matplotlib is not installed, but the report has a plot; pip install 'matplotlib>=3.8,<4'")
    folders = find_comparisons(arguments.comparison)
    if len(folders) > 1 and arguments.out is not None:
        raise ConfigError(f"--out: {arguments.comparison} holds {len(folders)} comparisons; name one of them")
    planned = [_plan(folder, arguments) for folder in folders]  # all are checked before the first is trained
    for comparison, out, runs, sizes in planned:
        print(f"{comparison.title}: {comparison.question.strip()}", flush=True)
        for label, size in sizes.items():
            print(
                f"  {label}: without embeddings {size.non_embedding:,} parameters, {size.active_non_embedding:,} "
                f"active, {size.tables:,} in tables; {size.expert_calls} expert calls; {size.tokens:,} tokens",
                flush=True,
            )
        if not arguments.check and not _carry_out(comparison, out, runs, sizes, arguments):
            print("interrupted: run the same command again to continue", flush=True)
            return 130
    return 0


def _plan(folder: Path, arguments: argparse.Namespace) -> "tuple[Comparison, Path, list[Run], dict[str, Size]]":
    from kmem.bench.compare import check_fairness, check_folders, load_comparison, measure, plan

    comparison = load_comparison(folder)
    out = arguments.out or Path("runs/compare") / _name(folder)
    if arguments.overrides and arguments.out is None:
        out = out.with_name(f"{out.name}-altered")
    seeds = comparison.seeds[: arguments.seeds]
    runs = plan(comparison, folder, out, seeds, arguments.overrides)
    sizes = {run.label: measure(run.config) for run in runs}
    check_fairness(comparison, sizes)
    check_folders(runs)
    return comparison, out, runs, sizes


def _name(folder: Path) -> str:
    """Path below `compare`, as in configs/compare/NAME; else the folder's own name."""
    parts = folder.resolve().parts
    below = parts[len(parts) - parts[::-1].index("compare") :] if "compare" in parts else ()
    return "/".join(below) or folder.resolve().name


def _carry_out(
    comparison: "Comparison", out: Path, runs: "list[Run]", sizes: "dict[str, Size]", arguments: argparse.Namespace
) -> bool:
    """Train, evaluate and report; False if training was interrupted."""
    from kmem.bench.compare import ensure_data
    from kmem.bench.compare_runs import is_finished, train

    ensure_data(comparison.data, comparison.questions_file)
    for number, run in enumerate(runs, 1):
        state = "is finished" if is_finished(run) else "trains"
        print(f"\n[{number}/{len(runs)}] {run.label}, seed {run.seed}, {state}: {run.folder}", flush=True)
        if state == "trains" and not train(run):
            return False
    from kmem.bench.compare_report import report  # imported after training, which does not need its libraries

    report(comparison, out, runs, sizes, arguments.comparison, arguments.overrides)
    return True
