"""Groups of parameters, and what the registry says of its optimizers."""

from typing import get_args

import pytest
import torch
from torch import nn

from kmem.config import OptimizerConfig
from kmem.parallel.mesh import Mesh
from kmem.parallel.optimizers import BACKBONE_OPTIMIZERS, make_backbone_optimizer
from tests.distributed.training_case import build, small_config

MESH = Mesh(0, 1, 4, 2)
SHAPES = {
    "embedding.weight": (8, 4),
    "layers.0.attention.q_proj.weight": (4, 4),
    "layers.0.attention.bias": (4,),
    "layers.0.engram.key_norm.weight": (2, 4),  # of two branches
    "layers.1.feed_forward.experts.gate_up": (2, 4, 6),
    "layers.1.feed_forward.experts.bias": (2,),
    "norm.weight": (4,),
    "head.weight": (8, 4),
}


def parameters(names=tuple(SHAPES)):
    """[(name, parameter)]; experts carry DeepSpeed's mark."""
    named = [(name, nn.Parameter(torch.ones(SHAPES[name]))) for name in names]
    for name, parameter in named:
        if ".experts." in name:
            parameter.allreduce = False
    return named


def groups(named, **settings):
    """[(names, decay, whether its parameters are experts)] in order."""
    optimizer = make_backbone_optimizer(named, OptimizerConfig(lr=0.1, weight_decay=0.25, **settings), MESH)
    names = {parameter: name for name, parameter in named}
    return [
        ([names[parameter] for parameter in group["params"]], group["weight_decay"], group.get("moe", False))
        for group in optimizer.param_groups
    ]


@pytest.mark.parametrize("decay_embeddings", [False, True])
def test_matrices_decay_and_nothing_else(decay_embeddings):
    found = groups(parameters(), decay_embeddings=decay_embeddings)
    decays = {name: decay for names, decay, _ in found for name in names}
    assert sorted(name for names, _, _ in found for name in names) == sorted(SHAPES)  # each in one group
    decayed = {"layers.0.attention.q_proj.weight", "layers.1.feed_forward.experts.gate_up"}
    decayed |= {"embedding.weight", "head.weight"} if decay_embeddings else set()
    assert decays == {name: 0.25 if name in decayed else 0.0 for name in SHAPES}


def test_experts_have_groups_of_their_own_with_the_mark_of_their_ranks():
    named = parameters()
    optimizer = make_backbone_optimizer(named, OptimizerConfig(lr=0.1), MESH)
    experts = {parameter for name, parameter in named if ".experts." in name}
    for group in optimizer.param_groups:
        marked = "moe" in group
        assert {parameter in experts for parameter in group["params"]} == {marked}
        assert group.get("name") == (MESH.expert_group_name if marked else None)
    assert sum(group.get("moe", False) for group in optimizer.param_groups) == 2


def test_the_order_of_groups_does_not_depend_on_the_order_of_layers():
    """Stages begin with layers of different kinds; DeepSpeed numbers its partitions by group."""
    names = list(SHAPES)
    keys = [(decay, expert) for _, decay, expert in groups(parameters(names))]
    assert [(decay, expert) for _, decay, expert in groups(parameters(names[::-1]))] == keys
    assert [expert for _, expert in keys] == sorted(expert for _, expert in keys)


def test_a_stage_has_no_empty_group():
    assert [names for names, _, _ in groups(parameters(["norm.weight"]))] == [["norm.weight"]]


def test_every_optimizer_of_the_configuration_keeps_the_moments_that_it_names():
    """Besides its step: fp32, in the shape of the parameter."""
    names = get_args(OptimizerConfig.model_fields["name"].annotation)
    assert set(BACKBONE_OPTIMIZERS) == set(names) != set()
    for name in names:
        named = parameters()
        optimizer = make_backbone_optimizer(named, OptimizerConfig(name=name, lr=0.1), MESH)
        for _, parameter in named:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        for _, parameter in named:
            state = optimizer.state[parameter]
            assert set(state) == {"step", *BACKBONE_OPTIMIZERS[name].moments}
            for moment in BACKBONE_OPTIMIZERS[name].moments:
                assert (state[moment].shape, state[moment].dtype) == (parameter.shape, torch.float32)


def test_the_settings_reach_the_optimizer():
    settings = OptimizerConfig(lr=0.5, betas=(0.25, 0.75), eps=0.125)
    optimizer = make_backbone_optimizer(parameters(), settings, MESH)
    for group in optimizer.param_groups:
        assert (group["lr"], tuple(group["betas"]), group["eps"]) == (0.5, (0.25, 0.75), 0.125)


def misaligned(tree):
    """Parameters of whole 16 bytes that do not begin at a multiple of 16 bytes."""
    pipeline = build(tree)
    found = [
        name
        for name, parameter in pipeline.named_parameters()
        if parameter.numel() * parameter.element_size() % 16 == 0 and parameter.data_ptr() % 16
    ]
    count = sum(1 for _ in pipeline.named_parameters())
    pipeline.close()
    return count, found


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_weights_of_products_begin_where_16_bytes_can_be_loaded(ranks, precision):
    """The scales of hyper-connections are of three values."""
    tree = small_config(
        model__hyper_connections={"branches": 3},
        train__precision=precision,
        train__optimizer={"lr": 0.01, "decay_embeddings": False},
    )
    ((count, found),) = ranks.run(1, misaligned, tree)
    assert (count > 50, found) == (True, [])
