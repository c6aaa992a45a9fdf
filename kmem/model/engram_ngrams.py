"""Addresses of n-grams: which table rows a token reads (Engram, arXiv 2601.07372; V4.1, arXiv 2609.19969; Qwen).

A token reads the rows of the n-grams that end at it. To hash an n-gram, each of its token ids is multiplied by an odd
number that depends on the look-back position, and the products are XORed. Every head takes the hash modulo its own
prime. The products stay below 2^63, so numpy, torch and Triton compute the same rows with plain signed arithmetic.

Token ids here are ids of the addressed vocabulary: compressed ids if the model compresses its vocabulary
(`token_compression`). An id below 0 is a missing token: padding, a masked token, or a position before the sequence.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from .engram_hash import INT64_MAX, pcg64_multipliers, prime_sizes, splitmix64_multipliers
from .kernels import kernels_serve, kmem_kernels

# Shape letters: B sequences, T tokens, N largest n-gram order.

Boundary = Literal["none", "document", "eos"]
Hash = Literal["pcg64", "splitmix64"]

MISSING = -1
"""Id of a missing token, and all row ids of a missing token."""


@dataclass(frozen=True)
class NgramAddressing:
    """The addressing of all tables of a model, in numbers that do not depend on any library's random stream.

    Tables are numbered in the order of `layers`. Heads are numbered over (order, head of that order), orders outermost.
    """

    variant: str
    """Name of the published variant, or a name chosen by the caller."""
    hash: Hash
    """How the multipliers were drawn."""
    boundary: Boundary
    """Where look-back ends. none: nowhere within a row of the batch. document: before a document's first token and
    after a missing token. eos: after an end-of-sequence token, which itself belongs to the sequence that it ends."""
    orders: tuple[int, ...]
    """Lengths of the n-grams, ascending."""
    heads: int
    """Heads per order."""
    pad_id: int
    """Id used for context that is missing or out of bounds; with the boundary `eos`, the end-of-sequence id."""
    raw_vocab_size: int
    """Number of ids of the tokenizer or model, before compression."""
    compressed_vocab_size: int | None
    """Number of ids after compression; None: raw ids are addressed."""
    seed: int
    layers: tuple[int, ...]
    """Decoder layer of each table, counted from 0."""
    seeding_ids: tuple[int, ...]
    """The layer number that each table's seed used; the variants count layers differently."""
    multipliers: tuple[tuple[int, ...], ...]
    """[tables][largest order]; entry i multiplies the id i tokens back."""
    sizes: tuple[tuple[int, ...], ...]
    """[tables][total heads]: the prime of each head, which is its number of rows."""
    row_multiple: int = 1
    """A table's number of rows is padded up to a multiple of this."""
    compression_digest: str | None = None
    tokenizer_fingerprint: str | None = None

    def __post_init__(self) -> None:
        tables, heads = len(self.layers), len(self.orders) * self.heads
        if self.boundary not in get_args(Boundary) or self.hash not in get_args(Hash):
            raise ValueError(f"unknown boundary rule {self.boundary!r} or hash {self.hash!r}")
        if not self.orders or self.orders[0] < 2 or list(self.orders) != sorted(set(self.orders)):
            raise ValueError(f"n-gram orders must ascend from 2 or more: {list(self.orders)}")
        if not len(self.seeding_ids) == len(self.multipliers) == len(self.sizes) == tables or tables == 0:
            raise ValueError("layers, seeding_ids, multipliers and sizes must have one entry for each table")
        if len(set(self.layers)) < tables:
            raise ValueError(f"layers names a layer twice: {list(self.layers)}")
        if any(len(sizes) != heads or min(sizes) < 1 for sizes in self.sizes):
            raise ValueError(f"sizes must hold {heads} positive numbers of rows for each table")
        bound = INT64_MAX // self.vocab_size
        if any(len(row) != self.context + 1 or min(row) < 1 or max(row) > bound for row in self.multipliers):
            raise ValueError(f"multipliers must hold {self.context + 1} numbers from 1 to {bound} for each table")
        if not 0 <= self.pad_id < self.vocab_size:
            raise ValueError(f"pad_id {self.pad_id} is not an id of the addressed vocabulary of {self.vocab_size}")
        if any(self.rows(table) > INT64_MAX for table in range(tables)):
            raise ValueError("a table has more rows than 64-bit row ids can number; use fewer rows per head")

    @classmethod
    def build(
        cls,
        *,
        variant: str,
        layers: Sequence[int],
        raw_vocab_size: int,
        compressed_vocab_size: int | None,
        orders: Sequence[int],
        heads: int,
        rows_per_head: int | Sequence[int],
        boundary: Boundary,
        pad_id: int,
        hash: Hash,
        seed: int,
        seeding_ids: Sequence[int] | None = None,
        row_multiple: int = 1,
        compression_digest: str | None = None,
        tokenizer_fingerprint: str | None = None,
    ) -> "NgramAddressing":
        """Choose primes and multipliers.

        `rows_per_head` (one number, or one per order) is where the search for primes starts, so a table gets a few more
        rows than that. `pad_id` is an id of the addressed vocabulary. `seeding_ids` defaults to the layers for `pcg64`
        (counted from 0, as in V4.1) and to 0, 1, .. for `splitmix64`.

        Raises:
            ValueError: names the argument that is wrong or does not fit the others.
        """
        bases = [rows_per_head] * len(orders) if isinstance(rows_per_head, int) else list(rows_per_head)
        if len(bases) != len(orders):
            raise ValueError(f"rows_per_head has {len(bases)} entries for {len(orders)} n-gram orders")
        if min(bases, default=1) < 1 or max(bases, default=1) > INT64_MAX // (2 * max(1, len(orders) * heads)):
            raise ValueError(f"rows_per_head must be positive, and row ids of all heads must fit in 64 bits: {bases}")
        if seeding_ids is None:
            seeding_ids = layers if hash == "pcg64" else range(len(layers))
        vocab_size = raw_vocab_size if compressed_vocab_size is None else compressed_vocab_size
        if vocab_size < 1:
            raise ValueError(f"the addressed vocabulary must have at least one id, not {vocab_size}")
        draw = pcg64_multipliers if hash == "pcg64" else splitmix64_multipliers
        return cls(
            variant=variant,
            hash=hash,
            boundary=boundary,
            orders=tuple(orders),
            heads=heads,
            pad_id=pad_id,
            raw_vocab_size=raw_vocab_size,
            compressed_vocab_size=compressed_vocab_size,
            seed=seed,
            layers=tuple(layers),
            seeding_ids=tuple(seeding_ids),
            multipliers=tuple(draw(seed, number, max(orders), vocab_size) for number in seeding_ids),
            sizes=prime_sizes(len(layers), bases, heads),
            row_multiple=row_multiple,
            compression_digest=compression_digest,
            tokenizer_fingerprint=tokenizer_fingerprint,
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids of the addressed vocabulary."""
        return self.raw_vocab_size if self.compressed_vocab_size is None else self.compressed_vocab_size

    @property
    def context(self) -> int:
        """Number of tokens of look-back, N - 1."""
        return self.orders[-1] - 1

    @property
    def total_heads(self) -> int:
        """Number of rows that one token addresses in one table."""
        return len(self.orders) * self.heads

    def offsets(self, table: int) -> tuple[int, ...]:
        """First row of each head in the table."""
        sizes = self.sizes[table]
        return tuple(sum(sizes[:head]) for head in range(len(sizes)))

    def rows(self, table: int) -> int:
        """Number of rows that heads address, without padding."""
        return sum(self.sizes[table])

    def padded_rows(self, table: int) -> int:
        """Number of rows of the stored table, with padding."""
        return -(-self.rows(table) // self.row_multiple) * self.row_multiple

    def row_ids(
        self, table: int, ids: Tensor, document_ids: Tensor | None = None, context: Tensor | None = None
    ) -> Tensor:
        """Row ids of one table for every token: int64 [B, T, total_heads], all MISSING for a missing token.

        Args:
            ids: int64 [B, T], ids of the addressed vocabulary, below 0 for a missing token.
            document_ids: int64 [B, T], for the boundary `document`. Default: each sequence is one document.
            context: int64 [B, N-1], the result of `next_context` for the preceding tokens; it belongs to the document
                of the sequence's first token. Default: no tokens precede.
        """
        multipliers, sizes, offsets = self.multipliers[table], self.sizes[table], self.offsets(table)
        if kernels_serve(ids):
            history, documents = self._history(ids, document_ids, context)
            return kmem_kernels.ngram_ids.op.ngram_ids(
                history, documents, self.orders, multipliers, sizes, offsets, self.boundary, self.pad_id
            )
        size_table, offset_table = (
            torch.tensor(numbers, device=ids.device).view(-1, self.heads) for numbers in (sizes, offsets)
        )
        rows = ids.new_empty(*ids.shape, len(sizes))
        grams = self._grams(ids, document_ids, context)
        mix = next(grams) * multipliers[0]
        for back, gram in enumerate(grams, 1):
            mix = mix ^ (gram * multipliers[back])
            if back + 1 in self.orders:
                order = self.orders.index(back + 1)
                part = rows[..., order * self.heads : (order + 1) * self.heads]
                torch.remainder(mix[..., None], size_table[order], out=part).add_(offset_table[order])
        return rows.masked_fill_((ids < 0)[..., None], MISSING)

    def row_ids_numpy(
        self, table: int, ids: "np.ndarray[Any, Any]", document_ids: "np.ndarray[Any, Any]"
    ) -> "np.ndarray[Any, Any]":
        """`row_ids` for numpy arrays."""
        return self.row_ids(table, torch.from_numpy(ids), torch.from_numpy(document_ids)).numpy()

    def distinct_grams(self, ids: "np.ndarray[Any, Any]", document_ids: "np.ndarray[Any, Any]") -> list[int]:
        """For each order, the number of distinct n-grams that end at these tokens [B, T]; no token may be missing."""
        grams = self._grams(torch.from_numpy(ids), torch.from_numpy(document_ids), None)
        number, counts = next(grams), []
        for back, gram in enumerate(grams, 1):
            # The shorter n-grams are numbered first, so the product with the vocabulary size fits in 64 bits.
            distinct, number = torch.unique(number * self.vocab_size + gram, return_inverse=True)
            if back + 1 in self.orders:
                counts.append(len(distinct))
        return counts

    def _grams(self, ids: Tensor, document_ids: Tensor | None, context: Tensor | None) -> Iterator[Tensor]:
        """Yield the tokens, then the tokens 1, 2, .. places back, [B, T] each; pad_id where a preceding token is
        missing or out of bounds."""
        history, documents = self._history(ids, document_ids, context)
        yield ids
        within: Tensor | None = None  # True while look-back has met no boundary
        for start in reversed(range(self.context)):
            past = history[:, start : start + ids.shape[1]]
            present = past >= 0
            if self.boundary == "eos":
                present &= past != self.pad_id
            elif documents is not None:
                present &= documents[:, start : start + ids.shape[1]] == documents[:, self.context :]
            if self.boundary != "none":
                within = present if within is None else within & present
                present = within
            yield torch.where(present, past, self.pad_id)

    def start(self, batch: int, device: torch.device | str | None = None) -> Tensor:
        """The state before a sequence's first token, int64 [B, N-1]."""
        return torch.full((batch, self.context), MISSING, dtype=torch.int64, device=device)

    def next_context(self, ids: Tensor, document_ids: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """The state after these tokens, int64 [B, N-1]: the last N-1 ids, MISSING for tokens outside the last token's
        document. Arguments as for `row_ids`."""
        history, documents = self._history(ids, document_ids, context)
        last = history[:, history.shape[1] - self.context :]
        if self.boundary == "document" and documents is not None:
            last_documents = documents[:, documents.shape[1] - self.context :]
            last = last.masked_fill(last_documents != last_documents[:, -1:], MISSING)
        return last.clone()

    def _history(
        self, ids: Tensor, document_ids: Tensor | None, context: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The ids, and the document ids if the boundary needs them, each preceded by N-1 tokens of look-back:
        [B, N-1+T]."""
        assert ids.dtype == torch.int64, f"token ids are int64, not {ids.dtype}"
        before = self.start(len(ids), ids.device) if context is None else context
        assert before.shape == (len(ids), self.context), f"context has shape {tuple(before.shape)}"
        history = torch.cat((before, ids), dim=1)
        if self.boundary != "document" or document_ids is None:
            return history, None
        return history, torch.cat((document_ids[:, :1].expand(-1, self.context), document_ids), dim=1)

    def to_manifest(self) -> dict[str, Any]:
        """Plain data for JSON or YAML."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> "NgramAddressing":
        """The inverse of `to_manifest`.

        Raises:
            ValueError: names the fields that are missing, unknown or inconsistent.
        """
        names = {field.name for field in fields(cls)}
        if wrong := sorted(names ^ set(manifest)):
            raise ValueError(f"the addressing manifest has missing or unknown fields: {', '.join(wrong)}")
        try:
            return cls(**{name: _frozen(value) for name, value in manifest.items()})
        except (TypeError, IndexError) as error:
            raise ValueError(f"the addressing manifest cannot be read: {error}") from error


def differences(one: "NgramAddressing | Mapping[str, Any]", other: "NgramAddressing | Mapping[str, Any]") -> list[str]:
    """Names of the fields in which two addressings, or their manifests, differ; empty if one's tables fit the other."""
    first, second = (item.to_manifest() if isinstance(item, NgramAddressing) else item for item in (one, other))
    absent = object()
    names = [*first, *(name for name in second if name not in first)]
    return [name for name in names if _plain(first.get(name, absent)) != _plain(second.get(name, absent))]


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, tuple | list) else value
