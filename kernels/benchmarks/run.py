"""Times the kernels and the MoE layer, and compares them with the copy and GEMM rates of the same process. Prints a
table and writes JSON.

    python kernels/benchmarks/run.py --out kernels.json         # on a GPU, within eight minutes
    python kernels/benchmarks/run.py --tiny --out tiny.json     # anywhere: on a CPU, kernels are interpreted

Bytes count what an operation cannot avoid: every input is read once, and every output is written once. Gathers from the
host count only the bytes of the rows; their ceiling is a kernel that reads host memory from front to back. FLOP count
the experts' products: 2 * T * K * 3 * H * I forward, and three times that with backward. Router, permutation and
activation add time but no FLOP.
"""

import argparse
import gc
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

from cases import SIZES, Case, Sizes, all_cases
from host_copy import host_copy
from row_cases import row_cases
from stream_cases import stream_cases

ROUNDS = 5
LONGEST_ROUND = 0.5
"""Seconds; short calls are repeated for about this long."""
PROFILED_KERNELS = 15


@dataclass(frozen=True)
class Ceilings:
    """The rates that this process reaches without the benchmarked kernels."""

    copy_bytes_per_second: float
    """Bytes read and written by one large copy."""
    gemm_flop_per_second: float
    host_copy_bytes_per_second: float
    """Bytes that a kernel reads from pinned host memory."""


@dataclass(frozen=True)
class Measurement:
    case: Case
    seconds: float | None
    """None: not measured."""
    reason: str = ""

    def share(self, ceilings: Ceilings) -> float | None:
        """The measured rate as a share of the case's ceiling; None if not measured."""
        if self.seconds is None:
            return None
        rates = {
            "GEMM": ceilings.gemm_flop_per_second,
            "copy": ceilings.copy_bytes_per_second,
            "host copy": ceilings.host_copy_bytes_per_second,
        }
        return (self.case.flop or self.case.bytes) / self.seconds / rates[self.case.ceiling]

    def value(self, unit: str, ceilings: Ceilings) -> float | None:
        if self.seconds is None:
            return None
        share = self.share(ceilings)
        rates = {"us": 1e6 * self.seconds, "TFLOP/s": self.case.flop / self.seconds / 1e12, "%": 100 * (share or 0)}
        return rates[unit]

    def meets_goal(self, ceilings: Ceilings) -> bool | None:
        """Whether the case meets its goal; None without a goal or a measurement."""
        goal = self.case.goal
        value = None if goal is None else self.value(goal.unit, ceilings)
        if goal is None or value is None:
            return None
        return value <= goal.limit if goal.at_most else value >= goal.limit


class TimeLeft:
    """Tells whether one more case will end in time. It assumes the duration of the longest case so far, including its
    profile."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._seconds = clock, seconds
        self._began = self._last = clock()
        self._longest = 0.0

    def passed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._began

    def for_one_more(self) -> bool:
        """Whether one more case will end in time; call it before each case."""
        now = self._clock()
        self._longest, self._last = max(self._longest, now - self._last), now
        return now - self._began + self._longest <= self._seconds


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: shows that everything runs, not how fast")
    parser.add_argument(
        "--minutes", type=float, default=7.5, help="no case begins that could end later, as long as the longest so far"
    )
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not options.tiny:
        parser.error("full sizes need a CUDA device; on a CPU kernels are interpreted: add --tiny")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    time_left = TimeLeft(60 * options.minutes)
    sizes = SIZES["tiny" if options.tiny else "full"]
    ceilings = measure_ceilings(device, sizes.copy_bytes, sizes.gemm)
    cases = [case for case in every_case(device, sizes) if options.only in case.name]
    measurements, profiles = [], {}
    for case in cases:
        if not time_left.for_one_more():
            measurements.append(Measurement(case, None, f"{options.minutes:g} minutes would have passed"))
            continue
        measurement = measure(case, device)
        if case.profiled and measurement.seconds is not None:
            measurement, profiles[case.name] = profiled(measurement, device)
        measurements.append(measurement)
        gc.collect()
        torch.cuda.empty_cache()
    report = {
        "environment": environment(device, options.tiny),
        "ceilings": vars(ceilings),
        "measurements": [as_json(measurement, ceilings, options.tiny) for measurement in measurements],
        "profiles": profiles,
        "seconds": time_left.passed(),
    }
    print_report(report)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    failed = [f"{m.case.name}: {m.reason}" for m in measurements if m.reason.startswith("failed")]
    print("\n".join(failed), file=sys.stderr, end="\n" if failed else "")
    return 1 if failed else 0


def every_case(device: torch.device, sizes: Sizes) -> list[Case]:
    return [*all_cases(device, sizes), *stream_cases(device, sizes), *row_cases(device, sizes)]


def measure_ceilings(device: torch.device, copy_bytes: int, gemm: int) -> Ceilings:
    source = torch.ones(copy_bytes // 4, device=device)
    target = torch.empty_like(source)
    copy = seconds_of([lambda: target.copy_(source)], device, "events")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(gemm, gemm, device=device).to(dtype) for _ in range(2))
    product = seconds_of([lambda: a @ b], device, "events")
    pinned = torch.ones(copy_bytes // 4, pin_memory=device.type == "cuda")
    bus = seconds_of([lambda: host_copy(pinned, target)], device, "events")
    return Ceilings(2 * source.nbytes / copy, 2 * gemm**3 / product, pinned.nbytes / bus)


def measure(case: Case, device: torch.device) -> Measurement:
    torch.manual_seed(0)
    try:
        return Measurement(case, seconds_of(case.prepare(), device, case.timing))
    except torch.cuda.OutOfMemoryError:
        return Measurement(case, None, "out of memory")
    except Exception as error:  # GPU time is rare, so the other cases still run; the exit status reports the failure
        return Measurement(case, None, f"failed: {type(error).__name__}: {error}")


def seconds_of(calls: Sequence[Callable[[], Any]], device: torch.device, timing: Literal["graph", "events"]) -> float:
    """Median time of one call; all calls do the same work on different data.

    `graph` replays all calls as one CUDA graph: launches do not show in a time of microseconds, and the data of all
    calls together does not fit the L2 cache. `events` launches the calls one by one.
    """
    for call in calls:
        call()
    if device.type == "cpu":
        return statistics.median(_on_cpu(calls) for _ in range(3)) / len(calls)
    torch.cuda.synchronize()
    if timing == "graph":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = [call() for call in calls]  # otherwise each call would reuse the memory of the previous outputs
        run: Callable[[], Any] = graph.replay
    else:
        kept = []

        def run() -> None:
            for call in calls:
                call()

    once = _on_gpu(run, 1)
    repeats = max(1, min(50, int(LONGEST_ROUND / once)))
    seconds = statistics.median(_on_gpu(run, repeats) for _ in range(ROUNDS))
    del kept
    return seconds / len(calls)


def _on_cpu(calls: Sequence[Callable[[], Any]]) -> float:
    began = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - began


def _on_gpu(run: Callable[[], Any], repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def profiled(measurement: Measurement, device: torch.device) -> tuple[Measurement, list[dict[str, Any]]]:
    """The measurement and the profile of its case. If profiling fails, the profile is empty and the measurement's
    reason tells why."""
    try:
        return measurement, profile(measurement.case, device)
    except Exception as error:  # the measurement itself is kept
        reason = f"failed while it was profiled: {type(error).__name__}: {error}"
        return Measurement(measurement.case, measurement.seconds, reason), []


def profile(case: Case, device: torch.device) -> list[dict[str, Any]]:
    """The time of one call by kernel (by operator on a CPU): the longest ones and their shares."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    (call,) = case.prepare()
    call()
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profiler(activities=[activity]) as trace:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
    name = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    rows = [(getattr(event, name), event.key, event.count) for event in trace.key_averages()]
    total = sum(row[0] for row in rows) or 1.0
    return [
        {"kernel": key[:120], "calls": count, "us": us, "share": us / total}
        for us, key, count in sorted(rows, reverse=True)[:PROFILED_KERNELS]
    ]


