"""Each kernel walks the streams once or twice and keeps all numbers of a token's mappings in registers.

The M (M + 2) numbers of a token are a small matrix of M + 2 rows: row 0 reads the branches, row 1 writes to them, and
the rows after that mix them. A program holds it padded to powers of two, for a block of tokens.

There are no atomics: what is summed over tokens is summed per block of tokens, and then over the blocks in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import interpreted, launching, operator
from ..tiling import row_tiling

# Shape letters: N tokens, M branches, D hidden size, S blocks of tokens.

FAR_BELOW = tl.constexpr(-1e30)
"""A logit that takes no part; finite, so that differences of two of them are numbers."""


@triton.jit
def _column(values, column, NUMBER: tl.constexpr):
    """Column NUMBER of values [BLOCK, Q]."""
    return tl.sum(tl.where(column == NUMBER, values, 0.0), 1)


@triton.jit
def _logits(dynamic, scale_ptr, bias_ptr, row, column, M: tl.constexpr):
    """Logits of dynamic [BLOCK, P, Q], and the factor [1, P, Q] between the two."""
    live = (row < M + 2) & (column < M)
    factor = tl.load(scale_ptr + tl.minimum(row, 2) + 0 * column, mask=live, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + row * M + column, mask=live, other=0.0).to(tl.float32)
    return dynamic * factor + bias, factor


@triton.jit
def _log_sum(values, AXIS: tl.constexpr):
    """log(sum(exp(values))) along the axis, which stays with size 1."""
    most = tl.max(values, AXIS, keep_dims=True)
    return most + tl.log(tl.sum(tl.exp(values - most), AXIS, keep_dims=True))


@triton.jit
def _read(
    streams_ptr,  # [N, M, D]
    weight_ptr,  # [M (M + 2), M D]
    bias_ptr,  # [M (M + 2)]
    scale_ptr,  # [3]
    taken_ptr,  # [N, D], of the streams' dtype
    mappings_ptr,  # fp32 [N, M + 2, M]
    dynamic_ptr,  # fp32 [N, M + 2, M]
    rms_ptr,  # fp32 [N]
    tokens,
    eps,
    M: tl.constexpr,
    HIDDEN: tl.constexpr,
    ITERATIONS: tl.constexpr,
    P: tl.constexpr,  # rows and columns of the mappings, padded
    Q: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    NARROW: tl.constexpr,  # whether streams and weight have one 16-bit dtype: their products are exact in fp32
):
    WIDTH: tl.constexpr = M * HIDDEN
    NUMBERS: tl.constexpr = M * (M + 2)
    token = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    token_live = token < tokens
    cell = tl.arange(0, P * Q)
    cell_live = (cell // Q < M + 2) & (cell % Q < M)
    number = cell // Q * M + cell % Q

    dots = tl.zeros((BLOCK, P * Q), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, WIDTH, BLOCK_HIDDEN):
        place = start + tl.arange(0, BLOCK_HIDDEN)
        live = place < WIDTH
        x = tl.load(
            streams_ptr + token[:, None] * WIDTH + place[None, :], mask=token_live[:, None] & live[None, :], other=0.0
        )
        w = tl.load(
            weight_ptr + number[None, :].to(tl.int64) * WIDTH + place[:, None],
            mask=cell_live[None, :] & live[:, None],
            other=0.0,
        )
        wide = x.to(tl.float32)
        squares += tl.sum(wide * wide, 1)
        if NARROW:
            dots = tl.dot(x, w, dots)
        else:
            dots = tl.dot(wide, w.to(tl.float32), dots, input_precision="tf32x3")
    rms = 1 / tl.sqrt(squares / WIDTH + eps)
    tl.store(rms_ptr + token, rms, mask=token_live)

    row = tl.arange(0, P)[None, :, None]
    column = tl.arange(0, Q)[None, None, :]
    dynamic = tl.reshape(dots * rms[:, None], (BLOCK, P, Q))
    logits, _ = _logits(dynamic, scale_ptr, bias_ptr, row, column, M)
    mixes = (row >= 2) & (row < M + 2) & (column < M)
    logs = tl.where(mixes, logits, FAR_BELOW)
    for _ in range(ITERATIONS):
        logs = tl.where(mixes, logs - _log_sum(logs, 1), FAR_BELOW)
        logs = tl.where(mixes, logs - _log_sum(logs, 2), FAR_BELOW)
    opened = tl.sigmoid(logits)
    mappings = tl.where(row == 0, opened, tl.where(row == 1, 2 * opened, tl.exp(logs)))
    places = token[:, None, None] * NUMBERS + row * M + column
    kept = token_live[:, None, None] & (row < M + 2) & (column < M)
    tl.store(mappings_ptr + places, mappings, mask=kept)
    tl.store(dynamic_ptr + places, dynamic, mask=kept)

    pre = tl.sum(tl.where(row == 0, mappings, 0.0), 1)
    branch = tl.arange(0, Q)[None, :]
    for start in range(0, HIDDEN, BLOCK_HIDDEN):
        place = start + tl.arange(0, BLOCK_HIDDEN)[None, :]
        live = token_live[:, None] & (place < HIDDEN)
        taken = tl.zeros((BLOCK, BLOCK_HIDDEN), tl.float32)
        for m in tl.static_range(M):
            x = tl.load(streams_ptr + token[:, None] * WIDTH + m * HIDDEN + place, mask=live, other=0.0)
            taken += _column(pre, branch, m)[:, None] * x.to(tl.float32)
        tl.store(taken_ptr + token[:, None] * HIDDEN + place, taken.to(taken_ptr.dtype.element_ty), mask=live)


@triton.jit
def _read_backward(
    grad_taken_ptr,  # [N, D]
    grad_streams_ptr,  # [N, M, D]: the gradient from `write`
    grad_mappings_ptr,  # fp32 [N, M + 2, M]
    streams_ptr,  # [N, M, D]
    weight_ptr,  # [M (M + 2), M D]
    bias_ptr,  # [M (M + 2)]
    scale_ptr,  # [3]
    mappings_ptr,  # fp32 [N, M + 2, M]
    dynamic_ptr,  # fp32 [N, M + 2, M]
    rms_ptr,  # fp32 [N]
    sums_ptr,  # fp32 [N, ITERATIONS, P + Q], scratch: what is taken from a token's logarithms
    grad_ptr,  # [N, M, D], of the streams' dtype
    grad_logits_ptr,  # fp32 [N, M + 2, M]
    grad_dots_ptr,  # fp32 [N, M + 2, M]
    tokens,
    M: tl.constexpr,
    HIDDEN: tl.constexpr,
    ITERATIONS: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    WIDTH: tl.constexpr = M * HIDDEN
    NUMBERS: tl.constexpr = M * (M + 2)
    token = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    token_live = token < tokens
    branch = tl.arange(0, Q)[None, :]
    row = tl.arange(0, P)[None, :, None]
    column = tl.arange(0, Q)[None, None, :]
    places = token[:, None, None] * NUMBERS + row * M + column
    kept = token_live[:, None, None] & (row < M + 2) & (column < M)

    grad_pre = tl.zeros((BLOCK, Q), tl.float32)
    for start in range(0, HIDDEN, BLOCK_HIDDEN):
        place = start + tl.arange(0, BLOCK_HIDDEN)[None, :]
        live = token_live[:, None] & (place < HIDDEN)
        grad = tl.load(grad_taken_ptr + token[:, None] * HIDDEN + place, mask=live, other=0.0).to(tl.float32)
        for m in tl.static_range(M):
            x = tl.load(streams_ptr + token[:, None] * WIDTH + m * HIDDEN + place, mask=live, other=0.0)
            grad_pre += tl.where(branch == m, tl.sum(grad * x.to(tl.float32), 1)[:, None], 0.0)

    mappings = tl.load(mappings_ptr + places, mask=kept, other=0.0)
    dynamic = tl.load(dynamic_ptr + places, mask=kept, other=0.0)
    rms = tl.load(rms_ptr + token, mask=token_live, other=0.0)
    logits, factor = _logits(dynamic, scale_ptr, bias_ptr, row, column, M)
    grad_mappings = tl.load(grad_mappings_ptr + places, mask=kept, other=0.0)
    grad_mappings += tl.where(row == 0, grad_pre[:, None, :], 0.0)

    # After every pass, a logarithm is the logit minus a sum of its row and one of its column.
    mixes = (row >= 2) & (row < M + 2) & (column < M)
    logits = tl.where(mixes, logits, FAR_BELOW)
    by_row = tl.zeros((BLOCK, P, 1), tl.float32)
    by_column = tl.zeros((BLOCK, 1, Q), tl.float32)
    column_sums = sums_ptr + token[:, None, None] * ITERATIONS * (P + Q) + column
    row_sums = sums_ptr + token[:, None, None] * ITERATIONS * (P + Q) + Q + row
    for number in range(ITERATIONS):
        tl.store(row_sums + number * (P + Q), by_row, mask=token_live[:, None, None])
        by_column += _log_sum(tl.where(mixes, logits - by_row - by_column, FAR_BELOW), 1)
        by_row += _log_sum(tl.where(mixes, logits - by_row - by_column, FAR_BELOW), 2)
        tl.store(column_sums + number * (P + Q), by_column, mask=token_live[:, None, None])
    tl.debug_barrier()  # other threads than those that stored them may read the sums
    grad_logs = tl.where(mixes, grad_mappings * mappings, 0.0)
    for back in range(ITERATIONS):
        number = ITERATIONS - 1 - back
        by_column = tl.load(column_sums + number * (P + Q), mask=token_live[:, None, None], other=0.0)
        shares = tl.where(mixes, tl.exp(logits - by_row - by_column), 0.0)
        grad_logs -= shares * tl.sum(grad_logs, 2, keep_dims=True)
        by_row = tl.load(row_sums + number * (P + Q), mask=token_live[:, None, None], other=0.0)
        shares = tl.where(mixes, tl.exp(logits - by_row - by_column), 0.0)
        grad_logs -= shares * tl.sum(grad_logs, 1, keep_dims=True)
    # Of s = sigmoid(l): s (1 - s), and of 2 s, as stored in row 1: 2 s (1 - 2 s / 2).
    slope = tl.where(row == 0, mappings * (1 - mappings), mappings * (1 - 0.5 * mappings))
    grad_logits = tl.where(mixes, grad_logs, tl.where(row < 2, grad_mappings * slope, 0.0))
    tl.store(grad_logits_ptr + places, grad_logits, mask=kept)

    # With d = rms * dots: the gradient of the streams is W' grad_dots - rms^2 / width * <grad_d, d> * streams.
    grad_dynamic = grad_logits * factor
    grad_dots = grad_dynamic * rms[:, None, None]
    tl.store(grad_dots_ptr + places, grad_dots, mask=kept)
    shrink = rms * rms * tl.sum(tl.sum(grad_dynamic * dynamic, 2), 1) / WIDTH
    grad_dots = tl.reshape(grad_dots, (BLOCK, P * Q))
    pre = tl.sum(tl.where(row == 0, mappings, 0.0), 1)
    cell = tl.arange(0, P * Q)[:, None]
    cell_live = (cell // Q < M + 2) & (cell % Q < M)
    cell_row = (cell // Q * M + cell % Q).to(tl.int64)
    for start in range(0, HIDDEN, BLOCK_HIDDEN):
        place = start + tl.arange(0, BLOCK_HIDDEN)[None, :]
        live = token_live[:, None] & (place < HIDDEN)
        grad_taken = tl.load(grad_taken_ptr + token[:, None] * HIDDEN + place, mask=live, other=0.0).to(tl.float32)
        for m in tl.static_range(M):
            at = token[:, None] * WIDTH + m * HIDDEN + place
            x = tl.load(streams_ptr + at, mask=live, other=0.0).to(tl.float32)
            grad = tl.load(grad_streams_ptr + at, mask=live, other=0.0).to(tl.float32)
            w = tl.load(
                weight_ptr + cell_row * WIDTH + m * HIDDEN + place, mask=cell_live & (place < HIDDEN), other=0.0
            )
            grad += _column(pre, branch, m)[:, None] * grad_taken - shrink[:, None] * x
            grad = tl.dot(grad_dots, w.to(tl.float32), grad, input_precision="tf32x3")
            tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=live)


@triton.jit
def _weight_gradient(
    grad_dots_ptr,  # fp32 [N, M (M + 2)]
    streams_ptr,  # [N, M D]
    out_ptr,  # fp32 [S, M (M + 2), M D]
    tokens,
    block_tokens,  # tokens per block, a multiple of BLOCK
    NUMBERS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,  # NUMBERS, padded
    BLOCK: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    place = tl.program_id(0) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    number = tl.arange(0, PADDED)
    first = tl.program_id(1) * block_tokens
    sums = tl.zeros((PADDED, BLOCK_HIDDEN), tl.float32)
    for start in range(0, block_tokens, BLOCK):
        token = (first + start + tl.arange(0, BLOCK)).to(tl.int64)
        live = token < tokens
        grad = tl.load(
            grad_dots_ptr + token[None, :] * NUMBERS + number[:, None],
            mask=live[None, :] & (number < NUMBERS)[:, None],
            other=0.0,
        )
        x = tl.load(
            streams_ptr + token[:, None] * WIDTH + place[None, :],
            mask=live[:, None] & (place < WIDTH)[None, :],
            other=0.0,
        )
        sums = tl.dot(grad, x.to(tl.float32), sums, input_precision="tf32x3")
    out = out_ptr + (tl.program_id(1) * NUMBERS + number[:, None]).to(tl.int64) * WIDTH + place[None, :]
    tl.store(out, sums, mask=(number < NUMBERS)[:, None] & (place < WIDTH)[None, :])


@triton.jit
def _write(
    streams_ptr,  # [N, M, D]
    output_ptr,  # [N, D]
    mappings_ptr,  # fp32 [N, M + 2, M]
    out_ptr,  # [N, M, D], of the streams' dtype
    M: tl.constexpr,
    HIDDEN: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    blocks: tl.constexpr = (HIDDEN + BLOCK_HIDDEN - 1) // BLOCK_HIDDEN
    token = (tl.program_id(0) // blocks).to(tl.int64)
    place = tl.program_id(0) % blocks * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    branch = tl.arange(0, Q)
    live = (branch < M)[:, None] & (place < HIDDEN)[None, :]
    at = token * M * HIDDEN + branch[:, None] * HIDDEN + place[None, :]
    x = tl.load(streams_ptr + at, mask=live, other=0.0).to(tl.float32)
    output = tl.load(output_ptr + token * HIDDEN + place, mask=place < HIDDEN, other=0.0).to(tl.float32)
    mappings_ptr += token * M * (M + 2)
    for m in tl.static_range(M):
        mixing = tl.load(mappings_ptr + (2 + m) * M + branch, mask=branch < M, other=0.0)
        out = tl.sum(mixing[:, None] * x, 0) + tl.load(mappings_ptr + M + m) * output
        tl.store(
            out_ptr + token * M * HIDDEN + m * HIDDEN + place, out.to(out_ptr.dtype.element_ty), mask=place < HIDDEN
        )


@triton.jit
def _write_backward(
    grad_ptr,  # [N, M, D]
    streams_ptr,  # [N, M, D]
    output_ptr,  # [N, D]
    mappings_ptr,  # fp32 [N, M + 2, M]
    grad_streams_ptr,  # [N, M, D]
    grad_output_ptr,  # [N, D]
    grad_mappings_ptr,  # fp32 [N, M + 2, M]
    M: tl.constexpr,
    HIDDEN: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    branch = tl.arange(0, Q)
    branch_live = branch < M
    mappings_ptr += token * M * (M + 2)
    grad_mappings_ptr += token * M * (M + 2)
    post = tl.load(mappings_ptr + M + branch, mask=branch_live, other=0.0)
    products = tl.zeros((Q, Q, BLOCK_HIDDEN), tl.float32)  # of every gradient with every branch
    by_output = tl.zeros((Q, BLOCK_HIDDEN), tl.float32)
    for start in range(0, HIDDEN, BLOCK_HIDDEN):
        place = start + tl.arange(0, BLOCK_HIDDEN)
        live = branch_live[:, None] & (place < HIDDEN)[None, :]
        at = token * M * HIDDEN + branch[:, None] * HIDDEN + place[None, :]
        grad = tl.load(grad_ptr + at, mask=live, other=0.0).to(tl.float32)
        x = tl.load(streams_ptr + at, mask=live, other=0.0).to(tl.float32)
        output = tl.load(output_ptr + token * HIDDEN + place, mask=place < HIDDEN, other=0.0).to(tl.float32)
        products += grad[:, None, :] * x[None, :, :]
        by_output += grad * output[None, :]
        tl.store(
            grad_output_ptr + token * HIDDEN + place,
            tl.sum(post[:, None] * grad, 0).to(grad_output_ptr.dtype.element_ty),
            mask=place < HIDDEN,
        )
        for m in tl.static_range(M):
            mixing = tl.load(mappings_ptr + (2 + branch) * M + m, mask=branch_live, other=0.0)
            tl.store(
                grad_streams_ptr + token * M * HIDDEN + m * HIDDEN + place,
                tl.sum(mixing[:, None] * grad, 0).to(grad_streams_ptr.dtype.element_ty),
                mask=place < HIDDEN,
            )
    tl.store(grad_mappings_ptr + branch, tl.zeros((Q,), tl.float32), mask=branch_live)
    tl.store(grad_mappings_ptr + M + branch, tl.sum(by_output, 1), mask=branch_live)
    tl.store(
        grad_mappings_ptr + (2 + branch[:, None]) * M + branch[None, :],
        tl.sum(products, 2),
        mask=branch_live[:, None] & branch_live[None, :],
    )


@operator
def hyper_connection_read(
    streams: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, eps: float, iterations: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.read`, and what the backward pass needs: the dynamic part of the logits [N, M + 2, M] and the inverse
    RMS [N]."""
    tokens, branches, hidden = streams.shape
    taken = streams.new_empty(tokens, hidden)
    mappings = streams.new_empty(tokens, branches + 2, branches, dtype=torch.float32)
    dynamic, rms = torch.empty_like(mappings), streams.new_empty(tokens, dtype=torch.float32)
    if launching(taken):
        tiling = _tiling(streams)
        _read[(triton.cdiv(tokens, tiling["BLOCK"]),)](
            streams,
            weight,
            bias,
            scale,
            taken,
            mappings,
            dynamic,
            rms,
            tokens,
            eps,
            ITERATIONS=iterations,
            # The interpreter multiplies 16-bit numbers wrongly.
            NARROW=streams.dtype == weight.dtype != torch.float32 and not interpreted(),
            **tiling,
        )
    return taken, mappings, dynamic, rms


