"""Training and held-out sequences by number: every process can read any of them at any time."""

import copy
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kmem.config import AddressesConfig, Config, DataConfig, UserError, with_vocab_size
from kmem.data.bank_addresses import (
    SplitAddresses,
    chosen_leaves,
    read_addresses,
    tree_record,
)
from kmem.data.batch import IGNORED_LABEL, SequenceBatch
from kmem.data.blend import Blend
from kmem.data.indexed import IndexedTokens
from kmem.data.leaf_order import LeafOrder
from kmem.data.manifest import Manifest, parse_manifest, read_manifest
from kmem.data.order import ORDER_VERSION, CorpusOrder, Epoch, natural_order, offsets_of
from kmem.data.tokenizer import check_one_tokenizer, check_tokenizer
from kmem.wording import counted

_SEQUENCES_AT_A_TIME = 256
_SLOWEST_DISK = 50e6
"""Bytes per second."""


@dataclass(frozen=True)
class PreparedData:
    """The data of a run, opened and checked."""

    training: "SequenceReader"
    validation: "SequenceReader"
    tokenizer_path: Path
    """Folder that AutoTokenizer.from_pretrained loads."""
    tokenizer_fingerprint: str
    tokenizer_size: int
    """Largest token id plus one."""
    eos_token_id: int
    bytes_per_token_validation: float
    """UTF-8 bytes per token of the validation documents. An EOS counts as a token; a BOS does not, since it is never
    predicted. Bits per byte are loss / ln 2 / this, where loss is the mean per token in nats."""
    fingerprint: str
    """Identity of the training sequences and their order: with equal fingerprints and selections, every sample is
    equal."""
    sequences_fingerprint: str
    """The same without the addresses that sequences carry, unless addresses decide how sequences are composed."""
    held_out_fingerprint: str = ""
    """Identity of the held-out documents."""
    selection: str = ""
    """The subtrees whose sequences are read, such as `0,3.7`; empty: all text. Each selection has an order of its own.
    """

    def bits_per_byte(self, loss: float) -> float:
        """Convert a mean held-out loss in nats per token to bits per UTF-8 byte, comparable between tokenizers."""
        return loss / math.log(2) / self.bytes_per_token_validation


def open_data(config: DataConfig, model_vocab_size: int | None) -> PreparedData:
    """Open the prepared corpora of a run. With `data.addresses`, sequences carry bank addresses.

    Args:
        model_vocab_size: `model.vocab_size`; None takes the tokenizer's size.

    Raises:
        UserError: a corpus is missing, unfinished, damaged or shorter than a sequence; the corpora do not share one
            tokenizer; the tokenizer has more tokens than the model; a corpus has no addresses from the tree.
    """
    manifests = [read_manifest(_folder(source.path)) for source in config.sources]
    for source, manifest in zip(config.sources, manifests, strict=True):
        check_tokenizer(_folder(source.path), manifest)
    check_one_tokenizer("data.sources", [source.path for source in config.sources], manifests)
    tokenizer = manifests[0].tokenizer
    if model_vocab_size is not None and tokenizer.size > model_vocab_size:
        raise UserError(
            f"model.vocab_size: {model_vocab_size} is less than the {tokenizer.size} tokens of "
            f"{config.sources[0].path}/tokenizer; give --set model.vocab_size={tokenizer.size} or more, or "
            "model.vocab_size=null, which takes the tokenizer's size"
        )
    held_out = [manifest.splits["validation"] for manifest in manifests]
    addresses, training = config.addresses, SequenceReader(config, "train")
    return PreparedData(
        training=training,
        validation=SequenceReader(config, "validation"),
        tokenizer_path=_folder(config.sources[0].path) / "tokenizer",
        tokenizer_fingerprint=tokenizer.fingerprint,
        tokenizer_size=tokenizer.size,
        eos_token_id=tokenizer.eos_token_id,
        bytes_per_token_validation=sum(split.bytes for split in held_out)
        / sum(split.tokens - split.documents * len(tokenizer.before_ids) for split in held_out),
        fingerprint=_fingerprint(config, manifests, addresses, training.address_digests),
        sequences_fingerprint=_fingerprint(
            config, manifests, addresses if _by_leaf(config) else None, training.address_digests
        ),
        held_out_fingerprint="/".join(manifest.content_digest("validation") for manifest in manifests),
        selection="" if addresses is None else ",".join(addresses.subtrees or ()),
    )


