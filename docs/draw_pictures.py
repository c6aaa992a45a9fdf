"""Draws the pictures of README.md: `python docs/draw_pictures.py`.

`--screen RECORDING` draws docs/pictures/run.png from what `script -c COMMAND RECORDING` has recorded of a terminal.
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

FOLDER = Path(__file__).parent / "pictures"
INK, QUIET, LINE = "#1d2b38", "#5d6d7c", "#33475b"
BLUE, GOLD, GREEN = ("#e6f0f8", "#3b6c93"), ("#fdf3df", "#c59b3f"), ("#e8f4ea", "#4c8a58")


class Picture:
    """Boxes, arrows and words on a plane without axes."""

    def __init__(self, width: float, height: float) -> None:
        self.figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(0, height))
        self.axes.axis("off")

    def box(self, x: float, y: float, width: float, height: float, text: str, colours=BLUE, **style) -> None:
        """A box whose centre is (x, y)."""
        self.axes.add_patch(
            FancyBboxPatch(
                (x - width / 2, y - height / 2),
                width,
                height,
                boxstyle="round,pad=0,rounding_size=0.06",
                facecolor=colours[0],
                edgecolor=colours[1],
                linewidth=1.3,
                zorder=2,
            )
        )
        self.text(x, y, text, zorder=3, **style)

    def text(self, x: float, y: float, text: str, **style) -> None:
        self.axes.text(x, y, text, **{"ha": "center", "va": "center", "fontsize": 10.5, "color": INK, **style})

    def arrow(self, start: tuple[float, float], end: tuple[float, float], **style) -> None:
        chosen = {"arrowstyle": "-|>", "mutation_scale": 12, "linewidth": 1.4, "color": LINE, **style}
        self.axes.add_patch(FancyArrowPatch(start, end, shrinkA=0, shrinkB=1, **chosen))

    def save(self, name: str) -> None:
        FOLDER.mkdir(exist_ok=True)
        self.figure.savefig(FOLDER / name)


def lookup() -> None:
    """How an engram reads: token ids, n-grams, rows, the stream."""
    picture = Picture(11, 5.1)
    tokens = ["the", "capital", "of", "France", "is"]
    for place, token in enumerate(tokens):
        picture.box(0.95 + 1.2 * place, 4.6, 1.05, 0.44, token, GREEN if place in (2, 3) else BLUE)
    picture.text(7.35, 4.6, "token ids, known before the step", ha="left", color=QUIET)
    picture.arrow((3.95, 4.36), (3.95, 3.96))
    picture.text(4.1, 4.15, "at this token: the 2-gram and the 3-gram that end here", ha="left", color=QUIET)
    for x, words in ((2.6, "of France"), (5.3, "capital of France")):
        picture.box(x, 3.7, 2.3, 0.44, words, GREEN)
        for lean in (-0.65, 0, 0.65):
            picture.arrow((x + lean, 3.46), (x + lean, 2.86))
    picture.text(7.35, 3.16, "hashed to one row per head", ha="left", color=QUIET)
    for x in (2.6, 5.3):
        for row in range(3):
            for column in range(12):
                picked = column == (3, 7, 10)[row] if x < 3 else column == (1, 5, 9)[row]
                picture.axes.add_patch(
                    FancyBboxPatch(
                        (x - 1.14 + 0.19 * column, 2.6 - 0.25 * row),
                        0.16,
                        0.2,
                        boxstyle="square,pad=0",
                        facecolor=GOLD[1] if picked else GOLD[0],
                        edgecolor=GOLD[1],
                        linewidth=0.7,
                    )
                )
    words = (
        "tables: millions of rows in GPU memory,\nhost memory or mapped files; the rows of\n"
        "a step are fetched during the one before"
    )
    picture.text(7.35, 2.35, words, ha="left", color=QUIET)
    picture.arrow((2.6, 1.98), (3.5, 1.48))
    picture.arrow((5.3, 1.98), (4.4, 1.48))
    picture.box(3.95, 1.22, 2.7, 0.5, "rows read, joined", GOLD)
    picture.arrow((3.95, 0.96), (3.95, 0.62))
    picture.box(3.95, 0.36, 6.4, 0.48, "layer:  stream + gate(stream, rows) x value(rows)")
    picture.text(7.35, 0.36, "the gate decides what is of use here", ha="left", color=QUIET)
    picture.save("lookup.png")


def tree() -> None:
    """How a bank is addressed: the text descends a tree of clusters and fetches one block of each level."""
    picture = Picture(11, 4.6)
    path = ["", "1", "12"]
    levels = {1: [2.0, 5.0, 8.0], 2: [1.1 + 0.975 * leaf for leaf in range(9)]}
    heights = {0: 4.1, 1: 2.9, 2: 1.7}
    places = {"": (5.0, heights[0])}
    for first, x in enumerate(levels[1]):
        places[str(first)] = (x, heights[1])
        for second in range(3):
            places[f"{first}{second}"] = (levels[2][3 * first + second], heights[2])
    for name, (x, y) in places.items():
        if name:
            up_x, up_y = places[name[:-1]]
            on_path = name in path
            picture.arrow(
                (up_x, up_y - 0.24),
                (x, y + 0.24),
                color=GREEN[1] if on_path else "#b5c0ca",
                linewidth=2.4 if on_path else 1.0,
            )
    for name, (x, y) in places.items():
        words = "all documents" if not name else ".".join(name)
        picture.box(x, y, 1.7 if not name else 0.84, 0.46, words, GREEN if name in path else BLUE)
    picture.text(
        0.15, 4.1, "a context, embedded,\ndescends to the nearest\ncluster of each level", ha="left", color=QUIET
    )
    picture.text(10.8, 4.1, "one block of weights\nfor every cluster", ha="right", color=QUIET)
    beside = places["1"][0] - 0.5  # between the clusters below
    picture.axes.plot(
        [places["1"][0] - 0.42, beside, beside], [heights[1], heights[1], 0.9], color=GOLD[1], linestyle="--"
    )
    picture.arrow((beside, 0.9), (beside, 0.7), color=GOLD[1])
    picture.arrow((places["12"][0], heights[2] - 0.25), (places["12"][0] + 0.25, 0.72), color=GOLD[1], linestyle="--")
    for name, x in (("1", beside), ("12", places["12"][0] + 0.25)):
        picture.box(x, 0.46, 1.5, 0.48, f"block of {'.'.join(name)}", GOLD)
    picture.arrow((7.05, 0.46), (7.5, 0.46))
    picture.text(7.6, 0.46, "added to the feed-forwards of the anchor", ha="left", color=QUIET)
    picture.save("tree.png")


COLOURS = {
    "default": "#d7dde2",
    "green": "#7fc98b",
    "red": "#e08a8a",
    "blue": "#84b6e3",
    "cyan": "#7fd0d3",
    "brown": "#dfc27f",
    "magenta": "#d79bd1",
    "black": "#6b7780",
}


def screen(recording: Path) -> None:
    """A terminal as it was at the end of a recording; needs `pip install pyte`."""
    import pyte

    columns = 118
    terminal = pyte.Screen(columns, 200)
    pyte.Stream(terminal).feed(recording.read_bytes().decode(errors="replace"))
    shown = [number for number, words in enumerate(terminal.display) if words.strip() and "Script done" not in words]
    rows = range(next(number for number in shown if terminal.display[number].startswith("== ")), shown[-1] + 1)
    width, height = 0.0745, 0.165  # inches of a character
    figure = Figure(figsize=(columns * width + 0.4, len(rows) * height + 0.3), dpi=110, facecolor="#1b232a")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-2, columns + 3), ylim=(len(rows) + 0.9, -0.9))
    axes.axis("off")
    for row, number in enumerate(rows):
        for place, character in enumerate(terminal.display[number]):
            if character != " ":
                style = terminal.buffer[number][place]
                colour = COLOURS.get(style.fg) or f"#{style.fg}"
                weight = "bold" if style.bold else "normal"
                axes.text(
                    place, row, character, color=colour, weight=weight, family="monospace", fontsize=8, va="center"
                )
    FOLDER.mkdir(exist_ok=True)
    figure.savefig(FOLDER / "run.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--screen", type=Path, metavar="RECORDING", help="draw a recorded terminal instead")
    recording = parser.parse_args().screen
    if recording is not None:
        screen(recording)
    else:
        lookup()
        tree()


if __name__ == "__main__":
    main()
