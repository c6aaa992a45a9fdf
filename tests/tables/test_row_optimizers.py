from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from kmem_kernels.row_update import reference

from kmem.config import ROW_OPTIMIZER_TRAITS, BlockOptimizerConfig, RowOptimizerConfig
from kmem.tables import stores
from kmem.tables.counter_random import key, normal_rows
from kmem.tables.row_optimizers import ROW_OPTIMIZERS, RowUpdate, kernels, make_row_optimizer
from kmem.tables.row_threads import RowThreads
from kmem.tables.segments import Segments
from kmem.tables.stores import ArrayLayout, Store, host_array

ROWS, DIM, RATE = 40, 5, 0.05
LAZY = [
    RowOptimizerConfig(name="lazy_adam"),
    RowOptimizerConfig(name="adam_catchup", weight_decay=0.1),
    RowOptimizerConfig(name="rowwise_adagrad"),
    RowOptimizerConfig(name="sinkhorn_momentum", dense=False),
]
DENSE = RowOptimizerConfig(name="sinkhorn_momentum")
DECAYED = BlockOptimizerConfig(name="lazy_adam", weight_decay=0.1)
names = pytest.mark.parametrize("settings", LAZY, ids=lambda s: s.name)


def table(optimizer, dtype=torch.float32, rows=ROWS, values=None, device="cpu"):
    dim = optimizer.dim
    store = Store("device", rows, {"rows": ArrayLayout(dim, dtype), **optimizer.state()}, device)
    values = torch.from_numpy(normal_rows(0, rows, dim, key(1, "start"), 1.0)) if values is None else values
    store["rows"].copy_(values)
    return store


def updates(steps, rows=ROWS, dim=DIM, every=False, seed=0):
    generator = np.random.default_rng(seed)
    for step in range(1, steps + 1):
        count = rows if every else generator.integers(1, rows)
        touched = np.sort(generator.choice(rows, count, replace=False))
        yield RowUpdate(
            Segments.distinct(touched), generator.standard_normal((count, dim)).astype(np.float32), 0.5, step, RATE
        )


def optimizer_for(settings, dim=DIM, threads=1):
    return make_row_optimizer(settings, dim, 7, "table", RowThreads(threads))


def dense_gradient(update, rows=ROWS, dim=DIM):
    gradient = torch.zeros(rows, dim)
    gradient[torch.from_numpy(update.rows)] = torch.from_numpy(update.gradients) * update.scale
    return gradient


def snapshot(store):
    return {name: array.clone() for name, array in store.arrays.items()}


def test_every_name_has_its_traits_and_its_class():
    names = get_args(RowOptimizerConfig.model_fields["name"].annotation)
    assert [*names] == [*ROW_OPTIMIZER_TRAITS] == [*ROW_OPTIMIZERS] == [settings.name for settings in LAZY]


@pytest.mark.parametrize("dim", [1, 5, 64])
@pytest.mark.parametrize("settings", [*LAZY[:2], DECAYED], ids=lambda s: f"{s.name}-{s.weight_decay}")
def test_compiled_adam_is_bit_equal_to_its_reference(settings, dim):
    optimizer = optimizer_for(settings, dim)
    store = table(optimizer)
    rows, m, v = (store[name].numpy().copy() for name in ("rows", "first_moment", "second_moment"))
    last, counts = np.zeros(ROWS, np.int64), np.zeros(ROWS, np.int64)
    for update in updates(50, dim=dim):
        optimizer.apply(store, update, 0)
        at, step = update.rows, update.step
        gradients = update.gradients * np.float32(update.scale)
        missed = step - 1 - last[at]
        last[at] = step
        corrections = None
        if settings.name == "lazy_adam":
            scalars = reference.AdamStep.lazy(0.9, 0.999, 1e-8, RATE, step)
            if settings.counts_updates:
                scalars = reference.AdamStep.own(0.9, 0.999, 1e-8, RATE)
                corrections = reference.own_corrections(0.9, 0.999)[counts[at], None]
                counts[at] += 1
            factors = [1, 1, 1 - RATE * settings.weight_decay]
            decays = [np.full((len(at), 1), factor, np.float32) for factor in factors]
        else:
            scalars = reference.AdamStep.dense(0.9, 0.999, 1e-8, RATE, step)
            factors = [(0.9, missed), (0.999, missed), (1 - RATE * 0.1, missed + 1)]
            decays = [reference.missed_steps_decay(factor, steps) for factor, steps in factors]
        rows[at], m[at], v[at] = reference.adam(rows[at], gradients, m[at], v[at], tuple(decays), scalars, corrections)
        assert np.array_equal(store["rows"].numpy(), rows)
        assert np.array_equal(store["first_moment"].numpy(), m)
        assert np.array_equal(store["second_moment"].numpy(), v)


