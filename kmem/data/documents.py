"""Read documents from plain text, JSON lines and Parquet; a problem with a record is reported with file and line."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from kmem.config import UserError
from kmem.files import PARTIAL, REPLACED

PROVENANCE_NAME = "provenance.json"
"""Describes the corpora in a folder; never read as a corpus itself."""

_TEXT, _LINES, _PARQUET = (".txt", ".text", ".md"), (".jsonl", ".json", ".ndjson"), (".parquet",)
_COMPRESSED = (".gz", ".zst")
_Fault = tuple[str, str]
"""`kind` and `detail` of a Problem."""
_Record = tuple[int, str | _Fault]
"""A line or row, and its document or its fault."""
SUPPORTED = "text (.txt, .md), JSON lines (.jsonl, .ndjson, .json), each plain, .gz or .zst, and .parquet"


@dataclass(frozen=True)
class Reading:
    """How files become documents."""

    field: str = "text"
    """Field or column that holds the text in JSON lines and Parquet."""
    documents: str = "file"
    """What counts as a document in plain text: `file`, `line`, `blank-line` (paragraphs between empty lines), or
    `marker:TEXT` (text between lines that consist of TEXT)."""

    def __post_init__(self) -> None:
        known = self.documents in ("file", "line", "blank-line")
        if not (known or (self.documents.startswith("marker:") and len(self.documents) > len("marker:"))):
            raise UserError(f"--documents {self.documents}: expected file, line, blank-line or marker:TEXT")


@dataclass(frozen=True)
class Problem:
    """A record that yields no document."""

    path: str
    line: int
    """Line (text, JSON lines) or row (Parquet), from 1."""
    kind: str
    """Short name under which such records are counted."""
    detail: str

    def __str__(self) -> str:
        unit = "row" if _form(Path(self.path)) == "parquet" else "line"
        return f"{self.path}, {unit} {self.line}: {self.detail}"


def find_files(inputs: Sequence[Path]) -> list[Path]:
    """Files in the order given; a folder stands for all files below it with a supported suffix, sorted by path.

    Raises:
        UserError: a path does not exist, a file is of another kind or given twice, or a folder has no input.
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.is_file() and _is_input(file, path))
            if not inside:
                raise UserError(f"{path}: no input in this folder; kmem reads {SUPPORTED}")
            files += inside
        elif not path.is_file():
            raise UserError(f"{path}: no such file or folder")
        elif _form(path) is None:
            raise UserError(f"{path}: unknown kind of file; kmem reads {SUPPORTED}")
        else:
            files.append(path)
    seen: set[Path] = set()
    for file in files:
        if file.resolve() in seen:
            raise UserError(f"{file}: given twice; name each input once")
        seen.add(file.resolve())
    return files


def read_documents(path: Path, reading: Reading) -> Iterator[str | Problem]:
    """The documents of a file in order, with a Problem in place of each record that yields none.

    Damage that ends a file early (a truncated .gz or .zst, broken Parquet) is one Problem, the last item.

    Raises:
        UserError: the file cannot be opened.
    """
    forms = {"text": _text, "lines": _json_lines, "parquet": _parquet}
    empty = True
    try:
        for number, record in forms[_form(path) or "text"](path, reading):
            empty = False
            usable = _usable(record) if isinstance(record, str) else record
            yield usable if isinstance(usable, str) else Problem(str(path), number, *usable)
    except PermissionError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if empty:
        yield Problem(str(path), 1, "empty", "the file holds no text")


def _is_input(file: Path, folder: Path) -> bool:
    """Whether a file below a folder is input: not hidden, not part of prepared data, and not provenance.json."""
    parts = file.relative_to(folder).parts
    hidden = any(part.startswith(".") or part.endswith((PARTIAL, REPLACED)) for part in parts)
    prepared = any((folder.joinpath(*parts[:depth]) / "train.idx").is_file() for depth in range(len(parts)))
    return _form(file) is not None and file.name != PROVENANCE_NAME and not hidden and not prepared


def _usable(text: str) -> str | _Fault:
    if not text or text.isspace():
        return "empty", "an empty document"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "undecodable", r"a lone surrogate (\ud800-\udfff), which no UTF-8 text can hold"
    return text


