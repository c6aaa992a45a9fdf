"""Chain-of-Experts: a token passes C times through the experts of its layer (arXiv 2506.18945).

h is the residual stream, n_t the norm of iteration t (n_0 is the decoder layer's feed_forward_norm), F_t the weighted
sum of the experts that iteration t chooses, plus the shared experts where they run, and w_t the retrofit scale (all
ones without a retrofit scale, and for t = 0). For t = 0 .. C-1:

    x_0     = h                                        stream: prenorm
            = n_0(h)                                   stream: normed
    y_t     = w_t * F_t(u_t)
    x_{t+1} = x_t + y_t                                residual: inner | inner_outer
            = x_0 + y_t                                residual: init
            = y_t                                      residual: outer | none
    u_0     = n_0(h)
    u_{t+1} = n_{t+1}(x_{t+1})                         norm: per_iteration
            = u_t + y_t | u_0 + y_t | y_t              norm: once, by residual as x_{t+1}
    out     = h + x_C                                  residual: outer | inner_outer
            = x_C                                      otherwise

So the layer's residual connection is part of the chain, and `DecoderLayer` adds nothing. With C = 1, prenorm and inner,
out = h + F_0(n_0(h)): the MoE layer, operation by operation. The released code is `stream: normed, norm: once`, where
x_t and u_t are the same. With outer and none, the stream makes no difference.

With `retrofit_scale`, x_{t+1} = x_t + y_t and u_{t+1} = u_t + y_t for t >= 1 under every residual: at w = 0 the output
is h + F_0(n_0(h)) to the last bit, the layer in which the experts were trained. `residual: outer, norm: once` is then
the published conversion (branch convert_moe_to_coe: the first iteration without inner residual, the rest with it).

Gates: with `independent`, iteration t has its own router t; with `shared`, one router routes u_t in every iteration;
with `frozen`, it routes once, and all iterations use its choice and weights. Balance losses are added per routing: C
times, or once when frozen.

Canonical names below layers.{i}.feed_forward: experts.* and shared_experts.* as in a MoE layer; routers.{t}.weight and
routers.{t}.selection_bias for independent gates, router.* otherwise; norms.{t}.weight and retrofit_scale.{t} [H] for
t >= 1. n_0 stays layers.{i}.feed_forward_norm.weight.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .balance import RoutingStatistics, mean_of_tokens
from .dispatcher import Routes
from .moe import ExpertLayer
from .norm import RMSNorm
from .router import Router, Routing, count_choices
from .shape import Shape

# Shape letters: B sequences, T tokens, H hidden size, E experts, K experts per token and iteration.


@dataclass(frozen=True)
class IterationStatistics(RoutingStatistics):
    """The routing of one iteration. With frozen gates, later iterations repeat its counts with losses of zero, since
    the losses act once."""

    iteration: int
    update_size: Tensor
    """Mean over tokens of |x_{t+1} - x_t| / |x_t|."""
    overlap: Tensor
    """Share of this iteration's choices that the previous iteration made for the same token; zero in the first one."""
    coactivation_EE: Tensor | None
    """int64 [experts of the previous iteration, experts of this one]: number of tokens that chose both; None in the
    first iteration and if it is not observed."""


class RetrofitScale(nn.ParameterDict):
    """Iteration -> factors [H] on its update. It is called, because hooks that move weights see only calls."""

    __call__ = nn.Module.__call__  # torch's dictionary takes one argument

    def forward(self, iteration: str, update: Tensor) -> Tensor:
        return self[iteration] * update


