"""All-to-all dispatch: every rank of an expert group owns a contiguous slice of the experts.

Shape letters: T tokens of this rank, K choices per token, N = T * K rows sent, M rows received, R ranks of the group,
E experts, e = E / R experts per rank; rank r owns experts [r * e, (r + 1) * e).
"""

import torch
import torch.distributed as dist
from torch import Tensor

from kmem.model.experts import Experts
from kmem.model.moe import combine_rows, gather_rows, sort_by_expert
from kmem.model.router import Routing


class AllToAllDispatcher:
    """Sends each token's row to the ranks that own its experts, runs them there, and brings the outputs back.

    Dropless. The rows of an expert are summed in a fixed order: by source rank, then by token.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group = group

    def __call__(self, hidden_TH: Tensor, routing: Routing, experts: Experts) -> Tensor:
        # Sorted by global expert number, rows are grouped by destination rank as well.
        order_N, place_TK = sort_by_expert(routing.experts_TK, len(routing.counts_E))
        rows_NH = gather_rows(hidden_TH, order_N, place_TK)
        sent_Re = routing.counts_E.view(dist.get_world_size(self.group), -1)
        received_Re = torch.empty_like(sent_Re)
        dist.all_to_all_single(received_Re, sent_Re, group=self.group)
        send, receive = torch.stack([sent_Re.sum(1), received_Re.sum(1)]).tolist()
        arrived_MH = _AllToAllRows.apply(rows_NH, send, receive, self.group)
        # They arrive by source rank, then expert; the grouped products want them by expert.
        expert_M = torch.arange(sent_Re.shape[1], device=hidden_TH.device).repeat(len(sent_Re))
        expert_M = expert_M.repeat_interleave(received_Re.flatten(), output_size=arrived_MH.shape[0])
        order_M, place_M1 = sort_by_expert(expert_M.unsqueeze(1), sent_Re.shape[1])
        out_MH = experts(gather_rows(arrived_MH, order_M, place_M1), received_Re.sum(0))
        back_MH = gather_rows(out_MH, place_M1.squeeze(1), order_M.unsqueeze(1))
        returned_NH = _AllToAllRows.apply(back_MH, receive, send, self.group)
        return combine_rows(returned_NH, routing.weights_TK, order_N, place_TK)


class _AllToAllRows(torch.autograd.Function):
    """Row blocks to the ranks of a group; gradients travel the same way back."""

    @staticmethod
    def forward(ctx, rows, send, receive, group):
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _exchange(rows, send, receive, group)

    @staticmethod
    def backward(ctx, grad):
        return _exchange(grad, ctx.receive, ctx.send, ctx.group), None, None, None


def _exchange(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    received = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), receive, send, group=group)
    return received
