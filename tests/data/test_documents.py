import bz2
import csv
import gzip
import json
import lzma
import re
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from kmem.config import UserError
from kmem.data.documents import Problem, Reading, find_files, read_documents

TEXTS = ["one\n\ntwo", "naïve 東京 🙂\r\n", "  kept blanks  ", 'quotes " and \\ slashes']


def lines(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({field: text}) + "\n" for text in texts).encode()


def write_parquet(path: Path, texts: list, field: str = "text") -> None:
    pyarrow.parquet.write_table(pyarrow.table({field: pyarrow.array(texts), "number": range(len(texts))}), path)


def read(path: Path, **reading) -> list:
    return list(read_documents(path, Reading(**reading)))


FORMATS = [".jsonl", ".json", ".ndjson", ".jsonl.gz", ".jsonl.zst", ".jsonl.bz2", ".jsonl.xz"]
TABLES = [".parquet", ".csv", ".tsv", ".arrow", ".stream.arrow"]


def write_table(path: Path, table: pyarrow.Table) -> None:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    elif path.suffix == ".arrow":
        kind = pyarrow.ipc.new_stream if ".stream" in path.name else pyarrow.ipc.new_file
        with kind(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerow(table.column_names)
            writer.writerows(zip(*table.to_pydict().values(), strict=True))


@pytest.mark.parametrize("ending", TABLES)
def test_every_table_gives_the_texts_unchanged(tmp_path, ending):
    path = tmp_path / f"input{ending}"
    texts = [*TEXTS, "12", "a,b\tc"]
    write_table(path, pyarrow.table({"number": range(len(texts)), "body": texts}))
    assert read(path, field="body") == texts
    assert re.search("row 1: .*'text'.*--field .*number, body", str(read(path)[0]))


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
@pytest.mark.parametrize("kind", ["dictionary", "string_view", "large_string"])
def test_columns_of_every_kind_of_string_are_read(tmp_path, ending, kind):
    texts = pyarrow.array(["one", "two", "one"])
    texts = texts.dictionary_encode() if kind == "dictionary" else texts.cast(getattr(pyarrow, kind)())
    write_table(tmp_path / f"input{ending}", pyarrow.table({"text": texts}))
    assert read(tmp_path / f"input{ending}") == ["one", "two", "one"]


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_two_columns_of_one_name_are_one_problem(tmp_path, ending):
    path = tmp_path / f"input{ending}"
    write_table(path, pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"]))
    assert [re.search("row 1: 2 columns .*'text'", str(item)) is not None for item in read(path)] == [True]


def test_joined_files_with_marks_and_lines_of_blanks(tmp_path):
    path = tmp_path / "input.jsonl.gz"
    path.write_bytes(b"".join(gzip.compress(b"\xef\xbb\xbf" + lines([text])) for text in ("a", "b")))
    assert read(path) == ["a", "b"]
    path = tmp_path / "blank.jsonl"
    path.write_bytes(lines(["a"]) + "\u00a0\u3000\n".encode() + lines(["b"]))
    assert read(path) == ["a", "b"]
    path = tmp_path / "blank.txt"
    path.write_bytes("a\n\u00a0\u2003\nb\n".encode())
    assert read(path, documents="line") == ["a", "b"]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.zst", ".txt"])
def test_a_document_that_is_too_long_is_a_problem_and_others_are_read(tmp_path, monkeypatch, ending):
    monkeypatch.setattr("kmem.data.documents.LONGEST_DOCUMENT", 1000)
    path = tmp_path / f"input{ending}"
    texts = ["a" * 700, "b" * 3000, "c"]
    content = "\n".join(texts).encode() if ending == ".txt" else lines(texts)
    path.write_bytes(zstandard.ZstdCompressor().compress(content) if ending.endswith("zst") else content)
    first, long, last = read(path, documents="line")
    assert (first, last) == (texts[0], texts[2])
    assert (long.line, long.kind) == (2, "too long")
    if ending == ".txt":
        assert [item.kind for item in read(path)] == ["too long"]
        path.write_text("a\n" * 300 + "\n" + "b\n" * 900 + "\n" + "c")
        assert [getattr(item, "kind", "read") for item in read(path, documents="blank-line")] == [
            "read",
            "too long",
            "read",
        ]


@pytest.mark.parametrize("newlines", [False, pytest.param(True, marks=pytest.mark.full)])
def test_a_small_file_of_much_text_takes_little_memory(tmp_path, newlines):
    """Gigabytes behind 100 KB: the limit on the process's memory is the test."""
    path = tmp_path / "input.jsonl.zst"
    compressor = zstandard.ZstdCompressor(level=1).compressobj()
    chunk = (b"a" * 1023 + (b"\n" if newlines else b"a")) * 1024
    with open(path, "wb") as file:
        for _ in range(700):
            file.write(compressor.compress(chunk))
        file.write(compressor.flush())
    program = (
        "import resource, sys; from pathlib import Path; from kmem.data.documents import *; "
        "resource.setrlimit(resource.RLIMIT_DATA, (600 << 20,) * 2); "
        "print(sum(1 for _ in read_documents(Path(sys.argv[1]), Reading())))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, path], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == (700 * 1024 if newlines else 1)


@pytest.mark.parametrize("ending", FORMATS)
def test_every_format_gives_the_texts_unchanged(tmp_path, ending):
    path = tmp_path / f"input{ending}"
    if ending.endswith((".bz2", ".xz")):
        compress = bz2.compress if ending.endswith(".bz2") else lzma.compress
        path.write_bytes(compress(lines(TEXTS[:2], "body")) + compress(lines(TEXTS[2:], "body")))
    elif ending.endswith(".gz"):
        path.write_bytes(gzip.compress(lines(TEXTS[:2], "body")) + gzip.compress(lines(TEXTS[2:], "body")))
    elif ending.endswith(".zst"):
        compress = zstandard.ZstdCompressor().compress
        path.write_bytes(compress(lines(TEXTS[:2], "body")) + compress(lines(TEXTS[2:], "body")))
    else:
        path.write_bytes(b"\xef\xbb\xbf" + lines(TEXTS, "body").replace(b"\n", b"\n\n"))  # mark, blank lines
    assert read(path, field="body") == TEXTS


def test_large_compressed_files_are_read_whole(tmp_path):
    texts = [f"document {number} " * 50 for number in range(5000)]
    path = tmp_path / "input.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor(level=1).compress(lines(texts)))
    assert read(path) == texts


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("file", ["a\nb\n\n\nc\n<|endoftext|>\n d\n"]),
        ("line", ["a", "b", "c", "<|endoftext|>", " d"]),
        ("blank-line", ["a\nb", "c\n<|endoftext|>\n d"]),
        ("marker:<|endoftext|>", ["a\nb\n\n\nc", " d"]),
    ],
)
@pytest.mark.parametrize("ending", [".txt", ".md", ".txt.gz"])
def test_ways_to_cut_plain_text(tmp_path, how, expected, ending):
    path = tmp_path / f"input{ending}"
    text = b"a\nb\n\n\nc\n<|endoftext|>\n d\n"
    path.write_bytes(gzip.compress(text) if ending.endswith("gz") else text)
    assert read(path, documents=how) == expected


@pytest.mark.parametrize("how", ["page", "marker:", ""])
def test_unknown_way_to_cut_is_refused(how):
    with pytest.raises(UserError, match="--documents"):
        Reading(documents=how)


GOOD = b'{"text": "good"}\n'
BAD_FILES = {
    "empty.txt": (b"", "line 1: .*no text"),
    "blank.txt": (b" \n\n", "line 1: .*no text"),
    "empty.jsonl": (b"", "line 1: .*no text"),
    "latin.txt": (b"a\nb\ncaf\xe9\n", "line 3: .*UTF-8.*0xe9"),
    "latin.jsonl": (GOOD + b'{"text": "caf\xe9"}\n', "line 2: .*UTF-8.*0xe9"),
    "syntax.jsonl": (GOOD + GOOD + b'{"text": \n', r"line 3: .*JSON \("),
    "deep.jsonl": (GOOD + b"[" * 100_000 + b"\n", r"line 2: .*JSON \("),
    "array.jsonl": (GOOD + b'["text"]\n', "line 2: .*JSON list"),
    "pretty.json": (b'[\n{"text": "x"}\n', r"line 1: .*JSON \("),
    "field.jsonl": (GOOD + b'{"body": "x", "id": 1}\n', "line 2: .*'text'.*--field .*body, id"),
    "null.jsonl": (GOOD + b'{"text": null}\n', "line 2: .*'text'.*null"),
    "number.jsonl": (GOOD + b'{"text": 5}\n', "line 2: .*'text'.*int"),
    "void.jsonl": (GOOD + b'{"text": " \\n"}\n', "line 2: .*empty"),
    "surrogate.jsonl": (GOOD + b'{"text": "a\\ud800b"}\n', "line 2: .*surrogate"),
    "cut.jsonl.gz": (gzip.compress(GOOD * 3)[:-4], "line 4: .*compressed file"),
    "garbage.jsonl.gz": (b"no gzip", "line 1: .*compressed file"),
    "cut.jsonl.zst": (zstandard.ZstdCompressor().compress(GOOD * 50_000)[:-3], "compressed file"),
    "garbage.jsonl.zst": (b"no zstandard", "line 1: .*compressed file"),
    "cut.jsonl.xz": (lzma.compress(GOOD * 3)[:-4], "line 4: .*compressed file"),
    "garbage.jsonl.xz": (b"no xz", "line 1: .*compressed file"),
    "cut.jsonl.bz2": (bz2.compress(GOOD * 3)[:-4], "compressed file"),
    "garbage.jsonl.bz2": (b"no bzip2", "line 1: .*compressed file"),
    "garbage.parquet": (b"PAR1 no parquet", "row 1: .*Parquet"),
    "garbage.arrow": (b"no arrow", "row 1: .*table"),
    "ragged.csv": (b"text,number\na,1\nb\n", "table"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_record_is_a_problem_that_names_its_place(tmp_path, name):
    content, says = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    problems = [item for item in read(path) if isinstance(item, Problem)]
    assert len(problems) == 1
    assert str(problems[0]).startswith(f"{path}, ")
    assert re.search(says, str(problems[0]))


def test_records_around_a_bad_one_are_kept(tmp_path):
    path = tmp_path / "input.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text"\n{"text": "\xff"}\n{"text": "b"}\n')
    assert [item if isinstance(item, str) else item.kind for item in read(path)] == [
        "a",
        "corrupt line",
        "undecodable",
        "b",
    ]


def test_bad_parquet_rows_and_columns(tmp_path):
    path = tmp_path / "input.parquet"
    write_parquet(path, ["a", None, "", "b"])
    assert [item if isinstance(item, str) else (item.line, item.kind) for item in read(path)] == [
        "a",
        (2, "missing field"),
        (3, "empty"),
        "b",
    ]
    assert re.search("row 1: .*'body'.*--field .*text, number", str(read(path, field="body")[0]))
    assert re.search("row 1: .*'number'.*string", str(read(path, field="number")[0]))


def test_links_to_folders_are_followed_once_and_what_is_ignored_is_said(tmp_path, capsys):
    for name in ("texts/a.txt", "texts/b.rtf", "texts/c.rtf", "texts/.d.txt", "elsewhere/e.txt", "elsewhere/sub/f.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "texts" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "texts")
    found = [str(file.relative_to(tmp_path / "texts")) for file in find_files([tmp_path / "texts"])]
    assert found == ["a.txt", "linked/e.txt", "linked/sub/f.txt"]
    (said,) = capsys.readouterr().err.splitlines()
    assert re.search(r"ignored\b.*\b1 hidden\b.*\b2 of unknown kind \(\.rtf\)", said)


def test_folders_stand_for_the_input_below_them(tmp_path):
    for name in ("b.txt", "a.jsonl", "sub/c.txt.gz", "picture.png", ".hidden.txt", "provenance.json", ".git/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    for leftover in ("out/manifest.json", "out/train.idx", "out/tokenizer/t.json", "new.partial/tokenizer/t.json"):
        (tmp_path / leftover).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / leftover).write_text("x")
    found = find_files([tmp_path])
    assert [str(file.relative_to(tmp_path)) for file in found] == ["a.jsonl", "b.txt", "sub/c.txt.gz"]


def test_unusable_inputs_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.pdf").write_text("x")
    (tmp_path / "none").mkdir()
    for inputs, says in (
        (["missing.txt"], r"missing\.txt: no such"),
        (["a.pdf"], r"a\.pdf: .*\.txt.*\.parquet"),
        (["none"], r"none: .*\.txt.*\.parquet"),
        (["a.txt", "a.txt"], r"a\.txt: .*twice"),
        ([".", "a.txt"], r"a\.txt: .*twice"),
    ):
        with pytest.raises(UserError, match=says):
            find_files([tmp_path / name for name in inputs])
