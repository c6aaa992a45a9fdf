"""What a run takes over from a checkpoint, from commit files alone: nothing is trained here."""

import re
from pathlib import Path

import pytest

from kmem.checkpoint.commit import Commit, Progress, StoredTensor
from kmem.checkpoint.manifest import REASONS
from kmem.checkpoint.pieces import CheckpointError
from kmem.config import parse_config
from kmem.model.memory_kinds import owner_of
from kmem.model.parameter_counts import tensor_shapes
from kmem.parallel.memory_kinds import kinds_of
from kmem.train.load_plan import TRAINED_ONLY, LoadPlan, plan_load, same_model
from tests.distributed.training_case import prepared, small_config

FOLDER = Path("/runs/first/checkpoints/step-00000002")
TREE = {"fingerprint": "a", "children": 3, "levels": 2, "unit": "document", "embedder": {"name": "tfidf"}}
ENGRAM = {
    "model__engram": {"layers": [1, 2], "heads": 2, "rows_per_head": 40, "row_dim": 8, "boundary": "document"},
    "engram__optimizer__name": "adam_catchup",
}
BANK = {
    "model__bank": {"children": 3, "levels": [5, 2], "generic": {"probability": 0.2}},
    "data__addresses": {"tree": "none"},
    "bank__optimizer__name": "lazy_adam",
}
BOTH = {**ENGRAM, **BANK}
MOMENTS = ("exp_avg", "exp_avg_sq")
ROW_STATE = {"engram": ("first_moment", "second_moment", "step"), "bank": ("first_moment", "updates", "step")}


def run(**changes):
    return parse_config(small_config(**changes))


def ready(config, tree=TREE):
    return prepared(config, tree)


def commit_of(config, moments=True, row_state=True, counted=True, tree=TREE):
    """The commit file of a checkpoint that a run of this configuration saves."""
    shapes = tensor_shapes(config.model.shape)
    names = [f"weight/{name}" for name in shapes]
    for name in shapes:
        kind = owner_of(name)
        table = kind is not None and name.split(".")[-1].startswith(("table", "level"))
        if table:
            arrays = ROW_STATE[kind] if row_state else ()
            names += [f"{array}/{name}" for array in arrays if counted or array != "updates"]
        elif moments:
            names += [f"{moment}/{name}" for moment in MOMENTS]
    manifests = {kind.name: kind.manifest(ready(config, tree)[kind.name]) for kind in kinds_of(config.model.shape)}
    stored = {name: StoredTensor("F32", 1, [(0, 1, "file")]) for name in names}
    return Commit(Progress(2, 16, 512, 2), config.model_dump(mode="json"), shapes, stored, {}, manifests)


def plan(wanted, commit, tree=TREE, **arguments):
    return plan_load(FOLDER, commit, wanted, ready(wanted, tree), **arguments)


def tables(commit, kind):
    """Names of the rows of a kind of memory."""
    return sorted(
        {name.partition("/")[2] for name in commit.tensors if name.startswith("step/") and f".{kind}." in name}
    )


def loaded(plan, commit):
    return {name for name in commit.tensors if plan.loads(name)}


@pytest.mark.parametrize("changes", [{}, ENGRAM, BANK, BOTH], ids=["plain", "engram", "bank", "both"])
def test_a_run_goes_on_with_all_that_it_saved(changes):
    config = run(**changes)
    commit = commit_of(config)
    assert len(tables(commit, "engram")) == (2 if "model__engram" in changes else 0)
    assert len(tables(commit, "bank")) == (8 if "model__bank" in changes else 0)
    found = plan(config, commit)
    assert (found.added, found.drawn, found.weights_only, found.moments) == (frozenset(), frozenset(), False, True)
    assert found.row_state == bool(changes)
    assert loaded(found, commit) == set(commit.tensors)
    assert not any(found.counts_updates(name) for name in commit.tensors)


def test_weights_alone_are_all_weights_and_no_state():
    config = run(**BOTH)
    commit = commit_of(config)
    found = plan(config, commit, weights_only=True)
    assert loaded(found, commit) == {name for name in commit.tensors if name.startswith("weight/")}
    assert (found.row_state, found.moments, found.weights_only) == (False, False, True)


