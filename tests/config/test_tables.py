"""Memory layers and their tables as a configuration describes them."""

import pytest

from kmem.config import ConfigError, dump_config, parse_config
from kmem.config.engram import PRESETS, EngramConfig
from tests.distributed.bank_case import bank_config
from tests.distributed.training_case import small_config


def config(engram, **others):
    return parse_config(small_config(model__engram=engram, **others))


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_left_out_comes_from_the_preset(preset):
    chosen = config({"preset": preset, "layers": [1], "heads": 3, "bias": None}).model.engram
    assert chosen.heads == 3
    assert {name: getattr(chosen, name) for name in PRESETS[preset] if name != "heads"} == {
        name: value for name, value in PRESETS[preset].items() if name != "heads"
    }


def test_a_resolved_configuration_is_complete_and_stays_what_it_is():
    resolved = config({"preset": "qwen", "layers": [1, 3], "rows_per_head": [11, 13]})
    tree = resolved.model_dump(mode="json")
    undecided = {name for name, value in tree["model"]["engram"].items() if value is None}
    assert undecided == {"pad_token_id", "seeding_ids", "conv_dilation"}
    assert parse_config(tree) == resolved
    assert "rows_per_head" in dump_config(resolved)


def test_presets_choose_fields_that_there_are():
    assert all(PRESETS[name].keys() <= EngramConfig.model_fields.keys() for name in PRESETS)


@pytest.mark.parametrize(
    ("engram", "message"),
    [
        ({}, "model.engram.layers: missing"),
        ({"layers": []}, "model.engram.layers: "),
        ({"layers": [4]}, "model.engram.layers=[4] is out of range for num_layers=4; layers count from 0"),
        ({"layers": [1, 1]}, "model.engram.layers=[1, 1] names one twice"),
        ({"layers": [1], "orders": [3, 2]}, "model.engram.orders=[3, 2] must ascend"),
        ({"layers": [1], "orders": [1]}, "model.engram.orders.0: "),
        ({"layers": [1], "preset": "demo"}, "model.engram.preset: "),
        ({"layers": [1], "rows_per_head": 2**60}, "model.engram.rows_per_head=1152921504606846976: the ids of all"),
        ({"layers": [1], "rows_per_head": [7]}, "model.engram.rows_per_head=[7] must have one entry for each of the 2"),
        ({"layers": [1], "seeding_ids": [1, 2]}, "model.engram.seeding_ids=[1, 2] must have one entry for each"),
        ({"layers": [1], "pad_token_id": 96}, "model.engram.pad_token_id=96 is no id of vocab_size=96"),
        ({"layers": [1], "boundry": "eos"}, "model.engram.boundry: unknown key; did you mean boundary?"),
    ],
)
def test_engram_errors_name_the_field(engram, message):
    with pytest.raises(ConfigError) as error:
        config(engram)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ({"staleness": 2}, "engram.staleness=2 exceeds prefetch_depth=1"),
        ({"optimizer": {"weight_decay": 0.1}}, "engram.optimizer.weight_decay=0.1 with lazy_adam"),
        ({"optimizer": {"name": "sinkhorn_momentum", "passes": 10}}, "engram.optimizer.passes=10: passes start and"),
        (
            {"store": "mmap", "optimizer": {"name": "sinkhorn_momentum"}},
            "engram.optimizer.name=sinkhorn_momentum with optimizer.dense=true passes over every row",
        ),
        ({"optimizer": {"stochastic_rounding": True}}, "engram.optimizer.stochastic_rounding=true is for dtype=bf16"),
        ({"store": "disk"}, "engram.store: "),
    ],
)
def test_table_errors_name_the_field(memory, message):
    with pytest.raises(ConfigError) as error:
        config({"layers": [1]}, engram=memory)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("bank", "message"),
    [
        ({"optimizer": {"name": "rowwise_adagrad"}}, "bank.optimizer.name=rowwise_adagrad has numbers that all values"),
        ({"optimizer": {"name": "sinkhorn_momentum"}}, "bank.optimizer.name=sinkhorn_momentum has numbers that"),
        (
            {"dtype": "bf16", "optimizer": {"stochastic_rounding": True}},
            "bank.optimizer.stochastic_rounding=true draws by a value's place in its row",
        ),
        ({"staleness": 2}, "bank.staleness=2 exceeds prefetch_depth=1"),
    ],
)
def test_bank_table_errors_name_the_field(bank, message):
    with pytest.raises(ConfigError) as error:
        config({"layers": [1]}, bank=bank)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__addresses": None}, "model.bank needs data.addresses, by which blocks are fetched; name the"),
        ({"checkpoint__asynchronous": True}, "checkpoint.asynchronous=true does not go with model.bank"),
        (
            {"model__bank__placement": "last", "model__bank__placed_layers": 9},
            "model.bank.placed_layers=9 exceeds num_layers=4",
        ),
        ({"model__bank__levels": [0, 0]}, "model.bank.levels=[0, 0] leaves every level without blocks"),
    ],
)
def test_what_does_not_go_with_a_bank_is_refused(changes, message):
    with pytest.raises(ConfigError) as error:
        parse_config(bank_config(**changes))
    assert str(error.value).startswith(message)


def test_blocks_have_a_rate_and_a_decay_of_their_own():
    settings = config({"layers": [1]}, bank={"optimizer": {"weight_decay": 1e-3}, "prefetch_depth": 3})
    assert (settings.bank.optimizer.name, settings.bank.optimizer.weight_decay) == ("lazy_adam", 1e-3)
    assert (settings.bank.optimizer.lr_multiplier, settings.engram.optimizer.lr_multiplier) == (1.0, 5.0)
    assert settings.prefetch_depth == 1  # there is no bank
    assert parse_config(bank_config(bank={"prefetch_depth": 3})).prefetch_depth == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint__asynchronous": True}, "checkpoint.asynchronous=true does not go with model.engram"),
        ({"data__document_attention": False}, "model.engram.boundary=document needs data.document_attention=true"),
        (
            {"model__hyper_connections__branches": 2, "model__moe__chain__iterations": 2},
            "model.hyper_connections.branches=2 does not go with moe.chain",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message):
    with pytest.raises(ConfigError) as error:
        config({"layers": [1], "boundary": "document"}, **changes)
    assert str(error.value).startswith(message)
