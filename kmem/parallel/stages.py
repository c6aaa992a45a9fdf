"""How layers are divided over pipeline stages."""

from bisect import bisect_left
from collections.abc import Sequence

from kmem.config import Config
from kmem.model.parameter_counts import count_parameters
from kmem.parallel.mesh import Mesh


def stage_bounds(config: Config) -> list[int]:
    """Numbers of the pipeline layers at which stages begin, and the end: [0, ..., layers].

    Pipeline layers are the embedding, the decoder layers and the head; in a tied model the final norm is a separate
    layer before the head. The largest stage is as small as possible. A layer's weight is the number of elements that a
    token is multiplied with.
    """
    counts = count_parameters(config.model.shape)
    head = [0, counts.head] if config.model.tie_embeddings else [counts.head]
    weights = [0, *counts.layers, *head]  # the embedding is a lookup
    stages = config.parallel.pipeline
    capacities = range(max(weights), sum(weights))  # the end, one stage for all, always suffices
    place = bisect_left(capacities, True, key=lambda capacity: len(_fill(weights, capacity)) <= stages)
    bounds = [0, *_fill(weights, capacities.start + place)]
    while len(bounds) <= stages:  # split the longest stages until every one has a layer
        longest = max(range(len(bounds) - 1), key=lambda stage: bounds[stage + 1] - bounds[stage])
        bounds.insert(longest + 1, (bounds[longest] + bounds[longest + 1] + 1) // 2)
    return bounds


def stages_with(config: Config, mesh: Mesh, layers: Sequence[int]) -> list[int]:
    """Stages that have any of these decoder layers."""
    bounds = stage_bounds(config)
    return [
        stage
        for stage in range(mesh.pipeline)
        if any(bounds[stage] <= layer + 1 < bounds[stage + 1] for layer in layers)
    ]


def _fill(weights: list[int], capacity: int) -> list[int]:
    """Ends of stages filled one after another up to a capacity."""
    ends, load = [], 0
    for layer, weight in enumerate(weights):
        if load + weight > capacity:
            ends.append(layer)
            load = 0
        load += weight
    return [*ends, len(weights)]
