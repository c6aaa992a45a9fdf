"""The manifest of a folder of data, which `kmem data prepare` and `kmem data adopt` write last: then it is complete."""

import json
import os
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from kmem.config import UserError
from kmem.data.verified_files import remedy, verify_files

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
HELD_OUT_NAME = "held_out.npy"
"""File of adopted data whose splits are chosen among the same documents: bool [documents], whether one is held out."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(_Record):
    """A file of the folder, or an adopted file that a link in the folder names."""

    bytes: int
    sha256: str


class SplitRecord(_Record):
    """One split."""

    documents: int
    """Number of documents."""
    tokens: int
    """Number of tokens, with one EOS per document, and what the tokenizer puts before each."""
    unknown: int = 0
    """Number of tokens that stand for text that the vocabulary lacks."""
    bytes: int
    """UTF-8 bytes of the documents' text; an EOS counts as 0."""
    parts: tuple[str, ...] = ()
    """Names of the indexed datasets that are joined, without .bin and .idx; empty: the one named after the split."""


class TokenizerRecord(_Record):
    """The tokenizer in the folder `tokenizer/`."""

    fingerprint: str
    """Identity of the mapping from text to ids; see kmem.data.tokenizer.tokenizer_fingerprint."""
    size: int
    """Largest token id plus one."""
    eos_token: str
    eos_token_id: int
    before_ids: tuple[int, ...] = ()
    """Ids at the beginning of every document and prompt, such as BOS."""
    origin: str
    """`trained on the corpus`, or the file or folder it was taken from."""


class SourceRecord(_Record):
    """An input file."""

    path: str
    bytes: int
    sha256: str
    documents: int
    """Documents taken from it."""
    provenance: dict[str, Any] | None = None
    """Package, version, licence and attribution of files that `kmem data corpora` wrote."""


class SkipRecord(_Record):
    """Records left out because of --on-error skip."""

    count: int = 0
    reasons: dict[str, int] = {}
    examples: tuple[str, ...] = ()
    """The first few, as file, line and reason."""


class Manifest(_Record):
    """Contents of manifest.json."""

    format: Literal["kmem-data"] = "kmem-data"
    version: int = FORMAT_VERSION
    kmem_version: str
    dtype: str
    """NumPy type of the tokens in the .bin files."""
    tokenizer: TokenizerRecord
    splits: dict[Literal["train", "validation"], SplitRecord]
    files: dict[str, FileRecord]
    """The .bin and .idx files, and the choice of held-out documents of adopted data."""
    sources: tuple[SourceRecord, ...]
    skipped: SkipRecord
    options: dict[str, Any]
    """The options that decide the content: field, documents, validation share, seed, tokenizer size."""

    @model_validator(mode="after")
    def _has_its_files(self) -> Self:
        for split in self.splits:
            for part in self.parts(split):
                if not {f"{part}.bin", f"{part}.idx"} <= self.files.keys():
                    raise ValueError(f"files has no {part}.bin and {part}.idx")
        return self

    def parts(self, split: str) -> tuple[str, ...]:
        """Names of the indexed datasets of a split, in order, without .bin and .idx."""
        return self.splits["train" if split == "train" else "validation"].parts or (split,)

    def content_digest(self, split: str) -> str:
        """Identity of a split's tokens and documents, wherever its files lie."""
        names = [f"{part}.{ending}" for part in self.parts(split) for ending in ("bin", "idx")]
        chosen = [self.files[HELD_OUT_NAME].sha256, split] if HELD_OUT_NAME in self.files else []
        return "/".join([*(self.files[name].sha256 for name in names), *chosen])

    def write(self, folder: Path) -> None:
        """Write it into a folder."""
        (folder / MANIFEST_NAME).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder of data, after a check that every file is there and matches its digest. Of the ranks on
    a machine, the first one compares digests.

    Raises:
        UserError: the folder is missing, unfinished or of an unknown format, or a file is missing or damaged.
    """
    manifest = parse_manifest(folder)
    for name, record in manifest.files.items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != record.bytes:
            actual = "missing" if size is None else f"{size:,} bytes"
            raise UserError(f"{file}: {actual}, expected {record.bytes:,} bytes; {remedy(file)}")
    if os.environ.get("LOCAL_RANK", "0") == "0":
        verify_files(folder, manifest.files)
    return manifest


def parse_manifest(folder: Path) -> Manifest:
    """The manifest of a folder of data, without a look at its files.

    Raises:
        UserError: the folder is missing, unfinished or of an unknown format.
    """
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; write it with: kmem data prepare ... --out {folder}")
    if not path.is_file():
        raise UserError(
            f"{path}: missing, so {folder} is not a finished preparation; run kmem data prepare ... --out {folder}"
        )
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        version = tree["version"] if tree["format"] == "kmem-data" else None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not a manifest of prepared data; prepare the folder anew") from None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {version}, but this kmem reads {FORMAT_VERSION}; prepare the folder anew or use "
            f"the kmem that wrote it ({tree.get('kmem_version', 'unknown')})"
        )
    try:
        return Manifest.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: damaged at {where} ({first['msg']}); prepare the folder anew") from None
