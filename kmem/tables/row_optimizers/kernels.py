"""Compiled loops over touched rows on the host: one pass that reads and writes each row and its state once.

The arithmetic equals `kmem_kernels.row_update.reference`, operation by operation in fp32, without contraction or
reordering. Loops release the interpreter lock. Threads split the rows, so the number of threads does not change the
result. `weights` is fp32, or uint16 with the bits of bf16.

An array of a store is passed as a contiguous array and the column `at_*` (np.uintp) at which its rows start in it
(`Store.columns`). Loops over contiguous rows with unsigned indices are vectorised and at least twice as fast as loops
over strided arrays; they also need no slices, which cost a tenth of the time. Pass scalars as np.float32: Python floats
would make the arithmetic double precision. The loops of all optimizers are in this one file, since numba recompiles a
cached loop only when the loop's own file changes, not when the file of a function that it calls changes.
"""

import numba
import numpy as np
from kmem_kernels.row_update.reference import SQUARES_LANES, SQUARES_PART
from numba.extending import overload

from kmem.tables.counter_random import random_bits

# Shape letters: U rows of a step, D values of a row, W contributions to gradients, n rows of a chunk.

_compiled = numba.njit(nogil=True, cache=True, error_model="numpy")
_ONE, _SIXTEEN = np.uint32(1), np.uint32(16)
_HALF = np.uint32(0x7FFF)
_LANES, _PART = SQUARES_LANES, SQUARES_PART


def _widen(stored):
    """A stored value, fp32 or the bits of bf16, as fp32. Works in compiled code only, like `_narrow`."""
    raise NotImplementedError


def _narrow(value, stored, counter, stream, stochastic):
    """An fp32 value in the dtype of `stored`. bf16 is rounded to nearest even, or stochastically: up with a probability
    equal to the part cut off. (It returns the value, since loops over bf16 were half as fast when it wrote the row.)"""
    raise NotImplementedError


@overload(_widen, inline="always")
def _overload_widen(stored):
    def bf16(stored):
        return np.uint32(np.uint32(stored) << _SIXTEEN).view(np.float32)

    return (lambda stored: stored) if stored == numba.float32 else bf16


@overload(_narrow, inline="always")
def _overload_narrow(value, stored, counter, stream, stochastic):
    def bf16(value, stored, counter, stream, stochastic):
        bits = np.float32(value).view(np.uint32)
        if stochastic:
            noise = np.uint32(random_bits(stream, counter) & np.uint64(0xFFFF))
            return np.uint16((bits + noise) >> _SIXTEEN)
        return np.uint16((bits + _HALF + ((bits >> _SIXTEEN) & _ONE)) >> _SIXTEEN)

    return (lambda value, stored, counter, stream, stochastic: value) if stored == numba.float32 else bf16


@numba.njit(nogil=True, error_model="numpy")
def _gradient(i, order, starts, gradients, scratch):
    """The gradient [D] of row i: its only contribution, or the sum of its contributions, added in order in `scratch`
    [D]."""
    if starts[i + 1] - starts[i] == 1:
        return gradients[order[starts[i]]]
    scratch[:] = 0
    for k in range(starts[i], starts[i + 1]):
        source = gradients[order[k]]
        for j in range(source.shape[0]):
            scratch[j] += source[j]
    return scratch


@_compiled
def adam(
    weights, at_w, first, at_m, second, at_v, rows, order, starts, gradients, decays_m, decays_v, decays_w, sizes,
    scale, rate_m, rate_v, inverse_root, eps, first_row, stream, stochastic,
):  # fmt: skip
    """One step. rows [U] int64; gradients [W, D] fp32 (times `scale`), of which order[starts[i]:starts[i + 1]] belong
    to row i; decays and step sizes [U] fp32. `first_row` is the number of local row 0 in the table; with `stream` it
    seeds stochastic rounding, for bf16 only."""
    dim = gradients.shape[1]
    scratch = np.empty(dim, np.float32)
    for i in range(rows.shape[0]):
        w, m, v = weights[rows[i]], first[rows[i]], second[rows[i]]
        g = _gradient(i, order, starts, gradients, scratch)
        decay_m, decay_v, decay_w, size = decays_m[i], decays_v[i], decays_w[i], sizes[i]
        counter = np.uint64(first_row + rows[i]) * np.uint64(dim)
        for column in range(dim):
            j = np.uintp(column)
            stored, gradient = w[at_w + j], g[j] * scale
            mean = m[at_m + j] * decay_m
            mean = mean + (gradient - mean) * rate_m
            square = v[at_v + j] * decay_v
            square = square + (gradient * gradient - square) * rate_v
            value = _widen(stored) * decay_w
            value = value - (mean / (np.sqrt(square) * inverse_root + eps)) * size
            w[at_w + j] = _narrow(value, stored, counter + np.uint64(j), stream, stochastic)
            m[at_m + j], v[at_v + j] = mean, square


