"""`kmem data prepare`."""

import argparse
from pathlib import Path

from kmem.data.documents import SUPPORTED
from kmem.data.manifest import Manifest
from kmem.data.workers import available_cores
from kmem.wording import counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        f"Tokenize documents into Megatron indexed datasets with a tokenizer and a manifest. Input: {SUPPORTED}."
    )
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="files, or folders searched for files")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument(
        "--vocab-size", type=int, metavar="N", help="train a byte-level BPE of N tokens on the input"
    )
    tokenizer.add_argument("--tokenizer", type=Path, metavar="PATH", help="use a tokenizer.json or a tokenizer folder")
    parser.add_argument("--eos-token", metavar="TOKEN", help="EOS of a --tokenizer that does not name its own")
    parser.add_argument(
        "--tokenizer-sample",
        type=int,
        default=256,
        metavar="MB",
        help="text to train a tokenizer on, at most (default: 256)",
    )
    parser.add_argument("--field", default="text", help="field or column that holds the text (default: text)")
    parser.add_argument(
        "--documents",
        default="file",
        metavar="HOW",
        help="what counts as a document in plain text: file (default), line, blank-line, or marker:TEXT for a line "
        "TEXT between documents",
    )
    parser.add_argument(
        "--validation-share", type=float, default=0.02, metavar="X", help="share of documents held out (default: 0.02)"
    )
    parser.add_argument("--seed", type=int, default=1234, help="chooses the held-out documents (default: 1234)")
    cores = available_cores()
    parser.add_argument("--workers", type=int, default=cores, metavar="N", help=f"processes (default here: {cores})")
    parser.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="what to do with unreadable records (default: fail)",
    )
    parser.add_argument("--force", action="store_true", help="replace a folder that is already prepared")


def run(arguments: argparse.Namespace) -> int:
    from kmem.data.documents import Reading
    from kmem.data.prepare import Preparation, prepare

    options = vars(arguments)
    reading = Reading(options.pop("field"), options.pop("documents"))
    sample = options.pop("tokenizer_sample") * 1_000_000
    manifest = prepare(Preparation(**options, reading=reading, tokenizer_sample=sample))
    report(manifest, arguments.out, arguments.vocab_size)
    return 0


def report(manifest: Manifest, out: Path, wanted: int | None = None) -> None:
    """Print what a folder of data holds. wanted: the size that the tokenizer was to have."""
    for name, split in manifest.splits.items():
        per_token = split.bytes / split.tokens
        print(
            f"{name}: {counted(split.documents, 'document')}, {counted(split.tokens, 'token')}, "
            f"{split.bytes / 1e6:.2f} MB ({per_token:.2f} bytes per token)"
        )
    short = (
        f", fewer than --vocab-size {wanted}: the text is small" if wanted and manifest.tokenizer.size < wanted else ""
    )
    print(f"tokenizer: {manifest.tokenizer.size:,} tokens{short}, EOS {manifest.tokenizer.eos_token}")
    if manifest.tokenizer.before_ids:
        print(f"every document begins with {counted(len(manifest.tokenizer.before_ids), 'token')} of the template")
    unknown = sum(split.unknown for split in manifest.splits.values())
    if unknown:
        share = unknown / sum(split.tokens for split in manifest.splits.values())
        print(f"unknown: {share:.2%} of the tokens stand for text that the vocabulary lacks")
    if manifest.skipped.count:
        reasons = ", ".join(f"{count:,} {kind}" for kind, count in manifest.skipped.reasons.items())
        print(f"skipped {counted(manifest.skipped.count, 'record')}: {reasons}; the first:")
        for example in manifest.skipped.examples:
            print(f"  {example}")
    print(f"wrote {out}")
