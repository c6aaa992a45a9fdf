"""Configuration: files, includes, overrides, and errors that name the field."""

import re
from pathlib import Path

import pytest
import yaml

from kmem.config import ConfigError, dump_config, load_config, packaged_configs, parse_config, with_vocab_size
from kmem.config.reference import reference
from tests.distributed.training_case import small_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(small_config()))
    return file


def test_every_packaged_config_loads_and_round_trips():
    names = packaged_configs()
    assert "quickstart" in names
    for name in names:
        config = load_config(name)
        assert parse_config(yaml.safe_load(dump_config(config))) == config


def test_overrides_win_and_are_yaml(path):
    config = load_config(
        path,
        ["model.moe.top_k=3", "train.optimizer.clip_norm=null", "data.sources.0.path=other", "train.optimizer.lr=1e-3"],
    )
    assert config.model.moe.top_k == 3
    assert config.train.optimizer.clip_norm is None
    assert config.data.sources[0].path == "other"
    assert config.train.optimizer.lr == 1e-3


def test_include_reads_the_base_first(path, tmp_path):
    (tmp_path / "child.yaml").write_text("include: run.yaml\nname: child\ntrain: {steps: 3}\n")
    config = load_config(tmp_path / "child.yaml")
    assert (config.name, config.train.steps, config.train.micro_batch_size) == ("child", 3, 2)
    (tmp_path / "packaged.yaml").write_text("include: quickstart\nname: mine\n")
    assert load_config(tmp_path / "packaged.yaml").model == load_config("quickstart").model
    (tmp_path / "a.yaml").write_text("include: b.yaml\n")
    (tmp_path / "b.yaml").write_text("include: a.yaml\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: include .*a\.yaml -> b\.yaml -> a\.yaml"):
        load_config(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.moe.topk=1", r"model\.moe\.topk: .*\btop_k\b"),
        ("model.attention.num_head=1", r"model\.attention\.num_head: .*\bnum_heads\b"),
        ("trian.steps=1", r"trian: .*\btrain\b"),
        ("data.sources.0.pth=x", r"data\.sources\.0\.pth: .*\bpath\b"),
        ("train.steps=0", r"train\.steps: .*\bgot 0\b"),
        ("train.steps=many", r"train\.steps: .*integer.*'many'"),
        ("train.steps=true", r"train\.steps: .*integer.*True"),
        ("train.steps='7'", r"train\.steps: .*integer.*'7'"),
        ("train.steps=1.5", r"train\.steps: .*integer.*1\.5"),
        ("train.optimizer.lr=true", r"train\.optimizer\.lr: .*number.*True"),
        ("checkpoint.asynchronous=1", r"checkpoint\.asynchronous: .*true or false.*1"),
        ("train.schedule.decay_steps=0", r"train\.schedule\.decay_steps: .*\bgot 0\b"),
        ("train.optimizer.lr=.nan", r"train\.optimizer\.lr: .*nan"),
        ("train.precision=fp8", r"train\.precision: .*'fp32' or 'bf16'.*'fp8'"),
        ("model.attention.kind=linear", r"model\.attention: .*'linear'.*'kind'"),
        ("model.attention.num_heads=6", r"model\.attention\.num_heads=6\b.*hidden_size=32"),
        ("model.attention.num_kv_heads=3", r"model\.attention\.num_kv_heads=3\b.*num_heads=4"),
        ("model.moe.intermediate_size=30", r"model\.moe\.intermediate_size=30\b.*\b8\b"),
        ("model.moe.top_k=9", r"model\.moe\.top_k=9\b.*\b4 experts"),
        ("model.moe.num_groups=3", r"model\.moe\.num_groups=3\b.*num_experts=4"),
        ("model.moe.first_dense_layers=9", r"model\.moe\.first_dense_layers=9\b.*num_layers=4"),
        ("model.intermediate_size=null", r"model\.intermediate_size .*\b1 layer"),
        ("parallel.expert=3", r"parallel\.expert=3\b.*model\.moe\.num_experts=4"),
        ("parallel.pipeline=7", r"parallel\.pipeline=7\b.*\b4 layers"),
        ("parallel.tensor=2", r"parallel\.tensor: .*\bgot 2\b"),
        ("train.global_batch_size=7", r"train\.global_batch_size=7\b.*micro_batch_size=2"),
        ("data.sequence_length=9999", r"data\.sequence_length=9999\b.*model\.max_position_embeddings=4096"),
        ("data.sources=[]", r"data\.sources: .*empty.*\b1\b"),
        ("data.sources=corpus", r"data\.sources: .*list.*'corpus'"),
        ("data.sources=[corpus]", r"data\.sources\.0: .*section.*'corpus'"),
        ("data.addresses.tree=t data.addresses.subtrees=[]", r"data\.addresses\.subtrees: .*empty.*\b1\b"),
        ("data.addresses.tree=t data.addresses.subtrees=3", r"data\.addresses\.subtrees: .*\[3\].*\bgot 3\b"),
        ("data.addresses.tree=t data.addresses.subtrees=[null]", r"data\.addresses\.subtrees\.0: .*text.*null"),
        ("train.optimizer.betas=[]", r"train\.optimizer\.betas: .*\b2 values.*\[\]"),
        ("train.optimizer.betas=[0.9]", r"train\.optimizer\.betas: .*\b2 values.*\[0\.9\]"),
        ("train.optimizer.betas=[0,0,0]", r"train\.optimizer\.betas: .*\b2 values.*\[0, 0, 0\]"),
        ("train.optimizer.betas=0.9", r"train\.optimizer\.betas: .*\b2 values.*\bgot 0\.9\b"),
        ("train.schedule.step_at=0.5", r"train\.schedule\.step_at: .*\[0\.5\].*\bgot 0\.5\b"),
        ("train.schedule=null", r"train\.schedule: .*section.*null"),
        ("model.bank.levels=[2] model.bank.placed_layers=[a]", r"model\.bank\.placed_layers\.0: .*'a'"),
        ("model.bank.levels=[2] model.bank.placed_layers=[]", r"model\.bank\.placed_layers: .*empty.*\b1\b"),
        ("model.bank.levels=[2] model.bank.placed_layers=0", r"model\.bank\.placed_layers: .*\bgot 0\b"),
        ("train.precision=bf16 parallel.zero_stage=0", r"parallel\.zero_stage=0\b.*train\.precision=bf16"),
        ("train.expert_backend=eager", r"train\.expert_backend: .*'grouped_mm', 'loop', 'deepspeed' or.*'eager'"),
        ("model.moe=null train.expert_backend=loop", r"train\.expert_backend=loop\b.*model\.moe\b"),
        ("name=a/b", r"name: .*'a/b'"),
        ("model", r"--set model: .*path\.of\.field=value"),
        ("model.moe.top_k=[1", r"--set model\.moe\.top_k: "),
    ],
)
def test_errors_begin_with_the_path_of_the_field(path, override, message):
    with pytest.raises(ConfigError) as error:
        load_config(path, override.split(" "))
    text = str(error.value)
    assert re.match(message, text)
    assert "\n" not in text, "one problem is one line"