def resolve_vocab_size(config: Config) -> Config:
    """The configuration with `model.vocab_size` as a number, without a look at the tokens of the data.

    Raises:
        UserError: it is null, and the data is not prepared.
    """
    if config.model.vocab_size is not None:
        return config
    try:
        manifest = parse_manifest(_folder(config.data.sources[0].path))
    except UserError as error:
        raise UserError(
            f"model.vocab_size: null takes the size of the tokenizer from data.sources, but {error}; or set the size, "
            "for example --set model.vocab_size=4096"
        ) from None
    return with_vocab_size(config, manifest.tokenizer.size)


def comparing_seconds(config: DataConfig) -> float:
    """A generous time for comparing the files of all corpora with their digests."""
    files = [file for source in config.sources for file in _folder(source.path).glob("*.bin")]
    return sum(file.stat().st_size for file in files) / _SLOWEST_DISK


class SequenceReader:
    """Sequences of one split as a pure function of (configuration, sample number).

    Split `train`: sample numbers are unbounded. Each source is read in a new order every epoch (kmem.data.order), and
    the blend takes sources by weight (kmem.data.blend). Nothing depends on the planned length of the run.

    Split `validation`: samples 0..len-1 in the order in which the documents are stored, source after source. The last
    sequence of a source is padded with EOS tokens that have no labels.

    With `addresses.batching` leaf, a sequence holds documents or windows of one leaf, and the last sequence of each
    leaf is padded (kmem.data.leaf_order); the validation split reads leaf after leaf. With `addresses.subtrees` both
    splits leave out the sequences of other leaves and are otherwise the same. A source's weight is then multiplied by
    the share of its sequences that remains, so each source keeps the share of a cluster's text that it has in the whole
    text.
    """

    def __init__(self, config: DataConfig, split: str):
        """
        Raises:
            UserError: a corpus is missing, unfinished or damaged, its training split is shorter than a sequence, or it
                has no addresses from the tree.
        """
        assert split in ("train", "validation")
        self._config = config
        self._sources = []
        for source in config.sources:
            folder = _folder(source.path)
            manifest = read_manifest(folder)
            self._sources.append(_Source(folder, manifest, split, config))
        self._drawn = np.arange(len(self._sources))
        if config.addresses is not None and config.addresses.subtrees:
            tree = tree_record(_folder(config.addresses.tree))
            self._drawn = np.flatnonzero([source.spans for source in self._sources])
            for path in config.addresses.subtrees:
                below = chosen_leaves(tree, [path])
                if split == "train" and not any(below[source.leaves].any() for source in self._sources):
                    raise UserError(
                        f"data.addresses.subtrees: there is no training text below cluster {path}; leave it out"
                    )
        weights = [config.sources[index].weight * self._sources[index].share for index in self._drawn]
        self._blend = Blend(weights) if split == "train" else None
        self._ends = offsets_of(np.array([source.spans for source in self._sources]))

    def __len__(self) -> int:
        """Sequences in one pass over every source; training continues beyond it, validation ends there."""
        return int(self._ends[-1])

    @property
    def address_digests(self) -> list[str]:
        """Identity of each source's addresses and of their tree; empty without addresses."""
        return [source.addresses.digest for source in self._sources if source.addresses is not None]

    @property
    def leaves(self) -> NDArray[np.integer]:
        """int32 [units] the leaf of each document or window, source after source; only if sequences carry addresses."""
        return np.concatenate([source.leaves for source in self._sources])

    def with_leaves(self, leaves: NDArray[np.integer]) -> "SequenceReader":
        """A reader of the same sequences whose units have other addresses: [units], in the order of `self.leaves`."""
        other, start = copy.copy(self), 0
        other._sources = []
        for source in self._sources:
            stop = start + len(source.leaves)
            other._sources.append(source.with_leaves(leaves[start:stop]))
            start = stop
        return other

    def units(self, samples: Sequence[int]) -> NDArray[np.int64]:
        """The units that these sequences hold: indices into `leaves`, ascending."""
        numbered = self.with_leaves(np.arange(len(self.leaves)))
        parts = [np.empty(0, dtype=np.int64)]
        for start in range(0, len(samples), _SEQUENCES_AT_A_TIME):
            addresses = numbered.read(samples[start : start + _SEQUENCES_AT_A_TIME]).addresses
            assert addresses is not None
            parts.append(np.unique(addresses.numpy()))
        return np.unique(np.concatenate(parts))

    @property
    def tokens(self) -> int:
        """Tokens of the split in all sources, with EOS."""
        return sum(int(source.indexed.lengths.sum()) for source in self._sources)

    @property
    def padding(self) -> int:
        """Positions without a token in one pass over every source, that is, in len(self) sequences."""
        return sum(source.padding for source in self._sources)

    def spread(self, count: int | None) -> list[int]:
        """At most `count` validation samples, evenly spaced over all sources and their whole length; None takes all."""
        count = len(self) if count is None else min(count, len(self))
        return [number * len(self) // count for number in range(count)]

    def read(self, samples: Sequence[int]) -> SequenceBatch:
        """The sequences of the given sample numbers, in that order.

        Raises:
            IndexError: a validation sample past the end, or a negative number.
            UserError: a token id is beyond the tokenizer's; names the file.
        """
        numbers = np.asarray(samples, dtype=np.int64)
        if self._blend is None:
            if len(numbers) and numbers.max() >= len(self):
                raise IndexError(f"sample {numbers.max()} of {len(self)} validation sequences")
            source_n = np.searchsorted(self._ends, numbers, side="right") - 1
            draw_n = numbers - self._ends[source_n]
        else:
            place_n, draw_n = self._blend.locate(numbers)
            source_n = self._drawn[place_n]
        if len(numbers) and numbers.min() < 0:
            raise IndexError(f"sample {numbers.min()} is negative")
        tokens, documents, positions, addresses = np.empty(
            (4, len(numbers), self._config.sequence_length + 1), dtype=np.int64
        )
        real = np.empty(len(numbers), dtype=np.int64)
        rows = _Rows(tokens, documents, positions, real, addresses if self._config.addresses is not None else None)
        for index in np.unique(source_n):
            source = self._sources[index]
            here = np.flatnonzero(source_n == index)
            epoch_n, position_n = np.divmod(draw_n[here], source.spans)
            for epoch in np.unique(epoch_n):
                among = epoch_n == epoch
                source.fill(rows, here[among], int(epoch), position_n[among])
        return self._batch(rows)

    def _batch(self, rows: "_Rows") -> SequenceBatch:
        tokens, documents = rows.tokens, rows.documents
        labels = tokens[:, 1:].copy()
        labels[np.arange(1, tokens.shape[1]) >= rows.real[:, None]] = IGNORED_LABEL  # the label is padding
        if self._config.document_attention:
            labels[documents[:, 1:] != documents[:, :-1]] = IGNORED_LABEL
            for row, column, token in rows.continuations:
                labels[row, column] = token
            document_ids, position_ids = documents[:, :-1].copy(), rows.positions[:, :-1].copy()
        else:
            document_ids = np.zeros_like(labels)
            position_ids = np.broadcast_to(np.arange(labels.shape[1]), labels.shape).copy()
        padding = np.arange(labels.shape[1]) >= rows.real[:, None]
        return SequenceBatch(
            input_ids=torch.from_numpy(tokens[:, :-1].copy()),
            labels=torch.from_numpy(labels),
            position_ids=torch.from_numpy(position_ids),
            document_ids=torch.from_numpy(document_ids),
            addresses=None if rows.addresses is None else torch.from_numpy(rows.addresses[:, :-1].copy()),
            padding=torch.from_numpy(padding) if padding.any() else None,
        )


@dataclass(frozen=True)
class _Rows:
    """n rows of T tokens and the token after each row; int64."""

    tokens: NDArray[np.int64]  # [n, T + 1]
    documents: NDArray[np.int64]  # [n, T + 1] numbered from 0 in each row
    positions: NDArray[np.int64]  # [n, T + 1] within the document, from its first token in the row
    real: NDArray[np.int64]  # [n] tokens before the padding
    addresses: NDArray[np.int64] | None  # [n, T + 1]
    # (rows, columns, tokens): the token after a window in its document, where the row continues with another token.
    continuations: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]] = field(default_factory=list)


