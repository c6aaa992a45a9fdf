"""Per-layer embeddings, in both forms."""

import re

import pytest
import torch
import torch.nn.functional as F

from kmem.checkpoint.commit import step_folder
from kmem.checkpoint.pieces import CheckpointError
from kmem.checkpoint.reader import CheckpointReader
from kmem.config import ModelConfig, parse_config
from kmem.model.decoder import Decoder
from kmem.model.hyper_connections import expand_branches
from kmem.model.memory_kind import OFF
from kmem.model.memory_kinds import KINDS
from kmem.model.parameter_counts import count_parameters
from kmem.model.per_layer_embeddings import GatedUpdate, StemFeedForward
from kmem.model.token_rows import TokenRows
from kmem.parallel.mesh import Mesh
from kmem.train.dry_run import print_dry_run, rank_bytes
from kmem.train.load_plan import plan_load
from tests.distributed.training_case import checkpoint_case, small_config
from tests.hf.loaded import SAME
from tests.hf.models import EXPERTS, GQA, MLA
from tests.memories.case import (
    MESHES,
    MemoryCase,
    check_evaluation,
    check_generation,
    check_logits,
    check_meshes,
    check_refusals,
    check_resume,
    check_round_trip,
    check_training,
    folder_of,
    hf_model,
    read_rows,
    wrong,
)
from tests.model import tiny

NAME = "per_layer_embeddings"
read = read_rows(NAME, lambda shape, ids, documents: ids[..., None])
CASES = {
    "gemma3n": MemoryCase(NAME, {"width": 8, "layers": [0, 2, 3], "init_std": 0.3}, read),
    "stem": MemoryCase(NAME, {"form": "stem", "layers": [0, 2], "init_std": 0.3}, read),
}
FORMS = pytest.mark.parametrize("form", CASES)


# Formulas


def gemma3n():
    """A text model of Transformers with layers that can be called."""
    from transformers.models.gemma3n import Gemma3nTextConfig, Gemma3nTextModel

    sizes = {"num_hidden_layers": 3, "hidden_size": 32, "hidden_size_per_layer_input": 8, "intermediate_size": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "laurel_rank": 4}
    vocabulary = {"vocab_size": 96, "vocab_size_per_layer_input": 96, "pad_token_id": 0}
    return Gemma3nTextModel(
        Gemma3nTextConfig(**sizes, **heads, **vocabulary, num_kv_shared_layers=0, activation_sparsity_pattern=[0.0] * 3)
    ).eval()


