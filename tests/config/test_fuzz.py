"""Configurations of any content: a Config or one clear error, never another error and never a hang."""

import contextlib
import copy
import time
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kmem.config import Config, ConfigError, load_config, parse_config
from tests.distributed.training_case import small_config

NUMBERS = st.one_of(
    st.integers(-3, 40), st.sampled_from([2**31, 2**63 - 1, 2**64, 10**30, -(2**70), 1e-300, 1e300, 0.5, float("nan")])
)
NAMES = st.sampled_from(
    ["auto", "gqa", "moe", "~", "..", "/", "\\0", "x" * 5000, "é\u202e", "${oc.env:HOME}", "1e3", ""]
)
LEAVES = st.one_of(NUMBERS, NAMES, st.booleans(), st.none())
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=3)),
    max_leaves=5,
)
EVERY = small_config(
    model__engram={"layers": [1], "preset": "deepseek", "rows_per_head": 61},
    model__bank={"children": 2, "levels": [2], "kind": "kv"},
    model__over_encoding={"rows": 61},
    model__per_layer_embeddings={"width": 8},
    model__product_key_memory={"layers": [0], "num_keys": 8, "key_dim": 16, "top_k": 2},
    model__hyper_connections={"branches": 2},
    data={"sources": [{"path": "text"}], "sequence_length": 32, "addresses": {"tree": "tree"}},
)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value, sections included."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


def neighbours(value: Any) -> list[Any]:
    """Values that a user might have meant instead."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 1, value * 2, value // 2, value / 2]
    return [value, None]


@st.composite
def changed(draw: Any) -> Any:
    """A configuration that uses every section, with some values replaced, added or removed."""
    tree = copy.deepcopy(EVERY)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(tree)[1:]))
        node = tree
        for key in path[:-1]:
            node = node[key]
        what = draw(st.sampled_from(["nudge", "nudge", "nudge", "replace", "replace", "remove", "add"]))
        if what == "nudge":
            node[path[-1]] = draw(st.sampled_from(neighbours(node[path[-1]])))
        elif what == "remove":
            del node[path[-1]]
        elif what == "add" and isinstance(node, dict):
            node[draw(NAMES)] = draw(VALUES)
        else:
            node[path[-1]] = draw(VALUES)
        if not tree:
            break
    return tree


def check(path: Any, content: str) -> None:
    path.write_text(content, encoding="utf-8")
    began = time.monotonic()
    with contextlib.suppress(ConfigError):
        assert isinstance(load_config(path), Config)
    assert time.monotonic() - began < 20


FAST = settings(
    max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
)


def test_the_configuration_that_is_changed_is_one():
    assert parse_config(EVERY).model.bank is not None


@FAST
@given(tree=changed())
def test_any_value_anywhere(tree, tmp_path_factory):
    check(tmp_path_factory.getbasetemp() / "fuzzed.yaml", yaml.safe_dump(tree, allow_unicode=True))


@pytest.mark.full
@settings(FAST, max_examples=5000)
@given(tree=changed())
def test_any_value_anywhere_at_length(tree, tmp_path_factory):
    check(tmp_path_factory.getbasetemp() / "fuzzed.yaml", yaml.safe_dump(tree, allow_unicode=True))


@FAST
@given(
    text=st.one_of(
        st.text(max_size=60), VALUES.map(yaml.safe_dump), VALUES.map(lambda base: yaml.safe_dump({"include": base}))
    )
)
def test_any_text(text, tmp_path_factory):
    with contextlib.suppress(UnicodeEncodeError):
        check(tmp_path_factory.getbasetemp() / "fuzzed.yaml", text)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"include": 5}, "include"),
        ({"include": [["quickstart"]]}, "include"),
        ({"include": "x" * 5000}, "no such file"),
        ({"include": "quickstart", "train": [1]}, "train|does not go with"),
        ({"name": "x" * 5000}, "^name: "),
        ({"data.seed": 2**64}, r"^data\.seed: .*64 bits"),
        ({"parallel.timeout_seconds": 2**62}, r"^parallel\.timeout_seconds: "),
        ({"model.num_layers": 10**9}, r"^model\.num_layers: "),
        ({"model.moe.num_experts": 10**9}, r"^model\.moe\.num_experts: "),
    ],
)
def test_values_that_hung_or_failed_are_named(tmp_path, changes, named):
    tree = small_config()
    for path, value in changes.items():
        *parents, leaf = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=named):
        load_config(tmp_path / "config.yaml")


def test_files_included_many_times_are_read_once(tmp_path):
    """Each includes the one before twice: 2^60 readings."""
    (tmp_path / "0.yaml").write_text(yaml.safe_dump(small_config()))
    for number in range(1, 61):
        (tmp_path / f"{number}.yaml").write_text(f"include: [{number - 1}.yaml, {number - 1}.yaml]")
    assert load_config(tmp_path / "60.yaml") == load_config(tmp_path / "0.yaml")
