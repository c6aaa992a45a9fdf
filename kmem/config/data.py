"""Where training text comes from and how it becomes sequences."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from kmem.config.section import Section


class Source(Section):
    """One prepared corpus of a blend."""

    path: str
    """Folder written by `kmem data prepare`."""
    weight: PositiveFloat = 1.0
    """Share of the training sequences drawn from this corpus, relative to the other weights."""


class AddressesConfig(Section):
    """Memory addresses of the text: the leaf, in a tree of clusters, of the document or window that a token stands
    in."""

    tree: str
    """Folder of a tree written by `kmem data cluster`; all sources must have addresses of it."""
    batching: Literal["packed", "leaf"] = "packed"
    """packed: the sequences are those of a run without addresses, and every document of one has its own. leaf: a
    sequence holds text of one leaf only, and the last one of each leaf is padded."""


class DataConfig(Section):
    """The batches a run trains and is evaluated on."""

    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    """Prepared corpora, blended by weight. All must share one tokenizer."""
    sequence_length: PositiveInt
    """Tokens per sequence. Documents are packed one after another; a sequence may start inside a document."""
    document_attention: bool = True
    """Attend only within a document and restart position ids at each; predictions across a boundary are not trained."""
    seed: Annotated[int, Field(ge=0)] = 1234
    """Seed of the order of sequences."""
    addresses: AddressesConfig | None = None
    """Addresses of the text, by which memory banks are fetched; null reads none."""

    @model_validator(mode="after")
    def _distinct(self) -> "DataConfig":
        paths = [source.path for source in self.sources]
        if len(set(paths)) != len(paths):
            raise ValueError("sources names the same path twice; give one entry the summed weight")
        return self
