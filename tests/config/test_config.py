"""Configuration: files, includes, overrides, and errors that name the field."""

from pathlib import Path

import pytest
import yaml

from kmem.config import ConfigError, dump_config, load_config, packaged_configs, parse_config
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
    with pytest.raises(ConfigError, match=r"include goes in a circle through a.yaml -> b.yaml -> a.yaml"):
        load_config(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.moe.topk=1", "model.moe.topk: unknown key; did you mean top_k?"),
        ("model.attention.num_head=1", "model.attention.num_head: unknown key; did you mean num_heads?"),
        ("trian.steps=1", "trian: unknown key; did you mean train?"),
        ("data.sources.0.pth=x", "data.sources.0.pth: unknown key; did you mean path?"),
        ("train.steps=0", "train.steps: Input should be greater than 0 (got 0)"),
        ("train.steps=many", "train.steps: Input should be an integer"),
        ("train.steps=true", "train.steps: Input should be an integer (got True)"),
        ("train.steps='7'", "train.steps: Input should be an integer (got '7')"),
        ("train.steps=1.5", "train.steps: Input should be a valid integer"),
        ("train.optimizer.lr=true", "train.optimizer.lr: Input should be a number"),
        ("checkpoint.asynchronous=1", "checkpoint.asynchronous: Input should be true or false"),
        ("train.schedule.decay_steps=0", "train.schedule.decay_steps: Input should be greater than 0"),
        ("train.optimizer.lr=.nan", "train.optimizer.lr: "),
        ("train.precision=fp8", "train.precision: Input should be 'fp32' or 'bf16' (got 'fp8')"),
        ("model.attention.kind=linear", "model.attention: "),
        ("model.attention.num_heads=6", "model.attention.num_heads=6 does not divide hidden_size=32"),
        ("model.attention.num_kv_heads=3", "model.attention.num_kv_heads=3 does not divide num_heads=4"),
        ("model.moe.intermediate_size=30", "model.moe.intermediate_size=30 must be a multiple of 8"),
        ("model.moe.top_k=9", "model.moe.top_k=9 exceeds the 4 experts a token can reach"),
        ("model.moe.num_groups=3", "model.moe.num_groups=3 does not divide num_experts=4"),
        ("model.moe.first_dense_layers=9", "model.moe.first_dense_layers=9 is out of range for num_layers=4"),
        ("model.intermediate_size=null", "model.intermediate_size is needed"),
        ("parallel.expert=3", "parallel.expert=3 does not divide model.moe.num_experts=4"),
        ("parallel.pipeline=7", "parallel.pipeline=7 stages are more than"),
        ("parallel.tensor=2", "parallel.tensor: tensor parallelism is not built yet"),
        ("train.global_batch_size=7", "train.global_batch_size=7 is not divisible by micro_batch_size=2"),
        ("data.sequence_length=9999", "data.sequence_length=9999 exceeds model.max_position_embeddings=4096"),
        ("data.sources=[]", "data.sources: an empty list; give at least 1 entry"),
        ("data.sources=corpus", "data.sources: a list is expected (got 'corpus')"),
        ("data.sources=[corpus]", "data.sources.0: a section of fields is expected (got 'corpus')"),
        (
            "data.addresses.tree=t data.addresses.subtrees=[]",
            "data.addresses.subtrees: an empty list; give at least 1 entry, or leave it out",
        ),
        (
            "data.addresses.tree=t data.addresses.subtrees=3",
            "data.addresses.subtrees: a list is expected, as in [3] (got 3)",
        ),
        (
            "data.addresses.tree=t data.addresses.subtrees=[null]",
            "data.addresses.subtrees.0: text is expected (got null)",
        ),
        ("train.optimizer.betas=[]", "train.optimizer.betas: a list of 2 values is expected (got [])"),
        ("train.optimizer.betas=[0.9]", "train.optimizer.betas: a list of 2 values is expected (got [0.9])"),
        ("train.optimizer.betas=[0,0,0]", "train.optimizer.betas: a list of 2 values is expected (got [0, 0, 0])"),
        ("train.optimizer.betas=0.9", "train.optimizer.betas: a list of 2 values is expected (got 0.9)"),
        ("train.schedule.step_at=0.5", "train.schedule.step_at: a list is expected, as in [0.5] (got 0.5)"),
        ("train.schedule=null", "train.schedule: a section of fields is expected (got null)"),
        (
            "model.bank.levels=[2] model.bank.placed_layers=[a]",
            "model.bank.placed_layers.0: Input should be a",
        ),
        (
            "model.bank.levels=[2] model.bank.placed_layers=[]",
            "model.bank.placed_layers: an empty list; give at",
        ),
        (
            "model.bank.levels=[2] model.bank.placed_layers=0",
            "model.bank.placed_layers: Input should be greater",
        ),
        ("train.precision=bf16 parallel.zero_stage=0", "parallel.zero_stage=0 does not go with"),
        ("train.expert_backend=eager", "train.expert_backend: Input should be 'grouped_mm', 'loop', 'deepspeed' or"),
        (
            "model.moe=null train.expert_backend=loop",
            "train.expert_backend=loop needs a model with experts (model.moe)",
        ),
        ("name=a/b", "name: String should match pattern"),
        ("model", "--set model: expected path.of.field=value"),
        ("model.moe.top_k=[1", "--set model.moe.top_k: "),
    ],
)
def test_errors_begin_with_the_path_of_the_field(path, override, message):
    with pytest.raises(ConfigError) as error:
        load_config(path, override.split(" "))
    text = str(error.value)
    assert text.startswith(message)
    assert "\n" not in text, "one problem is one line"


def test_a_missing_section_is_named(path):
    tree = small_config()
    del tree["train"]["optimizer"]
    with pytest.raises(ConfigError, match=r"^train.optimizer: missing"):
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
    assert text.endswith(" kmem train --help lists the packaged ones")
    assert (near is None) == ("did you mean" not in text)
    assert near is None or f"did you mean {near.format(folder=path.parent)}" in text
    assert len(text.split(" or ")) <= 4, "few, not all"


@pytest.mark.parametrize(
    ("world", "changes", "message"),
    [
        (3, {"parallel__pipeline": 2}, "parallel.pipeline: 2 stages do not divide 3 ranks"),
        (3, {"parallel__expert": 2}, "parallel.expert: 2 does not divide the 3 data-parallel ranks"),
        (3, {}, "train.global_batch_size: 8 is not divisible by 6"),
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
