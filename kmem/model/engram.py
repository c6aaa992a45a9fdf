"""The engram layer: from looked-up rows to the residual stream (arXiv 2601.07372, section 2).

The concatenated rows of a token are projected to one value and, for each residual branch, one key. A gate compares the
branch with its key and scales the value. An optional short causal convolution adds the values of preceding tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .kernels import kernels_serve, kmem_kernels
from .matmul import Linear
from .memory_kind import MemoryModule
from .recomputation import recomputing

# Shape letters: B sequences, T tokens, N = B * T, M residual branches, D hidden size, E width of the rows of a token,
# K kernel of the convolution.

GATE_FLOOR = 1e-6
"""Smallest magnitude of a score in the gate: the slope of the square root is infinite at 0."""
HISTOGRAM_BINS = 20


class EngramInput(NamedTuple):
    """The input of one engram layer for a batch of tokens."""

    rows: Tensor
    """[B, T, E], the rows of each token, concatenated."""
    present: Tensor | None = None
    """bool [B, T], False where a token is missing; None: no token is missing."""
    document_ids: Tensor | None = None
    """int64 [B, T], used by a convolution that stays within documents."""
    state: "ConvolutionState | None" = None
    """In generation, the convolution's inputs at the preceding tokens; advanced in place."""


@dataclass(frozen=True)
class GateStatistics:
    """Statistics of one layer's gates for one micro-batch, detached, without missing tokens."""

    mean_M: Tensor
    """fp32 [M], mean gate of each branch."""
    histogram: Tensor
    """int64 [M, HISTOGRAM_BINS], counts of gates in equal parts of 0..1."""
    value_norm: Tensor
    """fp32 scalar, mean over tokens of the value's RMS before the gate."""