@torch.no_grad()
def test_the_update_is_gemma_3ns():
    """With Transformers' own modules, whose input embedding is multiplied by sqrt(hidden_size)."""
    model = tiny.randomise_(gemma3n(), seed=3)
    shape = tiny.shape(per_layer_embeddings={"width": 8})
    ids, hidden, embedding = tiny.tokens()[0], tiny.random(2, 24, 32), tiny.random(2, 24, 32, seed=4) / 50
    inputs = model.project_per_layer_inputs(embedding * 32**0.5, model.get_per_layer_inputs(ids))
    for number, layer in enumerate(model.layers):
        gated = layer.per_layer_projection(layer.act_fn(layer.per_layer_input_gate(hidden)) * inputs[:, :, number])
        expected = hidden + layer.post_per_layer_input_norm(gated)
        own, part = GatedUpdate(shape), slice(number * 8, number * 8 + 8)
        weights = {
            "context_proj.weight": model.per_layer_model_projection.weight[part],
            "context_norm.weight": model.per_layer_projection_norm.weight,
            "gate_proj.weight": layer.per_layer_input_gate.weight,
            "out_proj.weight": layer.per_layer_projection.weight,
            "out_norm.weight": layer.post_per_layer_input_norm.weight,
        }
        own.load_state_dict(weights)
        rows = TokenRows(model.embed_tokens_per_layer.weight[ids][..., None, part])
        torch.testing.assert_close(own.leave(hidden, embedding, rows), expected, rtol=1e-5, atol=1e-5)
        # Of branches, the mean is read, and each gets the update.
        branches = torch.stack([hidden + 1, hidden - 1], dim=2)
        wide = own.leave(branches, embedding, rows) - branches
        torch.testing.assert_close(wide, (expected - hidden)[:, :, None].expand_as(wide), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_feed_forward_is_stems():
    module = tiny.randomise_(StemFeedForward(tiny.shape(per_layer_embeddings={"form": "stem"})))
    x, table, ids = tiny.random(2, 24, 32), tiny.random(96, 48, seed=5), tiny.tokens()[0]
    gate, down = module.gate_proj.weight, module.down_proj.weight
    expected = (F.silu(x @ gate.T) * table[ids]) @ down.T
    torch.testing.assert_close(module.feed(x, None, TokenRows(table[ids][..., None, :])), expected)


@torch.no_grad()
@pytest.mark.parametrize("branches", [1, 2])
def test_every_update_reads_the_input_embedding(branches):
    """Layer by layer: a layer without memory, then the update."""
    streams = {"hyper_connections": {"branches": branches}} if branches > 1 else {}
    decoder = tiny.decoder(tiny.shape(per_layer_embeddings={"width": 8}, **streams))
    plain = Decoder(tiny.shape(**streams))
    plain.load_state_dict({name: tensor for name, tensor in decoder.state_dict().items() if NAME not in name})
    (ids, positions), rows = tiny.tokens(), [TokenRows(tiny.random(2, 24, 1, 8, seed=layer)) for layer in range(3)]
    embedding = decoder.embedding(ids)
    hidden = expand_branches(embedding, branches)
    for layer, memories, read in zip(plain.layers, decoder.layers, rows, strict=True):
        hidden = memories.memories[NAME].leave(layer(hidden, positions), embedding, read)
    found = decoder(ids, positions, memories={NAME: dict(enumerate(rows))})
    torch.testing.assert_close(decoder.logits(found), plain.logits(hidden))


@torch.no_grad()
@pytest.mark.parametrize("branches", [1, 2])
def test_a_model_without_it_is_what_it_was(branches):
    """Bit for bit: with no section, with an empty one, and where the memory is switched off."""
    streams = {"hyper_connections": {"branches": branches}} if branches > 1 else {}
    plain = tiny.config(moe=tiny.SOFTMAX, **streams)
    ids, positions = tiny.tokens()
    expected = tiny.decoder(plain)
    logits = expected.logits(expected(ids, positions))
    older = {name: value for name, value in plain.shape.as_dict().items() if name not in KINDS}
    same = tiny.decoder(type(plain.shape)(older))
    assert torch.equal(same.logits(same(ids, positions)), logits)
    banked = Decoder(tiny.shape(moe=tiny.SOFTMAX, per_layer_embeddings={"layers": [1]}, **streams))
    missing, _ = banked.load_state_dict(expected.state_dict(), strict=False)
    assert {name.split(".")[2] for name in missing} == {NAME}
    assert torch.equal(banked.logits(banked(ids, positions, memories={NAME: {1: OFF}})), logits)


@torch.no_grad()
def test_a_replaced_feed_forward_that_is_off_adds_nothing():
    shape = tiny.shape(moe=tiny.SOFTMAX, per_layer_embeddings={"form": "stem", "layers": [1]})
    decoder = tiny.decoder(shape)
    assert decoder.layers[1].feed_forward is None
    ids, positions = tiny.tokens()
    found = decoder(ids, positions, memories={NAME: {1: OFF}})
    rows = TokenRows(torch.zeros(*ids.shape, 1, shape.intermediate_size))
    assert torch.equal(found, decoder(ids, positions, memories={NAME: {1: rows}}))


# Training


@FORMS
def test_training(ranks, form, tmp_path):
    check_meshes(ranks, CASES[form], tmp_path)


@pytest.mark.full
@FORMS
def test_resume(ranks, form, tmp_path):
    check_resume(ranks, CASES[form], tmp_path)


@pytest.mark.full
@FORMS
@pytest.mark.parametrize("mesh", MESHES)
def test_other_meshes(ranks, form, mesh):
    world, changes = MESHES[mesh]
    check_training(ranks, CASES[form], world, **changes)


@pytest.mark.full
@FORMS
def test_every_layer_has_it_by_default(ranks, form):
    """With stem, no layer keeps its experts."""
    section = {**CASES[form].section, "layers": None}
    check_training(ranks, CASES[form], 2, **{f"model__{NAME}": section, "parallel__pipeline": 2})


def test_added_to_a_trained_model_it_changes_nothing_at_first(ranks, tmp_path):
    """And learns from then on, if the update begins with the scale 0."""
    section = {**CASES["gemma3n"].section, "output_scale": 0.0}
    plain, more = small_config(), small_config(**{f"model__{NAME}": section})
    (trained,) = ranks.run(1, checkpoint_case, plain, str(tmp_path), None, 2, 4)
    (added,) = ranks.run(1, checkpoint_case, more, str(tmp_path), 2, None, 4)
    assert added["losses"][2] == trained["losses"][2]
    assert added["losses"][3] != trained["losses"][3]
    reader = CheckpointReader(step_folder(tmp_path, 2))
    assert plan_load(reader.folder, reader.commit, parse_config(more), {}).drawn == {NAME}
    for change in ({"output_scale": 1.0}, {"form": "stem"}):
        config = parse_config(small_config(**{f"model__{NAME}": {**section, **change}}))
        with pytest.raises(CheckpointError, match=rf"^model\.{NAME}\b"):
            plan_load(reader.folder, reader.commit, config, {})


@FORMS
def test_what_a_resumed_run_may_change(folders, form):
    """Initial values."""
    folder = folders(form)

    def load(**changes):
        section = {**folder.run.config.model.model_dump()[NAME], **changes}
        model = ModelConfig.model_validate({**folder.run.config.model.model_dump(), NAME: section})
        return plan_load(
            folder.run.folder, folder.run.commit, folder.run.config.model_copy(update={"model": model}), {}
        )

    assert not load(output_scale=0.5, init_std=0.1).added
    with pytest.raises(CheckpointError, match=rf"^model\.{NAME}\.layers"):
        load(layers=[1])


# Folders of Hugging Face

MODELS = {
    "gemma3n": hf_model(CASES["gemma3n"], GQA, EXPERTS, **{NAME: {"width": 6, "layers": [2, 0]}}, tie_embeddings=True),
    "stem": hf_model(
        CASES["stem"], MLA, {**EXPERTS, "first_dense_layers": 1}, **{NAME: {"form": "stem", "layers": [0, 1]}}
    ),
    "gemma3n in branches": hf_model(
        CASES["gemma3n"], GQA, None, **{NAME: {"width": 6}}, hyper_connections={"branches": 2}
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folders(name) -> a model with random weights, its run and its export."""
    made = {}

    def make(name):
        if name not in made:
            case = CASES[name.partition(" ")[0]]
            made[name] = folder_of(case, tmp_path_factory.mktemp("folder"), MODELS[name])
        return made[name]

    return make


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full if "branches" in name else ()) for name in MODELS]
)
def test_transformers_compute_kmems_logits(name, folders):
    check_logits(folders(name))


@FORMS
def test_folders(form, folders, tmp_path):
    """Generation, what is refused, and the way back."""
    check_generation(folders(form), ["cache"])
    check_round_trip(folders(form), tmp_path / "back")
    check_refusals(folders(form))


@pytest.mark.full
@FORMS
def test_ways_to_generate(form, folders):
    check_generation(folders(form), list(SAME), ["assistant", "prompt lookup"])


@FORMS
def test_evaluated_controls(form, folders, corpus):
    check_evaluation(folders(form), corpus)


# Sizes, and what is refused


def test_sizes_of_gemma_3n(capsys):
    """Transformers' defaults for Gemma 3n, 35 layers: one table of 262,144 x 8,960 values there, one for each layer
    here."""
    attention = {"kind": "gqa", "num_heads": 8, "num_kv_heads": 2, "head_dim": 256}
    sizes = {"vocab_size": 262_144, "hidden_size": 2048, "num_layers": 35, "intermediate_size": 16_384}
    changes = {"model": {**sizes, "attention": attention, NAME: {"width": 256}}, f"{NAME}__dtype": "bf16"}
    config = parse_config(small_config(**changes, parallel__pipeline=2))
    counts = count_parameters(config.model.shape)
    assert counts.tables == counts.components[f"{NAME}_table"] == 262_144 * 8_960
    assert counts.components[NAME] == 35 * (3 * 2048 * 256 + 256 + 2048)
    assert KINDS[NAME].init_std(config.model.shape) == config.model.init_std
    plain = count_parameters(config.model.model_copy(update={NAME: None}).shape)
    assert counts.active - plain.active == counts.components[NAME] + 8_960
    stages = rank_bytes(config, Mesh(0, 2, 4, 1))
    tables = [table for stage in stages for table in stage.tables]
    assert [table.number for table in tables] == list(range(35))
    for table in tables:
        tokens = config.train.global_batch_size // 4 * config.data.sequence_length
        assert (table.rows, table.row_bytes, table.state_bytes) == (262_144 // 4, 2 * 256, 8 * 256)
        assert table.working_set == tokens * (2 * 4 * 256 + 8)
    assert sum(table.rows * table.row_bytes for table in tables) == 262_144 * 8_960 * 2 // 4
    assert sum(stage.parameters for stage in stages) == counts.anchor
    assert print_dry_run(config, 8, as_json=False) == 0
    assert f"{NAME} tables per rank" in capsys.readouterr().out


def test_sizes_of_stem():
    """A replaced feed-forward has neither up-projection nor experts."""
    experts = {"num_experts": 4, "top_k": 2, "intermediate_size": 32, "first_dense_layers": 1}
    plain = count_parameters(parse_config(small_config(model__moe=experts)).model.shape)
    config = parse_config(small_config(model__moe=experts, **{f"model__{NAME}": {"form": "stem", "layers": [0, 2]}}))
    counts = count_parameters(config.model.shape)
    assert counts.tables == 2 * 96 * 48
    assert counts.components[NAME] == 2 * 2 * 32 * 48
    assert counts.components["feed_forward"] == plain.components["feed_forward"] - 3 * 32 * 48 == 0
    assert counts.components["routed_experts"] == plain.components["routed_experts"] // 3 * 2
    (stage,) = rank_bytes(config, Mesh(0, 1, 1, 1))
    assert [(table.number, table.rows, table.row_bytes) for table in stage.tables] == [(0, 96, 192), (2, 96, 192)]
    assert stage.parameters == counts.anchor


STEM = {"form": "stem", "layers": [1, 2]}
WRONG = [
    ({NAME: {"layers": [0, 4]}}, r"per_layer_embeddings\.layers=\[0, 4\] .*\bnum_layers=4\b"),
    ({NAME: {"layers": [1, 1]}}, r"per_layer_embeddings\.layers=\[1, 1\]"),
    ({NAME: {"layers": []}}, r"per_layer_embeddings\.layers: "),
    ({NAME: {"layers": [-1]}}, r"per_layer_embeddings\.layers\.0: "),
    ({NAME: {"width": 0}}, r"per_layer_embeddings\.width: "),
    ({NAME: {"output_scale": -1.0}}, r"per_layer_embeddings\.output_scale: "),
    ({NAME: {"form": "gemma4"}}, r"per_layer_embeddings\.form: "),
    ({NAME: {"with": 3}}, r"per_layer_embeddings\.with: .*\bwidth\b"),
    (
        {NAME: STEM, "intermediate_size": None, "moe__first_dense_layers": 0},
        r"per_layer_embeddings\.form=stem .*\bintermediate_size\b",
    ),
    ({NAME: STEM, "bank": {"levels": [1]}}, r"bank\.kind=ffn .*\blayer 1\b.*\bper_layer_embeddings\b"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_wrong_configurations(changes, message):
    assert re.match(rf"model\.{message}", wrong(CASES["gemma3n"], {f"model__{key}": v for key, v in changes.items()}))


def test_two_memories_cannot_replace_one_feed_forward(monkeypatch):
    from kmem.config.over_encoding import OverEncodingConfig

    monkeypatch.setattr(OverEncodingConfig, "replaced_layers", lambda section, model: (3, 2))
    changes = {"model__over_encoding": {"rows": 100}, f"model__{NAME}": STEM}
    assert re.match(rf"model\.{NAME} and over_encoding .*\blayer 2\b", wrong(CASES["stem"], changes))