def test_compiled_adagrad_is_bit_equal_to_its_reference():
    optimizer = optimizer_for(LAZY[2])
    store = table(optimizer)
    rows, v = store["rows"].numpy().copy(), store["second_moment"].numpy().copy()
    for update in updates(50):
        optimizer.apply(store, update, 0)
        at = update.rows
        rows[at], v[at] = reference.rowwise_adagrad(rows[at], update.gradients * np.float32(0.5), v[at], RATE, 1e-8)
    assert np.array_equal(store["rows"].numpy(), rows)
    assert np.array_equal(store["second_moment"].numpy(), v)


@names
def test_contributions_are_summed_on_the_way(settings):
    """Several gradients per row, in any order, are their sum in that order."""
    one, two = table(optimizer_for(settings)), table(optimizer_for(settings))
    generator = np.random.default_rng(2)
    for step in range(1, 6):
        rows = generator.integers(0, ROWS, 100)
        gradients = generator.standard_normal((100, DIM)).astype(np.float32)
        total = np.zeros((ROWS, DIM), np.float32)
        np.add.at(total, rows, gradients)
        segments = Segments.of(rows)
        assert np.array_equal(segments.unique, np.unique(rows))
        optimizer_for(settings).apply(one, RowUpdate(segments, gradients, 1.0, step, RATE), 0)
        distinct = Segments.distinct(segments.unique)
        optimizer_for(settings).apply(two, RowUpdate(distinct, total[distinct.unique], 1.0, step, RATE), 0)
    assert all(torch.equal(one[name], two[name]) for name in one.arrays)


@pytest.mark.parametrize("ids", [[], [5], [3, 1, 3, 3, 0, 1], [1 << 61, 2, 1 << 61]])
def test_segments_keep_the_order_of_equal_ids(ids):
    ids = np.array(ids, np.int64)
    segments = Segments.of(ids)
    unique, inverse = np.unique(ids, return_inverse=True)
    assert np.array_equal(segments.unique, unique)
    assert np.array_equal(segments.inverse(), inverse)
    assert np.array_equal(segments.order, np.argsort(ids, kind="stable"))


def test_lazy_adam_is_torchs_sparse_adam():
    optimizer = optimizer_for(LAZY[0])
    store = table(optimizer)
    weight = torch.nn.Parameter(store["rows"].clone())
    oracle = torch.optim.SparseAdam([weight], lr=RATE)
    for update in updates(50):
        optimizer.apply(store, update, 0)
        values = torch.from_numpy(update.gradients) * update.scale
        weight.grad = torch.sparse_coo_tensor(
            torch.from_numpy(update.rows)[None], values, weight.shape, check_invariants=True
        )
        oracle.step()
    assert (store["rows"] - weight).abs().max() < 1e-6


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_caught_up_adam_is_dense_adam(weight_decay):
    """Moments of every row after a virtual catch-up; weights of the rows that every step touches."""
    optimizer = optimizer_for(LAZY[1].model_copy(update={"weight_decay": weight_decay}))
    store = table(optimizer)
    weight = torch.nn.Parameter(store["rows"].clone())
    oracle = torch.optim.AdamW([weight], lr=RATE, weight_decay=weight_decay)
    for update in updates(50):
        extra = np.setdiff1d(np.arange(4), update.rows)  # rows 0 to 3 are touched always
        rows = np.concatenate([update.rows, extra])
        gradients = np.concatenate([update.gradients, np.ones((len(extra), DIM), np.float32)])
        order = np.argsort(rows)
        update = replace(update, segments=Segments.distinct(rows[order]), gradients=gradients[order])
        optimizer.apply(store, update, 0)
        weight.grad = dense_gradient(update)
        oracle.step()
    missed = 50 - store["last_step"].double()
    state = oracle.state[weight]
    assert (store["first_moment"] * 0.9**missed - state["exp_avg"]).abs().max() < 1e-6
    assert (store["second_moment"] * 0.999**missed - state["exp_avg_sq"]).abs().max() < 1e-6
    assert (store["rows"][:4] - weight[:4]).abs().max() < 1e-6
    assert (store["rows"][4:] - weight[4:]).abs().max() > 1e-3


