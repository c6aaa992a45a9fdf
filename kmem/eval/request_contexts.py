"""Requests of an evaluation, each scored with what a memory bank fetches for its context: what is scored takes no part
in what is fetched."""

from collections.abc import Callable, Sequence
from typing import Any

Score = Callable[[list[int]], Sequence[Any]]
"""Numbers of requests -> their scores, in that order."""


def fetches(model: Any) -> bool:
    """Whether a model has a memory bank that looks up contexts."""
    bank = getattr(model, "contexts", None)
    return bank is not None and bank.control == "fetched"


def score_by_leaf(model: Any, contexts: Sequence[Sequence[int]], score: Score) -> list[Any]:
    """The scores of requests, in their order, from a model that `fetches`.

    Requests whose contexts have one leaf are scored together, whatever their contexts are: they use the same blocks,
    which are fetched once. Leaves ascend, so that rows of upper levels stay where they are.

    Args:
        contexts: token ids of each request's context.
        score: asked once for each leaf, with its requests; the model then uses the leaf's blocks in every forward pass.
    """
    whole = [tuple(context) for context in contexts]
    distinct = list(dict.fromkeys(whole))
    if not distinct:
        return []
    leaf_of = dict(zip(distinct, model.contexts.route(distinct).tolist(), strict=True))
    requests: dict[int, list[int]] = {}
    for number, context in enumerate(whole):
        requests.setdefault(leaf_of[context], []).append(number)
    found: list[Any] = [None] * len(whole)
    try:
        for leaf, numbers in sorted(requests.items()):
            model.fetch(addresses=[leaf], blocked=())  # what is blocked has been gone around
            for number, answer in zip(numbers, score(numbers), strict=True):
                found[number] = answer
    finally:
        model.forget()
    return found


def preceding(tokens: Sequence[int], sizes: Sequence[int], longest: int, start: int) -> list[list[int]]:
    """The contexts of a document's consecutive windows: of each, the tokens before it.

    Args:
        sizes: tokens of each window.
        longest: of a context; what is further back is left out.
        start: token id that stands for the beginning, the context of the first window.
    """
    found, place = [], 0
    for size in sizes:
        found.append(list(tokens[max(0, place - longest) : place]) or [start])
        place += size
    return found
