"""What a command did under an attack."""

import contextlib
import io
import logging
import os
import re
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from kmem.cli import main
from tests.warm_processes import WarmProcess, start_command

OUTCOMES = ("clean", "fell back", "same", "traceback", "stuck", "silent")
"""clean: one error that names the place, exit code 2. fell back: another state was used, and a message said so. same:
the result of the unharmed command. traceback: an error without words. stuck: the command that was given again does not
go on. silent: another result without a word."""
BAD = ("traceback", "stuck", "silent")


@dataclass(frozen=True)
class Ran:
    """A command that has run."""

    code: int
    out: str
    said: str
    """What it wrote to stderr and to the log."""

    @classmethod
    def of(cls, process: WarmProcess) -> "Ran":
        """Of a process, once it has ended."""
        out, said = process.communicate()
        return cls(process.returncode or 0, out, said)


def alone(words: Sequence[str], environment: Mapping[str, str] = MappingProxyType({})) -> WarmProcess:
    """Start a `kmem` command in a process of its own, with these variables besides the present ones."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return start_command(words, {**inherited, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **environment})


def failed(ran: Ran) -> bool:
    """Whether it ended without words for its user."""
    return "Traceback (most recent call last)" in ran.said or ran.code not in (0, 2)


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
    if failed(attacked):
        return "traceback"
    if attacked.code == 2:
        return "clean" if named in attacked.said + attacked.out else "traceback"
    if _comparable(attacked.out) == _comparable(unharmed.out):
        return "same"
    return "fell back" if "passed over" in attacked.said else "silent"


def _comparable(text: str) -> str:
    """Output without times and temporary places."""
    return re.sub(r"/\S+|\d+\.\d+ s\b", "", text)
