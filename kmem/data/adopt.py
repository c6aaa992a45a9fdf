"""`kmem data adopt`: train on Megatron indexed datasets where they lie.

The folder that it writes holds links to the datasets, a copy of their tokenizer, a manifest and, where the documents
themselves are divided, which of them are held out.
"""

import hashlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import kmem
from kmem.config import UserError
from kmem.data.held_out import choose_held_out
from kmem.data.indexed import Index, dataset_file, map_tokens, read_index
from kmem.data.manifest import (
    HELD_OUT_NAME,
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    SkipRecord,
    SourceRecord,
    SplitRecord,
    TokenizerRecord,
)
from kmem.data.progress import Progress
from kmem.data.text_bytes import TextBytes
from kmem.data.tokenizer import Encoder, adopt_tokenizer, drop_beginning
from kmem.data.verified_files import remember_files
from kmem.files import atomic_folder, check_replaceable, has_format
from kmem.model.file_digest import file_digest
from kmem.wording import counted

_CHUNK_TOKENS = 1 << 22
_SAMPLE_DOCUMENTS, _SAMPLE_TOKENS = 64, 512
_RIGHT_TOKENIZER, _SURELY_RIGHT = 0.95, 0.99
"""Shares of the tokens of texts that come back when the texts are encoded again. Measured with tokenizers of 1,000 and
4,096 tokens, trained on English and on Python: 100% for the right one, 55% to 91% for others."""


@dataclass(frozen=True)
class Adoption:
    """What to adopt, and how it is divided."""

    prefixes: Sequence[Path]
    """Paths of indexed datasets without .bin and .idx. They are joined in this order."""
    tokenizer: Path
    """The tokenizer.json or tokenizer folder that they were made with."""
    out: Path
    validation: Sequence[Path] = ()
    """Indexed datasets that are held out; empty: a share of the documents of `prefixes` is."""
    validation_share: float = 0.02
    """Share of the documents that is held out where `validation` is empty; at least one document is."""
    seed: int = 1234
    """Chooses the held-out documents."""
    eos_token: str | None = None
    """The EOS of a tokenizer that does not name one."""
    force: bool = False
    """Replace a finished folder of data."""


def adopt(options: Adoption) -> Manifest:
    """Adopt indexed datasets; the folder `options.out` appears only when it is complete. Nothing is written elsewhere.

    Raises:
        UserError: names the option or the file, and the remedy.
    """
    if not options.tokenizer.exists():
        raise UserError(f"--tokenizer {options.tokenizer}: no such file or folder")
    if not 0 < options.validation_share < 1:
        raise UserError(f"--validation-share {options.validation_share}: expected a number between 0 and 1")
    training, held_out = (_datasets(paths) for paths in (options.prefixes, options.validation))
    inputs = training + held_out
    _check_apart(inputs, options.out)
    check_replaceable(options.out, "prepared data", has_format(options.out / MANIFEST_NAME, "kmem-data"), options.force)
    documents = sum(len(dataset.lengths) for dataset in training)
    if documents < 2 and not held_out:
        raise UserError(
            f"{training[0].prefix}.idx: {counted(documents, 'document')}, but training and validation need different "
            "ones; name held-out data with --validation PREFIX"
        )
    with atomic_folder(options.out, replace=options.force) as folder:
        tokenizer = adopt_tokenizer(options.tokenizer, options.eos_token, folder / "tokenizer")
        for dataset in inputs:
            _check_round_trip(dataset, folder / "tokenizer", tokenizer, options.tokenizer)
        chosen = None
        if not held_out:
            chosen = choose_held_out(documents, options.validation_share, options.seed)
            np.save(folder / HELD_OUT_NAME, chosen, allow_pickle=False)
        scans = list(_scan(inputs, chosen, folder / "tokenizer", tokenizer, options.tokenizer))
        for dataset in inputs:
            if dataset.written != _written(dataset.prefix):
                raise UserError(f"{dataset.prefix}: changed while it was read; retry")
        tokenizer = _agree_on_beginnings(scans, folder / "tokenizer", tokenizer, options.tokenizer)
        _warn_of_eos(scans, tokenizer)
        manifest = _manifest(folder, training, held_out, scans, tokenizer, options)
        if not manifest.splits["validation"].bytes:
            raise UserError(f"{inputs[-1].prefix}: the held-out documents stand for no text; hold out others")
        manifest.write(folder)
    remember_files(options.out, manifest.files)
    return manifest


