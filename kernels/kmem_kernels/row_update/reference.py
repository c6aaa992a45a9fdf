"""The definition of the row optimizers, in plain array arithmetic, which the fast forms must match.

Functions take and return fp32 arrays, numpy or torch, of the touched rows: U rows of D values, per-row values [U, 1].
They use only operators, in a stated order, since the compiled forms agree with them bit for bit. (numpy is the oracle:
its square root is IEEE's; torch's vectorised square root is not always.) Functions whose names end in an underscore
update the rows of a table in place; numpy computes them on the host, wherever the arrays are.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..counter_random import random_bits

if TYPE_CHECKING:
    from .op import CatchUp, Gradients, OwnSteps, RandomRounding

# Shape letters: U touched rows of D values, L length of a table of factors.

Array = Any
"""A numpy array or a torch tensor."""

SQUARES_LANES, SQUARES_PART = 128, 8192
"""For `square_norms`: the number of parallel sums, and the number of values of a row that are summed as one part."""
LARGEST_CORRECTIONS = 1 << 22
"""After this many updates, bias correction is taken as 1 whatever the betas; exact for betas up to 0.999995."""


@dataclass(frozen=True)
class AdamStep:
    """The scalars of one Adam step, computed in double precision and rounded to fp32 where they are used."""

    beta1: float
    beta2: float
    eps: float
    step_size: float
    inverse_root: float
    """Factor on the square root of the second moment."""

    @classmethod
    def lazy(cls, beta1: float, beta2: float, eps: float, learning_rate: float, step: int) -> "AdamStep":
        """As `torch.optim.SparseAdam`: eps is added before bias correction. `step` counts from 1, for all rows."""
        size = learning_rate * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
        return cls(beta1, beta2, eps, size, 1.0)

    @classmethod
    def own(cls, beta1: float, beta2: float, eps: float, learning_rate: float) -> "AdamStep":
        """As `lazy`, for rows that count their own updates: `adam` takes the factors of `own_corrections`."""
        return cls(beta1, beta2, eps, learning_rate, 1.0)

    @classmethod
    def dense(cls, beta1: float, beta2: float, eps: float, learning_rate: float, step: int) -> "AdamStep":
        """As `torch.optim.Adam`: eps is added after bias correction."""
        return cls(beta1, beta2, eps, learning_rate / (1 - beta1**step), (1 - beta2**step) ** -0.5)


def adam(
    weights: Array,
    gradients: Array,
    first: Array,
    second: Array,
    decays: tuple[Array, Array, Array],
    step: AdamStep,
    corrections: Array | None = None,
) -> tuple[Array, Array, Array]:
    """One Adam step of touched rows: (weights, first moments, second moments).

    decays: factors per row [U, 1] on the first moment, second moment and weight for the steps that the row has missed;
    the factor on the weight includes this step's decay. Lazy Adam uses only this step's decay.
    corrections: factors per row [U, 1] on the step size, from `own_corrections`.
    """
    size = step.step_size if corrections is None else corrections * step.step_size
    first = first * decays[0]
    first = first + (gradients - first) * (1 - step.beta1)
    second = second * decays[1]
    second = second + (gradients * gradients - second) * (1 - step.beta2)
    weights = weights * decays[2]
    weights = weights - (first / (_sqrt(second) * step.inverse_root + step.eps)) * size
    return weights, first, second


def square_norms(values: np.ndarray) -> np.ndarray:
    """fp64 [U]: the squared 2-norms of fp32 rows [U, D].

    The order of the sums is fixed, and many processors can share the work. A row is cut into parts of SQUARES_PART
    values. Within a part, value j is added to lane j % SQUARES_LANES, from left to right. Then neighbouring lanes are
    added until one is left, and then the parts in the same way. (Zeros at the end change nothing, so lanes and parts
    may be padded with them.)
    """
    rows, columns = values.shape
    parts = max(1, -(-columns // SQUARES_PART))
    padded = np.zeros((rows, parts * SQUARES_PART), np.float64)
    padded[:, :columns] = values
    lanes = (rows, parts, SQUARES_PART // SQUARES_LANES, SQUARES_LANES)
    sums = (padded * padded).reshape(lanes).cumsum(2)[:, :, -1]
    return _pairwise(_pairwise(sums))


def _pairwise(values: np.ndarray) -> np.ndarray:
    """Sums over the last dimension: neighbouring values are added until one is left."""
    while values.shape[-1] > 1:
        if values.shape[-1] % 2:
            values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, 1)])
        values = values[..., ::2] + values[..., 1::2]
    return values[..., 0]


def rowwise_adagrad(
    weights: Array, gradients: Array, second: Array, learning_rate: float, eps: float
) -> tuple[Array, Array]:
    """One step of Adagrad with one accumulator per row, [U, 1]: (weights, accumulators).

    The accumulator grows by the mean square of the row's gradient, summed from left to right in double precision.
    """
    squares = _double(gradients) * _double(gradients)
    means = squares.cumsum(1)[:, -1:] / gradients.shape[1]
    second = second + _single(means)
    return weights - (gradients / (_sqrt(second) + eps)) * learning_rate, second


def sinkhorn_momentum(
    weights: Array,
    gradients: Array,
    momentum: Array,
    learning_rate: float,
    beta: float,
    gamma: float,
    passes: int,
    threshold: float,
    eps: float = 1e-20,
) -> tuple[Array, Array]:
    """One step of Nesterov momentum on a whole matrix, balanced alternately by rows and columns: (weights, momentum).

    DeepSeek-V4.1 report (arXiv 2609.19969). The first and the last pass are over rows. A row whose norm exceeds the
    threshold moves by gamma * learning_rate times a vector with a root mean square of 1. It computes in double
    precision: this is a definition, not an efficient implementation.
    """
    momentum = momentum * beta + gradients * (1 - beta)
    h = _double(momentum * beta + gradients * (1 - beta))
    norms = ((h * h).sum(1) ** 0.5)[:, None]
    h = h * (norms > threshold * norms.mean())
    for number in range(passes):
        if number % 2 == 0:
            h = h / (((h * h).sum(1) ** 0.5)[:, None] + eps)
        else:
            h = h / (((h * h).sum(0) ** 0.5)[None, :] + eps)
    return weights - _single(h * (h.shape[1] ** 0.5)) * (gamma * learning_rate), momentum


def own_corrections(beta1: float, beta2: float) -> np.ndarray:
    """fp32 [L]: entry t - 1 is the bias correction of a row's t-th update, sqrt(1 - beta2^t) / (1 - beta1^t). From
    entry L - 1 on, it is 1 (except for betas so close to 1 that LARGEST_CORRECTIONS limits the table)."""
    # At these t, beta^t is below 2^-26, and 1 +- beta^t rounds to 1.
    enough = [-18.1 / np.log(beta) for beta in (beta1, beta2) if beta]
    number = np.arange(1, 2 + min(LARGEST_CORRECTIONS, int(max(enough, default=0))), dtype=np.float64)
    return (np.sqrt(1 - np.power(beta2, number)) / (1 - np.power(beta1, number))).astype(np.float32)


def missed_steps_decay(factor: float, missed: np.ndarray) -> np.ndarray:
    """factor ** missed per row, [U, 1] fp32, computed in double precision."""
    return np.power(np.float64(factor), missed.reshape(-1, 1)).astype(np.float32)


def to_bfloat16(values: np.ndarray, noise: np.ndarray | None = None) -> np.ndarray:
    """fp32 -> the bits of bf16 (uint16), rounded to nearest even or, with 16 random bits per value, stochastically."""
    bits = values.view(np.uint32)
    if noise is not None:
        return ((bits + noise.astype(np.uint32)) >> np.uint32(16)).astype(np.uint16)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """The bits of bf16 -> fp32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def rounding_noise(rows: np.ndarray, dim: int, first_row: int, stream: np.uint64) -> np.ndarray:
    """[U, D] uint16: the random bits for rounding bf16 rows; `first_row` is the number of row 0 in the stream."""
    counters = (first_row + rows).astype(np.uint64)[:, None] * np.uint64(dim) + np.arange(dim, dtype=np.uint64)
    return (random_bits(stream, counters) & np.uint64(0xFFFF)).astype(np.uint16)


