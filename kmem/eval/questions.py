"""Questions with one right answer: how often it is a model's most likely continuation, by how often the text told it.

A file of questions holds JSON lines with `prompt`, `answer` and, for the grouping, `exposures`: how many documents of
the training text tell the answer. `kmem data prepare` puts the file into the folder of a corpus that has questions.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, Field, NonNegativeInt, ValidationError
from torch import Tensor

from kmem.config import UserError
from kmem.data.progress import Progress
from kmem.wording import counted

GROUPS = {"unknown": -1, "0": 0, "1": 1, "2-3": 2, "4-15": 4, "16-63": 16, "64+": 64}
"""Group of exposures -> the fewest in it; -1 stands for exposures that are not given."""
SAMPLE_SEED = 0


class _Line(BaseModel):
    """A line of a file of questions."""

    prompt: str = Field(min_length=1)
    answer: str = Field(min_length=1)
    exposures: NonNegativeInt | None = None


@dataclass(frozen=True)
class Question:
    """Token ids of a question; the model should continue the prompt with the answer."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    exposures: int | None


Forward = Callable[[Tensor, Sequence[Question]], Tensor]
"""Token ids int64 [B, T] of questions and their answers, padded on the right -> logits [B, T, V]."""


@dataclass(frozen=True)
class Answers:
    """How a group of questions was answered."""

    group: str
    """Exposures, such as 4-15; `all` for all groups together."""
    questions: int
    """Questions of the group that were asked."""
    of: int
    """Questions of the group in the file."""
    right: float
    """Share of questions whose greedy continuation is the answer."""
    bits: float
    """Mean of -log2 P(answer | prompt)."""


def read_questions(path: Path, tokenizer: Any) -> list[Question]:
    """The questions of a file, in its order.

    Args:
        tokenizer: from Transformers.

    Raises:
        UserError: names the line that is not a question, or whose answer begins within a token of its prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--questions {path}: cannot be read ({error})") from None
    questions = []
    for number, line in enumerate(lines, 1):
        try:
            told = _Line.model_validate_json(line, strict=True)
        except ValidationError:
            raise UserError(
                f"--questions {path}, line {number}: needs a JSON object with the texts `prompt` and `answer`, and "
                "optionally the number `exposures`"
            ) from None
        texts = (told.prompt, told.prompt + told.answer)
        before, both = (tokenizer.encode(text, add_special_tokens=False) for text in texts)
        if both[: len(before)] != before or len(both) == len(before):
            raise UserError(
                f"--questions {path}, line {number}: the answer begins within a token of the prompt; let the answer "
                "begin with the blank that separates them"
            )
        questions.append(Question(tuple(before), tuple(both[len(before) :]), told.exposures))
    if not questions:
        raise UserError(f"--questions {path}: holds no questions")
    return questions


def sample(questions: Sequence[Question], limit: int) -> list[Question]:
    """At most `limit` questions, in their order and the same ones each time. Every group of exposures gives equally
    many, drawn at random within the group; a group that has fewer gives all.

    Raises:
        UserError: the limit leaves out a group.
    """
    groups: dict[str, list[int]] = {}
    for number, question in enumerate(questions):
        groups.setdefault(_group(question.exposures), []).append(number)
    if limit < len(groups):
        raise UserError(
            f"--questions-limit {limit}: these questions have {counted(len(groups), 'group')} of exposures; ask "
            "at least that many"
        )
    left, chosen = limit, set()
    for place, (group, numbers) in enumerate(sorted(groups.items(), key=lambda item: len(item[1]))):
        share = min(len(numbers), left // (len(groups) - place))
        chosen.update(random.Random(f"{SAMPLE_SEED} {group}").sample(numbers, share))
        left -= share
    return [questions[number] for number in sorted(chosen)]


@torch.no_grad()
def answer(
    questions: Sequence[Question],
    forward: Forward,
    batch: int,
    device: torch.device,
    of: Sequence[Question] | None = None,
) -> list[Answers]:
    """How the questions are answered, by rising exposures, and last over all of them.

    Args:
        of: all questions, if `questions` is a sample; the mean over all then weighs groups by their sizes in `of`.
    """
    sizes = Counter(_group(question.exposures) for question in (questions if of is None else of))
    scores: dict[str, list[tuple[bool, float]]] = {}
    longest_last = sorted(questions, key=lambda question: len(question.prompt) + len(question.answer))
    with Progress("answering questions", len(questions)) as progress:
        for start in range(0, len(questions), batch):
            asked = longest_last[start : start + batch]
            texts = [[*question.prompt, *question.answer] for question in asked]
            width = max(map(len, texts))
            ids = torch.tensor([text + [0] * (width - len(text)) for text in texts], device=device)
            logits = forward(ids, asked)
            for question, row in zip(asked, logits, strict=True):
                first, size = len(question.prompt) - 1, len(question.answer)
                said = row[first : first + size].float().log_softmax(-1)
                wanted = torch.tensor(question.answer, device=device)
                right = bool((said.argmax(-1) == wanted).all())
                bits = -float(said.gather(1, wanted[:, None]).sum()) / math.log(2)
                scores.setdefault(_group(question.exposures), []).append((right, bits))
            progress.advance(len(asked))
    by_group = [
        Answers(group, len(scores[group]), sizes[group], *np.mean(scores[group], axis=0).tolist())
        for group in sorted(scores, key=GROUPS.__getitem__)
    ]
    whole = sum(group.of for group in by_group)
    right, bits = (sum(group.of * getattr(group, name) for group in by_group) / whole for name in ("right", "bits"))
    return [*by_group, Answers("all", len(questions), whole, right, bits)]


def _group(exposures: int | None) -> str:
    given = -1 if exposures is None else exposures
    return max((group for group, fewest in GROUPS.items() if fewest <= given), key=GROUPS.__getitem__)
