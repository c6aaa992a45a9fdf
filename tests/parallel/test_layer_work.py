"""What a layer asks of a GPU: right where it can be known otherwise, and within budgets that only grow on purpose."""

from math import prod

import pytest
import torch

from kmem.config import load_config, parse_config
from kmem.model.memory_kinds import layer_kinds
from kmem.model.parameter_counts import count_parameters
from kmem.model.rope import rotation
from kmem.parallel.layer_work import _counted, layer_work, loss_work
from tests.distributed.training_case import small_config

BUDGETS = {
    # layer of Engram-27B: operators of the forward and the backward pass with kernels, and of the torch code
    2: ((35, 43), (218, 578)),
    1: ((48, 63), (273, 694)),
}


@pytest.mark.parametrize("layer", BUDGETS)
def test_operators_of_a_layer_are_within_their_budget(layer):
    """And the host waits for none of them."""
    config = load_config("engram-27b")
    for with_kernels, (forward, backward) in zip((True, False), BUDGETS[layer], strict=True):
        work = layer_work(config, layer, recompute="none", with_kernels=with_kernels)
        assert work.forward.operators.total() <= forward
        assert work.backward.operators.total() <= backward
        assert not work.forward.waits + work.backward.waits


def test_bytes_of_a_layer_are_within_their_budget():
    """With four branches: about a third of what the torch code moves. A micro-batch has 4,096 tokens."""
    config = load_config("engram-27b")
    moved = {
        kernels: [each.bytes.total() / 1e9 for each in (work.forward, work.backward)]
        for kernels in (True, False)
        for work in [layer_work(config, 2, recompute="none", with_kernels=kernels)]
    }
    assert moved[True][0] <= 4.1
    assert moved[True][1] <= 7.5
    assert sum(moved[True]) < 0.4 * sum(moved[False])


def test_the_loss_is_within_its_budget():
    """Of 4,096 tokens and a vocabulary of 129,280: logits of 1 GiB, which become the gradient, and the gradient of the
    weight in bf16. Logits in fp32 would take 2 GiB more."""
    work, torch_code = (loss_work(load_config("engram-27b"), with_kernels) for with_kernels in (True, False))
    assert work.forward.operators.total() + work.backward.operators.total() <= 19
    assert work.kept + work.extra <= 1.9e9
    assert work.forward.bytes.total() <= 6.6e9
    assert torch_code.kept + torch_code.extra > 4e9


def gemm(work):
    products = ("aten::mm", "aten::addmm", "kmem_meta::grouped_mm", "kmem_meta::grouped_mm_backward")
    return sum(work.flop[name] for name in products)


@pytest.mark.parametrize("name", ["engram-27b", "moe-27b", "bank/160m", "engram-150m"])
def test_flop_of_products_follow_from_the_parameters(name):
    config = load_config(name, ["model.vocab_size=8192"])
    tokens = config.train.micro_batch_size * config.data.sequence_length
    counts = count_parameters(config.model.shape)
    for index in range(4):
        none, selective, full = (layer_work(config, index, recompute=kind) for kind in ("none", "selective", "full"))
        # Norms, connections and convolutions multiply by few parameters, and not in products.
        assert gemm(none.forward) == pytest.approx(2 * tokens * counts.layers[index], rel=0.02)
        assert gemm(none.backward) == 2 * gemm(none.forward)
        assert gemm(selective.backward) == gemm(none.backward)  # products are kept
        # All but a last product, whose result no gradient needs.
        assert 0.6 * gemm(none.forward) <= gemm(full.backward) - gemm(none.backward) <= gemm(none.forward)
        assert full.kept < selective.kept < none.kept
        assert full.kept == tokens * config.model.shape.branches * config.model.hidden_size * 2
    assert gemm(loss_work(config).forward) == 6 * tokens * counts.head


def test_memory_of_a_chain_of_known_operations():
    """[64, 32] in fp32 is 8 KiB. sigmoid keeps its output, the product after it its input, which is the same."""
    layer = torch.nn.Linear(32, 32, bias=False, device="meta")
    hidden = torch.empty(1, 64, 32, device="meta")
    work = _counted(lambda x: layer(x.sigmoid()).sigmoid(), layer, hidden, "none", True)
    unit = 64 * 32 * 4
    assert work.kept == unit + unit  # the input, and what the sigmoid gave; the output is the next layer's
    assert work.forward.operators == {"aten::sigmoid": 2, "aten::mm": 1}
    assert work.forward.flop.total() == 2 * 64 * 32 * 32
    # The last sigmoid's output and gradient, that of the product's output, the weight's, then those of the input.
    assert 2 * unit <= work.extra <= 5 * unit


MEMORIES = ("bank", "engram", "over-encoding", "per-layer", "product-key", "stem")
KINDS = {
    "plain": small_config(),
    "branches": small_config(model__hyper_connections={"branches": 4}),
    "latent attention": small_config(
        model__attention={"kind": "mla", "num_heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
                          "qk_rope_head_dim": 8, "v_head_dim": 8},
    ),
    "chain": small_config(model__moe__chain={"iterations": 2}),
    **{name: f"compare/memories/{name}" for name in MEMORIES},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_is_what_autograd_saves(kind):
    """Counted in another way: by the storages that autograd packs. It packs what a layer is given, too."""
    source, kinds = KINDS[kind], set()
    config = load_config(source) if isinstance(source, str) else parse_config(source)
    shape, size = config.model.shape, (config.train.micro_batch_size, config.data.sequence_length)
    rotary = sum(part.nbytes for part in rotation(shape, torch.empty(size, dtype=torch.int64, device="meta")))
    for index in range(config.model.num_layers):
        packed = {}

        def pack(tensor, packed=packed):
            if not isinstance(tensor if tensor._base is None else tensor._base, torch.nn.Parameter):
                packed[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            work = layer_work(config, index, recompute="none")
        if packed:  # else the layer is like one before it
            kinds.add(work.kept)
            rows = sum(4 * kind.row_values(shape, index) for kind in layer_kinds(shape, index)) * prod(size)
            given = sum(storage.nbytes() for storage in packed.values()) - work.kept
            assert rotary <= given <= rotary + rows
    assert kinds