class ChainOfExperts(ExpertLayer):
    """C passes through one set of experts, the layer's residual connection included; the module docstring gives the
    equations. `on_routing` receives one `IterationStatistics` per iteration."""

    def __init__(self, shape: Shape, local_experts: range | None = None) -> None:
        super().__init__(shape, local_experts)
        self.chain = chain = shape.moe.chain
        later = [str(t) for t in range(1, chain.iterations)]
        if chain.gates == "independent":
            self.routers = nn.ModuleList(Router(shape) for _ in range(chain.iterations))
        else:
            self.router = Router(shape)
        self.norms = self.retrofit_scale = None
        if chain.norm == "per_iteration":
            self.norms = nn.ModuleDict({t: RMSNorm(shape.hidden_size, shape.norm_eps) for t in later})
        if chain.retrofit_scale:
            self.retrofit_scale = RetrofitScale({t: nn.Parameter(torch.zeros(shape.hidden_size)) for t in later})
        self.observe_coactivation = False

    def iteration_routers(self) -> list[Router]:
        if self.chain.gates == "independent":
            return [router for router in self.routers if isinstance(router, Router)]
        return [self.router] * self.chain.iterations

    def forward(self, hidden_BTH: Tensor, normed_BTH: Tensor) -> Tensor:
        """The residual stream h and n_0(h), both [B, T, H] -> the layer's output [B, T, H]."""
        chain = self.chain
        start = state = normed_BTH if chain.stream == "normed" else hidden_BTH  # x_t
        seen = normed_BTH  # u_t
        routing: Routing | None = None
        routes: Routes | None = None
        statistics: RoutingStatistics | None = None
        for iteration, router in enumerate(self.iteration_routers()):
            if iteration and self.norms is not None:
                seen = self.norms[str(iteration)](state)
            before = routing
            if routing is None or routes is None or chain.gates != "frozen":
                routing, statistics = self._balanced(router(seen.flatten(0, 1)), sequences=seen.shape[0])
                routes = self.dispatcher(routing)
            update = self._experts_of(seen, routes, shared=iteration == 0 or chain.shared_experts == "each_iteration")
            if iteration and self.retrofit_scale is not None:
                update = self.retrofit_scale(str(iteration), update)
            previous, state = state, self._advanced(iteration, state, update, start)
            if self.norms is None:
                seen = state if seen is previous else self._advanced(iteration, seen, update, normed_BTH)
            if statistics is not None and self.on_routing is not None:
                self.on_routing(self._observed(iteration, statistics, before, routing, previous, state))
        return hidden_BTH + state if chain.residual in ("outer", "inner_outer") else state

    def _advanced(self, iteration: int, state: Tensor, update: Tensor, start: Tensor) -> Tensor:
        """The state after an iteration."""
        if self.chain.residual in ("inner", "inner_outer") or (iteration and self.retrofit_scale is not None):
            return state + update
        return start + update if self.chain.residual == "init" else update

    @torch.no_grad()
    def _observed(
        self,
        iteration: int,
        statistics: RoutingStatistics,
        before: Routing | None,
        routing: Routing,
        previous: Tensor,
        state: Tensor,
    ) -> IterationStatistics:
        # Always in fp32: in a lower precision, the difference of two near states would vanish.
        size = torch.linalg.vector_norm(state.float() - previous.float(), dim=-1)
        scale = torch.linalg.vector_norm(previous, dim=-1, dtype=torch.float32).clamp_min(1e-12)
        overlap, coactivation = size.new_zeros(()), None
        real_BT = self._real_BT()
        real_T = None if real_BT is None else real_BT.flatten()
        if before is not None:
            pairs_TKK = before.experts_TK[:, :, None] == routing.experts_TK[:, None, :]
            overlap = mean_of_tokens(pairs_TKK.sum((1, 2)) / routing.experts_TK.shape[1], real_T)
            if self.observe_coactivation:
                experts = self.moe.num_experts
                pairs_TKK = before.experts_TK[:, :, None] * experts + routing.experts_TK[:, None, :]
                counted = None if real_T is None else real_T[:, None, None]
                coactivation = count_choices(pairs_TKK, experts**2, counted).view(experts, experts)
            if before is routing:  # frozen
                zero = torch.zeros_like(statistics.aux_loss)
                statistics = replace(statistics, aux_loss=zero, sequence_aux_loss=zero, z_loss=zero)
        return IterationStatistics(
            **vars(statistics),
            iteration=iteration,
            update_size=mean_of_tokens(size / scale, real_BT),
            overlap=overlap,
            coactivation_EE=coactivation,
        )