def test_a_checkpoint_without_moments_leaves_the_optimizer_as_new():
    """As `kmem import` writes."""
    config = run()
    found = plan(config, commit_of(config, moments=False))
    assert not found.moments
    assert not found.loads("exp_avg/norm.weight")
    assert found.loads("weight/norm.weight")


def test_rows_that_were_frozen_have_no_state():
    """Of some tables or of all; the rows themselves are loaded."""
    config = run(**BOTH)
    stateless = commit_of(config, row_state=False)
    found = plan(config, stateless)
    assert not found.row_state
    assert found.moments
    whole = commit_of(config)
    for name in tables(whole, "engram"):
        for array in ROW_STATE["engram"]:
            del whole.tensors[f"{array}/{name}"]
    some = plan(config, whole)
    assert some.row_state
    for name in tables(commit_of(config), "engram"):
        assert some.loads(f"weight/{name}")
        assert not some.loads(f"first_moment/{name}")
        assert not some.loads(f"step/{name}")
    assert all(some.loads(f"first_moment/{name}") for name in tables(whole, "bank"))


def test_updates_are_counted_for_rows_that_have_state_and_no_counts():
    config = run(**BANK)
    old, new = commit_of(config, counted=False), commit_of(config)
    for name in tables(new, "bank"):
        count = f"updates/{name}"
        assert plan(config, old).counts_updates(count)
        assert not plan(config, old).loads(count)
        assert not plan(config, new).counts_updates(count)
        assert plan(config, new).loads(count)
        assert not plan(config, old, weights_only=True).counts_updates(count)
        assert not plan(config, commit_of(config, row_state=False)).counts_updates(count)
        assert not plan(config, old).counts_updates(f"first_moment/{name}")
    assert not plan(run(**BANK), commit_of(run())).counts_updates(f"updates/{tables(new, 'bank')[0]}")  # added rows


def test_an_added_engram_begins_with_zeros_and_a_new_optimizer():
    added = {**ENGRAM, "model__engram__init_std": 0.0}
    commit = commit_of(run())
    found = plan(run(**added), commit)
    assert (found.added, found.drawn) == ({"engram"}, frozenset())
    assert not found.moments
    wanted = commit_of(run(**added)).tensors
    for name in wanted:
        array, _, tensor = name.partition("/")
        assert found.loads(name) == (array == "weight" and owner_of(tensor) is None)


def test_an_added_bank_is_drawn_and_leaves_the_optimizer_alone():
    commit = commit_of(run())
    found = plan(run(**BANK), commit)
    assert (found.added, found.drawn, found.moments) == ({"bank"}, {"bank"}, True)
    wanted = commit_of(run(**BANK)).tensors
    assert {name for name in wanted if found.loads(name)} == set(commit.tensors)


def test_state_of_the_rows_that_were_there_is_kept_beside_an_added_memory():
    commit = commit_of(run(**ENGRAM))
    found = plan(run(**BOTH), commit)
    assert (found.added, found.row_state, found.moments) == ({"bank"}, True, True)
    assert loaded(found, commit) == set(commit.tensors)


def test_a_frozen_anchor_has_no_optimizer_and_may_be_trained_again():
    trained, frozen = run(**BANK), run(**{**BANK, "model__bank__anchor": "frozen"})
    there = plan(frozen, commit_of(trained))
    assert (there.moments, there.row_state) == (False, True)
    assert not there.loads("exp_avg/norm.weight")
    back = plan(trained, commit_of(frozen, moments=False))
    assert (back.moments, back.row_state) == (False, True)