def _form(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in _COMPRESSED
    ending = suffixes[-2] if compressed and len(suffixes) > 1 else "" if compressed or not suffixes else suffixes[-1]
    if ending in _TEXT:
        return "text"
    if ending in _LINES:
        return "lines"
    return "parquet" if ending in _PARQUET and not compressed else None


def _open(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if path.suffix.lower() == ".zst":
        import pyarrow

        # zstandard's own stream_reader (0.25) returns the content of a truncated frame and then ends without an error.
        return cast(IO[bytes], io.BufferedReader(pyarrow.input_stream(path, compression="zstd"), 1 << 20))
    return open(path, "rb")


def _lines(path: Path) -> Iterator[tuple[int, bytes | _Fault]]:
    """Numbered raw lines with their line ends; a fault where a compressed stream is damaged, and then nothing."""
    number = 0
    with _open(path) as stream:
        try:
            for raw in stream:
                number += 1
                yield number, raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
        except (OSError, zlib.error, EOFError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's error; gzip and pyarrow report damage without a number
            yield number + 1, ("corrupt file", f"the compressed file is damaged from here on ({error})")


def _decode(number: int, raw: bytes) -> _Record:
    try:
        return number, raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = number + raw.count(b"\n", 0, error.start)
        return line, ("undecodable", f"not UTF-8 (byte 0x{raw[error.start]:02x}); convert the file to UTF-8")


def _text(path: Path, reading: Reading) -> Iterator[_Record]:
    """Documents of a plain text file. The text is not changed; only separators and a byte order mark are removed."""
    marker = reading.documents.removeprefix("marker:").encode()
    separator = {"file": None, "line": None, "blank-line": b""}.get(reading.documents, marker)
    begin = 1
    parts: list[bytes] = []
    for number, raw in _lines(path):
        if isinstance(raw, tuple):
            # Documents before the damage are complete only if each is a line; those have been yielded.
            yield number, raw
            return
        if reading.documents == "line":
            yield from _joined(number, [raw])
        elif raw.strip() == separator:
            yield from _joined(begin, parts)
            begin, parts = number + 1, []
        else:
            parts.append(raw)
    yield from _joined(begin, parts, verbatim=reading.documents == "file")


def _joined(begin: int, parts: list[bytes], verbatim: bool = False) -> Iterator[_Record]:
    raw = b"".join(parts)
    if not verbatim:
        raw = raw.rstrip(b"\r\n")
    if raw.strip():  # an empty space between two separators is neither a document nor an error
        yield _decode(begin, raw)


def _json_lines(path: Path, reading: Reading) -> Iterator[_Record]:
    for number, raw in _lines(path):
        if isinstance(raw, tuple):
            yield number, raw
        elif raw.strip():
            _, text = _decode(number, raw)
            yield number, _field(text, reading.field) if isinstance(text, str) else text


def _field(line: str, field: str) -> str | _Fault:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return "corrupt line", f"not JSON ({error}); expected one object per line"
    if not isinstance(record, dict):
        return "corrupt line", f"a JSON {type(record).__name__}; expected one object per line"
    if field not in record:
        names = ", ".join(record) or "none"
        return "missing field", f"no field {field!r}; choose one with --field (there are: {names})"
    if not isinstance(record[field], str):
        kind = "null" if record[field] is None else type(record[field]).__name__
        return "missing field", f"field {field!r} holds {kind}, expected a string"
    return record[field]


def _parquet(path: Path, reading: Reading) -> Iterator[_Record]:
    import pyarrow
    import pyarrow.parquet

    row, column = 0, f"column {reading.field!r}"
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if reading.field not in names:
                yield 1, ("missing field", f"no {column}; choose one with --field (there are: {', '.join(names)})")
                return
            kind = file.schema_arrow.field(reading.field).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                yield 1, ("missing field", f"{column} holds {kind}, expected a string")
                return
            for batch in file.iter_batches(batch_size=1024, columns=[reading.field]):
                for value in batch.column(0):
                    row += 1
                    try:
                        text = value.as_py()
                    except UnicodeDecodeError:
                        yield row, ("undecodable", "not UTF-8")
                    else:
                        yield row, ("missing field", f"{column} is null") if text is None else text
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, PermissionError):
            raise
        yield row + 1, ("corrupt file", f"broken Parquet ({str(error).splitlines()[0]})")
