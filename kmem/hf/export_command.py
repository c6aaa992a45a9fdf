"""`kmem export`: write a checkpoint as a Hugging Face folder."""

import argparse
from pathlib import Path

from pydantic import ByteSize, TypeAdapter, ValidationError

from kmem.checkpoint.actions import add_checkpoint_argument, open_checkpoint
from kmem.config import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_argument(parser, "RUN", "run folder, or RUN/checkpoints/step-N")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--custom-code", action="store_true", help="ship kmem's own code even where a native architecture fits"
    )
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="dtype of the weights (default: fp32)"
    )
    parser.add_argument(
        "--max-shard-size", default="2GB", metavar="SIZE", help="largest weight file, such as 500MB (default: 2GB)"
    )
    parser.add_argument(
        "--tree", type=Path, metavar="TREE", help="cluster tree of the memory bank (default: the tree of the run)"
    )
    parser.add_argument("--force", action="store_true", help="replace an earlier export")


def run(arguments: argparse.Namespace) -> int:
    size = parse_size(arguments.max_shard_size)
    from kmem.hf.export import export

    reader = open_checkpoint(arguments)
    reader.check_whole()
    print(f"checkpoint: {reader.folder}, step {reader.step}")
    export(
        reader,
        arguments.out,
        custom_code=arguments.custom_code,
        dtype=arguments.dtype,
        max_shard_bytes=size,
        tree=arguments.tree,
        force=arguments.force,
    )
    return 0


def parse_size(text: str) -> int:
    """A size such as `2GB` (10^9) or `512MiB` (2^20), in bytes.

    Raises:
        UserError: not a positive size.
    """
    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        size = 0
    if size < 1:
        raise UserError(f"--max-shard-size {text}: expected a size such as 500MB or 2GiB")
    return size
