"""Numbers and tables formatted for people."""

from collections.abc import Collection, Sequence


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """`1 cluster`, `2 clusters`, `1,024 clusters`.

    Args:
        plural: the plural of `noun` where it is not noun + s.
    """
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def magnitude(number: int) -> str:
    """Four significant digits and a unit: `950`, `41.63K`, `163.5M`, `4.624B`."""
    size, unit = float(number), ""
    for larger in ("K", "M", "B", "T"):
        if size < 999.95:
            break
        size, unit = size / 1000, larger
    return f"{size:.4g}{unit}"


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], width: int = 110, words: Collection[int] = (0,)
) -> None:
    """Print a table; its columns are right-aligned, except those at the places `words`. An empty row begins a section.

    Args:
        width: of the table in characters, if the terminal is narrower.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, title=title)
    for place, column in enumerate(table.columns):
        column.justify = "left" if place in words else "right"
    for row in rows:
        if row:
            table.add_row(*map(Text, row))
        else:
            table.add_section()
    Console(width=max(Console().width, width)).print(table)