@dataclass(frozen=True)
class _Dataset:
    """An input."""

    prefix: Path
    index: Index
    tokens: NDArray[np.integer]
    """[tokens] memory-mapped."""
    starts: NDArray[np.int64]
    """[documents] where each document begins; documents without tokens are left out."""
    lengths: NDArray[np.int64]
    """[documents] tokens of each document."""
    written: tuple[int, ...]
    """Sizes and times of change of its files."""

    def file(self, ending: str) -> Path:
        return dataset_file(self.prefix, ending)


@dataclass
class _Counts:
    """Sums over the documents of a split."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    unknown: int = 0


@dataclass
class _Scan:
    """What was found in an input."""

    sha256: str
    """Digest of the .bin file."""
    splits: dict[str, _Counts]
    """Split -> counts of the documents that belong to it."""
    with_eos: int
    """Documents whose last token is EOS."""
    eos: int
    """EOS tokens."""
    with_beginning: int
    """Documents that begin as the tokenizer's template does."""


def _datasets(prefixes: Sequence[Path]) -> list[_Dataset]:
    return [_dataset(_without_ending(prefix)) for prefix in prefixes]


def _without_ending(path: Path) -> Path:
    """A prefix, which may have been given as one of its files."""
    return path.with_suffix("") if path.suffix in (".bin", ".idx") and path.is_file() else path


def _dataset(prefix: Path) -> _Dataset:
    path = dataset_file(prefix, "idx")
    for file in (path, dataset_file(prefix, "bin")):
        if not file.is_file():
            raise UserError(f"{file}: no such file; name an indexed dataset by its path without .bin and .idx")
    written = _written(prefix)
    try:
        index = read_index(path)
        lengths = index.lengths.astype(np.int64)
        if (np.diff(index.pointers) != lengths[:-1] * index.dtype.itemsize).any() or index.pointers[:1].any():
            raise ValueError("its sequences do not lie one after another in the .bin file")
        path = dataset_file(prefix, "bin")
        tokens = map_tokens(path, index)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: not a whole indexed dataset of Megatron-core: {error}; copy it again, or make it again with "
            "Megatron's preprocess_data.py"
        ) from None
    ends = index.ends
    there = np.diff(ends) > 0
    if not there.any():
        raise UserError(f"{prefix}.idx: no documents with tokens; leave it out")
    return _Dataset(prefix, index, tokens, ends[:-1][there], np.diff(ends)[there], written)


def _written(prefix: Path) -> tuple[int, ...]:
    found = [dataset_file(prefix, ending).stat() for ending in ("bin", "idx")]
    return tuple(number for file in found for number in (file.st_size, file.st_mtime_ns))


def _check_apart(inputs: Sequence[_Dataset], out: Path) -> None:
    """Check that inputs differ, and that the folder is not among them."""
    resolved = [dataset.file("bin").resolve() for dataset in inputs]
    for dataset, path in zip(inputs, resolved, strict=True):
        if resolved.count(path) > 1:
            raise UserError(f"{dataset.prefix}: named twice; leave one out")
        if out.resolve().is_relative_to(path.parent):
            raise UserError(
                f"--out {out}: lies in {path.parent}, the folder of {dataset.prefix}, where nothing is to be written; "
                "choose a folder elsewhere"
            )


