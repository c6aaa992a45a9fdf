"""The cost of each feature of a layer of experts: with and without it, measured in turn in one process."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kmem.bench.compare import measure
from kmem.bench.contest import in_turn
from kmem.bench.experts import forward_backward, layer_input, settle_allocator
from kmem.config import Config, ConfigError, parse_config
from kmem.model.chain_of_experts import ChainOfExperts
from kmem.model.decoder import build_connection, build_feed_forward
from kmem.model.hyper_connections import expand_branches
from kmem.model.init import initialise_
from kmem.model.moe import ExpertLayer
from kmem.model.norm import RMSNorm


@dataclass(frozen=True)
class Feature:
    """A change to the plain layer."""

    subject: str
    name: str
    moe: dict[str, Any]
    """Fields of `model.moe` that differ from the plain layer's."""
    branches: int = 1
    recompute: bool = False
    observe: bool = False
    """Whether routing statistics are taken, as in training."""


@dataclass(frozen=True)
class Cost:
    """Cost of the second half of a decoder layer with a feature: norm, experts and residual connection."""

    subject: str
    feature: str
    ms: float
    """Median time of forward and backward."""
    times: float
    """Time as a multiple of the plain layer's, median over rounds that measure one after the other."""
    spread: tuple[float, float]
    """Lower and upper quartile of `times` over the rounds."""
    expert_calls: int
    """Experts that a token passes, with shared ones."""
    parameters: int
    active_parameters: int
    """Parameters that take part in the computation of a token, each counted once."""
    saved_bytes: int
    """Memory held from forward for backward, with the layer's input and without parameters."""


class ExpertHalf(nn.Module):
    """The second half of a decoder layer, computed as in `DecoderLayer`."""

    def __init__(self, config: Config, feature: Feature) -> None:
        super().__init__()
        shape = config.model.shape
        self.feed_forward_connection = build_connection(shape)
        self.feed_forward_norm = RMSNorm(shape.hidden_size, shape.norm_eps)
        experts = build_feed_forward(shape, 0, None)
        assert isinstance(experts, ExpertLayer)
        if feature.observe:
            experts.on_routing = lambda statistics: None
        self.feed_forward, self.recompute = experts, feature.recompute
        initialise_(self, shape, config.train.init_seed, "layers.0")

    def forward(self, hidden: Tensor) -> Tensor:
        return checkpoint(self._half, hidden, use_reentrant=False) if self.recompute else self._half(hidden)

    def _half(self, hidden: Tensor) -> Tensor:
        if isinstance(self.feed_forward, ChainOfExperts):
            return self.feed_forward(hidden, self.feed_forward_norm(hidden))
        return self.feed_forward_connection(hidden, lambda x: self.feed_forward(self.feed_forward_norm(x)))


