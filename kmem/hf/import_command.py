"""`kmem import`: turn a Hugging Face folder into a run that training starts from."""

import argparse
from pathlib import Path

from kmem.config import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", dest="source", required=True, type=Path, metavar="DIR", help="Hugging Face folder")
    parser.add_argument("--out", required=True, type=Path, metavar="RUN", help="run folder to make")
    parser.add_argument("--drop-mtp", action="store_true", help="leave out the layers for multi-token prediction")
    parser.add_argument(
        "--chain-iterations", type=int, metavar="C",
        help="turn MoE layers into chains of experts with C iterations that at first compute the same as the layers",
    )  # fmt: skip
    parser.add_argument(
        "--chain-set", nargs="+", default=[], metavar="FIELD=VALUE",
        help="with --chain-iterations: fields of model.moe.chain, such as residual=outer norm=once gates=shared",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    from kmem.hf.importing import import_folder

    if arguments.chain_set and arguments.chain_iterations is None:
        raise UserError("--chain-set: only with --chain-iterations")
    import_folder(
        arguments.source,
        arguments.out,
        drop_mtp=arguments.drop_mtp,
        chain_iterations=arguments.chain_iterations,
        chain_choices=arguments.chain_set,
    )
    config = arguments.out / "config.yaml"
    print(
        f"prepare text with its tokenizer: kmem data prepare --tokenizer {arguments.out / 'tokenizer'} ...\n"
        f"set data and train in {config}, then: kmem train --config {config}"
    )
    return 0
