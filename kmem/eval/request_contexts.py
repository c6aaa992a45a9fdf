"""Requests of an evaluation, each scored with the blocks that a bank fetches for its context alone: the scored tokens
do not influence which blocks are fetched."""

from collections.abc import Callable, Sequence
from typing import Any

Score = Callable[[list[int]], Sequence[Any]]
"""Numbers of requests -> their scores, in that order."""


def fetches(model: Any) -> bool:
    """Whether a model has a bank that looks up contexts."""
    bank = getattr(model, "contexts", None)
    return bank is not None and bank.control == "fetched"


def score_by_leaf(model: Any, contexts: Sequence[Sequence[int]], score: Score) -> list[Any]:
    """The scores of requests, in their order, from a model that `fetches`.

    Requests whose contexts have the same leaf are scored together: they use the same blocks, which are fetched once.
    Leaves ascend, so that rows of upper levels stay where they are.

    Args:
        contexts: token ids of each request's context.
        score: called once per leaf, with its requests; the model then uses the leaf's blocks in every forward pass.
    """
    whole = [tuple(context) for context in contexts]
    distinct = list(dict.fromkeys(whole))
    if not distinct:
        return []
    leaf_of = dict(zip(distinct, model.contexts.route(distinct).tolist(), strict=True))
    requests: dict[int, list[int]] = {}
    for number, context in enumerate(whole):
        requests.setdefault(leaf_of[context], []).append(number)
    scores: list[Any] = [None] * len(whole)
    try:
        for leaf, numbers in sorted(requests.items()):
            model.fetch(addresses=[leaf], blocked=())  # `route` has avoided blocked clusters already
            for number, answer in zip(numbers, score(numbers), strict=True):
                scores[number] = answer
    finally:
        model.forget()
    return scores


def preceding(tokens: Sequence[int], sizes: Sequence[int], longest: int, start: int) -> list[list[int]]:
    """The contexts of a document's consecutive windows: the tokens before each window.

    Args:
        sizes: tokens of each window.
        longest: most tokens of a context; tokens further back are left out.
        start: token id that stands for the beginning, the context of the first window.
    """
    contexts, place = [], 0
    for size in sizes:
        contexts.append(list(tokens[max(0, place - longest) : place]) or [start])
        place += size
    return contexts