@_compiled
def rowwise_adagrad(
    weights, at_w, second, at_v, rows, order, starts, gradients, scale, rate, eps, first_row, stream, stochastic
):
    """One step with one accumulator per row; arguments as for `adam`."""
    dim = gradients.shape[1]
    scratch = np.empty(dim, np.float32)
    for i in range(rows.shape[0]):
        w, g = weights[rows[i]], _gradient(i, order, starts, gradients, scratch)
        root = _accumulate(second[rows[i]], at_v, g, scale) + eps
        counter = np.uint64(first_row + rows[i]) * np.uint64(dim)
        for column in range(dim):
            j = np.uintp(column)
            stored = w[at_w + j]
            value = _widen(stored) - ((g[j] * scale) / root) * rate
            w[at_w + j] = _narrow(value, stored, counter + np.uint64(j), stream, stochastic)


@numba.njit(nogil=True, error_model="numpy")
def _accumulate(second, at, g, scale):
    """Add the mean square of a gradient row to its accumulator second[at]; returns the square root of the sum."""
    total = 0.0
    for j in range(g.shape[0]):
        value = np.float64(g[j] * scale)
        total += value * value
    second[at] = second[at] + np.float32(total / g.shape[0])
    return np.sqrt(second[at])


@numba.njit(nogil=True, error_model="numpy")
def _sinkhorn_row(h, momentum, at, i, rows, sources, gradients, scale, beta, rest):
    """h [D] fp64 = beta * M + (1 - beta) * G of row i, with every operation rounded to fp32."""
    m = momentum[rows[i]]
    if sources[i] < 0:
        for column in range(h.shape[0]):
            j = np.uintp(column)
            h[j] = np.float64(m[at + j] * beta)
    else:
        g = gradients[sources[i]]
        for column in range(h.shape[0]):
            j = np.uintp(column)
            h[j] = np.float64(m[at + j] * beta + (g[j] * scale) * rest)


@numba.njit(nogil=True, error_model="numpy", fastmath={"reassoc"})
def _norm(h):
    """The 2-norm of a row [D] in fp64, summed in the order of vector lanes."""
    total = 0.0
    for j in range(h.shape[0]):
        total += h[j] * h[j]
    return np.sqrt(total)


@numba.njit(nogil=True, error_model="numpy")
def _sinkhorn_balance(h, scales, least, eps):
    """Scale the columns of a row in place. Returns the factor that gives the row norm 1, or 0 if its norm before
    scaling is at most `least`."""
    if not _norm(h) > least:
        return 0.0
    for j in range(h.shape[0]):
        h[j] = h[j] * scales[j]
    return 1.0 / (_norm(h) + eps)


@_compiled
def sinkhorn_first(momentum, at, rows, sources, gradients, decays, scale, beta, rest):
    """M <- decay * M + (1 - beta) * G for the rows [n], with decays [n] fp32 and gradients G = gradients[sources [n]]
    (a source of -1: no gradient). Returns the sum of the norms of beta * M + (1 - beta) * G, fp64."""
    h = np.empty(gradients.shape[1], np.float64)
    total = 0.0
    for i in range(rows.shape[0]):
        m, decay = momentum[rows[i]], decays[i]
        for column in range(h.shape[0]):
            j = np.uintp(column)
            m[at + j] = m[at + j] * decay
        if sources[i] >= 0:
            g = gradients[sources[i]]
            for column in range(h.shape[0]):
                j = np.uintp(column)
                m[at + j] = m[at + j] + (g[j] * scale) * rest
        _sinkhorn_row(h, momentum, at, i, rows, sources, gradients, scale, beta, rest)
        total += _norm(h)
    return total


