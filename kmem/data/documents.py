"""Read documents from plain text, JSON lines and tables; a problem with a record is reported with file and line."""

import bz2
import gzip
import io
import json
import lzma
import os
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from kmem.config import UserError
from kmem.files import PARTIAL, REPLACED

PROVENANCE_NAME = "provenance.json"
"""Describes the corpora in a folder; never read as a corpus itself."""

_TEXT, _LINES, _CSV = (".txt", ".text", ".md"), (".jsonl", ".json", ".ndjson"), (".csv", ".tsv")
_TABLES = (".parquet", ".arrow", *_CSV)
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
LONGEST_DOCUMENT = 64 << 20
"""Bytes of the longest document, and of the longest line of JSON. It bounds the memory of preparation: a worker holds a
few documents, and tokenizing needs about 200 bytes for each byte of a piece of at most a million characters."""
_NO_COLUMN = "missing column"
_Fault = tuple[str, str]
"""`kind` and `detail` of a Problem."""
_Record = tuple[int, str | _Fault]
"""A line or row, and its document or its fault."""
SUPPORTED = (
    "text (.txt, .md), JSON lines (.jsonl, .ndjson, .json), each plain, .gz, .zst, .bz2 or .xz, and tables (.parquet, "
    ".arrow, .csv, .tsv)"
)


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
    """Line (text, JSON lines) or row (tables), from 1."""
    kind: str
    """Short name under which such records are counted."""
    detail: str

    @property
    def whole_file(self) -> bool:
        """Whether no record of the file can be read."""
        return self.kind in (_NO_COLUMN, "empty") and self.line == 1

    def __str__(self) -> str:
        unit = "row" if _form(Path(self.path)) == "table" else "line"
        return f"{self.path}, {unit} {self.line}: {self.detail}"


def find_files(inputs: Sequence[Path]) -> list[Path]:
    """Files in the order given; a folder stands for all files below it with a supported suffix, sorted by path. Links
    to folders are followed, once each. One line on stderr says what was ignored in folders.

    Raises:
        UserError: a path does not exist, a file is of another kind or given twice, or a folder has no input.
    """
    files: list[Path] = []
    ignored: Counter[str] = Counter()
    for path in inputs:
        if path.is_dir():
            reasons = {file: _ignored_as(file, path) for file in _files_below(path)}
            inside = sorted(file for file, reason in reasons.items() if reason is None)
            ignored.update(reason for reason in reasons.values() if reason)
            if not inside:
                raise UserError(f"{path}: no input in this folder; kmem reads {SUPPORTED}")
            files += inside
        elif not path.is_file():
            raise UserError(f"{path}: no such file or folder")
        elif _form(path) is None:
            raise UserError(f"{path}: unknown kind of file; kmem reads {SUPPORTED}")
        else:
            files.append(path)
    if ignored:
        listed = ", ".join(f"{count} {reason}" for reason, count in sorted(ignored.items()))
        print(f"ignored in folders: {listed}", file=sys.stderr)
    seen: set[Path] = set()
    for file in files:
        if file.resolve() in seen:
            raise UserError(f"{file}: given twice; name each input once")
        seen.add(file.resolve())
    return files


def read_documents(path: Path, reading: Reading) -> Iterator[str | Problem]:
    """The documents of a file in order, with a Problem in place of each record that yields none.

    Damage that ends a file early (a truncated .gz or .zst, broken Parquet) is one Problem, the last item. A document of
    more than LONGEST_DOCUMENT bytes is a Problem, too.

    Raises:
        UserError: the file cannot be opened.
    """
    forms = {"text": _text, "lines": _json_lines, "table": _table}
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


def _files_below(folder: Path) -> Iterator[Path]:
    """All files below a folder, also behind links to folders; a folder that was seen is not entered again."""
    entered: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        yield from (path for path in (Path(place, name) for name in names) if path.is_file())


def _ignored_as(file: Path, folder: Path) -> str | None:
    """Why a file below a folder is no input; None if it is."""
    parts = file.relative_to(folder).parts
    if any(part.startswith(".") or part.endswith((PARTIAL, REPLACED)) for part in parts):
        return "hidden or unfinished"
    if any((folder.joinpath(*parts[:depth]) / "train.idx").is_file() for depth in range(len(parts))):
        return "of prepared data"
    if file.name == PROVENANCE_NAME:
        return PROVENANCE_NAME
    return None if _form(file) is not None else f"of unknown kind ({file.suffix.lower() or 'no suffix'})"


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
    return "table" if ending in _TABLES and not compressed else None


