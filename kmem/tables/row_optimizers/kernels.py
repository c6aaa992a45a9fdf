"""Compiled loops over touched rows on the host, and what the loops of row optimizers are made of: one pass that reads
and writes each row and its state once.

The arithmetic is that of `kmem_kernels.row_update.reference`, operation by operation in fp32, without contraction or
reordering. Loops release the interpreter lock; threads split the rows, so the result does not depend on their number.
`weights` is fp32, or uint16 holding bf16 bits. An array of a store is passed as a contiguous one and the column `at_*`,
np.uintp, where its rows start in it (`Store.columns`): loops over contiguous rows by unsigned numbers are vectorised,
at least twice as fast as those over strided arrays, and need no slices, which cost a tenth. Scalars must be passed as
np.float32: Python's would turn the arithmetic into double precision.
"""

import numba
import numpy as np
from kmem_kernels.row_update.reference import SQUARES_LANES, SQUARES_PART

from kmem.tables.counter_random import random_bits

compiled = numba.njit(nogil=True, cache=True, error_model="numpy")
_ONE, _SIXTEEN = np.uint32(1), np.uint32(16)
_HALF = np.uint32(0x7FFF)
_LANES, _PART = SQUARES_LANES, SQUARES_PART


@numba.njit(inline="always")
def widen(bits):
    """bf16 bits -> fp32."""
    return np.uint32(np.uint32(bits) << _SIXTEEN).view(np.float32)


@numba.njit(inline="always")
def narrow(value):
    """fp32 -> bf16 bits, nearest even."""
    bits = np.float32(value).view(np.uint32)
    return np.uint16((bits + _HALF + ((bits >> _SIXTEEN) & _ONE)) >> _SIXTEEN)


@numba.njit(inline="always")
def narrow_randomly(value, stream, counter):
    """fp32 -> bf16 bits, up with the probability of the part cut off."""
    noise = np.uint32(random_bits(stream, counter) & np.uint64(0xFFFF))
    return np.uint16((np.float32(value).view(np.uint32) + noise) >> _SIXTEEN)


@numba.njit(nogil=True, error_model="numpy")
def summed_gradient(i, order, starts, gradients, scratch):
    """The sum of row i's contributions: their only one itself, or added up in `scratch` [D] in their order."""
    if starts[i + 1] - starts[i] == 1:
        return gradients[order[starts[i]]]
    scratch[:] = 0
    for k in range(starts[i], starts[i + 1]):
        source = gradients[order[k]]
        for j in range(source.shape[0]):
            scratch[j] += source[j]
    return scratch


@compiled
def rounding_noise(rows, dim, first_row, stream):
    """[U, D] uint16: the random bits with which the bf16 kernels round those rows."""
    noise = np.empty((rows.shape[0], dim), np.uint16)
    for i in range(rows.shape[0]):
        counter = np.uint64(first_row + rows[i]) * np.uint64(dim)
        for j in range(dim):
            noise[i, j] = np.uint16(random_bits(stream, counter + np.uint64(j)) & np.uint64(0xFFFF))
    return noise


@compiled
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
    """Neighbours are added until one is left, which is returned; overwrites the values."""
    count = values.shape[0]
    while count > 1:
        for i in range(count // 2):
            values[i] = values[2 * i] + values[2 * i + 1]
        if count % 2:
            values[count // 2] = values[count - 1]
        count = (count + 1) // 2
    return values[0]


@compiled
def gather(table, at, rows, out):
    """out[i] [D] = table[rows[i], at : at + D], in the table's own type."""
    for i in range(rows.shape[0]):
        source, target = table[rows[i]], out[i]
        for column in range(target.shape[0]):
            j = np.uintp(column)
            target[j] = source[at + j]


@compiled
def add_segments(total, order, values):
    """total[order[i]] += values[i] for i from 0 on: a sum whose order is the order of `values`."""
    for i in range(order.shape[0]):
        target, source = total[order[i]], values[i]
        for j in range(source.shape[0]):
            target[j] += source[j]


@compiled
def sum_segments(total, order, starts, values):
    """total[i] = the sum of values[order[starts[i]:starts[i + 1]]], in that order."""
    for i in range(total.shape[0]):
        target = total[i]
        target[:] = 0
        for k in range(starts[i], starts[i + 1]):
            source = values[order[k]]
            for j in range(source.shape[0]):
                target[j] += source[j]
