"""Which chains of experts cannot be, and what a chain counts."""

import re

import pytest
import yaml

from kmem.config import ConfigError, parse_config
from kmem.model.parameter_counts import count_parameters
from tests.distributed.training_case import small_config


def chain(changes, **others):
    return parse_config(small_config(model__moe__chain=changes, **others))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, r"model\.moe\.chain\.iterations: missing"),
        ({"iterations": 0}, r"model\.moe\.chain\.iterations: .*got 0"),
        ({"iterations": 2, "gate": "shared"}, r"model\.moe\.chain\.gate: .*\bgates\b"),
        ({"iterations": 2, "residual": "both"}, r"model\.moe\.chain\.residual: .*'both'"),
        (
            {"iterations": 2, "residual": "inner_outer"},
            r"model\.moe\.chain\.residual=inner_outer\b.*stream=prenorm",
        ),
        ({"iterations": 1, "retrofit_scale": True}, r"model\.moe\.chain\.retrofit_scale=true\b.*iterations=1"),
        (
            {"iterations": 2, "retrofit_scale": True, "residual": "init"},
            r"model\.moe\.chain\.retrofit_scale=true\b.*residual=init\b.*stream=prenorm",
        ),
        (
            {"iterations": 2, "retrofit_scale": True, "residual": "none"},
            r"model\.moe\.chain\.retrofit_scale=true\b.*residual=none\b.*stream=prenorm",
        ),
        (
            {"iterations": 2, "retrofit_scale": True, "stream": "normed"},
            r"model\.moe\.chain\.retrofit_scale=true\b.*residual=inner\b.*stream=normed",
        ),
    ],
)
def test_errors_name_the_field(section, message):
    with pytest.raises(ConfigError) as error:
        chain(section)
    assert re.match(message, str(error.value))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "choice", ["chain.shared_experts=once", "shared_intermediate_size=8", "shared_expert_gate=true"]
)
def test_choices_of_shared_experts_that_are_not_there_are_refused(choice):
    path, _, value = choice.partition("=")
    moe = {"num_shared_experts": 0, "chain.iterations": 1, path: yaml.safe_load(value)}
    with pytest.raises(ConfigError, match=rf"^model\.moe\.{choice}\b.*num_shared_experts"):
        chain({}, **{f"model__moe__{name.replace('.', '__')}": value for name, value in moe.items()})


MATRICES = 3 * 32 * 32
"""Of one expert, routed or shared, in the small model of 3 MoE layers with 4 experts and top-2."""


@pytest.mark.parametrize(
    ("section", "visited", "multiplied", "extra"),
    [
        ({"iterations": 1}, 2, 2 + 1, 0),
        ({"iterations": 2}, 4, 4 + 2, 4 * 32 + 32),  # a second router and norm
        ({"iterations": 3}, 4, 6 + 3, 2 * (4 * 32 + 32)),  # no more than there are
        ({"iterations": 2, "gates": "frozen"}, 2, 4 + 2, 32),
        ({"iterations": 2, "gates": "shared", "norm": "once", "shared_experts": "once"}, 4, 4 + 1, 0),
        ({"iterations": 2, "retrofit_scale": True}, 4, 4 + 2, 4 * 32 + 32 + 32),
    ],
)
def test_counts(section, visited, multiplied, extra):
    """Active: each element once. Stage balancing and arithmetic: each use."""
    plain = count_parameters(parse_config(small_config()).model.shape)
    counts = count_parameters(chain(section).model.shape)
    assert counts.total == plain.total + 3 * extra == sum(counts.components.values())
    assert counts.active == plain.active + 3 * (extra + (visited - 2) * MATRICES)
    reads = 4 * 32 if section.get("gates") == "shared" else 0  # one router, asked twice
    assert counts.layers[1] == plain.layers[1] + extra + reads + (multiplied - 3) * MATRICES
    assert counts.layers[0] == plain.layers[0]