def write_rows(table: Tensor, rows: Tensor | slice, values: Tensor, noise: np.ndarray | None) -> None:
    """table[rows] = fp32 values, rounded to nearest or, with 16 random bits per value, stochastically."""
    if noise is not None:
        bits = values.contiguous().view(torch.int32) + torch.from_numpy(noise.astype(np.int32)).to(values.device)
        values = ((bits >> 16) << 16).view(torch.float32)
    table[rows] = values.to(table.dtype)


def adam_(
    weights: Tensor,
    first: Tensor,
    second: Tensor,
    gradients: "Gradients",
    step: AdamStep,
    catch_up: "CatchUp | None",
    rounding: "RandomRounding | None",
    decay: float = 1.0,
    own: "OwnSteps | None" = None,
) -> None:
    """See `op.adam_`."""
    rows = gradients.rows
    decays = np.ones((3, len(rows), 1), np.float32)
    decays[2] = decay
    if catch_up is not None:
        missed = (catch_up.step - 1 - catch_up.last_step[rows].long()).clamp_min(0)
        decays = _host(catch_up.decays[:, missed.view(-1)]).reshape(3, -1, 1)
        catch_up.last_step[rows] = catch_up.step
    corrections = None
    if own is not None:
        before = own.updates[rows].long().clamp_max(len(own.corrections) - 1)
        corrections = _host(own.corrections[before])
        own.updates[rows] += 1
    weights_after, first_after, second_after = adam(
        _host(weights[rows]),
        _scaled(gradients),
        _host(first[rows]),
        _host(second[rows]),
        (decays[0], decays[1], decays[2]),
        step,
        corrections,
    )
    first[rows], second[rows] = (torch.from_numpy(values).to(first.device) for values in (first_after, second_after))
    _write(weights, rows, weights_after, rounding)