def _check_round_trip(dataset: _Dataset, folder: Path, tokenizer: TokenizerRecord, origin: Path) -> None:
    """Check on a sample that the tokenizer gives the ids of the text for which they stand. Those of another tokenizer
    of the same size stand for a text that no one would write, and whose tokens are others."""
    from tokenizers import Tokenizer

    codec = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoder = Encoder(folder, tokenizer.eos_token_id)
    special = [number for number, token in codec.get_added_tokens_decoder().items() if token.special]
    count = min(_SAMPLE_DOCUMENTS, len(dataset.starts))
    compared = same = 0
    for place in np.arange(count) * len(dataset.starts) // count:
        start = dataset.starts[place]
        ids = dataset.tokens[start : start + min(dataset.lengths[place], _SAMPLE_TOKENS)].astype(np.int64)
        _check_ids(dataset, start, ids, tokenizer, origin)
        ids = ids[~np.isin(ids, [*special, tokenizer.eos_token_id])]
        again = encoder.encode([codec.decode(ids.tolist())])[0][len(tokenizer.before_ids) : -1]
        compared += len(ids)
        same += (Counter(ids.tolist()) & Counter(again)).total()
    share = same / compared if compared else 1.0
    found = f"{share:.1%} of the tokens of {dataset.prefix} come back when their text is encoded again"
    if share < _RIGHT_TOKENIZER:
        raise UserError(
            f"--tokenizer {origin}: {found}, so it is not the tokenizer of this data; name the one that Megatron's "
            "preprocess_data.py was given"
        )
    if share < _SURELY_RIGHT:
        print(f"warning: --tokenizer {origin}: only {found}; is it the tokenizer of this data?", file=sys.stderr)


def _check_ids(
    dataset: _Dataset, start: int, ids: NDArray[np.integer], tokenizer: TokenizerRecord, origin: Path
) -> None:
    """Check that ids are the tokenizer's. start: the place of the first one."""
    wrong = np.flatnonzero((ids < 0) | (ids >= tokenizer.size))
    if len(wrong):
        document = int(np.searchsorted(dataset.starts, start + wrong[0], side="right")) - 1
        raise UserError(
            f"{dataset.prefix}.bin: token id {int(ids[wrong[0]])} in document {document:,} is none of the "
            f"{tokenizer.size:,} of --tokenizer {origin}; name the tokenizer that the data was made with"
        )


def _scan(
    inputs: Sequence[_Dataset],
    held_out: NDArray[np.bool_] | None,
    folder: Path,
    tokenizer: TokenizerRecord,
    origin: Path,
) -> Iterator[_Scan]:
    """Read every token of every input once.

    Args:
        held_out: [documents of all inputs] which are held out; None: this is not decided by document.
    """
    text_bytes = TextBytes(folder, tokenizer)
    before = np.array(tokenizer.before_ids)
    first = 0
    with Progress("reading tokens", sum(dataset.file("bin").stat().st_size for dataset in inputs)) as progress:
        for dataset in inputs:
            documents = len(dataset.starts)
            out = np.zeros(documents, bool) if held_out is None else held_out[first : first + documents]
            first += documents
            bytes_d = np.zeros(documents, np.int64)
            unknown_d = np.zeros(documents, np.int64)
            digest, eos = hashlib.sha256(), 0
            for start in range(0, len(dataset.tokens), _CHUNK_TOKENS):
                raw = dataset.tokens[start : start + _CHUNK_TOKENS]
                digest.update(raw.data)
                ids = raw.astype(np.int64)
                _check_ids(dataset, start, ids, tokenizer, origin)
                eos += int((ids == tokenizer.eos_token_id).sum())
                # The pieces of documents in the chunk.
                low = int(np.searchsorted(dataset.starts, start, side="right")) - 1
                high = int(np.searchsorted(dataset.starts, start + len(ids), side="left"))
                cuts = np.maximum(dataset.starts[low:high] - start, 0)
                bytes_d[low:high] += text_bytes.of_pieces(ids, cuts)
                unknown_d[low:high] += np.add.reduceat(text_bytes.is_unknown(ids), cuts, dtype=np.int64)
                progress.advance(len(ids) * raw.itemsize)
            splits = {
                split: _Counts(
                    documents=int(here.sum()),
                    tokens=int(dataset.lengths[here].sum()),
                    bytes=int(bytes_d[here].sum()),
                    unknown=int(unknown_d[here].sum()),
                )
                for split, here in (("train", ~out), ("validation", out))
            }
            last = dataset.tokens[dataset.starts + dataset.lengths - 1]
            begins = dataset.lengths > len(before)
            for place, number in enumerate(before):
                begins[begins] = dataset.tokens[dataset.starts[begins] + place] == number
            with_eos = int((last == tokenizer.eos_token_id).sum())
            yield _Scan(digest.hexdigest(), splits, with_eos, eos, int(begins.sum()))