@_compiled
def sinkhorn_columns(squares, momentum, at, rows, sources, gradients, scale, beta, rest, scales, least, eps):
    """Add the squares of the balanced rows to squares [D] fp64."""
    h = np.empty(gradients.shape[1], np.float64)
    for i in range(rows.shape[0]):
        _sinkhorn_row(h, momentum, at, i, rows, sources, gradients, scale, beta, rest)
        factor = _sinkhorn_balance(h, scales, least, eps)
        for j in range(h.shape[0]):
            squares[j] += (h[j] * factor) * (h[j] * factor)


@_compiled
def sinkhorn_move(
    weights, at_w, momentum, at, rows, sources, gradients, scale, beta, rest, scales, least, eps, size, first_row,
    stream, stochastic,
):  # fmt: skip
    """Add the balanced rows times `size` to the weights."""
    dim = gradients.shape[1]
    h = np.empty(dim, np.float64)
    for i in range(rows.shape[0]):
        _sinkhorn_row(h, momentum, at, i, rows, sources, gradients, scale, beta, rest)
        factor = _sinkhorn_balance(h, scales, least, eps)
        if factor == 0:
            continue
        w, counter = weights[rows[i]], np.uint64(first_row + rows[i]) * np.uint64(dim)
        for column in range(dim):
            j = np.uintp(column)
            stored = w[at_w + j]
            value = _widen(stored) + np.float32((h[j] * factor) * size)
            w[at_w + j] = _narrow(value, stored, counter + np.uint64(j), stream, stochastic)


@_compiled
def rounding_noise(rows, dim, first_row, stream):
    """[U, D] uint16: the random bits with which the loops round these bf16 rows."""
    noise = np.empty((rows.shape[0], dim), np.uint16)
    for i in range(rows.shape[0]):
        counter = np.uint64(first_row + rows[i]) * np.uint64(dim)
        for j in range(dim):
            noise[i, j] = np.uint16(random_bits(stream, counter + np.uint64(j)) & np.uint64(0xFFFF))
    return noise


@_compiled
def square_norms(gradients):
    """[U] fp64: `reference.square_norms`."""
    columns = gradients.shape[1]
    norms, lanes = np.zeros(gradients.shape[0], np.float64), np.empty(_LANES, np.float64)
    parts = np.empty((columns + _PART - 1) // _PART, np.float64)
    for i in range(gradients.shape[0]):
        row = gradients[i]
        for part in range(parts.shape[0]):
            lanes[:] = 0.0
            for start in range(part * _PART, min((part + 1) * _PART, columns), _LANES):
                for lane in range(min(_LANES, columns - start)):
                    value = np.float64(row[start + lane])
                    lanes[lane] += value * value
            parts[part] = _pairwise(lanes)
        if columns:
            norms[i] = _pairwise(parts)
    return norms


@numba.njit(nogil=True, error_model="numpy")
def _pairwise(values):
    """Add neighbouring values until one is left, and return it; overwrites the values."""
    count = values.shape[0]
    while count > 1:
        for i in range(count // 2):
            values[i] = values[2 * i] + values[2 * i + 1]
        if count % 2:
            values[count // 2] = values[count - 1]
        count = (count + 1) // 2
    return values[0]


@_compiled
def gather(table, at, rows, out):
    """out[i] [D] = table[rows[i], at : at + D], in the table's own dtype."""
    for i in range(rows.shape[0]):
        source, target = table[rows[i]], out[i]
        for column in range(target.shape[0]):
            j = np.uintp(column)
            target[j] = source[at + j]


@_compiled
def add_segments(total, order, values):
    """total[order[i]] += values[i] for i = 0, 1, ..: each sum is in the order of `values`."""
    for i in range(order.shape[0]):
        target, source = total[order[i]], values[i]
        for j in range(source.shape[0]):
            target[j] += source[j]


@_compiled
def sum_segments(total, order, starts, values):
    """total[i] = the sum of values[order[starts[i]:starts[i + 1]]], in that order."""
    for i in range(total.shape[0]):
        target = total[i]
        target[:] = 0
        for k in range(starts[i], starts[i + 1]):
            source = values[order[k]]
            for j in range(source.shape[0]):
                target[j] += source[j]
