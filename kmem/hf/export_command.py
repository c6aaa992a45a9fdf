"""`kmem export`: write a checkpoint as a Hugging Face folder."""

import argparse
import re
from pathlib import Path

from kmem.config import UserError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", required=True, type=Path, metavar="RUN", help="run folder, or RUN/checkpoints/step-N"
    )
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
    from kmem.checkpoint.reader import CheckpointReader
    from kmem.hf.export import export

    reader = CheckpointReader(arguments.checkpoint)
    reader.check_whole()
    reader.verify()
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
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise UserError(f"--max-shard-size {text}: expected a size such as 500MB or 2GiB")
    return int(float(match[1]) * unit)
