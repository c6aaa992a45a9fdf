"""Numbers formatted for people."""


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