def test_a_vocabulary_of_the_size_of_the_tokenizer():
    section = {"layers": [1], "heads": 2, "rows_per_head": 50, "row_dim": 8, "pad_token_id": 300}
    config = parse_config(small_config(model__vocab_size=None, model__engram=section))
    with pytest.raises(ConfigError, match=r"model\.vocab_size: null"):
        _ = config.model.shape
    assert with_vocab_size(config, 400) == parse_config(small_config(model__vocab_size=400, model__engram=section))
    assert with_vocab_size(with_vocab_size(config, 400), 500).model.vocab_size == 400
    with pytest.raises(ConfigError, match=r"model\.engram\.pad_token_id=300\b.*vocab_size=300\b"):
        with_vocab_size(config, 300)


def test_a_missing_section_is_named(path):
    tree = small_config()
    del tree["train"]["optimizer"]
    with pytest.raises(ConfigError, match=r"^train\.optimizer: missing"):
        parse_config(tree)


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2", "\x00"])
def test_unreadable_files_are_named(tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_config(tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("quikstart", "quickstart or"),
        ("quickstart-bnak.yaml", "quickstart-bank or"),
        ("160m-frzen", "bank/160m-frozen?"),
        ("{folder}/rnu.yaml", "{folder}/run.yaml?"),
        ("nothing-like-it.yaml", None),
    ],
)
def test_a_config_that_is_not_there_is_answered_with_names_like_it(path, name, near):
    with pytest.raises(ConfigError) as error:
        load_config(name.format(folder=path.parent))
    text = str(error.value)
    assert "kmem train --help" in text
    assert (near is None) == ("?" not in text)
    assert near is None or f" {near.format(folder=path.parent)}" in text
    assert len(text.split(" or ")) <= 4, "few, not all"


@pytest.mark.parametrize(
    ("world", "changes", "message"),
    [
        (3, {"parallel__pipeline": 2}, r"parallel\.pipeline: 2 .*\b3 ranks"),
        (3, {"parallel__expert": 2}, r"parallel\.expert: 2 .*\b3 data-parallel ranks"),
        (3, {}, r"train\.global_batch_size: 8 .*\b6\b"),
    ],
)
def test_the_world_must_fit(world, changes, message):
    with pytest.raises(ConfigError, match="^" + message):
        parse_config(small_config(**changes)).data_parallel_size(world)


def test_reference_is_true():
    """docs/configuration.md is what the docstrings say, and every field has one."""
    assert (ROOT / "docs" / "configuration.md").read_text() == reference(), (
        "run: python -m kmem.config.reference > docs/configuration.md"
    )
    for line in reference().splitlines():
        if line.startswith("| `"):
            assert not line.endswith("|  |"), f"no docstring: {line}"