def test_each_block_is_a_parameter_of_its_own():
    """Whose optimizer knows no steps but its updates."""
    optimizer = optimizer_for(BlockOptimizerConfig(name="lazy_adam"))
    store = table(optimizer)
    weights = [torch.nn.Parameter(row.clone()[None]) for row in store["rows"]]
    oracles = [torch.optim.SparseAdam([weight], lr=RATE) for weight in weights]
    for update in updates(50):
        optimizer.apply(store, update, 0)
        for row, gradient in zip(update.rows, torch.from_numpy(update.gradients), strict=True):
            weights[row].grad = (gradient[None] * update.scale).to_sparse(1)
            oracles[row].step()
    assert (store["rows"] - torch.cat(list(weights))).abs().max() < 1e-6
    counts = [int(oracle.state[weight]["step"]) for oracle, weight in zip(oracles, weights, strict=True)]
    assert store["updates"].flatten().tolist() == counts
    assert len(set(counts)) > 5


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.95), (0.0, 0.0)])
def test_corrections_end_where_they_are_one(betas):
    corrections = reference.own_corrections(*betas)
    beyond = [len(corrections) * factor for factor in (1, 2, 10)]
    for updates in [*beyond, *range(1, 5)]:
        exact = np.float32((1 - betas[1] ** updates) ** 0.5 / (1 - betas[0] ** updates))
        assert corrections[min(updates, len(corrections)) - 1] == exact
    assert corrections[-1] == 1


@pytest.mark.parametrize("name", ["lazy_adam", "adam_catchup"])
def test_a_block_of_a_longer_run_has_missed_nothing(name):
    """`kmem bank replace` may bring one."""
    optimizer = optimizer_for(BlockOptimizerConfig(name=name, weight_decay=0.1))
    store, other = table(optimizer), table(optimizer)
    state = {"updates": 99_999} if name == "lazy_adam" else {"last_step": 99_999}
    for array, number in state.items():
        store[array][:] = number
        other[array][:] = number if name == "lazy_adam" else 2
    update = replace(next(updates(1)), step=3)
    optimizer.apply(store, update, 0)
    optimizer.apply(other, update, 0)
    assert torch.equal(store["rows"], other["rows"])
    if name == "adam_catchup":
        assert (store["last_step"][update.rows] == 3).all()


@pytest.mark.parametrize("dim", [0, 1, 5, 127, 128, 300, 8192, 8200, 3 * 8192 + 1])
def test_square_norms_are_added_in_their_order(dim):
    values = (np.random.default_rng(dim).standard_normal((3, dim)) * 10.0 ** np.arange(3)[:, None]).astype(np.float32)
    found = kernels.square_norms(values)
    assert np.array_equal(found, reference.square_norms(values))
    assert np.allclose(found, (values.astype(np.float64) ** 2).sum(1), rtol=1e-12)


def test_lazy_adam_decays_like_adamw_where_every_step_touches_a_row():
    """And not at all elsewhere."""
    optimizer = optimizer_for(DECAYED.model_copy(update={"eps": 1e-12}))
    store = table(optimizer)
    weight = torch.nn.Parameter(store["rows"].clone())
    oracle = torch.optim.AdamW([weight], lr=RATE, weight_decay=0.1, eps=1e-12)
    for update in updates(20, every=True):
        optimizer.apply(store, update, 0)
        weight.grad = dense_gradient(update)
        oracle.step()
    assert (store["rows"] - weight).abs().max() < 1e-5


@pytest.mark.parametrize("settings", [*LAZY, DECAYED], ids=lambda s: f"{s.name}-{s.weight_decay}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_outside_the_working_set_never_move(settings, dtype):
    optimizer = optimizer_for(settings)
    store = table(optimizer, dtype)
    for update in updates(20):
        before = snapshot(store)
        optimizer.apply(store, update, 0)
        outside = np.setdiff1d(np.arange(ROWS), update.rows)
        assert all(torch.equal(store[name][outside], values[outside]) for name, values in before.items())
        assert (store["rows"][update.rows] != before["rows"][update.rows]).any()


def test_sinkhorn_agrees_with_the_oracle():
    gradients = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0], [1.0, -2.0]])
    expected = torch.tensor(
        [[0.8067347975, 1.1615416336], [1.4142135624, 0], [0, 0], [0.5942103574, -1.2833214917]], dtype=torch.float64
    )
    optimizer = optimizer_for(DENSE, 2)
    store = table(optimizer, rows=4, values=torch.zeros(4, 2))
    touched = np.array([0, 1, 3])
    optimizer.apply(store, RowUpdate(Segments.distinct(touched), gradients[touched].numpy(), 1.0, 1, 1 / 0.18), 0)
    assert (store["rows"] + expected).abs().max() < 1e-6
    assert torch.allclose(store["momentum"], 0.05 * gradients)
    moved, _ = reference.sinkhorn_momentum(
        torch.zeros(4, 2), gradients, torch.zeros(4, 2), 1 / 0.18, 0.95, 0.18, 11, 1e-3
    )
    assert (moved + expected).abs().max() < 1e-6


