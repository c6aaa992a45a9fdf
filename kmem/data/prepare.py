"""`kmem data prepare`: turn text into a tokenizer and Megatron indexed datasets.

There are two passes over the input. The first checks every record, counts documents and hashes the files: errors come
before hours of tokenizing, and the held-out documents are chosen from a known number. The second tokenizes.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import kmem
from kmem.config import UserError
from kmem.data.documents import PROVENANCE_NAME, Problem, Reading, find_files, read_documents
from kmem.data.held_out import choose_held_out
from kmem.data.indexed import IndexedWriter, token_dtype
from kmem.data.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    SkipRecord,
    SourceRecord,
    SplitRecord,
    TokenizerRecord,
)
from kmem.data.progress import Progress
from kmem.data.questions import count_exposures
from kmem.data.tokenizer import Encoder, adopt_tokenizer, train_tokenizer
from kmem.data.workers import Workers
from kmem.files import atomic_folder, check_replaceable, has_format
from kmem.model.file_digest import file_digest

OnError = Literal["fail", "skip"]
_EXAMPLES = 10
_BATCH_CHARACTERS, _BATCH_DOCUMENTS = 1 << 19, 1024


@dataclass(frozen=True)
class Preparation:
    """What to prepare, and how."""

    inputs: Sequence[Path]
    """Files and folders."""
    out: Path
    tokenizer: Path | None = None
    """An existing tokenizer.json or tokenizer folder; None trains one with vocab_size tokens."""
    vocab_size: int | None = None
    eos_token: str | None = None
    """The EOS of an existing tokenizer that does not name one."""
    reading: Reading = field(default_factory=Reading)
    validation_share: float = 0.02
    """Share of the documents that is held out; at least one document is."""
    seed: int = 1234
    """Chooses the held-out documents."""
    workers: int = 1
    on_error: OnError = "fail"
    force: bool = False
    """Replace a finished preparation."""
    tokenizer_sample: int = 1 << 28
    """Most bytes of text that a tokenizer is trained on: the beginning of each file, in proportion to its size."""


def prepare(options: Preparation) -> Manifest:
    """Prepare a corpus; the folder `options.out` appears only when it is complete.

    The folder's content depends on the input and the options, not on the number of workers.

    Raises:
        UserError: names the option, or the file and line, and the remedy.
    """
    if (options.tokenizer is None) == (options.vocab_size is None):
        raise UserError("give either --tokenizer or --vocab-size")
    if options.tokenizer is not None and not options.tokenizer.exists():
        raise UserError(f"--tokenizer {options.tokenizer}: no such file or folder")
    if not 0 < options.validation_share < 1:
        raise UserError(f"--validation-share {options.validation_share}: expected a number between 0 and 1")
    if options.workers < 1:
        raise UserError(f"--workers {options.workers}: expected at least 1")
    prepared = has_format(options.out / MANIFEST_NAME, "kmem-data")
    check_replaceable(options.out, "prepared data", prepared, options.force)
    with atomic_folder(options.out, replace=options.force) as folder, Workers(options.workers) as workers:
        surveys = _survey(find_files(options.inputs), options, workers)
        documents = sum(survey.source.documents for survey in surveys)
        _check_splittable(documents, options)
        held_out = choose_held_out(documents, options.validation_share, options.seed)
        tokenizer = _tokenizer(folder / "tokenizer", surveys, held_out, options)
        dtype, splits = _tokenize(folder, surveys, held_out, tokenizer, options, workers)
        for survey, held_out_here in _by_file(surveys, held_out):
            if survey.source.provenance is not None:
                count_exposures(survey.path, held_out_here, folder)
        manifest = _manifest(folder, surveys, tokenizer, dtype, splits, options)
        manifest.write(folder)
    return manifest


@dataclass(frozen=True)
class Survey:
    """An input file after the first pass."""

    source: SourceRecord
    text_bytes: int
    skipped: SkipRecord
    """Records left out."""

    @property
    def path(self) -> Path:
        return Path(self.source.path)


def survey_file(path: Path, reading: Reading, on_error: OnError) -> Survey:
    """Read a whole file, count its documents and hash it.

    Raises:
        UserError: names the first record that yields no document, unless such records are skipped.
    """
    documents = text_bytes = 0
    problems: Counter[str] = Counter()
    examples: list[str] = []
    for item in read_documents(path, reading):
        if isinstance(item, Problem):
            if on_error == "fail":
                remedy = "" if item.whole_file else "; --on-error skip leaves out unreadable records"
                raise UserError(f"{item}{remedy}")
            problems[item.kind] += 1
            if len(examples) < _EXAMPLES:
                examples.append(str(item))
        else:
            documents += 1
            text_bytes += len(item.encode("utf-8"))
    sha256 = file_digest(path)
    source = SourceRecord(
        path=str(path),
        bytes=path.stat().st_size,
        sha256=sha256,
        documents=documents,
        provenance=_provenance(path, sha256),
    )
    return Survey(
        source, text_bytes, SkipRecord(count=problems.total(), reasons=dict(problems), examples=tuple(examples))
    )


def _survey(files: Sequence[Path], options: Preparation, workers: Workers) -> list[Survey]:
    survey_one = partial(survey_file, reading=options.reading, on_error=options.on_error)
    surveys = []
    with Progress("checking input", sum(file.stat().st_size for file in files)) as progress:
        for survey in workers.in_order(survey_one, files):
            surveys.append(survey)
            progress.advance(survey.source.bytes)
    return surveys


def _check_splittable(documents: int, options: Preparation) -> None:
    if documents == 0:
        raise UserError(f"{', '.join(map(str, options.inputs))}: no documents in the input")
    if documents == 1:
        raise UserError(
            f"{', '.join(map(str, options.inputs))}: only one document, but training and validation need different "
            "documents; add more, or cut plain text with --documents blank-line, line or marker:TEXT"
        )


def _tokenizer(
    folder: Path, surveys: Sequence[Survey], held_out: NDArray[np.bool_], options: Preparation
) -> TokenizerRecord:
    if options.tokenizer is not None:
        return adopt_tokenizer(options.tokenizer, options.eos_token, folder)
    assert options.vocab_size is not None
    limit = min(options.tokenizer_sample, sum(survey.text_bytes for survey in surveys))
    with Progress("training tokenizer", limit) as progress:
        texts = _training_sample(surveys, held_out, options, progress)
        return train_tokenizer(texts, options.vocab_size, folder)


def _training_sample(
    surveys: Sequence[Survey], held_out: NDArray[np.bool_], options: Preparation, progress: Progress
) -> Iterator[str]:
    """Documents that the tokenizer is trained on: none is held out, and each file gives its share of the sample."""
    share = min(1.0, options.tokenizer_sample / sum(survey.text_bytes for survey in surveys))
    for survey, held_out_here in _by_file(surveys, held_out):
        taken = 0
        for text, out in zip(_documents(survey.path, options.reading), held_out_here, strict=False):
            if taken > share * survey.text_bytes:
                break
            if not out:
                yield text
                taken += len(text.encode("utf-8"))
                progress.advance(len(text.encode("utf-8")))


def _by_file(surveys: Sequence[Survey], held_out: NDArray[np.bool_]) -> Iterator[tuple[Survey, NDArray[np.bool_]]]:
    """Each file with `held_out` of its own documents."""
    ends = np.cumsum([survey.source.documents for survey in surveys])
    return zip(surveys, np.split(held_out, ends[:-1]), strict=True)


def _documents(path: Path, reading: Reading) -> Iterator[str]:
    """The documents of a file; the first pass has reported its problems."""
    return (item for item in read_documents(path, reading) if isinstance(item, str))


def encode_batch(
    texts: list[str], tokenizer: Path, eos_token_id: int, dtype: str
) -> list[tuple[NDArray[np.integer], int, int]]:
    """(token ids, UTF-8 bytes, number of unknown tokens) of each document of a batch; runs in a worker."""
    encoder = _encoder(tokenizer, eos_token_id)
    return [
        (
            np.array(ids, dtype=dtype),
            len(text.encode("utf-8")),
            ids.count(encoder.unknown_id),
        )
        for ids, text in zip(encoder.encode(texts), texts, strict=True)
    ]


_encoder = lru_cache(maxsize=1)(Encoder)  # one for each worker


def _tokenize(
    folder: Path,
    surveys: Sequence[Survey],
    held_out: NDArray[np.bool_],
    tokenizer: TokenizerRecord,
    options: Preparation,
    workers: Workers,
) -> tuple[str, dict[str, SplitRecord]]:
    """Second pass: write train.bin/.idx and validation.bin/.idx; return the tokens' dtype and each split's counts."""
    _encoder.cache_clear()  # a folder of the same name may have held another tokenizer
    dtype = token_dtype(tokenizer.size)
    writers = {split: IndexedWriter(folder / split, dtype) for split in _SPLITS}
    counts = {split: [0, 0, 0, 0] for split in _SPLITS}
    encode = partial(encode_batch, tokenizer=folder / "tokenizer", eos_token_id=tokenizer.eos_token_id, dtype=dtype)
    number = 0
    with Progress("tokenizing", sum(survey.text_bytes for survey in surveys)) as progress:
        for encoded in workers.in_order(encode, _batches(surveys, options)):
            for ids, text_bytes, unknown in encoded:
                if number == len(held_out):
                    raise _changed(surveys)
                split = "validation" if held_out[number] else "train"
                writers[split].add(ids)
                for place, amount in enumerate((1, len(ids), text_bytes, unknown)):
                    counts[split][place] += amount
                number += 1
            progress.advance(sum(text_bytes for _, text_bytes, _ in encoded))
    if number != len(held_out):
        raise _changed(surveys)
    for writer in writers.values():
        writer.close()
    records = {
        split: SplitRecord(documents=documents, tokens=tokens, bytes=text_bytes, unknown=unknown)
        for split, (documents, tokens, text_bytes, unknown) in counts.items()
    }
    return dtype, records


_SPLITS = ("train", "validation")


def _batches(surveys: Sequence[Survey], options: Preparation) -> Iterator[list[str]]:
    texts: list[str] = []
    characters = 0
    for survey in surveys:
        for text in _documents(survey.path, options.reading):
            texts.append(text)
            characters += len(text)
            if characters >= _BATCH_CHARACTERS or len(texts) >= _BATCH_DOCUMENTS:
                yield texts
                texts, characters = [], 0
    if texts:
        yield texts


def _changed(surveys: Sequence[Survey]) -> UserError:
    return UserError(f"{', '.join(str(survey.path) for survey in surveys)}: the input changed while it was read; retry")


def _manifest(
    folder: Path,
    surveys: Sequence[Survey],
    tokenizer: TokenizerRecord,
    dtype: str,
    splits: dict[str, SplitRecord],
    options: Preparation,
) -> Manifest:
    reasons = sum((Counter(survey.skipped.reasons) for survey in surveys), Counter())
    examples = [example for survey in surveys for example in survey.skipped.examples]
    return Manifest(
        kmem_version=kmem.__version__,
        dtype=dtype,
        tokenizer=tokenizer,
        splits=splits,  # type: ignore[arg-type]
        files={
            f"{split}.{ending}": FileRecord(
                bytes=(folder / f"{split}.{ending}").stat().st_size, sha256=file_digest(folder / f"{split}.{ending}")
            )
            for split in _SPLITS
            for ending in ("bin", "idx")
        },
        sources=tuple(survey.source for survey in surveys),
        skipped=SkipRecord(count=reasons.total(), reasons=dict(reasons), examples=tuple(examples[:_EXAMPLES])),
        options={
            "field": options.reading.field,
            "documents": options.reading.documents,
            "validation_share": options.validation_share,
            "seed": options.seed,
            "vocab_size": options.vocab_size,
            "tokenizer_sample": options.tokenizer_sample if options.tokenizer is None else None,
            "on_error": options.on_error,
        },
    )


def _provenance(path: Path, sha256: str) -> dict[str, Any] | None:
    """The provenance that `kmem data corpora` recorded for exactly this file; None if it did not write the file."""
    try:
        tree = json.loads((path.parent / PROVENANCE_NAME).read_text(encoding="utf-8"))
        entry = tree["files"][path.name]
        return entry if entry["sha256"] == sha256 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