REFUSED = [
    ({}, {"model__moe__top_k": 1}, r"^model\.moe\.top_k: 1\b.*\b2\b"),
    ({}, {"model__vocab_size": 100}, r"^model\.vocab_size: 100\b.*\b96\b"),
    ({}, {"model__num_layers": 5}, r"^model\.num_layers: 5\b.*\b4\b"),
    ({}, {"model__moe": None, "model__intermediate_size": 48}, r"^model\.moe: None "),
    ({}, ENGRAM, rf"^model\.engram\.init_std: 0\.02\b.*{FOLDER}.*\b0\b"),
    (ENGRAM, {"model__engram__rows_per_head": 80}, rf"^model\.engram: .*\bsizes .*{REASONS['sizes']}"),
    (ENGRAM, {"model__engram__seed": 1}, r"^model\.engram: .*\bmultipliers .*Correct model\.engram\b"),
    (ENGRAM, {"model__engram__boundary": "none"}, r"^model\.engram: .*\bboundary .*\bnone .*\bdocument "),
    (ENGRAM, {"model__engram__compression": False}, r"^model\.engram: .*\bcompression_digest .*\bNone "),
    (ENGRAM, {"model__engram__pad_token_id": 7}, r"^model\.engram: .*\bpad_id .*\b3 .*\b0 "),
    (ENGRAM, {"model__engram": None}, rf"^{FOLDER} .*\bmodel\.engram\b.*null"),
    (ENGRAM, {"model__engram__conv_kernel": 0}, r"^model\.engram\.conv_kernel: 0 .*\b4 "),
    (ENGRAM, {"engram__optimizer__name": "lazy_adam"}, r"^engram\.optimizer\.name: 'lazy_adam' .*'adam_catchup'"),
    (ENGRAM, {"engram__dtype": "bf16"}, r"^engram\.dtype: 'bf16' .*'fp32'.*checkpoint\.start\b"),
    (BANK, {"model__bank__levels": [5, 1]}, r"^model\.bank\.levels: .*5, 1\b.*5, 2\b"),
    (BANK, {"model__bank__kind": "kv"}, r"^model\.bank\.kind: 'kv' .*'ffn'"),
    (BANK, {"model__bank__generic": {}}, r"^model\.bank\.generic\.probability: 0 "),
    (BANK, {"model__bank": None}, rf"^{FOLDER} .*\bmodel\.bank\b.*null"),
    (BANK, {"bank__optimizer__name": "adam_catchup"}, r"^bank\.optimizer\.name: 'adam_catchup' .*'lazy_adam'"),
    (BANK, {"bank__dtype": "bf16"}, r"^bank\.dtype: 'bf16' .*'fp32'.*checkpoint\.start\b"),
]


@pytest.mark.parametrize(("base", "changes", "message"), REFUSED)
def test_what_does_not_fit_is_refused_by_its_field(base, changes, message):
    with pytest.raises(CheckpointError, match=message):
        plan(run(**{**base, **changes}), commit_of(run(**base)))


@pytest.mark.parametrize("section", [ENGRAM, BANK], ids=["engram", "bank"])
@pytest.mark.parametrize("field", ["dtype", "optimizer__name"])
def test_rows_whose_state_is_not_loaded_fit_any_optimizer_and_type(section, field):
    """With the weights alone, and where they were frozen."""
    kind = "engram" if section is ENGRAM else "bank"
    other = {"dtype": "bf16", "optimizer__name": "lazy_adam" if kind == "engram" else "adam_catchup"}[field]
    wanted = run(**{**section, f"{kind}__{field}": other})
    with pytest.raises(CheckpointError, match=rf"^{kind}\.{field.replace('__', '.')}: "):
        plan(wanted, commit_of(run(**section)))
    plan(wanted, commit_of(run(**section)), weights_only=True)
    plan(wanted, commit_of(run(**section), row_state=False))


def test_the_dense_form_counts_where_an_optimizer_has_one():
    sinkhorn = {**ENGRAM, "engram__optimizer__name": "sinkhorn_momentum"}
    sparse = {"engram__optimizer__dense": False}
    with pytest.raises(CheckpointError, match=r"^engram\.optimizer\.dense: False .*True "):
        plan(run(**sinkhorn, **sparse), commit_of(run(**sinkhorn)))
    plan(run(**ENGRAM, **sparse), commit_of(run(**ENGRAM)))


