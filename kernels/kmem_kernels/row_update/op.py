"""Row optimizers on the rows of one step. They read and write weights, moments and step numbers once, in place.

Results equal the compiled loops on the host bit for bit: fp32 operations in the same order, none contracted, IEEE
division and square root, and the same random bits for the same row. So a table may change its store without changing
its values. Only NaN payloads may differ.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..backend import Backend, chosen
from . import reference
from .reference import AdamStep

# Shape letters: R rows of D values in the table, U of them touched, W contributions to their gradients, L length of a
# table of factors.


@dataclass(frozen=True)
class Gradients:
    """The gradients of the rows of a step.

    Args:
        rows: int64 [U], row numbers, no two equal.
        values: fp32 [W, D], contributions to the gradients.
        scale: factor on a row's summed gradient.
        order: int64 [W]; the gradient of row i is the sum of values[order[starts[i]:starts[i + 1]]], in this order.
        starts: int64 [U + 1], strictly ascending. Without `order` and `starts`, the gradient of row i is values[i].
    """

    rows: Tensor
    values: Tensor
    scale: float = 1.0
    order: Tensor | None = None
    starts: Tensor | None = None


@dataclass(frozen=True)
class CatchUp:
    """Decay for the steps that rows have missed.

    Args:
        last_step: int32 [R, 1], each row's last step; set to this step for the touched rows.
        step: number of this step.
        decays: fp32 [3, L], L >= step; column m holds the factors on the first moment, second moment and weight after m
            missed steps. It is a table computed on the host, since powers on a device differ in their last bits.
    """

    last_step: Tensor
    step: int
    decays: Tensor


@dataclass(frozen=True)
class OwnSteps:
    """Bias correction by the number of a row's own updates.

    Args:
        updates: int32 [R, 1], each row's number of updates; incremented for the touched rows.
        corrections: fp32 [L]; entry u is the factor on the step size after u updates; the last entry holds for all
            larger numbers. It is a table for the same reason as `CatchUp.decays`.
    """

    updates: Tensor
    corrections: Tensor


@dataclass(frozen=True)
class RandomRounding:
    """The random bits for stochastic rounding of bf16 rows, as `reference.rounding_noise` draws them.

    Args:
        stream: key of the step's stream, from 0 to 2^64 - 1.
        first_row: number of row 0 in the stream.
    """

    stream: int
    first_row: int


def adam_(
    weights_RD: Tensor,
    first_RD: Tensor,
    second_RD: Tensor,
    gradients: Gradients,
    step: AdamStep,
    catch_up: CatchUp | None = None,
    rounding: RandomRounding | None = None,
    decay: float = 1.0,
    own: OwnSteps | None = None,
    backend: Backend | None = None,
) -> None:
    """One Adam step of the touched rows, in place.

    Args:
        weights_RD: fp32 or bf16, contiguous.
        first_RD, second_RD: moments, fp32, contiguous.
        catch_up: decay for missed steps; None: missed steps have no effect.
        rounding: stochastic rounding of bf16 rows; None rounds to nearest even.
        decay: factor on the weights before the step; `catch_up` has its own factors.
        own: bias correction for rows that count their own updates.
        backend: default `triton` for CUDA tensors, else `torch`.

    Raises:
        ValueError: dtypes or shapes do not fit, or both `decay` and `catch_up` are given.
    """
    _check(weights_RD, gradients, rounding, first_RD, second_RD)
    if catch_up is not None and decay != 1.0:
        raise ValueError(f"decay={decay} and catch_up exclude each other: the decays of catch_up include this step's")
    if catch_up is not None and catch_up.decays.shape[1] < catch_up.step:
        raise ValueError(f"step {catch_up.step} needs at least {catch_up.step} decays, not {catch_up.decays.shape[1]}")
    with torch.no_grad():
        if chosen(backend, weights_RD) == "torch":
            reference.adam_(weights_RD, first_RD, second_RD, gradients, step, catch_up, rounding, decay, own)
        else:
            from . import triton  # a CPU run never compiles

            triton.adam_(weights_RD, first_RD, second_RD, gradients, step, catch_up, rounding, decay, own)


def rowwise_adagrad_(
    weights_RD: Tensor,
    second_R1: Tensor,
    gradients: Gradients,
    learning_rate: float,
    eps: float,
    rounding: RandomRounding | None = None,
    backend: Backend | None = None,
) -> None:
    """One step of row-wise Adagrad of the touched rows, in place. `second_R1`: fp32 accumulators; other arguments as in
    `adam_`.

    The mean square of a row is one sum from left to right. That suits the short rows of engrams, but is slow for the
    long rows of banks, whose configuration refuses it.
    """
    _check(weights_RD, gradients, rounding)
    with torch.no_grad():
        if chosen(backend, weights_RD) == "torch":
            reference.rowwise_adagrad_(weights_RD, second_R1, gradients, learning_rate, eps, rounding)
        else:
            from . import triton

            triton.rowwise_adagrad_(weights_RD, second_R1, gradients, learning_rate, eps, rounding)


def square_norms(values_UD: Tensor, backend: Backend | None = None) -> Tensor:
    """fp64 [U]: the squared 2-norm of each fp32 row, in the order of `reference.square_norms`."""
    with torch.no_grad():
        if chosen(backend, values_UD) == "torch":
            squares = reference.square_norms(values_UD.cpu().numpy())
            return torch.from_numpy(squares).to(values_UD.device)
        from . import triton

        return triton.square_norms(values_UD)


def _check(weights: Tensor, gradients: Gradients, rounding: RandomRounding | None, *moments: Tensor) -> None:
    if weights.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"rows are fp32 or bf16, not {weights.dtype}")
    if rounding is not None and weights.dtype != torch.bfloat16:
        raise ValueError("fp32 rows are not rounded")
    for moment in moments:
        if moment.shape != weights.shape or moment.dtype != torch.float32:
            raise ValueError(
                f"moments of rows {tuple(weights.shape)} must be fp32 of the same shape, not {moment.dtype} "
                f"{tuple(moment.shape)}"
            )
    if not all(array.is_contiguous() for array in (weights, *moments)):
        raise ValueError("rows and moments are updated in place and must be contiguous")
    if (gradients.order is None) != (gradients.starts is None):
        raise ValueError("give order and starts together: both describe the sums of contributions")
    count = len(gradients.rows)
    if gradients.values.shape[1] != weights.shape[1] or gradients.values.dtype != torch.float32:
        raise ValueError(f"gradients {tuple(gradients.values.shape)} do not fit rows of {weights.shape[1]} values")
    if count != (len(gradients.values) if gradients.starts is None else len(gradients.starts) - 1):
        raise ValueError(f"{count} rows were given with gradients for another number of rows")
