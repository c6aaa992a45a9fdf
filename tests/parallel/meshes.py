"""Meshes to test on."""

from kmem.parallel.mesh import Mesh

SHAPES = [(1, 1, 1), (1, 4, 1), (3, 1, 1), (2, 4, 2), (2, 6, 3), (1, 4, 4), (3, 8, 4)]
"""Sizes of (pipeline, data, expert)."""


def ranks_of(pipeline: int, data: int, expert: int) -> list[Mesh]:
    """The mesh as each of its ranks sees it."""
    return [Mesh(rank, pipeline, data, expert) for rank in range(pipeline * data)]
