"""What the model card of an export says of parameters and licences."""

import math
import re
from functools import partial

import pytest

from kmem.hf.architectures import KMEM, Choice
from kmem.hf.importing import starting_config
from kmem.hf.memory_folders import FolderParts, bank_card, table_card
from kmem.hf.model_card import model_card
from kmem.model.engram_kind import EngramKind
from kmem.model.engram_reader import table_rows
from kmem.model.parameter_counts import tensor_shapes
from kmem.model.shape import Shape
from tests.hf.banks import BANKS, make_sentence_tree, make_tree, random_bank


def card(model, folder, tree):
    memories = [FolderParts(card=partial(table_card, EngramKind()))] if model.engram else []
    memories += [] if tree is None else [FolderParts(card=partial(bank_card, tree))]
    return model_card(starting_config(folder / "run", model), {}, Choice(KMEM, "a bank"), "fp32", memories)


@pytest.mark.parametrize("name", ["ffn", "ffn in some layers of experts", "with n-grams"])
def test_parts_of_a_model_with_a_bank_add_up(name, tmp_path):
    """Each number once, and their sum is that of all tensors."""
    text = card(BANKS[name], tmp_path, make_tree(tmp_path / "tree"))
    layout, model = random_bank(BANKS[name]).layout, BANKS[name].model_dump()
    engram = BANKS[name].engram
    rows = 0 if engram is None else sum(table_rows(Shape(model)).values()) * engram.row_dim
    generic = layout.fetched_values if layout.generic else 0
    total = sum(math.prod(shape) for shape in tensor_shapes(BANKS[name].shape).values())
    anchor = total - layout.bank_values - generic - rows
    assert f"| Parameters | {total:,} |" in text
    assert re.search(rf"parameters {anchor:,} .*\banchor\b.* {layout.bank_values:,} .*\bbank\b", text)
    assert f" fetches {layout.fetched_values:,} of" in text
    assert bool(re.search(rf" {generic:,} [^.\n]*generic blocks", text)) == bool(generic)
    assert bool(re.search(rf" {rows:,} [^.\n]*n-gram", text)) == bool(rows)


def test_licences_are_those_that_are_there(tmp_path):
    with_licence = card(BANKS["ffn"], tmp_path, make_sentence_tree(tmp_path / "sentences", ["a", "b c"] * 5))
    assert re.search("minilm.*`LICENSE` in `tree/embedder/`", with_licence)
    tree = make_tree(tmp_path / "tree")
    (tree / "embedder" / "LICENSE").unlink()
    assert ", tfidf.\n" in card(BANKS["ffn"], tmp_path, tree)


def test_a_model_without_a_bank_has_none(tmp_path):
    model = BANKS["ffn"].model_copy(update={"bank": None})
    assert "memory bank" not in card(model, tmp_path, None).split("## Configuration")[0]
