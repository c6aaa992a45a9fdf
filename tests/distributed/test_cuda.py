"""The same cases on a GPU. One process: what runs here is the device code, not the collectives."""

import pytest
import torch

from tests.distributed.bank_case import bank_config
from tests.distributed.test_bank_meshes import merged as merged_blocks
from tests.distributed.test_engram_meshes import engram_config, merged
from tests.distributed.training_case import small_config, train_case

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train__recompute": "full"},
        {"train__micro_batch_size": 8},
        {"train__expert_backend": "loop"},
        {"model__moe__chain": {"iterations": 2}, "train__init_seed": 1},
        {"model__moe__chain": {"iterations": 2, "gates": "frozen"}, "train__recompute": "full"},
    ],
    ids=["plain", "recompute", "one-micro-batch", "loop", "chain", "frozen chain, recompute"],
)
def test_fp32_losses_on_the_gpu_equal_those_of_the_cpu(ranks, gpu_ranks, monkeypatch, changes):
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    (gpu,) = gpu_ranks.run(1, train_case, small_config(**changes), 10)
    (cpu,) = ranks.run(1, train_on_cpu, small_config(**changes), 10)
    assert gpu["losses"] == pytest.approx(cpu["losses"], abs=1e-3)


@pytest.mark.parametrize("store", ["device", "host"])
def test_memory_on_the_gpu_equals_that_of_the_cpu(ranks, gpu_ranks, monkeypatch, store):
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    gpu = gpu_ranks.run(1, train_case, engram_config(engram__store=store), 8)
    cpu = ranks.run(1, train_case, engram_config(), 8)
    assert gpu[0]["losses"] == pytest.approx(cpu[0]["losses"], abs=1e-3)
    for layer, table in merged(gpu).items():
        torch.testing.assert_close(table, merged(cpu)[layer], rtol=0, atol=1e-2)


@pytest.mark.parametrize("store", ["device", "host"])
def test_fetching_ahead_and_recomputing_on_the_gpu_change_no_bit(gpu_ranks, store):
    results = []
    for depth, recompute in ((0, "none"), (2, "selective"), (1, "full")):
        changes = {"engram__prefetch_depth": depth, "train__recompute": recompute}
        results.append(gpu_ranks.run(1, train_case, engram_config(engram__store=store, **changes), 8))
    for result in results[1:]:
        assert result[0]["losses"] == results[0][0]["losses"]
        assert all(torch.equal(table, merged(results[0])[layer]) for layer, table in merged(result).items())


@pytest.mark.parametrize("store", ["device", "host"])
def test_a_bank_on_the_gpu_equals_that_of_the_cpu(ranks, gpu_ranks, monkeypatch, store):
    """Whatever is fetched ahead or recomputed, bit for bit."""
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    cpu = ranks.run(1, train_case, bank_config(), 6)
    first = gpu_ranks.run(1, train_case, bank_config(bank__store=store), 6)
    assert first[0]["losses"] == pytest.approx(cpu[0]["losses"], abs=1e-3)
    for name, table in merged_blocks(first).items():
        torch.testing.assert_close(table, merged_blocks(cpu)[name], rtol=0, atol=1e-2)
    ahead = {"bank__prefetch_depth": 2, "train__recompute": "full"}
    again = gpu_ranks.run(1, train_case, bank_config(bank__store=store, **ahead), 6)
    assert again[0]["losses"] == first[0]["losses"]
    assert all(torch.equal(table, merged_blocks(first)[name]) for name, table in merged_blocks(again).items())


def test_bf16_on_the_gpu_learns(gpu_ranks):
    (result,) = gpu_ranks.run(1, train_case, small_config(train__precision="bf16"), 10)
    assert result["losses"][-1] < result["losses"][0] - 0.2


def train_on_cpu(tree, steps):
    """Plain PyTorch on the CPU, as the mesh tests use it."""
    from tests.distributed.test_meshes import plain_training

    losses, norms = plain_training(tree)
    assert len(losses) == steps
    return {"losses": losses, "norms": norms}