def features(config: Config) -> list[Feature]:
    """The plain layer, then the changes that its shape allows.

    Raises:
        ConfigError: the model has no experts.
    """
    moe = config.model.moe
    if moe is None:
        raise ConfigError("model.moe: a model without experts has no layer to measure")
    experts, top_k, width = moe.num_experts, moe.top_k, moe.intermediate_size
    allowed = [Feature("", "plain", {})]

    def add(subject: str, name: str, changes: dict[str, Any], **rest: Any) -> None:
        try:
            feature = Feature(subject, name, changes, **rest)
            with_feature(config, feature)
        except ConfigError:
            return  # not possible with this shape, such as half of one expert
        allowed.append(feature)

    for k in (1, 2, 4, 8):
        if k != top_k:
            add("experts per token", f"top_k {k}", {"top_k": k})
    for count in (8, 16, 32, 64):
        if count != experts:
            add("experts", f"{count} of the same width", {"num_experts": count})
    for finer in (0.5, 2, 4):
        sizes = {
            "num_experts": int(experts * finer),
            "top_k": int(top_k * finer),
            "intermediate_size": int(width / finer),
        }
        label = "top-{top_k} of {num_experts} of width {intermediate_size}".format_map(sizes)
        if top_k * finer >= 1:
            add("granularity", label, sizes)
    add("shared expert", "one more", {"num_shared_experts": 1})
    add("shared expert", "in place of a routed one", {"num_shared_experts": 1, "top_k": top_k - 1})
    add("choice", "sigmoid scores", {"score_function": "sigmoid"})
    add("choice", "not renormalised", {"renormalize": False})
    add("choice", "from 2 of 4 groups", {"num_groups": 4, "top_groups": 2})
    add("choice", "selection bias", {"selection_bias": True})
    balance = {"aux_loss": 1e-3, "sequence_aux_loss": 1e-4, "z_loss": 1e-3}
    for field, coefficient in balance.items():
        add("balance", field, {field: coefficient})
    add("balance", "all three losses", balance)
    add("balance", "statistics, as in training", {}, observe=True)
    for k in sorted({top_k // 2, top_k} - {0}):
        calls = "equal" if 2 * k == top_k else "double"
        chain = {"top_k": k, "chain": {"iterations": 2}}
        add("chain of 2", f"{calls} calls", chain)
        for gates in ("shared", "frozen"):
            add("chain of 2", f"{calls} calls, gates {gates}", {"top_k": k, "chain": {"iterations": 2, "gates": gates}})
    half = max(top_k // 2, 1)
    for place in ("each_iteration", "once"):
        chain = {"iterations": 2, "shared_experts": place}
        add("chain of 2", f"top-{half}, 1 shared {place}", {"top_k": half, "num_shared_experts": 1, "chain": chain})
    for field, value in (("norm", "once"), ("residual", "outer"), ("stream", "normed"), ("retrofit_scale", True)):
        choice = {"top_k": half, "chain": {"iterations": 2, field: value}}
        add("chain of 2", f"top-{half}, {field} {str(value).lower()}", choice)
    add("chain of 2", f"top-{half}, observed as in training", {"top_k": half, "chain": {"iterations": 2}}, observe=True)
    add("chain of 3", f"top-{half}", {"top_k": half, "chain": {"iterations": 3}})
    add("around it", "recomputed in backward", {}, recompute=True)
    add("around it", "4 branches (hyper-connections)", {}, branches=4)
    return allowed


def with_feature(config: Config, feature: Feature) -> Config:
    """A one-layer model with the feature. It keeps the shape of the configuration's experts, not their features."""
    assert config.model.moe is not None
    tree = config.model_dump(mode="json")
    model = tree["model"]
    kept = ("num_experts", "top_k", "intermediate_size")
    model |= {"num_layers": 1, "engram": None, "moe": {field: model["moe"][field] for field in kept} | feature.moe}
    model["hyper_connections"] = {"branches": feature.branches} if feature.branches > 1 else None
    return parse_config(tree)


def feature_costs(
    config: Config, chosen: Sequence[Feature], rounds: int, on_feature: Callable[[str], None] = lambda name: None
) -> list[Cost]:
    """The cost of each feature; `chosen[0]` is the plain layer that the others are compared with."""
    settle_allocator()
    plain_step, _, _ = _prepared(with_feature(config, chosen[0]), chosen[0])
    costs = []
    for feature in chosen:
        own = with_feature(config, feature)
        size = measure(own)
        step, module, hidden = _prepared(own, feature)
        saved = saved_bytes(module, hidden)
        seconds = in_turn([plain_step, step], rounds)
        times = [theirs / plain for plain, theirs in zip(*seconds, strict=True)]
        quartiles = statistics.quantiles(times, n=4) if rounds > 1 else times * 3
        parameters = sum(parameter.numel() for parameter in module.parameters())
        costs.append(
            Cost(
                feature.subject,
                feature.name,
                1e3 * statistics.median(seconds[1]),
                statistics.median(times),
                (quartiles[0], quartiles[2]),
                size.expert_calls,
                parameters,
                parameters - (size.total - size.active),  # only experts are inactive for a token
                saved,
            )
        )
        on_feature(feature.name)
    return costs


def saved_bytes(module: nn.Module, hidden: Tensor) -> int:
    """Bytes that a forward pass holds for backward: the input and all saved tensors except parameters and buffers.
    Views of one storage count once, with the whole storage."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    held = {hidden.untyped_storage().data_ptr(): hidden.untyped_storage().nbytes()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = module(hidden)  # keeps the saved tensors alive, so that no address is used twice
    del out
    return sum(held.values())


def _prepared(config: Config, feature: Feature) -> tuple[Callable[[], Tensor], ExpertHalf, Tensor]:
    """(a step that can be timed, its module, the module's input) for the configuration `with_feature`."""
    module = ExpertHalf(config, feature)
    hidden = expand_branches(layer_input(config)[0].detach(), feature.branches).requires_grad_()
    gradient = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    leaves = (hidden, *module.parameters())
    return lambda: forward_backward(module, leaves, gradient), module, hidden
