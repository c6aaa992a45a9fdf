"""`kmem data adopt`."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train on Megatron indexed datasets where they lie: check them, count the bytes of their text, and write a "
        "folder with links to them, their tokenizer and a manifest. Nothing is copied or written beside them."
    )
    parser.add_argument(
        "prefixes", nargs="+", type=Path, metavar="PREFIX", help="indexed datasets, PREFIX.bin and PREFIX.idx, joined"
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        metavar="PATH",
        help="the tokenizer.json or tokenizer folder that they were made with",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--eos-token", metavar="TOKEN", help="EOS of a tokenizer that does not name its own")
    held_out = parser.add_mutually_exclusive_group()
    held_out.add_argument(
        "--validation",
        nargs="+",
        type=Path,
        default=(),
        metavar="PREFIX",
        help="indexed datasets that are held out, in place of a share of the documents",
    )
    held_out.add_argument(
        "--validation-share",
        type=float,
        default=0.02,
        metavar="X",
        help="share of documents held out (default: 0.02)",
    )
    parser.add_argument("--seed", type=int, default=1234, help="chooses the held-out documents (default: 1234)")
    parser.add_argument("--force", action="store_true", help="replace a folder of data that is already there")


def run(arguments: argparse.Namespace) -> int:
    from kmem.data.adopt import Adoption, adopt
    from kmem.data.command import report

    report(adopt(Adoption(**vars(arguments))), arguments.out)
    return 0
