import copy
import pickle

import pytest

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
