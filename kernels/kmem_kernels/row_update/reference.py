"""What the kernels compute: the definition of the row optimizers (`kmem.tables.row_optimizers.reference`) on a step's
rows.

Computed by numpy on the host, wherever the arrays are: its square root is IEEE's, torch's vectorised one is not always.
"""

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kmem.tables.row_optimizers import kernels
from kmem.tables.row_optimizers import reference as definition
from kmem.tables.row_optimizers.update import write_rows

if TYPE_CHECKING:
    from .op import CatchUp, Gradients, OwnSteps, RandomRounding


def adam_(
    weights: Tensor,
    first: Tensor,
    second: Tensor,
    gradients: "Gradients",
    step: definition.AdamStep,
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
    found = definition.adam(
        _host(weights[rows]),
        _scaled(gradients),
        _host(first[rows]),
        _host(second[rows]),
        (decays[0], decays[1], decays[2]),
        step,
        corrections,
    )
    first[rows], second[rows] = (torch.from_numpy(values).to(first.device) for values in found[1:])
    _write(weights, rows, found[0], rounding)


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
    moved, sums = definition.rowwise_adagrad(
        _host(weights[rows]), _scaled(gradients), _host(second[rows]), learning_rate, eps
    )
    second[rows] = torch.from_numpy(sums).to(second.device)
    _write(weights, rows, moved, rounding)


def square_norms(values: Tensor) -> Tensor:
    """See `op.square_norms`."""
    return torch.from_numpy(kernels.square_norms(_host(values))).to(values.device)


def _scaled(gradients: "Gradients") -> np.ndarray:
    """[U, D]: a row's only contribution itself, or its contributions added up from zero in their order."""
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
        noise = kernels.rounding_noise(
            rows.cpu().numpy(), weights.shape[1], rounding.first_row, np.uint64(rounding.stream)
        )
    write_rows(weights, rows, torch.from_numpy(values).to(weights.device), noise)


def _host(values: Tensor) -> np.ndarray:
    return values.float().cpu().numpy()