def _agree_on_beginnings(
    scans: Sequence[_Scan], folder: Path, tokenizer: TokenizerRecord, origin: Path
) -> TokenizerRecord:
    """Let prompts begin as documents do: what the tokenizer's template puts before a text is kept if most documents
    begin with it, and removed from the copy otherwise."""
    if not tokenizer.before_ids:
        return tokenizer
    documents = sum(counts.documents for scan in scans for counts in scan.splits.values())
    share = sum(scan.with_beginning for scan in scans) / documents
    if share < 1:
        kept = share >= 0.5
        print(
            f"warning: {origin} puts {counted(len(tokenizer.before_ids), 'token')} before a text, and {share:.1%} of "
            f"the documents begin so: its copy puts {'the same' if kept else 'nothing'} before a prompt",
            file=sys.stderr,
        )
        return tokenizer if kept else drop_beginning(folder, tokenizer)
    return tokenizer


def _warn_of_eos(scans: Sequence[_Scan], tokenizer: TokenizerRecord) -> None:
    documents = sum(counts.documents for scan in scans for counts in scan.splits.values())
    lacking = documents - sum(scan.with_eos for scan in scans)
    if lacking:
        print(
            f"warning: {lacking / documents:.1%} of the documents do not end in {tokenizer.eos_token} (id "
            f"{tokenizer.eos_token_id}): the model cannot learn from them where a text ends. Megatron's "
            "preprocess_data.py adds it with --append-eod; if the data ends in another token, name it with --eos-token",
            file=sys.stderr,
        )
    inside = sum(scan.eos - scan.with_eos for scan in scans)
    if inside:
        print(
            f"warning: {counted(inside, f'{tokenizer.eos_token} token')} inside of documents end none: a document "
            "is what the index says, and tokens attend to all of it",
            file=sys.stderr,
        )


def _manifest(
    folder: Path,
    training: Sequence[_Dataset],
    held_out: Sequence[_Dataset],
    scans: Sequence[_Scan],
    tokenizer: TokenizerRecord,
    options: Adoption,
) -> Manifest:
    """Link the inputs into the folder and describe them."""
    inputs = [*training, *held_out]
    if held_out:
        names = {"train": _names("train", len(training)), "validation": _names("validation", len(held_out))}
        linked = names["train"] + names["validation"]
        counts = {
            "train": [scan.splits["train"] for scan in scans[: len(training)]],
            "validation": [scan.splits["train"] for scan in scans[len(training) :]],
        }
    else:
        linked = _names("documents", len(training))
        names = dict.fromkeys(("train", "validation"), linked)
        counts = {split: [scan.splits[split] for scan in scans] for split in names}
    files = {}
    for name, dataset, scan in zip(linked, inputs, scans, strict=True):
        for ending in ("bin", "idx"):
            link, file = folder / f"{name}.{ending}", dataset.file(ending)
            link.symlink_to(file.absolute())
            sha256 = scan.sha256 if ending == "bin" else file_digest(file)
            files[link.name] = FileRecord(bytes=file.stat().st_size, sha256=sha256)
    if not held_out:
        path = folder / HELD_OUT_NAME
        files[path.name] = FileRecord(bytes=path.stat().st_size, sha256=file_digest(path))
    records = {
        split: SplitRecord(
            documents=sum(part.documents for part in parts),
            tokens=sum(part.tokens for part in parts),
            bytes=sum(part.bytes for part in parts),
            unknown=sum(part.unknown for part in parts),
            parts=names[split],
        )
        for split, parts in counts.items()
    }
    return Manifest(
        kmem_version=kmem.__version__,
        dtype=np.result_type(*(dataset.index.dtype for dataset in inputs)).name,
        tokenizer=tokenizer,
        splits=records,  # type: ignore[arg-type]
        files=files,
        sources=tuple(
            SourceRecord(
                path=str(dataset.file("bin").absolute()),
                bytes=dataset.file("bin").stat().st_size,
                sha256=scan.sha256,
                documents=len(dataset.starts),
            )
            for dataset, scan in zip(inputs, scans, strict=True)
        ),
        skipped=SkipRecord(),
        options={
            "adopted": True,
            "validation_share": None if held_out else options.validation_share,
            "seed": None if held_out else options.seed,
        },
    )


def _names(stem: str, count: int) -> tuple[str, ...]:
    return (stem,) if count == 1 else tuple(f"{stem}.{number}" for number in range(count))
