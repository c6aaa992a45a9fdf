"""Which memory banks can be."""

import re

import pytest
from pydantic import ValidationError

from kmem.config.bank import BankConfig
from tests.model import tiny


def bank(**changes):
    return BankConfig.model_validate({"levels": [4, 2], **changes})


def test_a_resolved_section_stays_what_it_is():
    chosen = bank(levels=[4, 0, 2], placement="listed", placed_layers=[0, 2], generic={"probability": 1 / 17})
    assert BankConfig.model_validate(chosen.model_dump(mode="json")) == chosen
    assert (bank().children, bank().kind, bank().anchor, bank().generic.probability) == (16, "ffn", "train", 0)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"levels": []}, "at least 1 item"),
        ({"levels": [-1]}, "greater than or equal to 0"),
        ({"levels": [0, 0]}, "levels=[0, 0] leaves every level without blocks; give one a rank above 0"),
        ({"levels": [1] * 8}, "levels=[1, 1, 1, 1, 1, 1, 1, 1]: a tree of 8 levels with children=16 has more than"),
        ({"children": 1}, "greater than or equal to 2"),
        ({"kind": "moe"}, "Input should be 'ffn', 'lora_ffn', 'lora_qk', 'lora_ov' or 'kv'"),
        ({"alpha": 0}, "greater than 0"),
        ({"anchor": True}, "anchor: "),
        ({"generic": {"probability": 1.5}}, "less than or equal to 1"),
        ({"generic": {"per": "token"}}, "Input should be 'sequence' or 'batch'"),
        ({"placed_layers": 2}, "placed_layers=2 with placement=uniform, which takes all layers"),
        ({"placement": "last"}, "placed_layers=null with placement=last; give the number of layers"),
        ({"placement": "first", "placed_layers": [1]}, "placed_layers=[1] with placement=first; give the number"),
        ({"placement": "listed", "placed_layers": 2}, "placed_layers=2 with placement=listed; list the layers"),
        ({"placement": "listed", "placed_layers": [2, 1]}, "placed_layers=[2, 1] must ascend"),
        ({"placement": "listed", "placed_layers": [1, 1]}, "placed_layers=[1, 1] must ascend"),
    ],
)
def test_errors_name_the_field(section, message):
    with pytest.raises(ValidationError) as error:
        bank(**section)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("section", "model", "message"),
    [
        (
            {"placement": "listed", "placed_layers": [1, 3]},
            {},
            "bank.placed_layers=[1, 3] is out of range for num_layers=3; layers count from 0",
        ),
        ({"placement": "last", "placed_layers": 4}, {}, "bank.placed_layers=4 exceeds num_layers=3"),
        ({"kind": "lora_qk"}, {"attention": tiny.MLA}, "bank.kind=lora_qk does not go with attention.kind=mla"),
        ({"kind": "lora_ov"}, {"attention": tiny.MLA}, "bank.kind=lora_ov does not go with attention.kind=mla"),
        (
            {"kind": "lora_ffn"},
            {"moe": {**tiny.SOFTMAX, "first_dense_layers": 1}},
            "bank.kind=lora_ffn updates a dense feed-forward, and layer 1 has experts; use kind=ffn",
        ),
        ({}, {"hidden_size": 36}, "hidden_size=36 must be a multiple of 8 for a memory bank of kind=ffn"),
        ({"kind": "lora_ffn"}, {"intermediate_size": 50}, "intermediate_size=50 must be a multiple of 8"),
        ({"kind": "kv"}, {"attention": {"num_heads": 2, "head_dim": 12}}, "attention.head_dim=12 must be a multiple"),
        (
            {"kind": "kv"},
            {"attention": tiny.MLA},
            "attention.qk_nope_head_dim + qk_rope_head_dim=20 must be a multiple of 8",
        ),
    ],
)
def test_what_does_not_go_with_a_model_is_refused(section, model, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        bank(**section).check_model(tiny.config(**model))


def test_what_goes_with_a_model():
    dense_first = {**tiny.SOFTMAX, "first_dense_layers": 1}
    bank(kind="lora_ffn", placement="first", placed_layers=1).check_model(tiny.config(moe=dense_first))
    bank(kind="lora_qk").check_model(tiny.config(moe=tiny.SOFTMAX, intermediate_size=50))
    bank(kind="ffn").check_model(tiny.config(tiny.MLA))
