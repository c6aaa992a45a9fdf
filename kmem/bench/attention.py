"""Attention within packed documents, its dense mask and plain causal attention, in turn."""

import argparse
from functools import partial

import torch

from kmem.bench.attention_command import AttentionMeasurement
from kmem.bench.contest import in_turn
from kmem.bench.machine import torch_threads
from kmem.model.attention import attend
from kmem.model.mask import Documents

_MOST_MASK_BYTES = 1 << 30


def measure(length: int, arguments: argparse.Namespace) -> AttentionMeasurement:
    """Time sequences of so many tokens.

    Args:
        arguments: tokens, document, heads, width, device, threads and repeats, as in `kmem bench attention --help`.
    """
    generator = torch.Generator().manual_seed(0)
    rows, device = max(1, arguments.tokens // length), torch.device(arguments.device)
    numbers = (torch.rand(rows, length, generator=generator) < 1 / arguments.document).cumsum(1)
    numbers[:, length // 2 :] += 1  # at least two documents
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    counts = (arguments.heads, max(1, arguments.heads // 4), max(1, arguments.heads // 4))
    query, key, value = (
        torch.randn(rows, length, count, arguments.width, generator=generator).to(device, dtype).requires_grad_()
        for count in counts
    )
    documents = Documents.of(numbers)
    assert documents is not None
    candidates: list[Documents | torch.Tensor | None] = [documents.to(device), None]
    if 4 * rows * length**2 <= _MOST_MASK_BYTES:
        candidates.append((numbers[:, None, :, None] == numbers[:, None, None, :]).tril().to(device))

    def step(mask: Documents | torch.Tensor | None) -> None:
        out = attend(query, key, value, mask)
        torch.autograd.grad(out.sum(), (query, key, value))
        if device.type == "cuda":
            torch.cuda.synchronize()

    with torch_threads(arguments.threads):
        times = in_turn([partial(step, mask) for mask in candidates], arguments.repeats)
    packed, causal, *masked = (1000 * min(seconds) for seconds in times)
    number = int((numbers[:, 1:] != numbers[:, :-1]).sum()) + rows
    return AttentionMeasurement(length, number, packed, masked[0] if masked else None, causal)
