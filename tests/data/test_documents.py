import gzip
import json
import re
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


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".ndjson", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_every_format_gives_the_texts_unchanged(tmp_path, ending):
    path = tmp_path / f"input{ending}"
    if ending == ".parquet":
        write_parquet(path, TEXTS, "body")
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
    "garbage.parquet": (b"PAR1 no parquet", "row 1: .*Parquet"),
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
