"""The mixture-of-experts feed-forward: router, dispatcher and experts, each replaceable."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .balance import RoutingStatistics, load_balancing_loss, mean_of_tokens, normalised_scores, z_loss
from .dispatcher import Dispatcher, Routes, dispatch_locally
from .experts import Experts
from .feed_forward import FeedForward
from .matmul import Linear
from .memory_kind import NO_MEMORIES, LayerMemories
from .recomputation import recomputing
from .router import Router, Routing, count_choices, stable_top_k
from .shape import Shape

# Shape letters: B sequences, T tokens, H hidden size, E experts, K experts per token.


class SharedExperts(FeedForward):
    """The experts that every token visits, as one feed-forward. With `moe.shared_expert_gate`, a learned sigmoid scales
    their output for each token (Qwen2-MoE)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape.hidden_size, shape.shared_width)
        gated = shape.moe.get("shared_expert_gate", False)  # models saved before gates existed lack the field
        self.output_gate = Linear(shape.hidden_size, 1, bias=False) if gated else None

    def forward(self, hidden: Tensor, memories: LayerMemories = NO_MEMORIES) -> Tensor:
        """hidden [.., H] -> [.., H]."""
        out = super().forward(hidden, memories)
        return out if self.output_gate is None else out * self.output_gate(hidden).sigmoid()


class ExpertLayer(nn.Module):
    """Routed and shared experts, with balance losses that act on the backward pass only.

    `loss_scale` multiplies the injected losses (a pipeline that accumulates M micro-batches sets 1/M). `on_routing`, if
    set, receives the statistics of each routing in a forward pass, but not in a recomputation. `padding`, if set, tells
    which positions [B, T] of the hidden states hold no token. They are routed like all others, but count in losses and
    statistics only with `moe.balance_padding`. `dispatcher` decides where the experts run. Subclasses own the routers.
    """

    def __init__(self, shape: Shape, local_experts: range | None = None) -> None:
        super().__init__()
        self.moe = shape.moe
        self.experts = Experts(shape, local_experts)
        self.shared_experts = SharedExperts(shape) if self.moe.num_shared_experts else None
        self.dispatcher: Dispatcher = dispatch_locally
        self.loss_scale = 1.0
        self.on_routing: Callable[[RoutingStatistics], None] | None = None
        self.padding: Callable[[], Tensor | None] | None = None

    def iteration_routers(self) -> list[Router]:
        """The router of each pass of a token through the experts."""
        raise NotImplementedError

    def _experts_of(self, hidden_BTH: Tensor, routes: Routes, shared: bool = True) -> Tensor:
        """The summed outputs [B, T, H] of the chosen experts and, if `shared`, the shared experts for hidden
        [B, T, H]."""
        shared_experts = self.shared_experts if shared else None
        return routes(hidden_BTH.flatten(0, 1), self.experts, shared_experts).view_as(hidden_BTH)

    def _real_BT(self) -> Tensor | None:
        """bool, True for positions that count in the balance; None: all positions count."""
        if self.padding is None or self.moe.get("balance_padding", False):
            return None
        padding_BT = self.padding()
        return None if padding_BT is None else ~padding_BT

    def _balanced(self, routing: Routing, sequences: int) -> tuple[Routing, RoutingStatistics | None]:
        """The routing, with weights that carry the balance losses into the backward pass, and its statistics if
        `on_routing` is set."""
        moe = self.moe
        losses = {"aux_loss": moe.aux_loss, "sequence_aux_loss": moe.sequence_aux_loss, "z_loss": moe.z_loss}
        inject = torch.is_grad_enabled() and any(losses.values())
        observe = None if recomputing() else self.on_routing
        if not (inject or observe):
            return routing, None
        values = dict.fromkeys(losses, routing.scores_TE.new_zeros(()))
        scores_TE = normalised_scores(routing.scores_TE, moe.score_function)
        real_BT = self._real_BT()
        real_T = None if real_BT is None else real_BT.flatten()
        if moe.aux_loss or moe.sequence_aux_loss:
            # DeepSeek-V3's eq. 18 counts the best scores without selection bias and without groups.
            plain = moe.num_groups == 1 and not moe.selection_bias
            experts_TK = routing.experts_TK if plain else stable_top_k(scores_TE.detach(), moe.top_k)
            if moe.aux_loss:
                values["aux_loss"] = load_balancing_loss(
                    scores_TE[None], experts_TK[None], None if real_T is None else real_T[None]
                )[0]
            if moe.sequence_aux_loss:
                scores_BTE = scores_TE.unflatten(0, (sequences, -1))
                experts_BTK = experts_TK.unflatten(0, (sequences, -1))
                values["sequence_aux_loss"] = load_balancing_loss(scores_BTE, experts_BTK, real_BT).mean()
        if moe.z_loss:
            values["z_loss"] = z_loss(routing.logits_TE, real_T)
        statistics = None
        if observe:
            detached = {name: value.detach() for name, value in values.items()}
            entropy = mean_of_tokens(torch.special.entr(scores_TE.detach()).sum(-1), real_T)
            counts_E, excluded = routing.counts_E, routing.counts_E.new_zeros(())
            if real_T is not None:
                counts_E = count_choices(routing.experts_TK, moe.num_experts, real_T[:, None])
                excluded = routing.counts_E.sum() - counts_E.sum()
            statistics = RoutingStatistics(counts_E, excluded, **detached, entropy=entropy)
        if not inject:
            return routing, statistics
        total = sum(losses[name] * values[name] for name in losses if losses[name])
        return routing._replace(weights_TK=_Inject.apply(routing.weights_TK, total, self.loss_scale)), statistics


class MoE(ExpertLayer):
    """The experts of a layer, chosen and run once."""

    def __init__(self, shape: Shape, local_experts: range | None = None) -> None:
        super().__init__(shape, local_experts)
        self.router = Router(shape)

    def forward(self, hidden_BTH: Tensor) -> Tensor:
        """hidden [B, T, H] -> [B, T, H]; a row of the batch is a sequence."""
        routing, statistics = self._balanced(self.router(hidden_BTH.flatten(0, 1)), sequences=hidden_BTH.shape[0])
        if statistics is not None and self.on_routing is not None:
            self.on_routing(statistics)
        return self._experts_of(hidden_BTH, self.dispatcher(routing))

    def iteration_routers(self) -> list[Router]:
        return [self.router]


class _Inject(torch.autograd.Function):
    """Returns x unchanged. In the backward pass, `loss` gets the gradient `scale`, as a part of the training loss
    would."""

    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.dtype = scale, loss.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, torch.full((), ctx.scale, dtype=ctx.dtype, device=grad.device), None