def test_fields_that_only_shape_training_may_change():
    wanted = run(**BANK, model__init_std=0.3, model__moe__bias_update_rate=0.5, model__moe__z_loss=0.0)
    plan(wanted, commit_of(run(**BANK)))
    plan(run(**{**BANK, "model__bank__generic": {"probability": 0.9, "per": "batch"}}), commit_of(run(**BANK)))


def test_another_tree_than_the_checkpoints_is_refused():
    other = {**TREE, "fingerprint": "b", "embedder": {"name": "minilm"}}
    config = run(**BANK)
    message = rf"^data\.addresses\.tree: .*\bembedder .*'minilm'.*{REASONS['embedder']}"
    with pytest.raises(CheckpointError, match=message):
        plan(config, commit_of(config), tree=other)
    unknown = commit_of(config)
    unknown.manifests.clear()  # of an older checkpoint
    plan(config, unknown, tree=other)


SUBTREE = {"tree": "none", "batching": "leaf", "subtrees": ["1"]}


def test_blocks_that_a_checkpoint_lacks_or_would_lose_are_refused():
    part = {**BANK, "bank__hold": "subtrees", "data__addresses": SUBTREE}
    with pytest.raises(CheckpointError, match=r"^bank\.hold: .*/step-00000002 .*\bsubtrees 1\b.*bank merge"):
        plan(run(**BANK), commit_of(run(**part)))
    with pytest.raises(CheckpointError, match=r"^bank\.hold: .*more blocks.*checkpoint\.resume or checkpoint\.start"):
        plan(run(**part), commit_of(run(**BANK)), own_run=True)
    plan(run(**part), commit_of(run(**BANK)), own_run=False)
    plan(run(**part), commit_of(run(**part)), own_run=True)


@pytest.mark.parametrize("missing", ["norm.weight", "layers.1.engram.table", "layers.0.bank.level2"])
def test_a_missing_tensor_is_named(missing):
    config = run(**BOTH)
    commit = commit_of(config)
    del commit.shapes[missing]
    with pytest.raises(CheckpointError, match=rf"^{re.escape(missing)} is not in {FOLDER}; leave it out$"):
        plan(config, commit, hint="leave it out")


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        ({}, {"model__moe__top_k": 1}),
        (ENGRAM, {"model__engram": None}),
        (ENGRAM, {"model__engram__seed": 1}),
    ],
)
def test_a_refusal_ends_with_what_to_do_for_another_model(base, changes):
    with pytest.raises(CheckpointError, match=r"\bthe remedy$"):
        plan(run(**{**base, **changes}), commit_of(run(**base)), hint="the remedy")


def test_models_agree_in_all_fields_but_those_of_training():
    model = {"a": 1, "b": {"c": [1, 2], "d": None}}
    same_model(FOLDER, model, {"a": 1, "b": {"c": [1, 2], "d": None}}, "model", "")
    for field in TRAINED_ONLY:
        same_model(FOLDER, {**model, field: 1}, {**model, field: 2}, "model", "")
        same_model(FOLDER, model, {"a": 1, "b": {**model["b"], field: 2}}, "model", "")
    same_model(FOLDER, {"a": 1}, {"a": 1, "new": None}, "model", "")  # a field that came later, and is not used
    for other, field in [
        ({**model, "a": 2}, "model.a: 2"),
        ({**model, "b": {"c": [2, 1], "d": None}}, "model.b.c: [2, 1]"),
        ({**model, "b": None}, "model.b: None"),
        ({"a": 1}, "model.b: None"),
        ({**model, "new": 5}, "model.new: 5"),
    ]:
        with pytest.raises(CheckpointError, match=rf"^{re.escape(field)} in the configuration, .*{FOLDER}; .*hint$"):
            same_model(FOLDER, model, other, "model", "hint")


def test_a_tensor_of_an_added_kind_is_never_loaded():
    found = LoadPlan(
        frozenset({"bank"}),
        frozenset(),
        False,
        True,
        MOMENTS,
        {"step/layers.0.bank.level1", "step/layers.1.engram.table"},
    )
    for array in ("weight", "exp_avg", "first_moment", "step"):
        assert not found.loads(f"{array}/layers.0.bank.level1")
        assert found.loads(f"{array}/layers.1.engram.table")
