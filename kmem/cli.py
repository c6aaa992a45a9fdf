"""The `kmem` command."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from kmem.config import UserError

COMMANDS = {
    "data": ("kmem.data.command", "fetch, prepare and cluster text"),
    "train": ("kmem.train.command", "train a model"),
    "eval": ("kmem.eval.command", "held-out loss of a checkpoint"),
    "generate": ("kmem.hf.generate_command", "continue a prompt"),
    "export": ("kmem.hf.export_command", "write a Hugging Face folder"),
    "import": ("kmem.hf.import_command", "make a checkpoint from a Hugging Face folder"),
    "bank": ("kmem.checkpoint.bank.command", "list, erase, replace and merge blocks of a memory bank"),
    "engram": ("kmem.checkpoint.engram.command", "list, inspect and erase rows of an n-gram memory"),
    "bench": ("kmem.bench.command", "compare speed with other libraries"),
}
"""Command -> (module with `add_arguments` and `run`, what it does). The module is imported when its command is used."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. A user's error is printed without a traceback and gives 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = words[0] if words else ""
    if command not in COMMANDS:
        return _overview(command)
    module, purpose = COMMANDS[command]
    try:
        implementation = importlib.import_module(module)
        parser = argparse.ArgumentParser(prog=f"kmem {command}", description=purpose, allow_abbrev=False)
        implementation.add_arguments(parser)
        return implementation.run(parser.parse_args(words[1:]))
    except UserError as error:
        print(f"kmem {command}: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"kmem {command}: interrupted", file=sys.stderr)
        return 130


def _overview(given: str) -> int:
    if given in ("--version", "-V"):
        import kmem

        print(f"kmem {kmem.__version__}")
        return 0
    asked = given in ("-h", "--help", "help")
    out = sys.stdout if asked else sys.stderr
    if given and not asked:
        print(f"kmem: unknown command {given}\n", file=out)
    print("usage: kmem COMMAND ...  (kmem COMMAND --help says more)\n", file=out)
    for name, (_, purpose) in COMMANDS.items():
        print(f"  {name:<10}{purpose}", file=out)
    return 0 if asked else 2


if __name__ == "__main__":
    sys.exit(main())
