"""Forward and backward of a layer of experts, in kmem and in the Qwen3-MoE block of Transformers."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kmem.bench.contest import Runner
from kmem.config import Config, ConfigError, UserError, parse_config
from kmem.model.init import initialise_
from kmem.model.moe import MoE

LARGEST_DIFFERENCE = 1e-5
"""Largest difference allowed between the outputs or gradients of both sides, as a share of the largest value of each.
"""


@dataclass(frozen=True)
class Layer:
    """One side of the comparison; `weights` are the router, gates with ups, and downs, in the layout of both sides."""

    module: nn.Module
    weights: tuple[nn.Parameter, nn.Parameter, nn.Parameter]


def our_layer(config: Config) -> Layer:
    """kmem's layer with the initial weights of the configuration."""
    shape = config.model.shape
    moe = MoE(shape)
    initialise_(moe, shape, config.train.init_seed)
    return Layer(moe, (moe.router.weight, moe.experts.gate_up_proj, moe.experts.down_proj))


def peer_layer(config: Config, implementation: str) -> Layer:
    """The Qwen3-MoE block with kmem's weights and one of Transformers' ways to run experts.

    Raises:
        ConfigError: the layer has a part that the block lacks; names the field.
    """
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    moe = config.model.moe
    if moe is None:
        raise ConfigError("model.moe: a model without experts has no layer to compare")
    absent = {
        "score_function": "softmax", "num_groups": 1, "num_shared_experts": 0, "selection_bias": False,
        "scaling_factor": 1, "aux_loss": 0, "sequence_aux_loss": 0, "z_loss": 0, "chain": None,
    }  # fmt: skip
    for field, plain in absent.items():
        if getattr(moe, field) != plain:
            raise ConfigError(
                f"model.moe.{field}: the block of Transformers does not have it; `--features` measures its cost"
            )
    chosen = Qwen3MoeConfig(
        hidden_size=config.model.hidden_size,
        num_experts=moe.num_experts,
        num_experts_per_tok=moe.top_k,
        moe_intermediate_size=moe.intermediate_size,
        norm_topk_prob=moe.renormalize,
        hidden_act="silu",
    )
    chosen._experts_implementation = implementation
    block = Qwen3MoeSparseMoeBlock(chosen)
    weights = (block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj)
    with torch.no_grad():
        for weight, source in zip(weights, our_layer(config).weights, strict=True):
            weight.copy_(source)
    return Layer(block, weights)


def layer_input(config: Config) -> tuple[Tensor, Tensor]:
    """(hidden, gradient of the output), both [B, T, H] from a standard normal, like the output of a norm."""
    generator = torch.Generator().manual_seed(config.train.init_seed)
    size = (config.train.micro_batch_size, config.data.sequence_length, config.model.hidden_size)
    hidden, gradient = (torch.randn(size, generator=generator) for _ in range(2))
    return hidden.requires_grad_(), gradient


def forward_backward(module: Callable[[Tensor], Tensor], leaves: Sequence[Tensor], gradient: Tensor) -> Tensor:
    """The output for the first of `leaves`, after a backward pass that gives all of them a fresh gradient."""
    for leaf in leaves:
        leaf.grad = None
    out = module(leaves[0])
    out.backward(gradient)
    return out.detach()


def settle_allocator() -> None:
    """Bring glibc's allocator into the state of a training process, whose largest buffers are longer than a layer's.

    The allocator returns freed memory to the system until a longer block has been freed once. A layer alone never frees
    one, and would spend a tenth of its time on first touches of the same memory in every pass.
    """
    longest = torch.ones(31 << 20, dtype=torch.uint8)  # blocks above 32 MiB do not change the allocator's threshold
    del longest


def check_equal(config: Config, peers: dict[str, Layer]) -> dict[str, float]:
    """Largest difference of each peer's output and gradients from kmem's, as a share of the largest value.

    Raises:
        UserError: a difference is more than LARGEST_DIFFERENCE; names the peer and the tensor.
    """
    names = ("output", "gradient of the input", "of the router", "of gates and ups", "of downs")
    expected = _values(our_layer(config), config)
    largest = {}
    for peer, layer in peers.items():
        differences = dict(zip(names, largest_differences(_values(layer, config), expected), strict=True))
        # `not <=`, so that NaN does not count as agreement
        wrong = [f"{name} {share:.1e}" for name, share in differences.items() if not share <= LARGEST_DIFFERENCE]
        if wrong:
            raise UserError(f"{peer} differs from kmem by more than {LARGEST_DIFFERENCE:g}: {', '.join(wrong)}")
        largest[peer] = max(differences.values())
    return largest


def largest_differences(values: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """The largest difference of each tensor from the expected one, as a share of that one's largest value."""
    pairs = zip(values, expected, strict=True)
    return [float((value - right).abs().max() / right.abs().max()) for value, right in pairs]


def layer_runner(tree: dict[str, Any], implementation: str | None) -> Runner:
    """A runner of forward and backward: of kmem's layer, or of the block with an implementation of Transformers."""
    settle_allocator()
    config = parse_config(tree)
    layer = our_layer(config) if implementation is None else peer_layer(config, implementation)
    hidden, gradient = layer_input(config)
    leaves = (hidden, *layer.weights)

    def run(steps: int) -> dict[str, Any]:
        began = time.perf_counter()
        for _ in range(steps):
            out = forward_backward(layer.module, leaves, gradient)
        return {"seconds": time.perf_counter() - began, "losses": [float(out.mul(gradient).mean())] * steps}

    return run


def _values(layer: Layer, config: Config) -> list[Tensor]:
    hidden, gradient = layer_input(config)
    leaves = (hidden, *layer.weights)
    out = forward_backward(layer.module, leaves, gradient)
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert len(gradients) == len(leaves)
    return [out, *gradients]
