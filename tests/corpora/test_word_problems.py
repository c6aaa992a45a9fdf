"""Arithmetic word problems: right, reproducible, and a corpus like the others."""

import json
import re
from operator import add, floordiv, mul, sub

from kmem.corpora import word_problems as generator
from kmem.corpora.catalogue import extract_corpora
from kmem.corpora.word_problems import word_problem

EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)\.")
PROBLEMS = [word_problem(number) for number in range(2000)]


def test_every_equation_holds_and_the_last_one_is_the_answer():
    operations = {"+": add, "-": sub, "*": mul, "/": floordiv}
    for problem in PROBLEMS:
        story, solution, answer = problem.split("\n")
        assert story.endswith("?")
        equations = EQUATION.findall(solution)
        assert " ".join(f"{a} {sign} {b} = {c}." for a, sign, b, c in equations) == solution
        for left, sign, right, result in equations:
            assert operations[sign](int(left), int(right)) == int(result)
            assert sign != "/" or int(left) % int(right) == 0
        assert answer == f"The answer is {equations[-1][3]}."


def test_equations_take_numbers_from_the_story_or_from_equations_before():
    """All but the factor 2 of `as many again`."""
    for problem in PROBLEMS:
        story, solution, _ = problem.split("\n")
        known = {*re.findall(r"\d+", story), *(["2"] if "again" in story else [])}
        for left, _, right, result in EQUATION.findall(solution):
            assert {left, right} <= known, problem
            known.add(result)


def test_problems_depend_on_seed_and_number_alone_and_differ():
    assert PROBLEMS[7] == word_problem(7) != word_problem(7, seed=1)
    _, solution, _ = word_problem(0).split("\n")  # the same on every machine and in every Python
    assert solution == "7 * 24 = 168. 5 * 23 = 115. 168 + 115 = 283. 6 * 12 = 72. 283 + 72 = 355. 400 - 355 = 45."
    assert len(set(PROBLEMS)) == len(PROBLEMS)


def test_the_corpus_is_written_without_a_package(tmp_path, monkeypatch):
    monkeypatch.setattr(generator, "PROBLEMS", 50)
    written = extract_corpora(["arithmetic"], tmp_path / "out", tmp_path / "cache")
    lines = [json.loads(line) for line in (tmp_path / "out" / "arithmetic.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == PROBLEMS[:50]
    assert written["arithmetic.jsonl"]["documents"] == 50
    assert written["arithmetic.jsonl"]["origin"] == "made by kmem"
    assert not (tmp_path / "cache").exists()
