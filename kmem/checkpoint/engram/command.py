"""`kmem engram`: lists the tables of an engram, shows the rows that a text reads, and erases them."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from kmem.checkpoint.actions import add_action, open_checkpoint
from kmem.config import UserError
from kmem.wording import counted, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = add_action(actions, "list", "sizes of the tables, the share of rows ever updated, and norms of rows")
    inspecting = add_action(actions, "inspect", "the rows that the n-grams of a text read")
    erasing = add_action(actions, "erase", "set the rows that the n-grams of texts read to zero")
    for action in (listing, inspecting):
        action.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    inspecting.add_argument("--text", required=True, help="the beginning of a document")
    inspecting.add_argument("--layer", type=int, metavar="L", help="this layer only, counted from 0")
    texts = erasing.add_mutually_exclusive_group(required=True)
    texts.add_argument("--text", action="append", help="a text; may be given several times")
    texts.add_argument("--file", type=Path, help="a UTF-8 file with a text on each line")
    erasing.add_argument("--out", required=True, type=Path, metavar="RUN", help="run folder to make")


def run(arguments: argparse.Namespace) -> int:
    return {"list": _list, "inspect": _inspect, "erase": _erase}[arguments.action](arguments)


def _list(arguments: argparse.Namespace) -> int:
    from kmem.checkpoint.engram.rows import checkpoint_addresses, table_figures

    reader = open_checkpoint(arguments)
    addressing = checkpoint_addresses(reader).addressing
    figures = list(table_figures(reader, addressing.layers))
    orders, heads = addressing.orders, addressing.heads
    if arguments.json:
        tables = [{"orders": orders, "heads": heads, **asdict(table)} for table in figures]
        print(json.dumps({"checkpoint": str(reader.folder), "step": reader.step, "tables": tables}))
        return 0
    rows = [
        (
            str(table.layer),
            f"{table.rows:,}",
            str(table.dim),
            f"{table.bytes / 1e6:,.1f}",
            "" if table.updated is None else f"{table.updated / table.rows:.2%}",
            f"{table.mean_norm:.4g}",
            f"{table.largest_norm:.4g}",
        )
        for table in figures
    ]
    columns = ("layer", "rows", "values each", "MB", "updated", "mean norm", "largest")
    print_table(
        f"n-grams of {', '.join(map(str, orders))} tokens, {counted(heads, 'head')} each, {reader.folder}",
        columns,
        rows,
    )
    print("updated: rows that training has moved, if the checkpoint has their optimizer state")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from kmem.checkpoint.engram.rows import checkpoint_addresses, text_ngrams

    reader = open_checkpoint(arguments)
    layers = checkpoint_addresses(reader).layers
    if arguments.layer is not None:
        if arguments.layer not in layers:
            known = ", ".join(map(str, layers))
            raise UserError(f"--layer {arguments.layer}: has no engram; layers with engram: {known}")
        layers = (arguments.layer,)
    ngrams = list(text_ngrams(reader, arguments.text, layers))
    if arguments.json:
        described = {"checkpoint": str(reader.folder), "step": reader.step, "text": arguments.text}
        print(json.dumps({**described, "ngrams": [asdict(ngram) for ngram in ngrams]}))
        return 0
    for layer in layers:
        rows = [
            (
                str(ngram.position),
                str(ngram.order),
                "[pad]" * ngram.missing + json.dumps(ngram.text, ensure_ascii=False),
                str(head),
                f"{ngram.rows[head]:,}",
                f"{ngram.norms[head]:.4g}",
                "" if ngram.updated is None else ("yes" if ngram.updated[head] else "no"),
            )
            for ngram in ngrams
            if ngram.layer == layer
            for head in range(len(ngram.rows))
        ]
        columns = ("token", "order", "n-gram", "head", "row", "norm", "updated")
        print_table(f"layer {layer}, {reader.folder}", columns, rows)
    return 0


def _erase(arguments: argparse.Namespace) -> int:
    from kmem.checkpoint.engram.rows import erase
    from kmem.model.engram_reader import table_name

    texts = _texts(arguments)
    reader = open_checkpoint(arguments)
    checkpoint, erased = erase(reader, arguments.out, texts)
    for layer, count in erased.items():
        print(f"layer {layer}: {count:,} of {counted(reader.tensors[table_name(layer)].shape[0], 'row')} erased")
    print("other n-grams that hash to these rows have lost them, too")
    print(f"wrote {checkpoint}")
    return 0


def _texts(arguments: argparse.Namespace) -> dict[str, str]:
    """Text -> where the user gave it."""
    if arguments.file is None:
        return dict.fromkeys(arguments.text, "--text")
    try:
        lines = arguments.file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--file {arguments.file}: not readable as text: {error}") from None
    texts = {line: f"--file {arguments.file}, line {number}" for number, line in enumerate(lines, 1) if line.strip()}
    if not texts:
        raise UserError(f"--file {arguments.file}: no text in it; write one on each line")
    return texts
