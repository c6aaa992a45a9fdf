"""The `kmem` command."""

import argparse
import contextlib
import faulthandler
import importlib
import os
import sys
from collections.abc import Mapping, Sequence

from kmem.config import UserError

Table = Mapping[str, tuple["str | Table", str]]

_DATA: Table = {
    "corpora": ("kmem.corpora.command", "write clean English text from installable packages as JSON lines"),
    "prepare": ("kmem.data.command", "tokenize text into a folder that training reads"),
    "adopt": ("kmem.data.adopt_command", "train on Megatron .bin/.idx files where they lie"),
    "cluster": ("kmem.clustering.command", "cluster documents into the tree that addresses a memory bank"),
}
_BENCH: Table = {
    "train": ("kmem.bench.train_command", "a training step against plain Transformers or another precision"),
    "experts": (
        "kmem.bench.experts_command",
        "a layer of experts, its features and backends, against the layer of Transformers",
    ),
    "attention": ("kmem.bench.attention_command", "attention within packed documents against its dense mask"),
    "rows": ("kmem.bench.rows_command", "row gathers and row optimizers on the host against torch's"),
    "compare": ("kmem.bench.compare_command", "models of equal budgets on the same text, over several seeds"),
    "fetch": ("kmem.bench.fetch_command", "fetching the blocks of contexts from a bank, in host memory and on disk"),
    "plan": ("kmem.bench.plan_command", "what `kmem plan` predicts for a step on one core against the step"),
    "tables": ("kmem.bench.tables_command", "a training step with large tables against one with small tables"),
}
COMMANDS: Table = {
    "data": (_DATA, "fetch, prepare, adopt and cluster text"),
    "train": ("kmem.train.command", "train a model"),
    "eval": ("kmem.eval.command", "held-out loss of a checkpoint"),
    "generate": ("kmem.hf.generate_command", "continue a prompt"),
    "export": ("kmem.hf.export_command", "write a Hugging Face folder"),
    "import": ("kmem.hf.import_command", "make a checkpoint from a Hugging Face folder"),
    "bank": ("kmem.checkpoint.bank.command", "list, erase, replace and merge blocks of a memory bank"),
    "engram": ("kmem.checkpoint.engram.command", "list, inspect and erase rows of an engram (n-gram memory)"),
    "verify": (
        "kmem.hf.verify_command",
        "compare the files of a checkpoint, data, an export or a tree with their digests",
    ),
    "plan": ("kmem.plan.command", "predict the time of a step on GPUs, by parts"),
    "bench": (_BENCH, "compare speed and models"),
}
"""Command -> (a module with `add_arguments` and `run`, or a table of subcommands; what the command does). A module is
imported when its command is used."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code. A UserError is printed without a traceback and gives 2."""
    if "_ARGCOMPLETE" in os.environ:  # a shell asks for completions
        from kmem.completion import complete

        complete()
    words = list(sys.argv[1:] if arguments is None else arguments)
    program, purpose = "kmem", ""
    target: str | Table = COMMANDS
    while not isinstance(target, str):
        word = words.pop(0) if words else ""
        if word not in target:
            return _overview(program, target, word)
        program, (target, purpose) = f"{program} {word}", target[word]
    if not faulthandler.is_enabled():
        # A file that is mapped into memory and cut short, or whose disk is full, ends the process by SIGBUS.
        with contextlib.suppress(OSError, ValueError):  # stderr may be no file
            faulthandler.enable()
    try:
        return _run(target, program, purpose, words)
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (
                OSError
            ):  # its reader is gone, which must not change the exit code when the interpreter flushes again
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _run(target: str, program: str, purpose: str, words: list[str]) -> int:
    try:
        implementation = importlib.import_module(target)
        parser = argparse.ArgumentParser(prog=program, description=purpose, allow_abbrev=False)
        implementation.add_arguments(parser)
        return implementation.run(parser.parse_args(words))
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed the pipe
        return 0
    except OSError as error:  # a file that cannot be read or written, or a full disk
        if error.filename is None:
            raise
        print(f"{program}: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130


def _overview(program: str, commands: Table, given: str) -> int:
    if given in ("--version", "-V"):
        import kmem

        print(f"kmem {kmem.__version__}")
        return 0
    asked = given in ("-h", "--help", "help")
    out = sys.stdout if asked else sys.stderr
    if given and not asked:
        print(f"{program}: unknown command {given}\n", file=out)
    print(f"usage: {program} COMMAND ...  ({program} COMMAND --help says more)\n", file=out)
    for name, (_, purpose) in commands.items():
        print(f"  {name:<10}{purpose}", file=out)
    return 0 if asked else 2


if __name__ == "__main__":
    sys.exit(main())
