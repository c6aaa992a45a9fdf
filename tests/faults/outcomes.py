"""What a command did under an attack."""

import contextlib
import io
import logging
import re
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

from kmem.cli import main

OUTCOMES = ("clean", "fell back", "same", "traceback", "silent")
"""clean: one error that names the place, exit code 2. fell back: another state was used, and a message said so. same:
the result of the unharmed command. traceback: an error without words. silent: another result without a word."""


@dataclass(frozen=True)
class Ran:
    """A command that has run."""

    code: int
    out: str
    said: str
    """What it wrote to stderr and to the log."""


def run(words: Sequence[str]) -> Ran:
    """Run a `kmem` command in this process."""
    out, said = io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger("kmem").addHandler(handler)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
            code = main(list(words))
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        code = 1
        said.write(traceback.format_exc())
    finally:
        logging.getLogger("kmem").removeHandler(handler)
    return Ran(code, out.getvalue(), said.getvalue())


def judge(unharmed: Ran, attacked: Ran, named: str) -> str:
    """One of OUTCOMES.

    Args:
        named: what an error or message must contain, such as the name of the damaged file or of its folder.
    """
    if "Traceback (most recent call last)" in attacked.said or attacked.code not in (0, 2):
        return "traceback"
    if attacked.code == 2:
        return "clean" if named in attacked.said + attacked.out else "traceback"
    if _comparable(attacked.out) == _comparable(unharmed.out):
        return "same"
    return "fell back" if "passed over" in attacked.said else "silent"


def _comparable(text: str) -> str:
    """Output without times and temporary places."""
    return re.sub(r"/\S+|\d+\.\d+ s\b", "", text)