def test_streamed_sinkhorn_is_its_reference(monkeypatch):
    monkeypatch.setattr(stores, "CHUNK_BYTES", 7 * 8 * DIM)  # seven rows at a time
    optimizer = optimizer_for(DENSE)
    store = table(optimizer)
    rows, momentum = store["rows"].clone(), torch.zeros(ROWS, DIM)
    for update in updates(10):
        optimizer.apply(store, update, 0)
        rows, momentum = reference.sinkhorn_momentum(rows, dense_gradient(update), momentum, RATE, 0.95, 0.18, 11, 1e-3)
        assert (store["rows"] - rows).abs().max() < 1e-5
        assert torch.allclose(store["momentum"], momentum, atol=1e-7)


def test_lazy_sinkhorn_is_dense_when_every_row_is_touched():
    lazy, dense = optimizer_for(LAZY[3]), optimizer_for(DENSE)
    one, two = table(lazy), table(dense)
    for update in updates(5, every=True):
        lazy.apply(one, update, 0)
        dense.apply(two, update, 0)
    assert torch.equal(one["rows"], two["rows"])


def test_lazy_sinkhorn_decays_the_momentum_of_missed_steps():
    optimizer = optimizer_for(LAZY[3])
    store = table(optimizer)
    ones = np.ones((1, DIM), np.float32)
    optimizer.apply(store, RowUpdate(Segments.distinct(np.array([3])), ones, 1.0, 1, RATE), 0)
    optimizer.apply(store, RowUpdate(Segments.distinct(np.array([3])), ones, 1.0, 5, RATE), 0)
    assert torch.allclose(store["momentum"][3], torch.full((DIM,), 0.05 * 0.95**4 + 0.05))


@names
def test_nothing_depends_on_the_number_of_threads(settings):
    states = []
    for threads in (1, 3):
        optimizer = optimizer_for(settings, threads=threads)
        store = table(optimizer, rows=2000)
        for update in updates(3, rows=2000):
            optimizer.apply(store, update, 0)
        states.append(snapshot(store))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("settings", [*LAZY[:3], DECAYED], ids=lambda s: f"{s.name}-{s.weight_decay}")
@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "bf16 at random"])
def test_the_device_form_is_bit_equal(settings, clip_norm, kind, monkeypatch):
    """As the kernels' torch backend has it; the kernels are compared with that one in tests/kernels."""
    pytest.importorskip("triton")
    settings = settings.model_copy(update={"clip_norm": clip_norm, "stochastic_rounding": kind == "bf16 at random"})
    host, device = optimizer_for(settings), optimizer_for(settings)
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    one, two = table(host, dtype), table(device, dtype)
    for number, update in enumerate(updates(21)):
        if number % 3 == 0:  # several contributions to a row, as several ranks have them
            ids = np.random.default_rng(number).integers(0, ROWS, len(update.rows))
            update = replace(update, segments=Segments.of(ids))
        host.apply(one, update, 9)
        if number % 3 == 1:  # as a single rank has it, whose gradient never leaves the device
            update = replace(update, gradients=torch.from_numpy(update.gradients))
        with monkeypatch.context() as patch:
            patch.setattr(Store, "on_host", False)
            device.apply(two, update, 9)
    assert all(torch.equal(one[name], two[name]) for name in one.arrays)


