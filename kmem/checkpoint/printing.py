"""Tables that commands print."""

from collections.abc import Collection, Sequence


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
