"""What the model card of an export says of parameters and licences."""

import math

import pytest

from kmem.hf.architectures import KMEM, Choice
from kmem.hf.importing import starting_config
from kmem.hf.model_card import model_card
from kmem.model.engram_reader import table_rows
from kmem.model.parameter_counts import tensor_shapes
from kmem.model.shape import Shape
from tests.hf.banks import BANKS, make_sentence_tree, make_tree, random_bank


def card(model, folder, tree):
    return model_card(starting_config(folder / "run", model), {}, Choice(KMEM, "a bank"), "fp32", tree)


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
    assert (
        f"Of its parameters {anchor:,} are the anchor, the model without memory, and {layout.bank_values:,} a" in text
    )
    assert f"A context fetches {layout.fetched_values:,} of the bank" in text
    assert (f"{generic:,} more are generic blocks" in text) == bool(generic)
    assert (f"Of its parameters {rows:,} are rows of n-gram memory" in text) == bool(rows)


def test_licences_are_those_that_are_there(tmp_path):
    with_licence = card(BANKS["ffn"], tmp_path, make_sentence_tree(tmp_path / "sentences", ["a", "b c"] * 5))
    assert "minilm, with its licence: `LICENSE` in `tree/embedder/`." in with_licence
    tree = make_tree(tmp_path / "tree")
    (tree / "embedder" / "LICENSE").unlink()
    assert "the embedder of contexts, tfidf.\n" in card(BANKS["ffn"], tmp_path, tree)


def test_a_model_without_a_bank_has_none(tmp_path):
    model = BANKS["ffn"].model_copy(update={"bank": None})
    assert "memory bank" not in card(model, tmp_path, None).split("## Configuration")[0]