@pytest.mark.parametrize("settings", [LAZY[3], DENSE], ids=lambda s: s.name + "-dense" * s.is_dense)
def test_the_device_form_of_sinkhorn_agrees(settings, monkeypatch):
    host, device = optimizer_for(settings), optimizer_for(settings)
    one, two = table(host), table(device)
    for number, update in enumerate(updates(20)):
        host.apply(one, update, 0)
        if number % 2:
            update = replace(update, gradients=torch.from_numpy(update.gradients))
        with monkeypatch.context() as patch:
            patch.setattr(Store, "on_host", False)
            device.apply(two, update, 0)
    assert (one["rows"] - two["rows"]).abs().max() < 1e-6


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_decay_tables_hold_the_powers_of_single_rows(weight_decay):
    optimizer = optimizer_for(LAZY[1].model_copy(update={"weight_decay": weight_decay}))
    update = replace(next(updates(1)), step=3000)
    decays = optimizer._decays_after(update)
    assert decays.shape[1] >= update.step
    assert optimizer._decays_after(replace(update, step=3001)) is decays
    for missed in (0, 1, 7, 998, 2999):
        one = np.array([missed])
        factors = [(0.9, one), (0.999, one), (1 - RATE * weight_decay, one + 1)]
        for row, factor in zip(decays.numpy(), factors, strict=True):
            assert row[missed] == reference.missed_steps_decay(*factor)[0, 0]


@pytest.mark.parametrize("name", ["lazy_adam", "rowwise_adagrad"])
@pytest.mark.parametrize("stochastic", [False, True])
def test_bf16_rows_are_the_rounded_fp32_rows(name, stochastic):
    settings = RowOptimizerConfig(name=name, stochastic_rounding=stochastic)
    optimizer = optimizer_for(settings)
    rounded, exact = table(optimizer, torch.bfloat16), table(optimizer)
    exact["rows"].copy_(rounded["rows"])
    for update in list(updates(1)):
        optimizer.apply(rounded, update, 100)
        optimizer.apply(exact, update, 100)
        values = exact["rows"][update.rows].numpy()
        noise = optimizer._noise(update.rows, 100, update)
        assert (noise is not None) == stochastic
        assert np.array_equal(host_array(rounded["rows"])[update.rows], reference.to_bfloat16(values, noise))
    if not stochastic:
        assert torch.equal(rounded["rows"], exact["rows"].bfloat16())


def test_stochastic_rounding_keeps_the_mean_and_nearest_does_not():
    values = np.full(100_000, 1 + 2.0**-10, np.float32)  # an eighth of the way to the next bf16
    noise = kernels.rounding_noise(np.arange(100), 1000, 0, key(0, "t")).reshape(-1)
    assert abs(reference.from_bfloat16(reference.to_bfloat16(values, noise)).mean() - values[0]) < 5e-5
    assert (reference.from_bfloat16(reference.to_bfloat16(values)) == 1).all()
    assert (reference.from_bfloat16(reference.to_bfloat16(-values, noise)) <= -1).all()


def test_rounding_differs_by_step_and_row_but_not_by_sharding():
    optimizer = optimizer_for(RowOptimizerConfig(stochastic_rounding=True))
    first, second = list(updates(2))
    rows = np.array([3, 8])
    noise = optimizer._noise(rows, 10, first)
    assert np.array_equal(noise, reference.rounding_noise(rows, DIM, 10, optimizer._step_stream(first.step)))
    assert np.array_equal(noise, optimizer._noise(rows - 2, 12, first))
    assert not np.array_equal(optimizer._noise(rows, 10, first), optimizer._noise(rows, 10, second))
    assert not np.array_equal(optimizer._noise(rows, 10, first), optimizer._noise(rows, 11, first))


@names
def test_own_clip_norm(settings):
    optimizer, plain = optimizer_for(settings.model_copy(update={"clip_norm": 0.1})), optimizer_for(settings)
    one, two = table(optimizer), table(plain)
    update = next(updates(1))
    optimizer.apply(one, update, 0)
    norm = float(np.linalg.norm(update.gradients.astype(np.float64) * update.scale))
    plain.apply(two, replace(update, scale=update.scale * 0.1 / (norm + 1e-6)), 0)
    assert all(torch.allclose(one[name].float(), two[name].float(), rtol=1e-6) for name in one.arrays)


def test_few_wide_rows_are_shared_out_like_many_narrow_ones():
    for dim, rows, expected in ((64, 512, 2), (64, 500, 1), (1 << 20, 3, 3), (1 << 20, 1, 1)):
        threads, seen = RowThreads(3, dim), []
        threads.run(rows, seen.append)
        assert len(seen) == expected
        assert sorted(row for part in seen for row in range(part.start, part.stop)) == list(range(rows))
        threads.close()
