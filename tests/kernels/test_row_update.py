"""Optimizer steps of touched rows: the bits of the host's compiled loops, whoever computes them."""

import numpy as np
import pytest
import torch
from kmem_kernels.row_update import reference

from kmem.config import BlockOptimizerConfig, RowOptimizerConfig
from kmem.tables import counter_random
from kmem.tables.row_optimizers import RowUpdate, kernels, make_row_optimizer
from kmem.tables.segments import Segments
from kmem.tables.stores import ArrayLayout, Store, host_array
from tests.kernels.devices import DEVICES, random

pytest.importorskip("triton")
from kmem_kernels.row_update.op import (
    CatchUp,
    Gradients,
    OwnSteps,
    RandomRounding,
    adam_,
    rowwise_adagrad_,
    square_norms,
)

ROWS, RATE, SEED, TABLE, FIRST_ROW = 60, 0.05, 7, "table", (1 << 40) + 3
OPTIMIZERS = [
    RowOptimizerConfig(name="lazy_adam"),
    BlockOptimizerConfig(name="lazy_adam", weight_decay=0.1),
    RowOptimizerConfig(name="adam_catchup", weight_decay=0.1),
    RowOptimizerConfig(name="rowwise_adagrad"),
]
DECAYS, LAST = 16, 5


def contributions(step, dim):
    """Gradients of lookups, some of the same row, of very different sizes, zeros of both signs among them."""
    generator = np.random.default_rng(step)
    ids = generator.integers(0, ROWS, 80)
    gradients = generator.standard_normal((80, dim)) * 10.0 ** generator.integers(-22, 3, (80, 1))
    gradients[generator.random((80, dim)) < 0.1] = -0.0
    return Segments.of(ids), gradients.astype(np.float32)


def on_the_host(settings, dim, dtype):
    """State after each step of the compiled loops."""
    optimizer = make_row_optimizer(settings, dim, SEED, TABLE)
    store = Store("host", ROWS, {"rows": ArrayLayout(dim, dtype), **optimizer.state()})
    store["rows"].copy_(random(ROWS, dim))
    states = [{name: array.clone() for name, array in store.arrays.items()}]
    for step in range(1, (5 if dim < 100 else 2) + 1):
        optimizer.apply(store, RowUpdate(*contributions(step, dim), 0.3, step, RATE), FIRST_ROW)
        states.append({name: array.clone() for name, array in store.arrays.items()})
    return states


def update(settings, state, step, dim, device, backend):
    segments, values = contributions(step, dim)
    rows, order, starts = (
        torch.from_numpy(array).to(device) for array in (segments.unique, segments.order, segments.starts)
    )
    gradients = Gradients(rows, torch.from_numpy(values).to(device), 0.3, order, starts)
    rounding = None
    if settings.stochastic_rounding:
        key = counter_random.key(SEED, TABLE, "rounding")
        rounding = RandomRounding(int(counter_random.random_bits(key, np.uint64(step))), FIRST_ROW)
    if settings.name == "rowwise_adagrad":
        rowwise_adagrad_(
            state["rows"], state["second_moment"], gradients, RATE, settings.eps, rounding, backend=backend
        )
        return
    moments = state["rows"], state["first_moment"], state["second_moment"]
    if settings.counts_updates:
        scalars = reference.AdamStep.own(*settings.betas, settings.eps, RATE)
        own = OwnSteps(state["updates"], torch.from_numpy(reference.own_corrections(*settings.betas)[:LAST]).to(device))
        decay = 1 - RATE * settings.weight_decay
        adam_(*moments, gradients, scalars, None, rounding, decay, own, backend=backend)
        return
    if settings.name == "lazy_adam":
        scalars = reference.AdamStep.lazy(*settings.betas, settings.eps, RATE, step)
        adam_(*moments, gradients, scalars, None, rounding, 1 - RATE * settings.weight_decay, backend=backend)
        return
    scalars = reference.AdamStep.dense(*settings.betas, settings.eps, RATE, step)
    missed = np.arange(DECAYS)
    factors = [(beta, missed) for beta in settings.betas] + [(1 - RATE * settings.weight_decay, missed + 1)]
    decays = np.stack([reference.missed_steps_decay(factor, steps).reshape(-1) for factor, steps in factors])
    catch_up = CatchUp(state["last_step"], step, torch.from_numpy(decays).to(device))
    adam_(*moments, gradients, scalars, catch_up, rounding, backend=backend)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rounding", ["fp32", "nearest", "random"])
