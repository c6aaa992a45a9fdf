"""Which memory banks can be."""

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
        ({"levels": []}, r"^levels$"),
        ({"levels": [-1]}, r"^levels\.0\n.*-1"),
        ({"levels": [0, 0]}, r" levels=\[0, 0\] "),
        ({"levels": [1] * 8}, r" levels=\[1, 1, 1, 1, 1, 1, 1, 1\]: .*children=16"),
        ({"children": 1}, r"^children\n.*\b2\b"),
        ({"kind": "moe"}, r"^kind\n.*'ffn', 'lora_ffn', 'lora_qk', 'lora_ov' or 'kv'"),
        ({"alpha": 0}, r"^alpha\n.*\b0\b"),
        ({"anchor": True}, r" anchor: .*True"),
        ({"generic": {"probability": 1.5}}, r"^generic\.probability\n.*\b1\b.*1\.5"),
        ({"generic": {"per": "token"}}, r"^generic\.per\n.*'sequence' or 'batch'"),
        ({"placed_layers": 2}, r" placed_layers=2\b.*placement=uniform"),
        ({"placement": "last"}, r" placed_layers=null\b.*placement=last"),
        ({"placement": "first", "placed_layers": [1]}, r" placed_layers=\[1\].*placement=first"),
        ({"placement": "listed", "placed_layers": 2}, r" placed_layers=2\b.*placement=listed"),
        ({"placement": "listed", "placed_layers": [2, 1]}, r" placed_layers=\[2, 1\].*ascend"),
        ({"placement": "listed", "placed_layers": [1, 1]}, r" placed_layers=\[1, 1\].*ascend"),
    ],
)
def test_errors_name_the_field(section, message):
    with pytest.raises(ValidationError, match="(?m)" + message):
        bank(**section)


@pytest.mark.parametrize(
    ("section", "model", "message"),
    [
        (
            {"placement": "listed", "placed_layers": [1, 3]},
            {},
            r"bank\.placed_layers=\[1, 3\].*num_layers=3",
        ),
        ({"placement": "last", "placed_layers": 4}, {}, r"bank\.placed_layers=4\b.*num_layers=3"),
        ({"kind": "lora_qk"}, {"attention": tiny.MLA}, r"bank\.kind=lora_qk\b.*attention\.kind=mla"),
        ({"kind": "lora_ov"}, {"attention": tiny.MLA}, r"bank\.kind=lora_ov\b.*attention\.kind=mla"),
        (
            {"kind": "lora_ffn"},
            {"moe": {**tiny.SOFTMAX, "first_dense_layers": 1}},
            r"bank\.kind=lora_ffn\b.*layer 1 .*kind=ffn",
        ),
        ({}, {"hidden_size": 36}, r"hidden_size=36\b.*\b8 .*kind=ffn"),
        ({"kind": "lora_ffn"}, {"intermediate_size": 50}, r"intermediate_size=50\b.*\b8 .*kind=lora_ffn"),
        ({"kind": "kv"}, {"attention": {"num_heads": 2, "head_dim": 12}}, r"attention\.head_dim=12\b.*\b8 .*kind=kv"),
        (
            {"kind": "kv"},
            {"attention": tiny.MLA},
            r"attention\.qk_nope_head_dim \+ qk_rope_head_dim=20\b.*\b8 .*kind=kv",
        ),
    ],
)
def test_what_does_not_go_with_a_model_is_refused(section, model, message):
    with pytest.raises(ValueError, match="^" + message):
        bank(**section).check_model(tiny.config(**model))


def test_what_goes_with_a_model():
    dense_first = {**tiny.SOFTMAX, "first_dense_layers": 1}
    bank(kind="lora_ffn", placement="first", placed_layers=1).check_model(tiny.config(moe=dense_first))
    bank(kind="lora_qk").check_model(tiny.config(moe=tiny.SOFTMAX, intermediate_size=50))
    bank(kind="ffn").check_model(tiny.config(tiny.MLA))