def environment(device: torch.device, tiny: bool) -> dict[str, Any]:
    import triton
    from kmem_kernels.backend import interpreted

    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "tiny": tiny,
        "interpreted": interpreted(),
    }
    if device.type == "cuda" and shutil.which("nvidia-smi"):
        fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
        command = [
            "nvidia-smi",
            f"--query-gpu={fields}",
            "--format=csv,noheader",
            f"--id={torch.cuda.current_device()}",
        ]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
        facts["nvidia-smi"] = dict(zip(fields.split(","), map(str.strip, answer.stdout.split(",")), strict=False))
    return facts


def as_json(measurement: Measurement, ceilings: Ceilings, tiny: bool) -> dict[str, Any]:
    case, seconds = measurement.case, measurement.seconds
    return {
        "name": case.name,
        "shape": case.shape,
        "dtype": case.dtype,
        "us": measurement.value("us", ceilings),
        "gigabytes_per_second": case.bytes / seconds / 1e9 if seconds and case.bytes else None,
        "tflop_per_second": measurement.value("TFLOP/s", ceilings) if case.flop else None,
        "ceiling": case.ceiling,
        "share_of_ceiling": measurement.share(ceilings),
        "goal": None if case.goal is None else str(case.goal),
        "meets_goal": None if tiny else measurement.meets_goal(ceilings),  # goals are for full sizes
        "not_measured": measurement.reason or None,
    }


def print_report(report: dict[str, Any]) -> None:
    print(", ".join(f"{key} {value}" for key, value in report["environment"].items()))
    ceilings = report["ceilings"]
    print(
        f"copy {ceilings['copy_bytes_per_second'] / 1e9:,.0f} GB/s (read + written), "
        f"GEMM {ceilings['gemm_flop_per_second'] / 1e12:,.2f} TFLOP/s, "
        f"copy from the host {ceilings['host_copy_bytes_per_second'] / 1e9:,.1f} GB/s (read)\n"
    )
    if report["environment"]["interpreted"]:
        print("Kernels are interpreted: these times say nothing about a GPU.\n")
    table = [("", "shape", "dtype", "time", "rate", "of ceiling", "goal")]
    for row in report["measurements"]:
        if row["us"] is None:
            table.append((row["name"], row["shape"], row["dtype"], "not measured", "", "", row["goal"] or ""))
            continue
        in_flop = row["tflop_per_second"] is not None
        rate = f"{row['tflop_per_second']:,.3g} TFLOP/s" if in_flop else f"{row['gigabytes_per_second']:,.4g} GB/s"
        met = {True: " (met)", False: " (missed)", None: ""}[row["meets_goal"]]
        share = f"{100 * row['share_of_ceiling']:.1f} % {row['ceiling']}"
        time_text = f"{row['us']:,.1f} us" if row["us"] < 1e4 else f"{row['us'] / 1e3:,.2f} ms"
        table.append((row["name"], row["shape"], row["dtype"], time_text, rate, share, (row["goal"] or "") + met))
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    for line in table:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
    for name, rows in report["profiles"].items():
        print(f"\n{name}, one call:")
        for row in rows:
            print(f"  {100 * row['share']:5.1f} %  {row['us']:10,.0f} us  {row['calls']:4d} x  {row['kernel']}")


if __name__ == "__main__":
    sys.exit(main())