@pytest.mark.parametrize("dim", [1, 5, 40, pytest.param(520, marks=pytest.mark.full)])
@pytest.mark.parametrize("settings", OPTIMIZERS, ids=lambda s: s.name + "-decayed" * (type(s) is BlockOptimizerConfig))
def test_the_bits_are_those_of_the_host(settings, dim, rounding, device):
    settings = settings.model_copy(update={"stochastic_rounding": rounding == "random"})
    states = on_the_host(settings, dim, torch.float32 if rounding == "fp32" else torch.bfloat16)
    assert all((after["rows"] != states[0]["rows"]).any() for after in states[1:])
    for backend in ("torch", "triton"):
        state = {name: array.to(device, copy=True) for name, array in states[0].items()}
        for step, expected in enumerate(states[1:], 1):
            update(settings, state, step, dim, device, backend)
            for name, array in state.items():
                found, wanted = host_array(array.cpu()), host_array(expected[name])
                assert np.array_equal(found.view(np.uint8), wanted.view(np.uint8)), (backend, step, name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", [1, 5, 200, 3 * reference.SQUARES_PART + 70])
def test_square_norms_are_added_in_their_order(dim, device):
    values = random(77, dim) * 10 ** random(77, 1, seed=1)
    expected = kernels.square_norms(values.numpy())
    for backend in ("torch", "triton"):
        assert np.array_equal(square_norms(values.to(device), backend=backend).cpu().numpy(), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_one_gradient_per_row_needs_no_order(device):
    rows = torch.tensor([3, 0, 2], device=device)
    values = random(3, 8).to(device)
    step = reference.AdamStep.lazy(0.9, 0.999, 1e-8, RATE, 1)
    found = []
    for more in ({}, {"order": torch.tensor([0, 1, 2]), "starts": torch.arange(4)}):
        state = [random(4, 8, seed=1).to(device), torch.zeros(4, 8, device=device), torch.zeros(4, 8, device=device)]
        more = {name: array.to(device) for name, array in more.items()}
        adam_(*state, Gradients(rows, values, **more), step, backend="triton")
        assert torch.equal(state[0][1], random(4, 8, seed=1)[1].to(device))
        found.append(state)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows(device):
    none = Gradients(torch.zeros(0, dtype=torch.int64, device=device), torch.zeros(0, 3, device=device))
    state = [random(4, 3).to(device) for _ in range(3)]
    for backend in ("torch", "triton"):
        adam_(*state, none, reference.AdamStep.lazy(0.9, 0.999, 1e-8, RATE, 1), backend=backend)
        rowwise_adagrad_(state[0], state[1][:, :1].contiguous(), none, RATE, 1e-8, backend=backend)
        assert square_norms(none.values, backend=backend).shape == (0,)
    assert torch.equal(state[0], random(4, 3).to(device))


def test_refusals():
    rows, step = torch.tensor([0, 1]), reference.AdamStep.lazy(0.9, 0.999, 1e-8, RATE, 1)
    table = [random(4, 3) for _ in range(3)]
    good = Gradients(rows, random(2, 3))
    with pytest.raises(ValueError, match="float64"):
        adam_(table[0].double(), *table[1:], good, step)
    with pytest.raises(ValueError, match=r"gradients \(2, 4\) .*\brows of 3\b"):
        adam_(*table, Gradients(rows, random(2, 4)), step)
    with pytest.raises(ValueError, match=r"^2 rows .*gradients"):
        adam_(*table, Gradients(rows, random(3, 3)), step)
    with pytest.raises(ValueError, match="order and starts"):
        adam_(*table, Gradients(rows, random(2, 3), order=rows), step)
    with pytest.raises(ValueError, match=r"fp32 rows .*rounded"):
        adam_(*table, good, step, rounding=RandomRounding(1, 0))
    with pytest.raises(ValueError, match="moments"):
        adam_(table[0], table[1].bfloat16(), table[2], good, step)
    with pytest.raises(ValueError, match=r"step 5 .*decays"):
        adam_(*table, good, step, CatchUp(torch.zeros(4, 1, dtype=torch.int32), 5, torch.ones(3, 4)))
