"""Over-encoding."""

import re

import pytest
import torch
import torch.nn.functional as F

from kmem.checkpoint.pieces import CheckpointError
from kmem.config import parse_config
from kmem.model.memory_kind import OFF
from kmem.model.memory_kinds import KINDS
from kmem.model.over_encoding import NgramSums, OverEncoding
from kmem.model.parameter_counts import count_parameters
from kmem.model.token_rows import MISSING, TokenRows
from kmem.parallel.mesh import Mesh
from kmem.train.dry_run import print_dry_run, rank_bytes
from kmem.train.load_plan import plan_load
from tests.distributed.training_case import small_config, synthetic_sequences
from tests.hf.loaded import SAME
from tests.hf.models import EXPERTS, GQA, MLA, write_run
from tests.hf.models import model as plain_model
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

NAME = "over_encoding"


def sums(shape, ids, documents):
    """Row ids int64 [B, T, K] in exact integers; the tables of order 2 come first, and table t has `rows` + 2 t + 1
    rows."""
    section, found = shape.over_encoding, []
    for row, tokens in enumerate(ids.tolist()):
        found.append([])
        for place in range(len(tokens)):
            rows, first = [], 0
            for table in range((section.max_order - 1) * section.tables_per_order):
                size, number = section.rows + 2 * table + 1, 0
                for back in range(2 + table // section.tables_per_order):
                    if place >= back and (documents is None or documents[row, place - back] == documents[row, place]):
                        number += tokens[place - back] * shape.vocab_size**back
                rows.append(first + number % size)
                first += size
            found[-1].append(rows)
    return torch.tensor(found)


SECTION = {"max_order": 3, "tables_per_order": 2, "rows": 150, "init_std": 0.3}
CASE = MemoryCase(NAME, {**SECTION, "amplification": "norm"}, read_rows(NAME, sums))


# Addresses and formulas


@pytest.mark.parametrize("vocabulary", [96, 131_072])
def test_addresses_are_sums_of_powers_within_documents(vocabulary):
    """The rows of LongCat-2.0, and small ones."""
    for section in (SECTION, {"max_order": 5, "tables_per_order": 4, "rows": 16_476_897}):
        shape = tiny.shape(vocab_size=vocabulary, over_encoding=section)
        batch = synthetic_sequences([3, 5])
        ids = batch.input_ids * (vocabulary // 96)
        for documents in (None, batch.document_ids):
            assert torch.equal(NgramSums(shape).row_ids(0, ids, documents), sums(shape, ids, documents))


def test_documents_and_padding_end_the_look_back():
    """A document reads the same rows wherever it stands, also after padding."""
    addresses = NgramSums(tiny.shape(over_encoding=SECTION))
    first, second = (ids[None] for ids in torch.randint(96, (2, 7), generator=torch.Generator().manual_seed(1)))
    both, documents = torch.cat([first, second], 1), torch.tensor([[0] * 7 + [1] * 7])
    alone = addresses.row_ids(0, second)
    assert torch.equal(addresses.row_ids(0, both, documents)[:, 7:], alone)
    assert not torch.equal(addresses.row_ids(0, both)[:, 7:], alone)
    padded = addresses.row_ids(0, torch.cat([torch.full((1, 5), MISSING), second], 1))
    assert torch.equal(padded[:, 5:], alone)
    assert (padded[:, :5] == MISSING).all()


def test_shuffled_rows_are_other_rows_of_the_same_table():
    shape = tiny.shape(over_encoding=SECTION)
    sizes = [151, 153, 155, 157]
    first = torch.tensor([0, 151, 304, 459])
    rows = torch.stack([torch.arange(157) % size for size in sizes], -1) + first
    other = NgramSums(shape).other_rows(0, "shuffled")(rows)
    for table, size in enumerate(sizes):
        own, moved = ((found[:size, table] - first[table]).tolist() for found in (rows, other))
        assert sorted(moved) == own == list(range(size))
        assert not any(one == two for one, two in zip(own, moved, strict=True))


SCALES = {
    ("mean", "none"): 1 / 5,
    ("root", "none"): 5**-0.5,
    ("mean", "root"): 32**0.5 / 5,
    ("root", "root"): (32 / 5) ** 0.5,
}


@torch.no_grad()
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize(("normalization", "amplification"), [*SCALES, ("mean", "norm")])
def test_the_input_embedding_is_the_mean_of_all_tables(normalization, amplification, branches):
    choices = {"normalization": normalization, "amplification": amplification}
    shape = tiny.shape(over_encoding={**SECTION, **choices})
    module = tiny.randomise_(OverEncoding(shape))
    size = (2, 24, branches, 32) if branches > 1 else (2, 24, 32)
    hidden, rows = tiny.random(*size), tiny.random(2, 24, 4, 8, seed=5)
    matrices = module.proj.weight.split(8, dim=1)  # W_t, [hidden_size, hidden_size / 4] each
    added = sum(rows[:, :, table] @ matrix.T for table, matrix in enumerate(matrices))
    for read, total in (
        (TokenRows(rows), hidden + (added[:, :, None] if branches > 1 else added)),
        (OFF, hidden),
    ):
        if amplification == "norm":
            expected = F.rms_norm(total / 5, (32,), module.norm.weight, shape.norm_eps)
        else:
            expected = total * SCALES[normalization, amplification]
        torch.testing.assert_close(module.enter(hidden, read), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_off_keeps_the_scale():
    """A model whose rows are zeros is the model without them: only what rows hold is switched off."""
    shape = tiny.shape(over_encoding=SECTION)
    decoder, (ids, positions) = tiny.decoder(shape), tiny.tokens()
    off, zeros = (
        decoder(ids, positions, memories={NAME: {0: read}}) for read in (OFF, TokenRows(torch.zeros(*ids.shape, 4, 8)))
    )
    assert torch.equal(off, zeros)
    plain = tiny.decoder(tiny.shape())
    plain.load_state_dict({name: tensor for name, tensor in decoder.state_dict().items() if NAME not in name})
    plain.embedding.weight.mul_(1 / 5)
    torch.testing.assert_close(off, plain(ids, positions))


# Training


def test_training(ranks, tmp_path):
    check_meshes(ranks, CASE, tmp_path)


@pytest.mark.full
def test_resume(ranks, tmp_path):
    check_resume(ranks, CASE, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("mesh", MESHES)
def test_other_meshes(ranks, mesh):
    world, changes = MESHES[mesh]
    check_training(ranks, CASE, world, **changes)


@pytest.mark.full
def test_beside_per_layer_embeddings_and_an_engram(ranks):
    """Three memories, two of them in layer 0, on one rank and on four."""
    from tests.distributed.test_engram_meshes import merged
    from tests.distributed.training_case import train_case

    engram = {"layers": [0, 2], "heads": 2, "rows_per_head": 40, "row_dim": 8, "boundary": "document"}
    more = {"model__engram": engram, "model__per_layer_embeddings": {"width": 8}}
    one = ranks.run(1, train_case, CASE.config(**more), 5)
    four = ranks.run(4, train_case, CASE.config(**more, parallel__pipeline=2), 5)
    assert four[0]["losses"] == pytest.approx(one[0]["losses"], abs=1e-5)
    assert len(merged(one)) == 1 + 2 + 4
    for name, table in merged(one).items():
        torch.testing.assert_close(merged(four)[name], table, rtol=0, atol=1e-4)


def test_it_cannot_be_added_to_a_trained_model(tmp_path):
    reader = write_run(tmp_path / "run", plain_model(GQA, None))
    config = reader.config.model_copy(update={"model": hf_model(CASE, GQA, None)})
    with pytest.raises(CheckpointError, match=rf"^model\.{NAME}: .*\bscale\b"):
        plan_load(reader.folder, reader.commit, config, {})


# Folders of Hugging Face

MODELS = {
    "experts": hf_model(CASE, GQA, EXPERTS, tie_embeddings=True),
    "look-back of four": hf_model(CASE, MLA, None, **{NAME: {**SECTION, "max_order": 5, "tables_per_order": 1}}),
    "branches": hf_model(CASE, GQA, None, hyper_connections={"branches": 2}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folders(name) -> a model with random weights, its run and its export."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = folder_of(CASE, tmp_path_factory.mktemp("folder"), MODELS[name])
        return made[name]

    return make


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full if "branches" in name else ()) for name in MODELS]
)
def test_transformers_compute_kmems_logits(name, folders):
    check_logits(folders(name))


def test_folders(folders, tmp_path):
    """Generation, what is refused, and the way back."""
    check_generation(folders("look-back of four"), ["cache", "beams"], ["prompt lookup"])
    check_round_trip(folders("experts"), tmp_path / "back")
    check_refusals(folders("experts"))


@pytest.mark.full
@pytest.mark.parametrize("name", MODELS)
def test_ways_to_generate(name, folders):
    check_generation(folders(name), list(SAME), ["assistant", "prompt lookup"])


def test_evaluated_controls(folders, corpus):
    check_evaluation(folders("experts"), corpus)


@pytest.mark.parametrize(
    ("changes", "field"), [({"rows": 151}, "rows"), ({"max_order": 2, "tables_per_order": 4}, "max_order")]
)
def test_other_addresses_are_refused(changes, field, folders):
    run = folders("experts").run
    model = hf_model(CASE, GQA, EXPERTS, tie_embeddings=True, **{NAME: {**CASE.section, **changes}})
    with pytest.raises(CheckpointError, match=rf"^model\.{NAME}\.{field}: "):
        plan_load(run.folder, run.commit, run.config.model_copy(update={"model": model}), {})


# Sizes, and what is refused

PUBLISHED = {  # arXiv 2601.21204; hidden size, largest order, rows, billions of parameters
    "LongCat": (3072, 4, 78 * 131_072, "31.41"),
    "LongCat-2.0": (8192, 5, 16_476_897, "135.0"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name, capsys):
    hidden, order, rows, billions = PUBLISHED[name]
    attention = {"kind": "gqa", "num_heads": hidden // 128, "num_kv_heads": 8}
    sizes = {"vocab_size": 131_072, "hidden_size": hidden, "num_layers": 2, "intermediate_size": 1024}
    section = {"max_order": order, "tables_per_order": 4, "rows": rows}
    config = parse_config(small_config(model={**sizes, "attention": attention, NAME: section}))
    counts = count_parameters(config.model.shape)
    tables = (order - 1) * 4
    whole = sum(rows + 2 * table + 1 for table in range(tables))
    assert counts.tables == counts.components[f"{NAME}_table"] == whole * (hidden // tables)
    digits = len(billions.partition(".")[2])
    assert f"{counts.tables / 1e9:.{digits}f}" == billions
    assert counts.components[NAME] == hidden**2
    assert KINDS[NAME].init_std(config.model.shape) == config.model.init_std
    plain = count_parameters(config.model.model_copy(update={NAME: None}).shape)
    assert counts.active - plain.active == hidden**2 + hidden
    assert counts.layers[0] - plain.layers[0] == hidden**2
    assert counts.layers[1] == plain.layers[1]
    (stage,) = rank_bytes(config, Mesh(0, 1, 4, 1))
    (table,) = stage.tables
    width = hidden // tables
    look_ups = config.train.global_batch_size // 4 * config.data.sequence_length * tables
    assert (table.place, table.number, table.rows) == ("layer", 0, -(-whole // 4))
    assert (table.row_bytes, table.state_bytes) == (4 * width, 8 * width)
    assert table.working_set == look_ups * (2 * 4 * width + 8)
    assert stage.parameters == counts.anchor
    assert print_dry_run(config, 4, as_json=False) == 0
    assert f"{NAME} tables per rank" in capsys.readouterr().out


WRONG = [
    ({"max_order": 4}, r": 6 tables .*\bmax_order\b.*\btables_per_order\b.*\bhidden_size=32\b"),
    ({"max_order": 1}, r"\.max_order: "),
    ({"tables_per_order": 0}, r"\.tables_per_order: "),
    ({"rows": 0}, r"\.rows: "),
    ({"rows": 2**56}, r"\.rows=\d+: .*\b62 bits\b"),
    ({"rows": None}, r"\.rows: "),
    ({"normalization": "sum"}, r"\.normalization: "),
    ({"amplification": "layernorm"}, r"\.amplification: "),
    ({"init_std": -0.1}, r"\.init_std: "),
    ({"order": 3}, r"\.order: "),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_wrong_configurations(changes, message):
    said = wrong(CASE, {f"model__{NAME}": {**SECTION, **changes}})
    assert re.match(rf"model\.{NAME}{message}", said)


def test_controls_are_checked():
    assert KINDS[NAME].telling_controls(tiny.shape(over_encoding=SECTION)) == ("off", "shuffled")
    said = wrong(CASE, {f"model__{NAME}": None, "evaluation": {"controls": [f"{NAME}=off"]}})
    assert re.match(rf"evaluation\.controls.*\bmodel\.{NAME}\b", said)
