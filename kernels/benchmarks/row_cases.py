"""Benchmark cases for table rows: gathers from device memory and from pinned host memory, and updates."""

from collections.abc import Callable
from typing import Any

import torch
from cases import Case, Goal, Sizes
from kmem_kernels.row_gather.op import row_gather
from kmem_kernels.row_update.op import CatchUp, Gradients, RandomRounding, adam_, rowwise_adagrad_
from kmem_kernels.row_update.reference import AdamStep
from torch import Tensor

# Shape letters: R rows of D values in the table, U of them touched.

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def row_cases(device: torch.device, sizes: Sizes) -> list[Case]:
    return [*device_gathers(device, sizes), *host_gathers(device, sizes), *updates(device, sizes)]


def device_gathers(device: torch.device, sizes: Sizes) -> list[Case]:
    cases = []
    for dtype, columns in sizes.row_types:
        row_bytes = columns * dtype.itemsize
        rows, touched = sizes.table_bytes // row_bytes, sizes.touched_bytes // row_bytes

        def prepare(
            backend: Any = "triton",
            dtype: torch.dtype = dtype,
            rows: int = rows,
            columns: int = columns,
            u: int = touched,
        ) -> list[Callable[[], Any]]:
            table, ids = torch.ones(rows, columns, dtype=dtype, device=device), _drawn(u, rows, device)
            out = torch.empty(u, columns, device=device)
            if backend == "torch":
                return [lambda: torch.index_select(table, 0, ids)]
            return [lambda: row_gather(table, ids, out, backend="triton")]

        shape, moved = f"R{rows} D{columns} U{touched}", touched * (row_bytes + 4 * columns + 8)
        goal = Goal(90 if row_bytes >= 512 else 80, "%")
        cases.append(Case(f"row_gather {row_bytes} B", shape, NAMES[dtype], prepare, bytes=moved, goal=goal))
        if dtype == torch.float32:
            in_torch = lambda prepare=prepare: prepare("torch")  # noqa: E731
            cases.append(Case(f"row_gather {row_bytes} B (torch)", shape, "fp32", in_torch, bytes=moved))
    return cases


def host_gathers(device: torch.device, sizes: Sizes) -> list[Case]:
    cases = []
    for dtype, columns in sizes.row_types:
        row_bytes = columns * dtype.itemsize
        rows, touched = sizes.table_bytes // row_bytes, sizes.touched_bytes // 4 // row_bytes

        def prepare(
            dtype: torch.dtype = dtype, rows: int = rows, columns: int = columns, touched: int = touched
        ) -> list[Callable[[], Any]]:
            table = torch.empty(rows, columns, dtype=dtype, pin_memory=device.type == "cuda")
            ids, out = _drawn(touched, rows, device), torch.empty(touched, columns, device=device)
            return [lambda: row_gather(table, ids, out, backend="triton")]

        cases.append(
            Case(
                f"row_gather from the host {row_bytes} B",
                f"R{rows} D{columns} U{touched}",
                NAMES[dtype],
                prepare,
                bytes=touched * row_bytes,
                goal=Goal(90, "%"),
                over_the_bus=True,
            )
        )
    return cases


def updates(device: torch.device, sizes: Sizes) -> list[Case]:
    columns = 256 if sizes.table_bytes > 1 << 30 else 40
    rows, touched = sizes.table_bytes // (12 * columns), sizes.touched_bytes // (4 * columns)
    step = AdamStep.lazy(0.9, 0.999, 1e-8, 1e-3, 10)

    def arrays(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Gradients]:
        table = torch.ones(rows, columns, dtype=dtype, device=device)
        first, second = torch.zeros(rows, columns, device=device), torch.ones(rows, columns, device=device)
        ids = _drawn(touched, rows, device).unique()
        return table, first, second, Gradients(ids, torch.randn(len(ids), columns, device=device), 0.5)

    def adam(dtype: torch.dtype, catch_up: bool, rounding: RandomRounding | None) -> list[Callable[[], Any]]:
        *state, gradients = arrays(dtype)
        missed = None
        if catch_up:
            last = torch.zeros(rows, 1, dtype=torch.int32, device=device)
            missed = CatchUp(last, 10, torch.ones(3, 1024, device=device))
        return [lambda: adam_(*state, gradients, step, missed, rounding, backend="triton")]

    def adagrad(dtype: torch.dtype) -> list[Callable[[], Any]]:
        table, _, _, gradients = arrays(dtype)
        second = torch.ones(rows, 1, device=device)
        return [lambda: rowwise_adagrad_(table, second, gradients, 1e-3, 1e-8, backend="triton")]

    # The expected number of distinct rows that are drawn; accurate enough for a rate.
    unique = round(rows * (1 - (1 - 1 / rows) ** touched))
    shape = f"R{rows} D{columns} U{unique}"
    fp32, bf16 = torch.float32, torch.bfloat16
    kinds: list[tuple[str, torch.dtype, Callable[[], list[Callable[[], Any]]], int]] = [
        ("row_update lazy_adam", fp32, lambda: adam(fp32, False, None), 4 + 3 * 8),
        ("row_update lazy_adam, random rounding", bf16, lambda: adam(bf16, False, RandomRounding(7, 0)), 4 + 4 + 2 * 8),
        ("row_update adam_catchup", fp32, lambda: adam(fp32, True, None), 4 + 3 * 8),
        ("row_update rowwise_adagrad", fp32, lambda: adagrad(fp32), 4 + 8),
    ]
    return [
        Case(name, shape, NAMES[dtype], prepare, bytes=unique * (columns * value_bytes + 8))
        for name, dtype, prepare, value_bytes in kinds
    ]


def _drawn(count: int, rows: int, device: torch.device) -> Tensor:
    return torch.randint(rows, (count,), device=device)
