"""Every backend computes what the loop over experts does, forward and backward, or says why it cannot."""

import importlib
import re

import pytest
import torch

from kmem.model import expert_backends
from kmem.model.expert_backends import NAMES, available, find_backend, problem
from tests.model import tiny

COUNTS = {
    "one expert": [5],
    "a prime number": [3, 0, 5, 1, 0, 2, 9],
    "all to one": [0, 0, 70, 0, 0],
    "one row": [0, 1, 0],
    "no rows": [0, 0, 0],
    "more than a block": [33, 65, 0],
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def load():
    """load(name): a backend that runs on the CPU, in Triton's interpreter where it is a kernel."""
    if torch.cuda.is_available():
        pytest.skip("the GPU runs the same cases")

    def find(name):
        if name == "liger":
            pytest.importorskip(
                "liger_kernel", reason="liger-kernel is an extra: pip install 'liger-kernel>=0.8.5,<0.9'"
            )
        if name == "deepspeed":
            pytest.importorskip("triton")
            switch = importlib.import_module("deepspeed.ops.triton_ops._triton")
            if not switch._TRITON_AVAILABLE:  # without a GPU it does not even define its kernels
                switch._TRITON_AVAILABLE = True
                importlib.reload(importlib.import_module("deepspeed.ops.triton_ops.group_gemm_triton"))
        assert problem(name, CPU, torch.float32) is None
        return find_backend(name)

    yield find
    switch = importlib.import_module("deepspeed.ops.triton_ops._triton")
    switch._TRITON_AVAILABLE = False
    importlib.reload(importlib.import_module("deepspeed.ops.triton_ops.group_gemm_triton"))


def results(backend, counts, hidden_size, width, device="cpu", dtype=torch.float32):
    rows, experts = sum(counts), len(counts)
    sizes = (rows, hidden_size), (experts, 2 * width, hidden_size), (experts, hidden_size, width)
    scales = 1, hidden_size**-0.5, width**-0.5
    inputs = [
        (scale * tiny.random(*size, seed=seed)).to(device, dtype).requires_grad_()
        for seed, (size, scale) in enumerate(zip(sizes, scales, strict=True))
    ]
    out = backend(*inputs, torch.tensor(counts, device=device))
    grads = torch.autograd.grad(out, inputs, tiny.random(rows, hidden_size, seed=9).to(device, dtype))
    return [out.detach().float().cpu(), *(grad.float().cpu() for grad in grads)]


SHORT = ("a prime number", "no rows", "more than a block")
"""Experts without rows, with one and with several, and with more than a block of them."""


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in SHORT else pytest.mark.full) for kind in COUNTS]
)
@pytest.mark.parametrize("name", NAMES[2:])
def test_kernels_equal_the_loop(name, kind, load):
    found = results(load(name), COUNTS[kind], 40, 24)
    for ours, wanted in zip(found, results(find_backend("loop"), COUNTS[kind], 40, 24), strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("hidden_size, width", [(8, 16), (40, 24), (136, 72)])
@pytest.mark.parametrize("kind", COUNTS)
def test_grouped_mm_equals_the_loop(kind, hidden_size, width):
    found = results(find_backend("grouped_mm"), COUNTS[kind], hidden_size, width)
    for ours, wanted in zip(found, results(find_backend("loop"), COUNTS[kind], hidden_size, width), strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("hidden_size, width", [(8, 16), (40, 24), (136, 72)])
@pytest.mark.parametrize("kind", COUNTS)
@pytest.mark.parametrize("name", NAMES)
def test_backends_on_a_gpu_equal_the_loop_in_fp32(name, kind, hidden_size, width):
    device = torch.device("cuda")
    if name == "liger":
        pytest.importorskip("liger_kernel", reason="liger-kernel is an extra: pip install 'liger-kernel>=0.8.5,<0.9'")
    assert problem(name, device, torch.bfloat16) is None
    found = results(find_backend(name), COUNTS[kind], hidden_size, width, device, torch.bfloat16)
    again = results(find_backend(name), COUNTS[kind], hidden_size, width, device, torch.bfloat16)
    assert all(map(torch.equal, found, again))
    for ours, wanted in zip(found, results(find_backend("loop"), COUNTS[kind], hidden_size, width), strict=True):
        torch.testing.assert_close(ours, wanted, atol=4e-2, rtol=4e-2)


def test_the_loop_is_its_definition():
    """Row by row, as the model's formula says."""
    counts, width = [2, 0, 3], 16
    rows, gate_up, down = tiny.random(5, 8), tiny.random(3, 32, 8), tiny.random(3, 8, 16)
    out = find_backend("loop")(rows, gate_up, down, torch.tensor(counts))
    for row, expert in enumerate([0, 0, 2, 2, 2]):
        gate, up = (gate_up[expert] @ rows[row]).split(width)
        torch.testing.assert_close(out[row], down[expert] @ (gate * torch.sigmoid(gate) * up), atol=1e-5, rtol=1e-4)


def test_what_runs_on_a_cpu(monkeypatch):
    monkeypatch.setattr(expert_backends, "_interpreted", lambda: False)
    assert available(CPU, torch.float32) == available(CPU, torch.bfloat16) == ["grouped_mm", "loop"]
    assert re.search(r"CUDA.*\bcpu$", str(problem("deepspeed", CPU, torch.float32)))


def test_a_backend_that_is_not_installed_names_its_remedy(monkeypatch):
    monkeypatch.setattr(expert_backends, "_interpreted", lambda: True)
    monkeypatch.setitem(
        expert_backends._PACKAGES, "liger", ("no_such_package.ops", "pip install 'liger-kernel>=0.8.5,<0.9'")
    )
    refusal = problem("liger", CPU, torch.float32)
    assert refusal is not None
    assert "no_such_package" in refusal
    assert refusal.endswith("pip install 'liger-kernel>=0.8.5,<0.9'")


def test_old_gpus_and_other_types_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    cuda = torch.device("cuda")
    assert re.search(r"\b8\.0\b.*\bcuda\b.*\b7\.5$", str(problem("deepspeed", cuda, torch.bfloat16)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "TF32" in str(problem("liger", cuda, torch.float32))
    assert problem("grouped_mm", cuda, torch.float32) is None
    monkeypatch.setattr(expert_backends, "_interpreted", lambda: True)
    assert re.search("interpreter.*fp32", str(problem("deepspeed", CPU, torch.bfloat16)))


def test_more_elements_than_deepspeed_can_address_are_refused():
    pytest.importorskip("triton")
    rows = torch.zeros(1, 8).expand(2**28, 8)
    with pytest.raises(AssertionError, match=r"train\.micro_batch_size"):
        find_backend("deepspeed")(rows, torch.zeros(1, 8, 8), torch.zeros(1, 8, 4), torch.tensor([2**28]))


def test_names_that_are_none():
    with pytest.raises(ValueError, match=r"'scatter' .*grouped_mm, loop, deepspeed, liger"):
        find_backend("scatter")
