"""The mesh of ranks: world = pipeline x data, expert parallelism divides data.

Stages are the outermost axis: rank = stage * data_size + data_rank, so the ranks of a stage are neighbours, and the
ranks that share one set of experts are neighbours within a stage.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from kmem.config import UserError
from kmem.tables.exchange import ExchangeError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Mesh:
    """Sizes of the mesh axes and this rank's place on them."""

    rank: int
    pipeline: int
    data: int
    expert: int

    @property
    def world(self) -> int:
        return self.pipeline * self.data

    @property
    def stage(self) -> int:
        return self.rank // self.data

    @property
    def data_rank(self) -> int:
        return self.rank % self.data

    @property
    def expert_rank(self) -> int:
        """Place within the group that shares one set of experts; also the number of the local expert slice."""
        return self.data_rank % self.expert

    @property
    def expert_group_name(self) -> str:
        """DeepSpeed's name of the expert groups."""
        return f"ep_size_{self.expert}"

    @property
    def is_first_replica(self) -> bool:
        """True on the one rank of a stage whose copy of replicated state counts."""
        return self.data_rank == 0

    @property
    def is_first_expert_replica(self) -> bool:
        """True on the ranks whose copy of their expert slice counts."""
        return self.data_rank < self.expert

    def __str__(self) -> str:
        return f"pipeline {self.pipeline} x data {self.data} (expert {self.expert})"


def limit_waiting(seconds: float) -> None:
    """Set the timeout of every process group, including DeepSpeed's groups."""
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def any_rank(flags: Sequence[bool]) -> list[bool]:
    """For each flag, whether it is set on any rank; collective over the world."""
    if dist.get_world_size() == 1:
        return list(flags)
    values = torch.tensor([float(flag) for flag in flags], device=local_device())
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return [bool(value) for value in values.tolist()]


def lost_peer(error: BaseException | None) -> bool:
    """Whether a collective failed because another rank is gone or does not answer. gloo and NCCL have no error type for
    this, so the message decides."""
    if isinstance(error, ExchangeError):
        error = error.__cause__
    signs = ("Connection closed by", "Connection reset by", "Timed out", "timed out", "timeout", "no answer within")
    return isinstance(error, RuntimeError | TimeoutError) and any(sign in str(error) for sign in signs)


def raise_on_all_ranks(problem: str | None, kind: type[UserError] = UserError) -> None:
    """Raise the problem of the first rank that has one, on every rank; collective over the world."""
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    reported = [(rank, text) for rank, text in enumerate(problems) if text is not None]
    if reported:
        rank, text = reported[0]
        raise kind(text if rank == 0 else f"rank {rank}: {text}")


def run_on_all_ranks(action: Callable[[], Result]) -> Result:
    """Run an action on every rank and return this rank's result. If any rank raises a UserError, all ranks raise one.
    Collective over the world."""
    result, problem = None, None
    try:
        result = action()
    except UserError as error:
        problem = str(error)
    raise_on_all_ranks(problem)
    return cast(Result, result)


def expert_group(mesh: Mesh) -> dist.ProcessGroup:
    """The ranks that share one set of experts with this one."""
    from deepspeed.utils import groups

    return groups._get_expert_parallel_group(mesh.expert_group_name)


def choose_kernels(deterministic: bool) -> None:
    """Let torch choose among all kernels or deterministic ones, before the first runs on a GPU. Operations that have no
    deterministic kernel raise then. kmem's own kernels are deterministic."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once
        torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass is not deterministic
    # Filling costs time, and kmem reads no memory that it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(deterministic)


def local_device() -> torch.device:
    """The accelerator of this rank; DS_ACCELERATOR=cpu keeps a run off the GPUs."""
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")
