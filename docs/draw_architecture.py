"""Draw the rooms of kmem from the imports of its files, and check that they point one way.

    python docs/draw_architecture.py          # writes docs/architecture.png and prints the figures

Nothing is imported: files are parsed. An arrow is an import at any place of a file, also within a function; imports for
types alone (`if TYPE_CHECKING`) are none. In `kmem/cli.py` a string that is the name of a module counts as an import of
it, since commands are imported by name.
"""

import argparse
import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]

ORDER = (
    "cli", "bench", "plan", "train", "eval", "hf", "parallel", "tables", "checkpoint", "clustering", "corpora", "data",
    "files", "config", "wording", "model", "kmem_kernels",
)  # fmt: skip
"""Rooms from top to bottom: a room may import those behind it."""

FOR_ALL = ("files", "config", "wording")
"""Rooms that all those before them import, in the picture beside the others and without arrows to them."""

PLACES = {
    "cli": (1, 10),
    "bench": (1, 9),
    "plan": (1, 8),
    "train": (1, 7),
    "eval": (1, 6),
    "hf": (0.42, 5),
    "parallel": (1.58, 5),
    "clustering": (0, 4),
    "tables": (1.8, 4),
    "corpora": (0, 3),
    "checkpoint": (1.1, 3),
    "data": (0.8, 2),
    "model": (0.8, 1),
    "kmem_kernels": (0.8, 0),
    "files": (2.9, 3),
    "config": (2.9, 2),
    "wording": (2.9, 1),
}
"""Where rooms are drawn: column and layer, layer 0 at the bottom."""

SUBJECTS = {
    "cli": "the kmem command",
    "bench": "comparisons with peers",
    "plan": "costs on other machines",
    "train": "the loop and its start",
    "eval": "losses, questions, controls",
    "hf": "Hugging Face folders",
    "parallel": "mesh, pipeline, memories",
    "tables": "rows kept, fetched, updated",
    "checkpoint": "one format for every mesh",
    "clustering": "trees, addresses of texts",
    "corpora": "where text comes from",
    "data": "text to batches",
    "files": "files that appear complete",
    "config": "typed sections",
    "wording": "numbers for readers",
    "model": "the mathematics",
    "kmem_kernels": "Triton kernels, references",
}


@dataclass
class Module:
    """A file of the package."""

    name: str
    """Dotted, such as kmem.tables.table."""
    lines: int = 0
    at_import: set[str] = field(default_factory=set)
    """Modules that are imported with it."""
    later: set[str] = field(default_factory=set)
    """Modules that its functions import, or that the command line imports by name."""

    @property
    def room(self) -> str:
        return room_of(self.name)


def room_of(module: str) -> str:
    """`kmem.tables.stores` is in `tables`, `kmem_kernels.route.op` in `kmem_kernels`, `kmem` itself in no room. The
    modules that a shell or launcher starts belong to the command line."""
    package, _, rest = module.partition(".")
    room = package if package != "kmem" else rest.partition(".")[0]
    return "cli" if room in ("__main__", "completion", "pretrain") else room


def read_modules(repository: Path = REPOSITORY) -> dict[str, Module]:
    """Name -> module, of kmem and kmem_kernels."""
    files: dict[str, Path] = {}
    for parent, package in ((repository, "kmem"), (repository / "kernels", "kmem_kernels")):
        for path in sorted((parent / package).rglob("*.py")):
            parts = path.relative_to(parent).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    modules = {}
    for name, path in files.items():
        text = path.read_text(encoding="utf-8")
        module = modules[name] = Module(name, text.count("\n"))
        package = name if path.stem == "__init__" else name.rpartition(".")[0]
        tree = ast.parse(text)
        for imported, deferred in _imports(tree, package, files):
            (module.later if deferred else module.at_import).add(imported)
        if module.room == "cli":
            strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
            module.later |= {value for value in strings if value in files}
        module.later -= module.at_import
    return modules


def _imports(tree: ast.AST, package: str, known: dict[str, Path], deferred: bool = False) -> Iterator[tuple[str, bool]]:
    """(module, whether a function imports it), of known modules."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and _for_types(node.test):
            for other in node.orelse:
                yield from _imports(other, package, known, deferred)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in known:
                    yield alias.name, deferred
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package.split(".")[: len(package.split(".")) + 1 - node.level]) if node.level else ""
            base = ".".join(part for part in (start, node.module) if part)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                if inner in known or base in known:
                    yield (inner if inner in known else base), deferred
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(node, package, known, deferred or inside)


def _for_types(test: ast.expr) -> bool:
    return (test.id if isinstance(test, ast.Name) else getattr(test, "attr", "")) == "TYPE_CHECKING"


def arrows(modules: dict[str, Module]) -> Counter[tuple[str, str]]:
    """(room, room that it imports) -> number of imports between their files."""
    return Counter(
        (module.room, room_of(other))
        for module in modules.values()
        for other in module.at_import | module.later
        if module.room and room_of(other) not in ("", module.room)
    )


def upward(modules: dict[str, Module]) -> list[str]:
    """Imports against the order of the rooms, each as `importing module -> imported module`."""
    return [
        f"{module.name} -> {other}"
        for module in modules.values()
        for other in sorted(module.at_import | module.later)
        if module.room
        and room_of(other) not in ("", module.room)
        and ORDER.index(module.room) > ORDER.index(room_of(other))
    ]


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes each of which leads to all others of its group (strongly connected components; Tarjan 1972)."""
    found: list[list[str]] = []
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []

    def visit(node: str) -> None:
        order[node] = lowest[node] = len(order)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in order:
                visit(other)
            if other in stack:
                lowest[node] = min(lowest[node], lowest[other])
        if lowest[node] == order[node]:
            start = stack.index(node)
            if len(stack) - start > 1:
                found.append(sorted(stack[start:]))
            del stack[start:]

    for node in sorted(graph):
        if node not in order:
            visit(node)
    return found


