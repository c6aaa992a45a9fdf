"""Questions: whoever knows the answers is right, whoever knows nothing is not, and every fault of a file is named."""

import json
import math
import re

import pytest
import torch

from kmem.cli import main
from kmem.config import UserError
from kmem.eval.questions import Question, answer, read_questions, sample

VOCABULARY = 32


class Letters:
    """A tokenizer of single letters, where `ab` is a token of its own."""

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return _letters(text)


def _letters(text):
    ids, place = [], 0
    while place < len(text):
        pair = text[place : place + 2] == "ab"
        ids.append(30 if pair else ord(text[place]) - ord("a"))
        place += 2 if pair else 1
    return ids


def knowing(ids, asked):
    """Logits of a model whose next token is always the last one plus 1."""
    logits = torch.full((*ids.shape, VOCABULARY), -20.0)
    return logits.scatter(2, ((ids + 1) % VOCABULARY)[..., None], 20.0)


def ignorant(ids, asked):
    return torch.zeros(*ids.shape, VOCABULARY)


QUESTIONS = [
    Question((1, 2), (3, 4), 1),
    Question((5,), (6,), 3),
    Question((7, 8, 9), (10, 11, 12), 70),
    Question((7, 8, 9), (10, 11, 13), 64),
]


@pytest.mark.parametrize("batch", [1, 3, 10])
def test_answers_are_right_where_all_their_tokens_are_the_likeliest(batch):
    found = answer(QUESTIONS, knowing, batch, torch.device("cpu"))
    assert [(group.group, group.questions, group.right) for group in found] == [
        ("1", 1, 1.0), ("2-3", 1, 1.0), ("64+", 2, 0.5), ("all", 4, 0.75),
    ]  # fmt: skip
    assert found[0].bits == pytest.approx(0, abs=1e-6)


def test_a_uniform_guess_costs_the_logarithm_of_the_vocabulary_per_token():
    found = answer(QUESTIONS, ignorant, 2, torch.device("cpu"))
    assert found[0].bits == pytest.approx(2 * math.log2(VOCABULARY), rel=1e-5)
    assert found[-1].right == 0


def test_a_sample_has_as_many_of_every_group_and_is_the_same_each_time():
    many = [Question((number % 20,), (number % 20 + number % 2,), number % 7) for number in range(700)]
    rare = [Question((3,), (4,), 100), Question((4,), (9,), None)]
    questions = [*many[:350], *rare, *many[350:]]
    asked = sample(questions, 102)
    assert asked == sample(questions, 102)
    assert sample(questions, 1000) == questions
    found = {group.group: group for group in answer(asked, knowing, 16, torch.device("cpu"), questions)}
    assert {name: (group.questions, group.of) for name, group in found.items()} == {
        "unknown": (1, 1), "0": (25, 100), "1": (25, 100), "2-3": (25, 200), "4-15": (25, 300), "64+": (1, 1),
        "all": (102, 702),
    }  # fmt: skip
    groups = [group for name, group in found.items() if name != "all"]
    weighed = sum(group.of * group.right for group in groups) / 702
    assert found["all"].right == pytest.approx(weighed)
    assert weighed != pytest.approx(sum(group.questions * group.right for group in groups) / 102)
    with pytest.raises(UserError, match=r"^--questions-limit 5: .*\b6 groups"):
        sample(questions, 5)


def test_faults_of_a_file_are_named_by_line(tmp_path):
    path = tmp_path / "some.questions"
    for text, complaint in [
        ('{"prompt": "a", "answer": "c"}\nno json', ", line 2: .*`prompt`"),
        ('{"prompt": "a"}', ", line 1: .*`answer`"),
        ('{"prompt": "a", "answer": ""}', ", line 1: .*`answer`"),
        ('{"prompt": "a", "answer": "c", "exposures": "often"}', ", line 1: .*`exposures`"),
        ('{"prompt": "a", "answer": "b"}', ", line 1: .*token"),
        ("", ": .*no questions"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=f"--questions {path}{complaint}"):
            read_questions(path, Letters())
    with pytest.raises(UserError, match=f"--questions {tmp_path / 'none'}: .*No such file"):
        read_questions(tmp_path / "none", Letters())
    path.write_text('{"prompt": "ba", "answer": "cd", "exposures": 4}')
    assert read_questions(path, Letters()) == [Question((1, 0), (2, 3), 4)]


def test_the_command_asks_a_run(ranks, run_config, tmp_path, capsys):
    from pathlib import Path

    from tests.train.trainer_case import trainer_case

    tree, _ = run_config(train__steps=1)
    ranks.run(2, trainer_case, tree)
    run = str(Path(tree["folder"]) / tree["name"])
    path = tmp_path / "some.questions"
    path.write_text(json.dumps({"prompt": "The king", "answer": " of", "exposures": 5}) + "\n")
    assert main(["eval", "--checkpoint", run, "--questions", str(path), "--json"]) == 0
    groups = json.loads(capsys.readouterr().out)["questions"]
    assert [group["group"] for group in groups] == ["4-15", "all"]
    assert main(["eval", "--checkpoint", run, "--questions", str(path)]) == 0
    assert "bits per answer" in " ".join(capsys.readouterr().out.split())
    assert main(["eval", "--checkpoint", run, "--questions", str(path), "--sequences", "2"]) == 2
    assert "--questions: " in capsys.readouterr().err
    assert main(["eval", "--checkpoint", run, "--questions-limit", "2"]) == 2
    assert re.search(r"--questions-limit: .*--questions\b", capsys.readouterr().err)
    with path.open("a") as file:
        file.writelines(json.dumps({"prompt": "A king", "answer": " of", "exposures": 7}) + "\n" for _ in range(3))
    assert main(["eval", "--checkpoint", run, "--questions", str(path), "--questions-limit", "2", "--json"]) == 0
    groups = json.loads(capsys.readouterr().out)["questions"]
    assert [(group["group"], group["questions"], group["of"]) for group in groups] == [("4-15", 2, 4), ("all", 2, 4)]
    assert main(["eval", "--checkpoint", run, "--questions", str(path), "--questions-limit", "2"]) == 0
    printed = capsys.readouterr().out
    assert "2 of 4" in printed
    assert "sample" in printed