class _Source:
    """One corpus of the blend."""

    def __init__(self, folder: Path, manifest: Manifest, split: str, config: DataConfig):
        self.indexed = IndexedTokens.of_split(folder, manifest, split)
        record = manifest.splits["train" if split == "train" else "validation"]
        lengths = self.indexed.lengths
        if (len(lengths), int(lengths.sum())) != (record.documents, record.tokens):
            raise UserError(
                f"{folder / split}.idx: {counted(len(lengths), 'document')} of {lengths.sum():,} tokens, but "
                f"manifest.json says {record.documents:,} of {record.tokens:,}; prepare the folder anew"
            )
        self._files = ", ".join(f"{folder / part}.bin" for part in manifest.parts(split))
        self._ids = manifest.tokenizer.size
        self._length = config.sequence_length
        self._padding = manifest.tokenizer.eos_token_id
        # The pieces that are joined into a stream: documents, or units of one leaf.
        self._starts, self._lengths = self.indexed.starts, lengths
        self.addresses: SplitAddresses | None = None
        if config.addresses is not None:
            tree = _folder(config.addresses.tree)
            self.addresses = read_addresses(folder, manifest, split, self._starts, lengths, tree)
        self.leaves: NDArray[np.integer] = np.empty(0, np.int32) if self.addresses is None else self.addresses.leaves
        self._by_leaf = _by_leaf(config)
        self._epoch: Callable[[int], Epoch]
        self.padding, self.share = 0, 1.0
        if self._by_leaf:
            assert self.addresses is not None
            assert config.addresses is not None
            self._starts, self._lengths = self.addresses.units.starts, self.addresses.units.lengths
            digest = f"{manifest.content_digest('train')}/{self.addresses.digest}" if split == "train" else None
            subtrees = config.addresses.subtrees
            chosen = chosen_leaves(tree_record(tree), subtrees) if subtrees else None
            order = LeafOrder(self._lengths, self.addresses.leaves, self._length, config.seed, digest, chosen)
            self.padding, self.spans, self._epoch = order.padding, order.spans_per_epoch, order.epoch
            self.share = order.spans_per_epoch / max(order.all_spans, 1)
        elif split == "train":
            whole = CorpusOrder(lengths, self._length, config.seed, manifest.content_digest("train"))
            self.spans, self._epoch = whole.spans_per_epoch, whole.epoch
            if self.spans == 0:
                raise UserError(
                    f"{folder}: its {record.tokens:,} training tokens are fewer than one sequence of "
                    f"data.sequence_length={self._length} and the label of its last token; add text or shorten the "
                    "sequences"
                )
        else:
            natural = natural_order(lengths, self._length)
            self.spans, self._epoch = len(natural.spans), lambda _: natural
            self.padding = max(self.spans * self._length - record.tokens, 0)

    def with_leaves(self, leaves: NDArray[np.integer]) -> "_Source":
        """The same sequences with other addresses of their units."""
        other = copy.copy(self)
        other.leaves = leaves
        return other

    def fill(self, rows: _Rows, here: NDArray[np.int64], number: int, positions: NDArray[np.int64]) -> None:
        """Write the spans at `positions` of epoch `number` into the rows `here`."""
        epoch = self._epoch(number)
        width = self._length + 1
        span_n = epoch.spans[positions]
        start_n = span_n * self._length
        stop_n = np.minimum(start_n + width, epoch.offsets[-1] if epoch.ends is None else epoch.ends[span_n])
        # A row is joined from pieces, one per document (or unit) that it overlaps.
        first_n = np.searchsorted(epoch.offsets, start_n, side="right") - 1
        count_n = np.searchsorted(epoch.offsets, stop_n, side="left") - first_n
        row_p = np.repeat(np.arange(len(here)), count_n)
        nth_p = _within(count_n)
        place_p = first_n[row_p] + nth_p
        part_p = epoch.documents[place_p]
        begin_p = np.maximum(epoch.offsets[place_p], start_n[row_p])
        end_p = epoch.offsets[place_p] + self._lengths[part_p]
        length_p = np.minimum(end_p, stop_n[row_p]) - begin_p
        stored_p = self._starts[part_p] + begin_p - epoch.offsets[place_p]

        within = _within(length_p)
        row = np.repeat(row_p, length_p)
        column = np.repeat(begin_p - start_n[row_p], length_p) + within
        real_n = stop_n - start_n
        tokens = np.full((len(here), width), self._padding, dtype=np.int64)
        stored = np.repeat(stored_p, length_p) + within
        tokens[row, column] = self.indexed.take(stored)
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < self._ids:
            raise UserError(
                f"{self._files}: token id {int(tokens.max())} is none of the tokenizer's {self._ids}: the file was "
                "damaged since it was opened; copy it again or prepare the folder anew"
            )
        documents = np.repeat(count_n, width).reshape(-1, width)  # padding is one more document
        documents[row, column] = np.repeat(nth_p, length_p)
        place = np.arange(width) - real_n[:, None]
        place[row, column] = within
        rows.tokens[here], rows.documents[here], rows.positions[here] = tokens, documents, place
        rows.real[here] = real_n
        if self.addresses is None or rows.addresses is None:
            return
        part = np.repeat(part_p, length_p)
        unit = part if self._by_leaf else self.addresses.units.of(part, stored)
        addresses = np.zeros((len(here), width), dtype=np.int64)
        addresses[row, column] = self.leaves[unit]
        last = addresses[np.arange(len(here)), real_n - 1]
        rows.addresses[here] = np.where(np.arange(width) < real_n[:, None], addresses, last[:, None])
        if self._by_leaf:
            at = begin_p + length_p - 1 - start_n[row_p]  # column of the piece's last token
            reached = (begin_p + length_p == end_p) & (at < self._length) & self.addresses.continued[part_p]
            following = self.indexed.take(stored_p[reached] + length_p[reached])
            rows.continuations.append((here[row_p[reached]], at[reached], following))


def _within(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 1, .. counts[0]-1, 0, 1, .. counts[1]-1, and so on."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)


def _by_leaf(config: DataConfig) -> bool:
    return config.addresses is not None and config.addresses.batching == "leaf"


def _folder(path: str) -> Path:
    return Path(path).expanduser()


def _fingerprint(
    config: DataConfig, manifests: Sequence[Manifest], addresses: AddressesConfig | None, digests: Sequence[str]
) -> str:
    # Paths are left out: a moved corpus is still the same data.
    tree = {
        "order": ORDER_VERSION,
        "sources": [
            [manifest.content_digest("train"), source.weight]
            for source, manifest in zip(config.sources, manifests, strict=True)
        ],
        "tokenizer": manifests[0].tokenizer.fingerprint,
        "sequence_length": config.sequence_length,
        "document_attention": config.document_attention,
        "seed": config.seed,
    }
    if addresses is not None:  # left out otherwise, so data without addresses keeps its fingerprint
        tree["addresses"] = [addresses.batching, *digests]
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
