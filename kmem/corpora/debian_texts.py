"""Documents from Debian packages: a dictionary, HTML essays, reStructuredText manuals, novels in R data."""

import gzip
import re
import struct
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

_SKIPPED_TAGS = frozenset({"script", "style", "head", "nav", "form"})
_BLOCK_TAGS = frozenset(
    {"p", "div", "br", "li", "tr", "td", "h1", "h2", "h3", "h4", "h5", "h6", "blockquote", "pre", "hr"}
)


def dictionary_entries(root: Path) -> Iterator[tuple[str, str]]:
    """dict-gcide: one document per headword; wrapped lines are joined, source tags and link braces removed."""
    raw = gzip.decompress((root / "usr" / "share" / "dictd" / "gcide.dict.dz").read_bytes())
    text = raw.decode("utf-8", errors="replace")
    text = re.sub(r"\s*\[(?:1913 Webster|WordNet|PJC|Webster|Century|RP|AS)[^\]]*\]", "", text)
    text = text.replace("{", "").replace("}", "")
    # Entries begin at the margin, `Headword \Pronunciation\`; the rest of an entry is indented.
    for entry in re.split(r"\n(?=\S)", text):
        headword = entry.split("\\", 1)[0].strip()
        if headword and "\\" in entry and not headword.startswith("00-"):
            yield _joined(re.split(r"\n\s*\n", entry)), f"gcide: {headword}"


def essays(root: Path) -> Iterator[tuple[str, str]]:
    """anarchism: one document per HTML page."""
    folder = root / "usr" / "share" / "doc" / "anarchism" / "html"
    for file in sorted(folder.iterdir()):
        if file.name.endswith(".html"):
            yield html_text(file.read_bytes().decode("utf-8", errors="replace")), file.name


def kernel_manuals(root: Path) -> Iterator[tuple[str, str]]:
    """linux-doc: one document per reStructuredText source, without translations."""
    top = root / "usr" / "share" / "doc"
    manuals = next(folder for folder in top.iterdir() if folder.name.startswith("linux-doc"))
    sources = (manuals / "html" / "_sources").resolve(strict=True)  # a missing folder is an error
    for file in sorted(sources.rglob("*.rst.txt")):
        path = file.relative_to(sources).as_posix()
        if not path.startswith("translations/"):
            text = file.read_bytes().decode("utf-8", errors="replace")
            text = re.sub(r"^\.\. (?:SPDX-License-Identifier|_[^:]+):.*\n", "", text, flags=re.MULTILINE)
            yield text, path.removesuffix(".txt")


def novel_chapters(root: Path) -> Iterator[tuple[str, str]]:
    """r-cran-janeaustenr: one document per chapter; wrapped lines are joined."""
    base = root / "usr" / "lib" / "R" / "site-library" / "janeaustenr" / "data"
    for lines in r_string_vectors((base / "Rdata.rdb").read_bytes()):
        title = next((line.strip() for line in lines if line.strip()), "")
        chapter: list[str] = []
        number = 0
        for line in [*lines, "CHAPTER"]:
            if re.match(r"\s*(CHAPTER|Chapter)\b", line):
                text = _joined(re.split(r"\n\s*\n", "\n".join(chapter)))
                if len(text) > 500:  # not a table of contents
                    yield text, f"{title}, part {number}"
                    number += 1
                chapter = []
            chapter.append(line)


def r_string_vectors(database: bytes) -> Iterator[list[str]]:
    """The string vectors of an R lazy-load database; other records are skipped.

    A record is a big-endian length and a zlib stream. Its content is an R serialisation in XDR, version 2 or 3
    (R Internals, section 1.8).
    """
    begin = 0
    while begin < len(database):
        # The file does not say how long a record is on disk; the zlib stream says where it ends.
        stream = zlib.decompressobj()
        content = stream.decompress(database[begin + 4 :])
        begin = len(database) - len(stream.unused_data)
        if content[:2] != b"X\n":
            continue
        (version,) = struct.unpack_from(">i", content, 2)
        place = 14
        if version == 3:
            (size,) = struct.unpack_from(">i", content, place)
            place += 4 + size
        flags, count = struct.unpack_from(">ii", content, place)
        if flags & 0xFF != 16:  # STRSXP
            continue
        place += 8
        lines = []
        for _ in range(count):
            _, size = struct.unpack_from(">ii", content, place)
            place += 8
            lines.append(content[place : place + max(size, 0)].decode("utf-8"))
            place += max(size, 0)
        yield lines


def html_text(page: str) -> str:
    """The visible text of a page, one paragraph per block."""
    parser = _Text()
    parser.feed(page)
    parser.close()
    return _joined("".join(parser.parts).split("\0"))


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in _SKIPPED_TAGS
        if tag in _BLOCK_TAGS:
            self.parts.append("\0")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = max(self._hidden - (tag in _SKIPPED_TAGS), 0)
        if tag in _BLOCK_TAGS:
            self.parts.append("\0")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)


def _joined(wrapped: list[str]) -> str:
    paragraphs = (" ".join(paragraph.split()) for paragraph in wrapped)
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
