"""The backends of `train.expert_backend`, measured in turn on the same experts and rows."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kmem.bench.contest import in_turn
from kmem.bench.experts import forward_backward, largest_differences, settle_allocator
from kmem.config import Config, UserError
from kmem.model.expert_backends import find_backend
from kmem.model.experts import Experts
from kmem.model.init import initialise_

GROUP_SIZES = (8, 32, 128, 512)
"""Rows per expert, on average."""


@dataclass(frozen=True)
class BackendTime:
    """Time of forward and backward of the experts alone: without a router, with rows already sorted."""

    backend: str
    rows: int
    """Rows per expert, on average."""
    groups: str
    """even: every expert has equally many rows. zipf: the share of the n-th most visited expert is proportional to
    1 / n."""
    ms: float
    gflops: float
    """10^9 floating-point operations per second, counting the nine matrix products."""
    times: float
    """Time as a multiple of the first backend's, median over rounds."""


def backend_times(
    config: Config,
    names: Sequence[str],
    device: torch.device,
    rounds: int,
    sizes: Sequence[int] = GROUP_SIZES,
    on_size: Callable[[str], None] = lambda size: None,
) -> list[BackendTime]:
    """Time these backends, after a check that all agree with the first one.

    Args:
        names: the backends; the first is the one that others are compared with.
        sizes: rows per expert, on average.
        on_size: called when a size is done.

    Raises:
        UserError: a backend's output or a gradient differs; names the backend.
    """
    moe = config.model.moe
    assert moe is not None
    settle_allocator()
    shape = config.model.shape
    experts = Experts(shape)
    initialise_(experts, shape, config.train.init_seed)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    experts.to(device, dtype)
    measured = []
    for size in sizes:
        for groups in ("even", "zipf"):
            counts = _counts(moe.num_experts, size * moe.num_experts, groups).to(device)
            generator = torch.Generator().manual_seed(size)
            shape_NH = (size * moe.num_experts, config.model.hidden_size)
            rows, gradient = (torch.randn(shape_NH, generator=generator).to(device, dtype) for _ in range(2))
            leaves = (rows.requires_grad_(), experts.gate_up_proj, experts.down_proj)
            steps = [_step(name, experts, leaves, counts, gradient) for name in names]
            _check_equal(names, steps, leaves)
            seconds = in_turn(steps, rounds)
            operations = 9 * 2 * len(rows) * config.model.hidden_size * moe.intermediate_size
            for name, own in zip(names, seconds, strict=True):
                median = statistics.median(own)
                times = statistics.median(mine / first for mine, first in zip(own, seconds[0], strict=True))
                measured.append(BackendTime(name, size, groups, 1e3 * median, operations / median / 1e9, times))
        on_size(f"{size} rows per expert")
    return measured


def _step(
    name: str, experts: Experts, leaves: Sequence[Tensor], counts: Tensor, gradient: Tensor
) -> Callable[[], Tensor]:
    backend = find_backend(name)

    def step() -> Tensor:
        out = forward_backward(
            lambda rows: backend(rows, experts.gate_up_proj, experts.down_proj, counts), leaves, gradient
        )
        if out.is_cuda:
            torch.cuda.synchronize()
        return out

    return step


def _check_equal(names: Sequence[str], steps: Sequence[Callable[[], Tensor]], leaves: Sequence[Tensor]) -> None:
    expected: list[Tensor] = []
    for name, step in zip(names, steps, strict=True):
        values = [step(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]
        expected = expected or values
        largest = 2e-2 if values[0].dtype == torch.bfloat16 else 1e-5
        for share in largest_differences(values, expected):
            if not share <= largest:  # also true for NaN
                raise UserError(f"{name} differs from {names[0]} by {share:.1e} of the largest value")


def _counts(experts: int, rows: int, groups: str) -> Tensor:
    """Rows of each expert: int64 [experts] with sum `rows`."""
    if groups == "even":
        return torch.full((experts,), rows // experts)
    shares = 1 / torch.arange(1, experts + 1, dtype=torch.float64)
    ends = (shares.cumsum(0) / shares.sum() * rows).round().long()
    return ends.diff(prepend=ends.new_zeros(1))
