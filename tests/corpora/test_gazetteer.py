"""The made-up gazetteer: every document tells the fact of its place, and questions ask for it."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from kmem.config import UserError
from kmem.corpora import gazetteer as generator
from kmem.corpora.catalogue import extract_corpora
from kmem.corpora.gazetteer import PLACES, document, gazetteer, place, questions
from kmem.data.indexed import IndexedTokens
from kmem.data.prepare import Preparation, prepare
from kmem.data.tokenizer import load_tokenizer

NUMBERS = range(0, PLACES, 16)


def test_every_document_tells_the_fact_of_its_place_and_no_other_number():
    for number in NUMBERS:
        where = place(number)
        for exposure in range(min(where.documents, 5)):
            text = document(where, exposure)
            assert re.findall(r"\d+", text) == [str(where.height)]
            assert text.count(where.name) >= 2
            assert where.region_name in text
            assert where.land_name in text


def test_a_document_is_a_function_of_its_numbers_and_all_differ():
    texts = [text for text, _ in gazetteer(None)]
    assert texts == [text for text, _ in gazetteer(None)]
    assert len(set(texts)) == len(texts)
    assert document(place(3), 0) != document(place(3, seed=1), 0, seed=1)


def test_frequencies_follow_the_law():
    documents = sorted((place(number).documents for number in range(PLACES)), reverse=True)
    assert documents[0] == generator.MOST
    assert all(
        abs(found - generator.MOST / (rank + 1) ** generator.EXPONENT) <= 0.5 or found == 1
        for rank, found in enumerate(documents)
    )
    assert documents[-1] == 1
    assert len(list(gazetteer(None))) == sum(documents)


def test_names_are_distinct_and_no_name_is_told_by_another():
    places = [place(number) for number in range(PLACES)]
    assert len({where.name for where in places}) == PLACES
    assert len(Counter(where.region_name for where in places)) == 256
    assert len(Counter(where.land_name for where in places)) == 16
    assert all(len({where.land_name for where in places if where.land == land}) == 1 for land in range(16))


def test_questions_end_before_the_fact_and_stand_in_no_document():
    asked = list(questions())
    assert len(asked) == PLACES
    for number in NUMBERS:
        question, where = asked[number], place(number)
        assert question["answer"] == f" {where.height}"
        assert str(where.height) not in question["prompt"]
        assert question["prompt"].endswith(f"{where.name} is")
        assert len(question["documents"]) == where.documents
        assert not any(
            document(where, exposure).startswith(question["prompt"] + question["answer"])
            for exposure in range(min(where.documents, 3))
        )


@pytest.fixture
def corpus(tmp_path, monkeypatch) -> Path:
    """A gazetteer of 20 places, as `kmem data corpora` writes it."""
    monkeypatch.setattr(generator, "PLACES", 20)
    entry = extract_corpora(["gazetteer"], tmp_path, tmp_path)["gazetteer.jsonl"]
    lines = (tmp_path / "gazetteer.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == entry["documents"]
    assert json.loads(lines[0])["domain"] == "facts"
    return tmp_path / "gazetteer.jsonl"


def read_questions(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_questions_name_the_documents_that_tell_the_answer(corpus):
    texts = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()]
    asked = read_questions(corpus.with_suffix(".questions"))
    assert len(asked) == 20
    for question in asked:
        tells = [number for number, text in enumerate(texts) if question["subject"] in text]
        assert question["documents"] == tells
        assert all(question["answer"] in texts[number] for number in tells)


def test_exposures_are_counted_in_the_training_split(corpus, tmp_path):
    """A document that is held out has told a model nothing."""
    other = corpus.with_name("before.jsonl")  # comes first, and is no corpus
    other.write_text("".join(json.dumps({"text": f"line {number}"}) + "\n" for number in range(30)))
    out = tmp_path / "out"
    prepare(Preparation([other, corpus], out, vocab_size=600, validation_share=0.3))
    indexed, tokenizer = IndexedTokens(out / "train"), load_tokenizer(out / "tokenizer")
    read = [
        tokenizer.decode(indexed.take(np.arange(start, start + length)))
        for start, length in zip(indexed.starts, indexed.lengths, strict=True)
    ]
    asked = read_questions(out / "gazetteer.questions")
    assert len(asked) == 20
    assert not any("documents" in question for question in asked)
    assert [question["exposures"] for question in asked] == [
        sum(question["subject"] in text for text in read) for question in asked
    ]
    whole = read_questions(corpus.with_suffix(".questions"))
    assert sum(q["exposures"] for q in asked) < sum(len(q["documents"]) for q in whole)


def test_questions_of_another_corpus_are_an_error_and_those_of_changed_text_are_left(corpus, tmp_path):
    questions = corpus.with_suffix(".questions")
    questions.write_text(questions.read_text().replace('"documents": [0', '"documents": [100000'))
    with pytest.raises(UserError, match=r"gazetteer\.questions: .*gazetteer\.jsonl.*kmem data corpora"):
        prepare(Preparation([corpus], tmp_path / "out", vocab_size=600))
    with open(corpus, "a") as file:
        file.write('{"text": "one more"}\n')
    prepare(Preparation([corpus], tmp_path / "out", vocab_size=600))
    assert not (tmp_path / "out" / "gazetteer.questions").exists()