@operator
def hyper_connection_read_backward(
    grad_taken: Tensor,
    grad_streams: Tensor,
    grad_mappings: Tensor,
    streams: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    mappings: Tensor,
    dynamic: Tensor,
    rms: Tensor,
    iterations: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of streams, weight, bias and scale."""
    tokens, (numbers, width) = len(streams), weight.shape
    grad = torch.empty_like(streams)
    grad_logits, grad_dots = torch.empty_like(mappings), torch.empty_like(mappings)
    tiling = _tiling(streams)
    blocks = max(1, min(8, tokens // 256))
    parts = streams.new_empty(blocks, numbers, width, dtype=torch.float32)
    if launching(grad):
        sums = rms.new_empty(tokens, iterations, tiling["P"] + tiling["Q"])
        _read_backward[(triton.cdiv(tokens, tiling["BLOCK"]),)](
            grad_taken,
            grad_streams,
            grad_mappings,
            streams,
            weight,
            bias,
            scale,
            mappings,
            dynamic,
            rms,
            sums,
            grad,
            grad_logits,
            grad_dots,
            tokens,
            ITERATIONS=iterations,
            **tiling,
        )
        block, block_hidden = tiling["BLOCK"], tiling["BLOCK_HIDDEN"]
        _weight_gradient[(triton.cdiv(width, block_hidden), blocks)](
            grad_dots,
            streams,
            parts,
            tokens,
            triton.cdiv(triton.cdiv(tokens, blocks), block) * block,
            NUMBERS=numbers,
            WIDTH=width,
            PADDED=max(16, triton.next_power_of_2(numbers)),
            BLOCK=block,
            BLOCK_HIDDEN=block_hidden,
        )
    else:
        for empty in (parts, grad_logits):
            empty.zero_()
    grad_scale = (grad_logits * dynamic).sum(0).sum(1)
    return (
        grad,
        parts.sum(0).to(weight.dtype),
        grad_logits.sum(0).flatten().to(bias.dtype),
        torch.cat((grad_scale[:2], grad_scale[2:].sum(0, keepdim=True))).to(scale.dtype),
    )


@operator
def hyper_connection_write(streams: Tensor, output: Tensor, mappings: Tensor) -> Tensor:
    """`reference.write`."""
    out = torch.empty_like(streams)
    if launching(out):
        tiling = row_tiling(streams)
        programs = len(streams) * triton.cdiv(streams.shape[2], tiling["BLOCK_HIDDEN"])
        _write[(programs,)](streams, output, mappings, out, **tiling)
    return out


@operator
def hyper_connection_write_backward(
    grad: Tensor, streams: Tensor, output: Tensor, mappings: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of streams, output and mappings; that of the mappings' row 0 is zero."""
    grad_streams, grad_output = torch.empty_like(streams), torch.empty_like(output)
    grad_mappings = torch.empty_like(mappings)
    if launching(grad):
        products = triton.next_power_of_2(streams.shape[1]) ** 2  # sums per thread and column
        tiling = row_tiling(streams, most=max(1, 64 // products))
        _write_backward[(len(streams),)](
            grad, streams, output, mappings, grad_streams, grad_output, grad_mappings, **tiling
        )
    return grad_streams, grad_output, grad_mappings


def _tiling(streams: Tensor) -> dict[str, int]:
    """For kernels of a block of tokens per program."""
    _, branches, hidden = streams.shape
    columns = triton.next_power_of_2(branches)
    rows = max(triton.next_power_of_2(branches + 2), 16 // columns)  # products need 16 rows and columns
    widest = 1024 if interpreted() else max(16, 4096 // (rows * columns))
    return {
        "M": branches,
        "HIDDEN": hidden,
        "P": rows,
        "Q": columns,
        "BLOCK": 64 if interpreted() else 16,
        "BLOCK_HIDDEN": min(max(16, triton.next_power_of_2(hidden)), widest, 1024 if interpreted() else 128),
        "num_stages": 3 if branches <= 4 else 2,  # what is fetched ahead must fit into shared memory
    }
