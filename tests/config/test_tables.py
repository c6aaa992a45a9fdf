"""Memory layers and their tables as a configuration describes them."""

import re

import pytest

from kmem.config import Config, ConfigError, ModelConfig, TableConfig, dump_config, parse_config
from kmem.config.engram import PRESETS, EngramConfig
from tests.distributed.bank_case import bank_config
from tests.distributed.training_case import small_config


def config(engram, /, **others):
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
    assert undecided == {"pad_token_id", "seeding_ids", "conv_dilation", "gate_norm_eps", "conv_norm_eps"}
    assert parse_config(tree) == resolved
    assert "rows_per_head" in dump_config(resolved)


def test_presets_choose_fields_that_there_are():
    assert all(PRESETS[name].keys() <= EngramConfig.model_fields.keys() for name in PRESETS)


@pytest.mark.parametrize(
    ("engram", "message"),
    [
        ({}, r"model\.engram\.layers: missing"),
        ({"layers": []}, r"model\.engram\.layers: .*empty"),
        ({"layers": [4]}, r"model\.engram\.layers=\[4\].*num_layers=4"),
        ({"layers": [1, 1]}, r"model\.engram\.layers=\[1, 1\].*twice"),
        ({"layers": [1], "orders": [3, 2]}, r"model\.engram\.orders=\[3, 2\].*ascend"),
        ({"layers": [1], "orders": [1]}, r"model\.engram\.orders\.0: "),
        ({"layers": [1], "preset": "demo"}, r"model\.engram\.preset: .*'demo'"),
        ({"layers": [1], "rows_per_head": 2**60}, r"model\.engram\.rows_per_head=1152921504606846976: "),
        ({"layers": [1], "rows_per_head": [7]}, r"model\.engram\.rows_per_head=\[7\].*\b2\b"),
        ({"layers": [1], "seeding_ids": [1, 2]}, r"model\.engram\.seeding_ids=\[1, 2\].*layers"),
        ({"layers": [1], "pad_token_id": 96}, r"model\.engram\.pad_token_id=96\b.*vocab_size=96"),
        ({"layers": [1], "boundry": "eos"}, r"model\.engram\.boundry: .*\bboundary\b"),
    ],
)
def test_engram_errors_name_the_field(engram, message):
    with pytest.raises(ConfigError) as error:
        config(engram)
    assert re.match(message, str(error.value))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ({"staleness": 2}, r"engram\.staleness=2\b.*prefetch_depth=1"),
        ({"optimizer": {"weight_decay": 0.1}}, r"engram\.optimizer\.weight_decay=0\.1 .*lazy_adam"),
        ({"optimizer": {"name": "sinkhorn_momentum", "passes": 10}}, r"engram\.optimizer\.passes=10: "),
        (
            {"store": "mmap", "optimizer": {"name": "sinkhorn_momentum"}},
            r"engram\.optimizer\.name=sinkhorn_momentum\b.*optimizer\.dense=true\b.*store=host",
        ),
        ({"optimizer": {"stochastic_rounding": True}}, r"engram\.optimizer\.stochastic_rounding=true\b.*dtype=bf16"),
        ({"store": "disk"}, r"engram\.store: .*'disk'"),
    ],
)
def test_table_errors_name_the_field(memory, message):
    with pytest.raises(ConfigError) as error:
        config({"layers": [1]}, engram=memory)
    assert re.match(message, str(error.value))


@pytest.mark.parametrize(
    ("bank", "message"),
    [
        ({"optimizer": {"name": "rowwise_adagrad"}}, r"bank\.optimizer\.name=rowwise_adagrad\b.*parallel\.pipeline\b"),
        (
            {"optimizer": {"name": "sinkhorn_momentum"}},
            r"bank\.optimizer\.name=sinkhorn_momentum\b.*parallel\.pipeline\b",
        ),
        (
            {"dtype": "bf16", "optimizer": {"stochastic_rounding": True}},
            r"bank\.optimizer\.stochastic_rounding=true\b.*parallel\.pipeline\b",
        ),
        ({"staleness": 2}, r"bank\.staleness=2\b.*prefetch_depth=1"),
    ],
)
def test_bank_table_errors_name_the_field(bank, message):
    with pytest.raises(ConfigError) as error:
        config({"layers": [1]}, bank=bank)
    assert re.match(message, str(error.value))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__addresses": None}, r"model\.bank .*data\.addresses\b"),
        ({"checkpoint__asynchronous": True}, r"checkpoint\.asynchronous=true\b.*model\.bank\b"),
        (
            {"model__bank__placement": "last", "model__bank__placed_layers": 9},
            r"model\.bank\.placed_layers=9\b.*num_layers=4",
        ),
        ({"model__bank__levels": [0, 0]}, r"model\.bank\.levels=\[0, 0\] "),
    ],
)
def test_what_does_not_go_with_a_bank_is_refused(changes, message):
    with pytest.raises(ConfigError) as error:
        parse_config(bank_config(**changes))
    assert re.match(message, str(error.value))


def test_blocks_have_a_rate_and_a_decay_of_their_own():
    settings = config({"layers": [1]}, bank={"optimizer": {"weight_decay": 1e-3}, "prefetch_depth": 3})
    assert (settings.bank.optimizer.name, settings.bank.optimizer.weight_decay) == ("lazy_adam", 1e-3)
    assert (settings.bank.optimizer.lr_multiplier, settings.engram.optimizer.lr_multiplier) == (1.0, 5.0)
    assert settings.prefetch_depth == 1  # there is no bank
    assert parse_config(bank_config(bank={"prefetch_depth": 3})).prefetch_depth == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint__asynchronous": True}, r"checkpoint\.asynchronous=true\b.*model\.engram\b"),
        ({"data__document_attention": False}, r"model\.engram\.boundary=document\b.*data\.document_attention=true"),
        (
            {"model__hyper_connections__branches": 2, "model__moe__chain__iterations": 2},
            r"model\.hyper_connections\.branches=2\b.*moe\.chain\b",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message):
    with pytest.raises(ConfigError) as error:
        config({"layers": [1], "boundary": "document"}, **changes)
    assert re.match(message, str(error.value))


def test_tables_of_a_memory_from_outside_the_package_count():
    class VectorModel(ModelConfig):
        vectors: bool | None = None

    class VectorRun(Config):
        model: VectorModel
        vectors: TableConfig = TableConfig()

    tree = small_config(model__vectors=True, vectors={"prefetch_depth": 3})
    assert VectorRun.model_validate(tree).prefetch_depth == 3
    assert VectorRun.model_validate(small_config(vectors={"prefetch_depth": 3})).tables == {}
    with pytest.raises(ValueError, match=r"checkpoint\.asynchronous=true\b.*model\.vectors\b"):
        VectorRun.model_validate({**tree, "checkpoint": {"asynchronous": True}})