class Engram(MemoryModule):
    """Rows of each token [B, T, E] -> the update of the residual stream.

    With one branch the stream is [B, T, D], with more [B, T, M, D]; the update has the stream's shape and dtype.

    Args:
        width: E, the number of values in all rows of a token.
        norm_eps: epsilon of the gate's norms.
        conv_norm_eps: epsilon of the convolution's norm; None: norm_eps.
        conv_dilation: distance between two taps, in tokens; the published models use the largest n-gram order.
        bias: whether the key and value projections have biases.
        zero_centered_norm: norms multiply by 1 + weight, with weight starting at 0, instead of by a weight starting
            at 1.
        conv_kernel: number of taps of the convolution; 0: no convolution.
        conv_within_documents: taps do not reach into another document. False in the published models.
    """

    def __init__(
        self,
        hidden_size: int,
        width: int,
        branches: int = 1,
        *,
        norm_eps: float,
        conv_norm_eps: float | None = None,
        conv_dilation: int,
        bias: bool = False,
        zero_centered_norm: bool = False,
        conv_kernel: int = 0,
        conv_within_documents: bool = False,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.width = width
        self.branches = branches
        self.conv_within_documents = conv_within_documents
        self.key_proj = Linear(width, branches * hidden_size, bias=bias)
        self.value_proj = Linear(width, hidden_size, bias=bias)
        self.query_norm = BranchFactor(branches, hidden_size, norm_eps, zero_centered_norm)
        self.key_norm = BranchFactor(branches, hidden_size, norm_eps, zero_centered_norm)
        self.conv_norm: BranchNorm | None = None
        self.conv: ShortConvolution | None = None
        if conv_kernel:
            self.conv_norm = BranchNorm(branches, hidden_size, conv_norm_eps or norm_eps, zero_centered_norm)
            self.conv = ShortConvolution(branches * hidden_size, conv_kernel, conv_dilation)
        self.on_gate: Callable[[GateStatistics], None] | None = None
        """If set, called in every forward pass that is not a recomputation."""

    def enter(self, hidden: Tensor, read: EngramInput) -> Tensor:
        return hidden + self(hidden, read)

    def forward(self, hidden: Tensor, looked_up: EngramInput) -> Tensor:
        """The update of `hidden` [B, T, D] or [B, T, M, D]. It is zero for a missing token, which also contributes
        nothing to later tokens."""
        rows, present = looked_up.rows.to(self.key_proj.weight.dtype), looked_up.present
        batch, tokens = hidden.shape[:2]
        streams = hidden.reshape(batch, tokens, self.branches, self.hidden_size)
        keys = self.key_proj(rows).view_as(streams)
        value = self.value_proj(rows)
        weight = self.query_norm() * self.key_norm()
        gated, gate = branch_gate(streams, keys, value, weight, self.query_norm.eps)
        if present is not None:
            gated = gated * present[:, :, None, None]
        if self.on_gate is not None and not recomputing():
            self.on_gate(_statistics(gate, value, present))
        if self.conv is not None and self.conv_norm is not None:
            documents = looked_up.document_ids if self.conv_within_documents else None
            plain = present is None and looked_up.state is None
            if plain and kernels_serve(gated) and gated.dtype != torch.float64:
                return kmem_kernels.engram_convolution.op.convolved(
                    gated,
                    self.conv_norm.factor(),
                    self.conv.weight,
                    eps=self.conv_norm.eps,
                    dilation=self.conv.dilation,
                    document_ids=documents,
                    backend="triton",
                ).view_as(hidden)
            # A missing token stays 0 through the norm, which has no bias.
            normed = self.conv_norm(gated).flatten(2)
            recent = F.silu(self.conv(normed, documents, looked_up.state)).view_as(gated)
            gated = gated + (recent if present is None else recent * present[:, :, None, None])
        return gated.view_as(hidden)

    def start(self, batch: int) -> "ConvolutionState | None":
        """The state before a sequence's first token; None without a convolution."""
        return None if self.conv is None else self.conv.start(batch)


class _BranchWeight(nn.Module):
    """The weights of an RMSNorm over the last dimension of [.., M, D], separate per branch."""

    def __init__(self, branches: int, width: int, eps: float, zero_centered: bool) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered = zero_centered
        self.initial_values = {"weight": 0.0 if zero_centered else 1.0}
        self.weight = nn.Parameter(torch.full((branches, width), self.initial_values["weight"]))

    def factor(self) -> Tensor:
        """The factor on the normed input, [M, D], in at least fp32. For calls of the module alone: hooks that move
        weights see nothing else."""
        weight = self.weight.to(_wide(self.weight))
        return 1 + weight if self.zero_centered else weight


class BranchFactor(_BranchWeight):
    """The factor of a norm that `branch_gate` computes."""

    def forward(self) -> Tensor:
        return self.factor()


class BranchNorm(_BranchWeight):
    """The whole norm; statistics in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(_wide(x))
        scale = wide.square().mean(-1, keepdim=True).add(self.eps).rsqrt()
        return (wide * scale * self.factor()).to(x.dtype)


class ConvolutionState:
    """The last (K-1) * dilation inputs of a convolution, [B, (K-1) * dilation, C], for generation.

    While `recording` is True, it also keeps earlier inputs, so that `crop` can remove the latest ones.
    """

    def __init__(self, batch: int, length: int) -> None:
        self.batch = batch
        self.length = length
        self.recording = False
        self.inputs: Tensor | None = None

    def extend(self, x: Tensor) -> Tensor:
        """The preceding inputs followed by x [B, T, C], [B, length + T, C]; keeps the last `length` inputs."""
        assert len(x) == self.batch, f"a state of {self.batch} sequences met {len(x)}"
        before = x.new_zeros(len(x), self.length, x.shape[2]) if self.inputs is None else self.inputs
        history = torch.cat((before, x), dim=1)
        kept = history if self.recording else history[:, history.shape[1] - self.length :]
        self.inputs = kept.detach().clone()
        return history[:, before.shape[1] - self.length :]

    def crop(self, tokens: int) -> None:
        """Remove the inputs of the last `tokens` tokens, and drop the earlier recorded inputs."""
        if self.inputs is not None:
            stop = self.inputs.shape[1] - tokens
            assert stop >= self.length, "more tokens were cropped than recorded"
            self.inputs = self.inputs[:, stop - self.length : stop].clone()

    def reorder(self, order: Tensor) -> None:
        """Select the sequences `order` int64 [B'] for beam search; a sequence may occur several times."""
        self.batch = len(order)
        if self.inputs is not None:
            self.inputs = self.inputs.index_select(0, order.to(self.inputs.device))


class ShortConvolution(nn.Module):
    """Depthwise causal convolution of [B, T, C] with dilation, without bias; its weight starts at zero.

    weight [C, K]: the last tap multiplies the token itself, the tap before it the token `dilation` earlier, and so on.
    """

    def __init__(self, channels: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.dilation = dilation
        self.initial_values = {"weight": 0.0}
        self.weight = nn.Parameter(torch.zeros(channels, kernel))

    @property
    def reach(self) -> int:
        """Number of tokens of look-back."""
        return (self.kernel - 1) * self.dilation

    def start(self, batch: int) -> ConvolutionState:
        return ConvolutionState(batch, self.reach)

    def forward(self, x: Tensor, document_ids: Tensor | None = None, state: ConvolutionState | None = None) -> Tensor:
        """Convolve x [B, T, C]. With `document_ids` int64 [B, T], taps stay within documents; the inputs in `state`
        belong to the document of the first token."""
        tokens = x.shape[1]
        history = F.pad(x, (0, 0, self.reach, 0)) if state is None else state.extend(x)
        weight = self.weight.to(_wide(x))
        documents = None
        if document_ids is not None:
            documents = torch.cat((document_ids[:, :1].expand(-1, self.reach), document_ids), dim=1)
        out = x * weight[:, -1]
        for tap in range(1, self.kernel):
            start = self.reach - tap * self.dilation
            past = history[:, start : start + tokens]
            if documents is not None and document_ids is not None:
                past = past * (documents[:, start : start + tokens] == document_ids)[..., None]
            out = torch.addcmul(out, past.to(out.dtype), weight[:, -1 - tap])
        return out.to(x.dtype)


def branch_gate(hidden: Tensor, keys: Tensor, value: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """sigmoid(signed square root of <norm(hidden), norm(keys)> / sqrt(D)) * value, and the gate itself, detached.

    hidden, keys [.., M, D]; value [.., D]; weight [M, D], the product of the two norms' factors. Returns [.., M, D] in
    the value's dtype and the gate [.., M] in at least fp32. The backward pass is in closed form; it saves the inputs
    and four numbers per token and branch. If |score| < GATE_FLOOR, no gradient passes through the gate.
    """
    if kernels_serve(hidden) and hidden.dtype == value.dtype != torch.float64:
        gated, gate = kmem_kernels.engram_gate.op.branch_gate(
            hidden.flatten(0, -3), keys.flatten(0, -3), value.flatten(0, -2), weight, eps, backend="triton"
        )
        return gated.view_as(hidden), gate.view(hidden.shape[:-1])
    return _BranchGate.apply(hidden, keys, value, weight, eps)


class _BranchGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, keys: Tensor, value: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        wide = _wide(hidden)
        h, k, size = hidden.to(wide), keys.to(wide), hidden.shape[-1]
        raw = (h * weight).mul_(k).sum(-1)
        scale_h, scale_k = (torch.linalg.vector_norm(x, dim=-1).square_().div_(size).add_(eps).rsqrt_() for x in (h, k))
        score = raw * scale_h * scale_k * size**-0.5
        gate = torch.sigmoid(score.sign() * score.abs().clamp_min(GATE_FLOOR).sqrt())
        out = (gate[..., None] * value.to(wide)[..., None, :]).to(value.dtype)
        ctx.save_for_backward(hidden, keys, value, weight, raw, gate, scale_h, scale_k)
        ctx.mark_non_differentiable(gate)
        return out, gate

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        hidden, keys, value, weight, raw, gate, scale_h, scale_k = ctx.saved_tensors
        wide, size = raw.dtype, hidden.shape[-1]
        h, k, grad = hidden.to(wide), keys.to(wide), grad.to(wide)
        grad_gate = (grad * value.to(wide)[..., None, :]).sum(-1)
        grad_value = gate[..., :1] * grad[..., 0, :]
        for branch in range(1, grad.shape[-2]):
            grad_value.addcmul_(gate[..., branch, None], grad[..., branch, :])
        magnitude = raw.abs() * scale_h * scale_k * size**-0.5  # |score|
        # With z = s raw r_h r_k, d sqrt|z| / d raw = sqrt(s r_h r_k / |raw|) / 2 = s r_h r_k / (2 sqrt|z|).
        slope = 0.5 * size**-0.5 * scale_h * scale_k * magnitude.clamp_min(GATE_FLOOR).rsqrt()
        slope = (grad_gate * gate * (1 - gate) * slope).masked_fill_(magnitude < GATE_FLOOR, 0)
        through_h = (slope * raw * scale_h.square() / size)[..., None]
        through_k = (slope * raw * scale_k.square() / size)[..., None]
        slope = slope[..., None]
        grad_h = (k * weight).mul_(slope).addcmul_(h, through_h, value=-1)
        grad_k = (h * weight).mul_(slope).addcmul_(k, through_k, value=-1)
        grad_weight = (h * k).mul_(slope).flatten(0, -3).sum(0)
        return (
            grad_h.to(hidden.dtype),
            grad_k.to(keys.dtype),
            grad_value.to(value.dtype),
            grad_weight.to(weight.dtype),
            None,
        )


def _statistics(gate: Tensor, value: Tensor, present: Tensor | None) -> GateStatistics:
    gate, value = gate.detach().float(), value.detach().float()
    if present is None:
        gate_NM, norms = gate.flatten(0, 1), value.square().mean(-1).sqrt().flatten()
    else:
        gate_NM, norms = gate[present], value[present].square().mean(-1).sqrt()
    branches = gate_NM.shape[1]
    bins = (gate_NM * HISTOGRAM_BINS).long().clamp_(0, HISTOGRAM_BINS - 1)
    bins += torch.arange(branches, device=gate.device) * HISTOGRAM_BINS
    histogram = torch.zeros(branches * HISTOGRAM_BINS, dtype=torch.int64, device=gate.device)
    histogram.scatter_add_(0, bins.flatten(), torch.ones_like(bins.flatten()))
    return GateStatistics(gate_NM.mean(0), histogram.view(branches, HISTOGRAM_BINS), norms.mean())


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
