import copy
import pickle

import pytest
import torch

from kmem.model.decoder import Decoder
from kmem.model.shape import Shape
from tests.model import tiny


def test_a_shape_is_the_mapping_it_was_made_from():
    mapping = tiny.config(tiny.MLA, tiny.SIGMOID).model_dump()
    shape = Shape(mapping)
    assert shape.as_dict() == mapping
    assert shape.attention.kv_lora_rank == mapping["attention"]["kv_lora_rank"] == shape["attention"]["kv_lora_rank"]
    assert Shape(shape).as_dict() == copy.deepcopy(shape).as_dict() == pickle.loads(pickle.dumps(shape)).as_dict()  # noqa: S301


def test_a_shape_is_read_only_and_names_unknown_fields():
    shape = tiny.shape()
    with pytest.raises(AttributeError, match="read-only: 'hidden_size'"):
        shape.hidden_size = 1
    with pytest.raises(AttributeError, match=r"'hiden_size'.*hidden_size"):
        _ = shape.hiden_size


@pytest.mark.parametrize("first_dense, expected", [(0, [1, 1, 1]), (1, [0, 1, 1]), (3, [0, 0, 0])])
def test_layers_with_experts(first_dense, expected):
    shape = tiny.shape(tiny.GQA, {**tiny.SOFTMAX, "first_dense_layers": first_dense})
    assert [shape.has_experts(layer) for layer in range(3)] == expected
    assert not tiny.shape().has_experts(0)


def test_head_dim_has_a_default():
    assert tiny.shape({**tiny.GQA, "head_dim": None}).head_dim == 8


LATER = {
    "attention": ("latent_norm_eps",),
    "moe": ("shared_intermediate_size", "shared_expert_gate", "chain"),
    "engram": ("gate_norm_eps", "conv_norm_eps"),
}
"""Section -> fields that models saved before they existed lack."""


def test_a_model_saved_before_a_field_existed_is_what_it_was():
    engram = {"layers": [1], "heads": 2, "rows_per_head": 31, "row_dim": 4}
    now = tiny.config(tiny.MLA, {**tiny.SIGMOID, "num_shared_experts": 2}, engram=engram, norm_eps=0.1).model_dump()
    before = {
        name: {key: value for key, value in section.items() if key not in LATER[name]} if name in LATER else section
        for name, section in now.items()
        if name != "rope_scaling"
    }
    with torch.device("meta"):
        old, new = Decoder(Shape(before)), Decoder(Shape(now))
    assert repr(old) == repr(new)  # widths and epsilons
    epsilons = {module.eps for module in (*old.modules(), *new.modules()) if hasattr(module, "eps")}
    assert epsilons == {0.1}
