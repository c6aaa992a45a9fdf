"""Selective recomputation of whole layers, at sizes where the CPU's own products serve: the same to the last bit."""

import pytest
import torch

from kmem.model.decoder import DecoderLayer
from kmem.model.mask import Documents
from kmem.parallel.selective_recompute import checkpoint_selectively
from tests.model import tiny

MLA = {
    "kind": "mla", "num_heads": 4, "kv_lora_rank": 16, "q_lora_rank": None, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
LAYERS = {
    "experts": (tiny.GQA, {**tiny.SIGMOID, "num_shared_experts": 1}, {}),
    "chain": (tiny.GQA, {**tiny.SOFTMAX, "chain": {"iterations": 2}}, {}),
    "branches": (tiny.GQA, tiny.SOFTMAX, {"hyper_connections": {"branches": 4}}),
    "dense": (tiny.GQA, None, {"intermediate_size": 48}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_are_the_same_bits(name, packed, dtype):
    attention, moe, changes = LAYERS[name]
    shape = tiny.shape(attention, moe, **changes)
    layer = tiny.randomise_(DecoderLayer(shape, 0)).to(dtype)
    rows, tokens = 2, 96
    position_ids = torch.arange(tokens).expand(rows, -1)
    documents = Documents.of((torch.arange(tokens) // 37).expand(rows, -1)) if packed else None
    size = (rows, tokens, 32) if shape.branches == 1 else (rows, tokens, shape.branches, 32)
    results = []
    for recomputed in (False, True):
        hidden = tiny.random(*size).to(dtype).requires_grad_()

        def run(hidden):
            return layer(hidden, position_ids, documents)

        out = checkpoint_selectively(run, hidden) if recomputed else run(hidden)
        grads = torch.autograd.grad(out, [hidden, *layer.parameters()], tiny.random(*size, seed=1).to(dtype))
        results.append([out.detach(), *grads])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))
