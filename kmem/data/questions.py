"""Questions about a corpus, with the number of training documents that tell the answer.

`kmem data corpora` writes NAME.questions beside NAME.jsonl: JSON lines with `prompt`, `answer`, and `documents`, the
numbers of the corpus's documents that tell the answer. Which of these a model reads is decided when the corpus is
split. So `kmem data prepare` copies the questions into the prepared folder, with the number of training documents that
tell the answer, `exposures`, in place of `documents`.
"""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kmem.config import UserError

QUESTIONS_SUFFIX = ".questions"


def count_exposures(corpus: Path, held_out: NDArray[np.bool_], folder: Path) -> None:
    """Write the questions of a corpus file, if there are any, into a prepared folder.

    Args:
        corpus: a file that `kmem data corpora` wrote, unchanged.
        held_out: [documents of the file] whether a document is held out.

    Raises:
        UserError: the questions are damaged or belong to another corpus.
    """
    source = corpus.with_suffix(QUESTIONS_SUFFIX)
    if not source.is_file():
        return
    lines = []
    try:
        for line in source.read_text(encoding="utf-8").splitlines():
            question = json.loads(line)
            tells = np.array(question.pop("documents"), dtype=np.int64)
            question["exposures"] = int((~held_out[tells]).sum())
            lines.append(json.dumps(question, ensure_ascii=False) + "\n")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise UserError(
            f"{source}: not the questions of {corpus.name}; write both again with kmem data corpora, or remove it"
        ) from None
    (folder / source.name).write_text("".join(lines), encoding="utf-8")