def module_cycles(modules: dict[str, Module]) -> list[list[str]]:
    """Cycles of modules at import time. A module brings the packages that it lies in, but for those of its importer,
    which are being imported already."""
    graph: dict[str, set[str]] = {}
    for name, module in modules.items():
        brought = module.at_import | {package for other in module.at_import for package in _packages(other)}
        graph[name] = (brought & modules.keys()) - {name, *_packages(name)} | (module.at_import - {name})
    return cycles(graph)


def room_cycles(modules: dict[str, Module]) -> list[list[str]]:
    """Cycles of rooms, deferred imports included."""
    graph: dict[str, set[str]] = {module.room: set() for module in modules.values()}
    for room, other in arrows(modules):
        graph[room].add(other)
    return cycles(graph)


def _packages(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def not_implied(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The arrows of an acyclic graph that do not follow from others (its transitive reduction)."""
    below: dict[str, set[str]] = {}
    for room in reversed(ORDER):
        direct = {other for one, other in edges if one == room}
        below[room] = direct.union(*(below[other] for other in direct))
    return {
        (room, other)
        for room, other in edges
        if not any(other in below[between] for one, between in edges if one == room)
    }


LEGEND = """Rooms of kmem

An arrow: files of the upper room import
files of the lower one. Arrows that follow
from others are left out."""


def draw(modules: dict[str, Module], path: Path) -> None:
    """Write the picture."""
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    width, height = 0.98, 0.64
    figure = Figure(figsize=(10, 12), dpi=100, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.62, 3.52), ylim=(-0.5, 10.5))
    axes.axis("off")
    ink, quiet = "#1d2b38", "#5d6d7c"

    edges = {(room, other) for room, other in arrows(modules) if other not in FOR_ALL or room in FOR_ALL}
    for room, other in not_implied(edges):
        (x, y), (to_x, to_y) = PLACES[room], PLACES[other]
        assert to_y < y, f"{room} -> {other} points up: correct PLACES"
        lean = max(-0.3, min(0.3, 0.2 * (to_x - x)))
        start, end = (x + lean, y - height / 2), (to_x - lean, to_y + height / 2)
        if room in FOR_ALL and other not in FOR_ALL:
            start, end = (x - 0.3, y - height / 2), (to_x + width / 2, to_y)
        arrow = FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=14, shrinkA=0, shrinkB=1, linewidth=1.7, color="#33475b"
        )
        axes.add_patch(arrow)
    for room, (x, y) in PLACES.items():
        files = [module for module in modules.values() if module.room == room]
        lines = sum(module.lines for module in files)
        fill, edge = ("#fdf3df", "#c59b3f") if room in FOR_ALL else ("#e6f0f8", "#3b6c93")
        box = FancyBboxPatch(
            (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=0.06",
            facecolor=fill, edgecolor=edge, linewidth=1.3, zorder=3,
        )  # fmt: skip
        axes.add_patch(box)
        size = f"{len(files)} {'file' if len(files) == 1 else 'files'}, {lines:,} lines"
        for text, above, style in (
            (room, 0.16, {"fontsize": 14, "fontweight": "bold", "color": ink}),
            (SUBJECTS[room], -0.05, {"fontsize": 10, "color": ink}),
            (size, -0.21, {"fontsize": 10, "color": quiet}),
        ):
            axes.text(x, y + above, text, ha="center", va="center", zorder=4, **style)
    axes.text(2.05, 9.3, LEGEND, fontsize=11.5, color=ink, va="top", linespacing=1.5)
    axes.text(
        2.9, 3.45, "for every room\nbut model and kmem_kernels", fontsize=10.5, color=quiet, ha="center", va="bottom"
    )
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "architecture.png")
    path = parser.parse_args().out
    modules = read_modules()
    against, loops = upward(modules), module_cycles(modules) + room_cycles(modules)
    for line in against:
        print(f"points up: {line}")
    for loop in loops:
        print(f"cycle: {', '.join(loop)}")
    draw(modules, path)
    print(
        f"{len(modules)} files, {sum(module.lines for module in modules.values()):,} lines, {len(ORDER)} rooms, "
        f"{len(arrows(modules))} arrows between rooms; {len(against)} imports point up, {len(loops)} cycles; {path}"
    )


if __name__ == "__main__":
    main()
