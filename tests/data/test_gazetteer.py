"""The made-up gazetteer: every document tells the fact of its place, and questions ask for it."""

import json
import re
from collections import Counter

from kmem.data import gazetteer as generator
from kmem.data.corpora import extract_corpora
from kmem.data.gazetteer import PLACES, document, gazetteer, place, questions

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
        assert question["exposures"] == where.documents
        assert not any(
            document(where, exposure).startswith(question["prompt"] + question["answer"])
            for exposure in range(min(where.documents, 3))
        )


def test_it_is_a_corpus_with_questions_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(generator, "PLACES", 20)
    entry = extract_corpora(["gazetteer"], tmp_path, tmp_path)["gazetteer.jsonl"]
    lines = (tmp_path / "gazetteer.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == entry["documents"]
    assert json.loads(lines[0])["domain"] == "facts"
    asked = [json.loads(line) for line in (tmp_path / "gazetteer.questions").read_text(encoding="utf-8").splitlines()]
    assert len(asked) == 20