def _open(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if path.suffix.lower() == ".bz2":
        return bz2.open(path, "rb")
    if path.suffix.lower() == ".xz":
        return lzma.open(path, "rb")
    if path.suffix.lower() == ".zst":
        import pyarrow

        # zstandard's own stream_reader (0.25) returns the content of a truncated frame and then ends without an error.
        return cast(IO[bytes], io.BufferedReader(pyarrow.input_stream(path, compression="zstd"), 1 << 20))
    return open(path, "rb")


def _lines(path: Path) -> Iterator[tuple[int, bytes | _Fault]]:
    """Numbered raw lines with their line ends; a fault in place of a line that is too long; a fault where a compressed
    stream is damaged, and then nothing."""
    number = 0
    with _open(path) as stream:
        try:
            while raw := stream.readline(LONGEST_DOCUMENT + 1):
                number += 1
                if len(raw) > LONGEST_DOCUMENT:
                    while raw and not raw.endswith(b"\n"):
                        raw = stream.readline(LONGEST_DOCUMENT)
                    yield number, _TOO_LONG
                    continue
                yield number, raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
        except (OSError, zlib.error, lzma.LZMAError, EOFError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's error; gzip and pyarrow report damage without a number
            yield number + 1, ("corrupt file", f"the compressed file is damaged from here on ({error})")


_TOO_LONG: _Fault = (
    "too long",
    f"longer than {LONGEST_DOCUMENT >> 20} MiB; cut it into documents, for example with --documents blank-line or line",
)


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
    begin, size = 1, 0
    parts: list[bytes] = []
    for number, raw in _lines(path):
        if raw is _TOO_LONG:
            size = LONGEST_DOCUMENT + 1
            if reading.documents == "line":
                yield number, _TOO_LONG
            continue
        if isinstance(raw, tuple):
            # Documents before the damage are complete only if each is a line; those have been yielded.
            yield number, raw
            return
        if reading.documents == "line":
            yield from _joined(number, [raw], len(raw))
        elif raw.strip() == separator:
            yield from _joined(begin, parts, size)
            begin, size, parts = number + 1, 0, []
        else:
            size += len(raw)
            if size > LONGEST_DOCUMENT:
                parts.clear()
            else:
                parts.append(raw)
    if reading.documents != "line":
        yield from _joined(begin, parts, size, verbatim=reading.documents == "file")


def _joined(begin: int, parts: list[bytes], size: int, verbatim: bool = False) -> Iterator[_Record]:
    if size > LONGEST_DOCUMENT:
        yield begin, _TOO_LONG
        return
    raw = b"".join(parts)
    if not verbatim:
        raw = raw.rstrip(b"\r\n")
    place, text = _decode(begin, raw)
    if not isinstance(text, str) or (text and not text.isspace()):
        yield place, text  # an empty space between two separators is neither a document nor an error


def _json_lines(path: Path, reading: Reading) -> Iterator[_Record]:
    for number, raw in _lines(path):
        if isinstance(raw, tuple):
            yield number, raw
            continue
        _, text = _decode(number, raw.removeprefix(b"\xef\xbb\xbf"))  # joined files each have one
        if not isinstance(text, str):
            yield number, text
        elif text and not text.isspace():
            yield number, _field(text, reading.field)


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


def _table(path: Path, reading: Reading) -> Iterator[_Record]:
    import pyarrow
    from pyarrow import types

    row, column = 0, f"column {reading.field!r}"
    try:
        with _opened_table(path, reading.field) as (schema, batches):
            found = schema.get_all_field_indices(reading.field)
            if not found:
                yield (
                    1,
                    (_NO_COLUMN, f"no {column}; choose one with --field (there are: {', '.join(schema.names)})"),
                )
                return
            if len(found) > 1:
                yield 1, (_NO_COLUMN, f"{len(found)} columns are named {reading.field!r}; rename all but one")
                return
            kind = schema.field(found[0]).type
            values = kind.value_type if types.is_dictionary(kind) else kind
            if not (types.is_string(values) or types.is_large_string(values) or types.is_string_view(values)):
                yield 1, (_NO_COLUMN, f"{column} holds {kind}, expected a string")
                return
            for batch in batches:
                for value in batch.column(batch.schema.get_field_index(reading.field)):
                    row += 1
                    try:
                        text = value.as_py()
                    except UnicodeDecodeError:
                        yield row, ("undecodable", "not UTF-8")
                        continue
                    if text is not None and len(text) > LONGEST_DOCUMENT:
                        yield row, _TOO_LONG
                    else:
                        yield row, ("missing field", f"{column} is null") if text is None else text
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, PermissionError):
            raise
        yield row + 1, ("corrupt file", f"a broken table ({str(error).splitlines()[0]})")


@contextmanager
def _opened_table(path: Path, field: str) -> Iterator[tuple[Any, Iterable[Any]]]:
    """(schema, batches of rows) of a table, which is read as it is iterated over."""
    import pyarrow

    suffix = path.suffix.lower()
    if suffix == ".parquet":
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as file:
            yield file.schema_arrow, file.iter_batches(batch_size=1024)
    elif suffix == ".arrow":
        with pyarrow.memory_map(str(path)) as mapped:
            try:
                file = pyarrow.ipc.open_file(mapped)
            except pyarrow.ArrowInvalid:  # a stream, as Hugging Face datasets has
                mapped.seek(0)
                stream = pyarrow.ipc.open_stream(mapped)
                yield stream.schema, stream
            else:
                yield file.schema, (file.get_batch(number) for number in range(file.num_record_batches))
    else:
        from pyarrow import csv

        parse = csv.ParseOptions(delimiter="\t" if suffix == ".tsv" else ",", newlines_in_values=True)
        convert = csv.ConvertOptions(column_types={field: pyarrow.string()})
        with csv.open_csv(path, csv.ReadOptions(block_size=LONGEST_DOCUMENT), parse, convert) as rows:
            yield rows.schema, rows
