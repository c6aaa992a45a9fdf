"""All-to-all dispatch: every rank of an expert group owns a contiguous slice of the experts.

Shape letters: T tokens of this rank, K choices per token, N = T * K rows sent, M rows received, R ranks of the group,
E experts, e = E / R experts per rank; rank r owns experts [r * e, (r + 1) * e).
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from kmem.model.dispatcher import Routes, Shared, combine_rows, gather_rows, sort_by_expert
from kmem.model.experts import Experts
from kmem.model.router import Routing


@dataclass(frozen=True)
class AllToAllDispatcher:
    """Sends each token's row to the ranks that own its experts, runs the experts there, and sends the outputs back.

    Dropless. The rows of an expert are in a fixed order, by source rank, then by token, so sums over them have a fixed
    order, too. Once per routing, ranks tell each other how many rows each expert gets. Nothing else is exchanged
    besides the rows.
    """

    group: dist.ProcessGroup

    def __call__(self, routing: Routing) -> Routes:
        return AllToAllRoutes(routing, self.group)


class AllToAllRoutes:
    """Routes over the ranks of a group. The shared experts run during the transfer of rows to the routed experts. In
    the backward pass, their gradients are computed during the transfer of the rows' gradients back."""

    def __init__(self, routing: Routing, group: dist.ProcessGroup) -> None:
        self.routing, self.group = routing, group
        sent_Re = routing.counts_E.view(dist.get_world_size(group), -1)
        ones = [1] * len(sent_Re)
        arriving_Re = exchange(sent_Re, ones, ones, group)
        # Sorted by global expert number, rows are grouped by destination rank as well.
        self.choice_of_row_N, self.row_of_choice_TK = sort_by_expert(routing.experts_TK, len(routing.counts_E))
        received_Re = wait(arriving_Re)
        self.send: list[int]
        """Number of rows sent to each rank."""
        self.receive: list[int]
        """Number of rows received from each rank."""
        self.send, self.receive = torch.stack([sent_Re.sum(1), received_Re.sum(1)]).cpu().tolist()
        # Rows arrive sorted by source rank, then expert; the grouped products need them sorted by expert.
        expert_M = torch.arange(sent_Re.shape[1], device=sent_Re.device).repeat(len(sent_Re))
        expert_M = expert_M.repeat_interleave(received_Re.flatten(), output_size=sum(self.receive))
        self.order_M, self.place_M1 = sort_by_expert(expert_M.unsqueeze(1), sent_Re.shape[1])
        self.counts_e = received_Re.sum(0)

    def __call__(self, hidden_TH: Tensor, experts: Experts, shared: Shared | None = None) -> Tensor:
        dispatch = _Transfer(self.send, self.receive, self.group)
        received_MH = _Begin.apply(gather_rows(hidden_TH, self.choice_of_row_N, self.row_of_choice_TK), dispatch)
        # Autograd runs these three steps in reverse order: it begins the transfer of the gradients, computes the
        # gradients of the shared experts, and then waits for the transfer.
        shared_TH = None if shared is None else shared(hidden_TH)
        arrived_MH = _End.apply(received_MH, dispatch)
        out_MH = experts(gather_rows(arrived_MH, self.order_M, self.place_M1), self.counts_e)
        back_MH = gather_rows(out_MH, self.place_M1.squeeze(1), self.order_M.unsqueeze(1))
        combine = _Transfer(self.receive, self.send, self.group)
        returned_NH = _End.apply(_Begin.apply(back_MH, combine), combine)
        out_TH = combine_rows(returned_NH, self.routing.weights_TK, self.choice_of_row_N, self.row_of_choice_TK)
        return out_TH if shared_TH is None else out_TH + shared_TH


def exchange(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """Start an all-to-all; returns the tensor in which the rows will arrive. Do not read it before `wait`.

    Args:
        send, receive: number of rows to and from each rank.
    """
    return torch.ops._c10d_functional.all_to_all_single(rows.contiguous(), receive, send, group.group_name)


def wait(arriving: Tensor) -> Tensor:
    """The rows of an `exchange`, once they have arrived."""
    return torch.ops._c10d_functional.wait_tensor(arriving)


class _Transfer:
    """One all-to-all of rows over the ranks of a group; the backward pass sends the gradients the opposite way."""

    def __init__(self, send: list[int], receive: list[int], group: dist.ProcessGroup) -> None:
        self.send, self.receive, self.group = send, receive, group
        self.gradient: Tensor | None = None
        """The gradient that is under way."""


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        return exchange(rows, transfer.send, transfer.receive, transfer.group)

    @staticmethod
    def backward(ctx, _: Tensor) -> tuple[Tensor, None]:
        arriving, ctx.transfer.gradient = ctx.transfer.gradient, None
        return wait(arriving), None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx, arriving: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        return wait(arriving).view_as(arriving)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        transfer = ctx.transfer
        transfer.gradient = exchange(grad, transfer.receive, transfer.send, transfer.group)
        return grad, None  # nothing reads this gradient: `_Begin` returns the transferred one
