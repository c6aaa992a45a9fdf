"""The norm over a mesh, of one gradient that every rank holds its part of as its optimizer keeps it."""

from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn

from kmem.parallel.engine import UnclippedBF16Optimizer
from kmem.parallel.gradients import GradientNorm
from tests.parallel.meshes import SHAPES, ranks_of

TIED = torch.linspace(1, 2, 11)


def gradients_of(mesh):
    """What a rank has to update: (replicated, its slice of experts) of its stage, each [(gradient, whether the copy of
    another stage counts)]. The first and the last stage share a tied weight."""
    generator = torch.Generator().manual_seed(mesh.stage)
    replicated = [(torch.randn(7, generator=generator), False), (torch.randn(2, 3, generator=generator), False)]
    if mesh.pipeline > 1 and mesh.stage in (0, mesh.pipeline - 1):
        replicated.insert(1, (TIED.clone(), mesh.stage > 0))
    generator.manual_seed(100 + mesh.stage * 10 + mesh.expert_rank)
    return replicated, [(torch.randn(5, generator=generator), False)] if mesh.expert > 1 else []


def whole_square(shape):
    """Every element of the model once."""
    total = 0.0
    for mesh in ranks_of(*shape):
        replicated, experts = gradients_of(mesh)
        counted = replicated if mesh.data_rank == 0 else []
        counted = counted + (experts if mesh.data_rank < mesh.expert else [])
        total += sum(gradient.double().square().sum().item() for gradient, copy in counted if not copy)
    return total


def parameter(gradient, copy, expert):
    found = nn.Parameter(torch.zeros_like(gradient))
    if expert:
        found.allreduce = False
    if copy:
        found.ds_pipe_replicated = True
    return found


def plain(mesh):
    """Gradients on the parameters, whole on every rank; one parameter has none."""
    module = nn.Module()
    for expert, group in enumerate(gradients_of(mesh)):
        for number, (gradient, copy) in enumerate(group):
            held = parameter(gradient, copy, expert)
            held.grad = gradient
            module.register_parameter(f"weight{expert}{number}", held)
    module.register_parameter("unused", nn.Parameter(torch.ones(3)))
    return module, torch.optim.SGD(module.parameters())


def partitions(mesh):
    """Of each group: its parameters; (number of a parameter, what of its gradient lies in this rank's partition); and
    elements that pad the last partition."""
    for expert, group in enumerate(gradients_of(mesh)):
        if not group:
            continue
        ranks, rank = (
            (mesh.data // mesh.expert, mesh.data_rank // mesh.expert) if expert else (mesh.data, mesh.data_rank)
        )
        numbers = torch.cat([torch.full((gradient.numel(),), number) for number, (gradient, _) in enumerate(group)])
        flat = torch.cat([gradient.flatten() for gradient, _ in group])
        share = -(-len(flat) // ranks)
        mine = slice(rank * share, (rank + 1) * share)
        held = [
            (number, flat[mine][numbers[mine] == number])
            for number in range(len(group))
            if (numbers[mine] == number).any()
        ]
        yield [parameter(*entry, expert) for entry in group], held, share - len(flat[mine])


def zero(mesh):
    """fp32, ZeRO-1: pieces of parameters in this rank's partition, a parameter may lie in two; and padding."""
    optimizer = DeepSpeedZeroOptimizer.__new__(DeepSpeedZeroOptimizer)
    optimizer.params_in_partition, optimizer.averaged_gradients = [], {}
    for number, (parameters, held, missing) in enumerate(partitions(mesh)):
        optimizer.params_in_partition.append([parameters[place] for place, _ in held])
        pieces = [piece.clone() for _, piece in held]
        if missing:
            pieces.append(torch.full((missing,), 7.0))  # zeros, in fact: it would be seen here
            pieces[-1]._zero_padding = True
        optimizer.averaged_gradients[number] = pieces
    return nn.Module(), optimizer


def bf16(mesh, kind=BF16_Optimizer):
    """bf16: flat fp32 buffers; a parameter knows where in one it lies, if any of it is this rank's."""
    optimizer = kind.__new__(kind)
    optimizer.bf16_groups, optimizer.fp32_groups_gradient_flat_partition = [], []
    for parameters, held, missing in partitions(mesh):
        start = 0
        for one in parameters:
            one._hp_mapping = None
        for place, piece in held:
            address = SimpleNamespace(start=start, numel=len(piece))
            fragment = SimpleNamespace(get_hp_fragment_address=lambda address=address: address)
            parameters[place]._hp_mapping = fragment
            start += len(piece)
        optimizer.bf16_groups.append(parameters)
        flat = torch.cat([*(piece for _, piece in held), torch.full((missing,), 7.0)])
        optimizer.fp32_groups_gradient_flat_partition.append(flat)
    return nn.Module(), optimizer


def unclipped(mesh):
    return bf16(mesh, UnclippedBF16Optimizer)


def norms(shape, kind):
    return [GradientNorm(*kind(mesh), mesh) for mesh in ranks_of(*shape)]


@pytest.mark.parametrize("kind", [plain, zero, bf16, unclipped])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_element_is_counted_once(alone, shape, kind):
    found = sum(norm.reduce([])[0] for norm in norms(shape, kind))
    assert found == pytest.approx(whole_square(shape), rel=1e-6)


@pytest.mark.parametrize("kind", [plain, zero, bf16])
def test_all_gradients_are_scaled_also_copies(alone, kind):
    """Copies step like what they copy, or they would come apart."""
    shape = (2, 4, 2)
    for norm in norms(shape, kind):
        before = [piece.clone() for piece in norm._local()]
        if kind is plain:
            assert len(before) == len(list(norm.module.parameters())) - 1
        norm.scale(0.5)
        after = list(norm._local())
        assert len(after) == len(before) > 0
        assert all(torch.equal(one, 0.5 * other) for one, other in zip(after, before, strict=True))
    scaled = norms(shape, kind)
    for norm in scaled:
        norm.scale(3.0)
    assert sum(norm.reduce([])[0] for norm in scaled) == pytest.approx(9 * whole_square(shape), rel=1e-6)


def test_figures_are_summed_with_the_norm_in_fp64(alone):
    (norm,) = norms((1, 1, 1), plain)
    extra = [1 / 3, 2.0**40 + 1]
    square, *figures = norm.reduce(extra)
    assert figures == extra
    assert square == pytest.approx(whole_square((1, 1, 1)), rel=1e-6)


def test_a_rank_of_copies_alone_counts_nothing(alone):
    module = nn.Module()
    copy = parameter(TIED, True, False)
    copy.grad = TIED.clone()
    module.register_parameter("copy", copy)
    norm = GradientNorm(module, torch.optim.SGD([copy]), ranks_of(2, 1, 1)[1])
    assert norm.reduce([5.0]) == [0.0, 5.0]
    norm.scale(2.0)
    assert torch.equal(copy.grad, 2 * TIED)


def test_a_rank_without_gradients_is_no_error(alone):
    module = nn.Module()
    norm = GradientNorm(module, None, ranks_of(1, 1, 1)[0])
    norm.scale(2.0)
    assert norm.reduce([]) == [0.0]


def test_a_gradient_that_is_not_finite_is_seen(alone):
    (norm,) = norms((1, 1, 1), plain)
    next(iter(norm._local()))[0] = float("inf")
    assert norm.reduce([])[0] == float("inf")
