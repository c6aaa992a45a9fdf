"""Where training text comes from and how it becomes sequences."""

import re
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from kmem.config.section import Section

_CLUSTER = re.compile(r"(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*))*")


class Source(Section):
    """One prepared corpus of a blend."""

    path: str
    """Folder written by `kmem data prepare`."""
    weight: PositiveFloat = 1.0
    """Share of the training sequences drawn from this corpus, relative to the other weights."""


class AddressesConfig(Section):
    """Addresses of the text. The address of a token is a leaf of a tree of clusters: the leaf of the document or window
    that contains the token."""

    tree: str
    """Folder of a tree written by `kmem data cluster`; all sources must have addresses in it."""
    batching: Literal["packed", "leaf"] = "packed"
    """packed: the same sequences as without addresses; every document in a sequence has its own address. leaf: a
    sequence holds text of one leaf only, and the last sequence of each leaf is padded."""
    subtrees: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Clusters, with all clusters below them, whose text is used for training and evaluation, as paths from the root,
    such as ["0", "3.7"]. Each source keeps the share of this text that it has in the whole text. Needs batching: leaf.
    Null: all text."""

    @field_validator("subtrees", mode="before")
    @classmethod
    def _as_paths(cls, value: Any) -> Any:
        for path in value if isinstance(value, list | tuple) else ():
            if isinstance(path, float):
                raise ValueError(
                    f'{path} is a number, and 3.1 would be 3.10; write paths in quotes, as in ["0", "3.7"]'
                )
        return [str(path) if type(path) is int else path for path in value] if isinstance(value, list) else value

    @field_validator("subtrees")
    @classmethod
    def _distinct_clusters(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for path in value or ():
            if not _CLUSTER.fullmatch(path):
                raise ValueError(f"{path!r}: write a cluster as numbers from the root down, such as 3 or 3.7")
        ordered = sorted(value or (), key=_numbers)
        for one, other in pairwise(ordered):
            if _numbers(other)[: len(_numbers(one))] == _numbers(one):
                raise ValueError(f"{one} and {other} overlap; leave out {other}, whose text belongs to {one}, too")
        return None if value is None else tuple(ordered)

    def check(self) -> None:
        if self.subtrees is not None and self.batching != "leaf":
            raise ValueError(
                f"subtrees={list(self.subtrees)} needs batching=leaf: packed sequences hold text of all clusters; set "
                "batching to leaf, or leave subtrees out"
            )


def _numbers(path: str) -> tuple[int, ...]:
    return tuple(map(int, path.split(".")))


class DataConfig(Section):
    """The batches a run trains and is evaluated on."""

    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    """Prepared corpora, blended by weight. All must share one tokenizer."""
    sequence_length: PositiveInt
    """Tokens per sequence. Documents are packed one after another; a sequence may start inside a document."""
    document_attention: bool = True
    """Attend only within a document and restart position ids at each; predictions across a boundary are not trained."""
    seed: NonNegativeInt = 1234
    """Seed of the order of sequences."""
    addresses: AddressesConfig | None = None
    """Addresses of the text, which select the blocks of a bank; null reads none."""

    def check(self) -> None:
        paths = [source.path for source in self.sources]
        if len(set(paths)) != len(paths):
            raise ValueError("sources names the same path twice; give one entry the summed weight")
