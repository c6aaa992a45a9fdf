"""Benchmark cases around the residual stream: branches, the engram's gate and convolution, the rotation, the loss."""

from collections.abc import Callable
from typing import Any

import torch
from cases import Case, Goal, Sizes
from kmem_kernels.cross_entropy import reference as loss_reference
from kmem_kernels.cross_entropy.triton import cross_entropy_
from kmem_kernels.engram_convolution.triton import engram_convolved, engram_convolved_backward
from kmem_kernels.engram_gate.triton import engram_gate, engram_gate_backward
from kmem_kernels.hyper_connection import reference as connection_reference
from kmem_kernels.hyper_connection.triton import (
    hyper_connection_read,
    hyper_connection_read_backward,
    hyper_connection_write,
    hyper_connection_write_backward,
)
from kmem_kernels.rotary import reference as rotary_reference
from kmem_kernels.rotary.triton import rotary
from torch import Tensor

# Shape letters: N tokens, M branches, D hidden size, V vocabulary.


def stream_cases(device: torch.device, sizes: Sizes) -> list[Case]:
    return [
        *connection_cases(device, *sizes.connection),
        *engram_cases(device, *sizes.connection),
        *rotary_cases(device, *sizes.rotary),
        *loss_cases(device, *sizes.loss),
    ]


def connection_cases(device: torch.device, tokens: int, branches: int, hidden: int) -> list[Case]:
    """Hyper-connections: `bytes` counts streams as often as a kernel walks them."""
    dtype, numbers = torch.bfloat16, branches * (branches + 2)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, dtype=dtype, device=device)

    def parameters() -> tuple[Tensor, Tensor, Tensor]:
        return normal(numbers, branches * hidden) * 0.01, normal(numbers), normal(3)

    def forward(function: Callable[..., Any]) -> list[Callable[[], Any]]:
        streams, given = normal(tokens, branches, hidden), parameters()
        return [lambda: function(streams, *given, 1e-6, 20)]

    def backward() -> list[Callable[[], Any]]:
        streams, given = normal(tokens, branches, hidden), parameters()
        taken, mappings, dynamic, rms = hyper_connection_read(streams, *given, 1e-6, 20)
        grads = (taken, normal(tokens, branches, hidden), torch.randn_like(mappings))
        return [lambda: hyper_connection_read_backward(*grads, streams, *given, mappings, dynamic, rms, 20)]

    def write(name: str) -> list[Callable[[], Any]]:
        streams, output = normal(tokens, branches, hidden), normal(tokens, hidden)
        mappings, grad = torch.randn(tokens, branches + 2, branches, device=device), torch.randn_like(streams)
        calls: dict[str, Callable[[], Any]] = {
            "forward": lambda: hyper_connection_write(streams, output, mappings),
            "backward": lambda: hyper_connection_write_backward(grad, streams, output, mappings),
            "torch": lambda: connection_reference.write(streams, output, mappings),
        }
        return [calls[name]]

    shape, of_row = f"N{tokens} M{branches} D{hidden}", tokens * hidden * dtype.itemsize
    of_streams, goal = branches * of_row, Goal(60, "%")
    reading, writing = 2 * of_streams + of_row, 2 * of_streams + of_row
    return [
        Case("connection read (torch)", shape, "bf16", lambda: forward(connection_reference.read), bytes=reading),
        Case("connection read", shape, "bf16", lambda: forward(hyper_connection_read), bytes=reading, goal=goal),
        Case("connection read backward", shape, "bf16", backward, bytes=5 * of_streams + 2 * of_row, goal=goal),
        Case("connection write (torch)", shape, "bf16", lambda: write("torch"), bytes=writing),
        Case("connection write", shape, "bf16", lambda: write("forward"), bytes=writing, goal=Goal(80, "%")),
        Case(
            "connection write backward",
            shape,
            "bf16",
            lambda: write("backward"),
            bytes=3 * of_streams + 2 * of_row,
            goal=goal,
        ),
    ]


def engram_cases(device: torch.device, tokens: int, branches: int, hidden: int) -> list[Case]:
    """The gate and the convolution of an engram layer: `bytes` counts streams as often as they must be moved."""
    dtype = torch.bfloat16
    streams, keys = (torch.randn(tokens, branches, hidden, dtype=dtype, device=device) for _ in range(2))
    value, norm = torch.randn(tokens, hidden, dtype=dtype, device=device), torch.ones(branches, hidden, device=device)
    taps = torch.randn(4, branches, hidden, device=device)

    def both(gate: bool, backward: bool) -> list[Callable[[], Any]]:
        if gate:
            gated, numbers = engram_gate(streams, keys, value, norm, 1e-6)
            forward, back = (streams, keys, value, norm, 1e-6), (gated, streams, keys, value, norm, numbers)
            return [(lambda: engram_gate_backward(*back)) if backward else (lambda: engram_gate(*forward))]
        _, scales = engram_convolved(streams, norm, taps, None, 1e-6, 3, tokens)
        given, back = (streams, norm, taps, None, 1e-6, 3, tokens), (keys, streams, scales, norm, taps, None, 3, tokens)
        return [(lambda: engram_convolved_backward(*back)) if backward else (lambda: engram_convolved(*given))]

    shape, moved = f"N{tokens} M{branches} D{hidden}", tokens * branches * hidden * dtype.itemsize
    goal = Goal(60, "%")
    return [
        Case("engram gate", shape, "bf16", lambda: both(True, False), bytes=3 * moved, goal=goal),
        Case("engram gate backward", shape, "bf16", lambda: both(True, True), bytes=5 * moved, goal=goal),
        Case("engram convolution", shape, "bf16", lambda: both(False, False), bytes=3 * moved, goal=goal),
        Case("engram convolution backward", shape, "bf16", lambda: both(False, True), bytes=7 * moved, goal=goal),
    ]


def rotary_cases(device: torch.device, tokens: int, heads: int, width: int) -> list[Case]:
    """The rotation of queries, of whose heads a part is rotated."""
    x = torch.randn(tokens, heads, 3 * width, dtype=torch.bfloat16, device=device)[..., 2 * width :]
    cos, sin = torch.randn(tokens, width, device=device), torch.randn(tokens, width // 2, device=device)
    shape, moved = f"N{tokens} h{heads} D{width}", 2 * 2 * tokens * heads * width
    return [
        Case("rotary (torch)", shape, "bf16", lambda: [lambda: rotary_reference.rotated(x, cos, sin, 1)], bytes=moved),
        Case("rotary", shape, "bf16", lambda: [lambda: rotary(x, cos, sin, 1)], bytes=moved, goal=Goal(60, "%")),
    ]


def loss_cases(device: torch.device, tokens: int, vocabulary: int) -> list[Case]:
    """The loss of logits, which become its gradient: read twice, written once."""

    def prepare(function: Callable[[Tensor, Tensor], Tensor]) -> list[Callable[[], Any]]:
        logits = torch.randn(tokens, vocabulary, dtype=torch.bfloat16, device=device)
        labels = torch.randint(vocabulary, (tokens,), device=device)
        return [lambda: function(logits, labels)]

    shape, moved = f"N{tokens} V{vocabulary}", 3 * 2 * tokens * vocabulary
    in_torch, by_kernel = loss_reference.cross_entropy_, cross_entropy_
    return [
        Case("cross_entropy (torch)", shape, "bf16", lambda: prepare(in_torch), bytes=moved),
        Case("cross_entropy", shape, "bf16", lambda: prepare(by_kernel), bytes=moved, goal=Goal(80, "%")),
    ]