def rowwise_adagrad_(
    weights: Tensor,
    second: Tensor,
    gradients: "Gradients",
    learning_rate: float,
    eps: float,
    rounding: "RandomRounding | None",
) -> None:
    """See `op.rowwise_adagrad_`."""
    rows = gradients.rows
    moved, sums = rowwise_adagrad(_host(weights[rows]), _scaled(gradients), _host(second[rows]), learning_rate, eps)
    second[rows] = torch.from_numpy(sums).to(second.device)
    _write(weights, rows, moved, rounding)


def _scaled(gradients: "Gradients") -> np.ndarray:
    """fp32 [U, D]: the scaled gradient of each row, from its only contribution, or from the sum of its contributions,
    added to zero in order."""
    values = _host(gradients.values)
    if gradients.order is not None and gradients.starts is not None:
        order, starts = gradients.order.cpu().numpy(), gradients.starts.cpu().numpy()
        sums = np.zeros((len(gradients.rows), values.shape[1]), np.float32)
        for row, (a, b) in enumerate(pairwise(starts)):
            sums[row] = values[order[a]] if b - a == 1 else sum(values[order[a:b]], np.zeros_like(sums[row]))
        values = sums
    return values * np.float32(gradients.scale)


def _write(weights: Tensor, rows: Tensor, values: np.ndarray, rounding: "RandomRounding | None") -> None:
    noise = None
    if rounding is not None:
        stream = np.uint64(rounding.stream)
        noise = rounding_noise(rows.cpu().numpy(), weights.shape[1], rounding.first_row, stream)
    write_rows(weights, rows, torch.from_numpy(values).to(weights.device), noise)


def _host(values: Tensor) -> np.ndarray:
    return values.float().cpu().numpy()


def _sqrt(x: Array) -> Array:
    return np.sqrt(x) if isinstance(x, np.ndarray) else x.sqrt()


def _double(x: Array) -> Array:
    return x.astype(np.float64) if isinstance(x, np.ndarray) else x.double()


def _single(x: Array) -> Array:
    return x.astype(np.float32) if isinstance(x, np.ndarray) else x.float()
