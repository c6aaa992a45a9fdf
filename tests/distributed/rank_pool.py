"""A pool of rank processes kept alive between cases.

A case is a module-level function `case(*arguments)` of a test module; every rank runs it in a fresh process group of
the asked size and returns something picklable.
"""

import gc
import importlib
import multiprocessing as mp
import os
import queue
import traceback
from collections.abc import Callable
from typing import Any

from kmem.parallel.local_launch import free_port
from tests.warm_processes import WITH_KMEM, WarmContext

TIMEOUT_SECONDS = 180


class RankFailure(AssertionError):
    """A case raised on at least one rank; holds the tracebacks."""


class RankPool:
    """Processes that run cases as ranks, on the CPU with gloo or on GPUs with NCCL."""

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        # A process that was forked by one that has seen no GPU finds none.
        self._context = WarmContext(WITH_KMEM) if device == "cpu" else mp.get_context("spawn")
        self._workers: list[tuple[Any, Any, Any]] = []

    def run(self, world: int, case: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The case's results by rank."""
        while len(self._workers) < world:
            jobs, answers = self._context.Queue(), self._context.Queue()
            process = self._context.Process(target=_serve, args=(self._device, jobs, answers), daemon=True)
            process.start()
            self._workers.append((process, jobs, answers))
        port = free_port()
        for rank, (_, jobs, _) in enumerate(self._workers[:world]):
            jobs.put((case.__module__, case.__qualname__, arguments, rank, world, port))
        results, failures = [], []
        for rank, (_, _, answers) in enumerate(self._workers[:world]):
            try:
                ok, value = answers.get(timeout=TIMEOUT_SECONDS)
            except queue.Empty:
                ok, value = False, f"no answer within {TIMEOUT_SECONDS} s"
            results.append(value)
            if not ok:
                failures.append(f"rank {rank}: {value}")
        if failures:
            self.close()  # survivors may hang in a collective: the next case gets fresh processes
            raise RankFailure("\n".join(failures))
        return results

    def close(self) -> None:
        for process, _, _ in self._workers:
            process.kill()
            process.join()
        self._workers.clear()


def _serve(device: str, jobs: Any, answers: Any) -> None:
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # what is imported; `_forget_engines` need not look at it
    while True:
        module, name, arguments, rank, world, port = jobs.get()
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            DS_ACCELERATOR=device,
        )
        try:
            case = importlib.import_module(module)
            for part in name.split("."):
                case = getattr(case, part)
            answers.put((True, case(*arguments)))
        except BaseException:
            answers.put((False, traceback.format_exc()))
        finally:
            from kmem.parallel.joining import leave_mesh

            leave_mesh()
            _forget_engines()


_HOLDERS = (
    "StepEngine",
    "_StagedModule",
    "PipelineParallelGrid",
    "DeepSpeedZeroOptimizer",
    "BF16_Optimizer",
    "Parameter",  # ZeRO gives it its group
)


def _forget_engines() -> None:
    """Empty the engines of a finished case. DeepSpeed's hooks on autograd keep them for ever, and with them the threads
    of all their process groups: a thousand after a hundred cases, each of which wakes up every 10 ms."""
    for candidate in gc.get_objects():
        if type(candidate).__name__ in _HOLDERS:
            getattr(candidate, "__dict__", {}).clear()  # other libraries have classes of these names
    gc.collect()
