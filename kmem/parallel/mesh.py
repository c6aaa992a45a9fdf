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

from kmem.config import Config, ConfigError, UserError
from kmem.wording import counted

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


def environment_rank() -> tuple[int, int]:
    """(rank, world size) from the environment, where torchrun, deepspeed and `kmem train --nproc` put them."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def join_mesh(config: Config) -> Mesh:
    """Check the mesh, then start (or join) the process group and every group that later work needs.

    All ranks create the groups in the same order, including stages without experts: `new_group` is collective over the
    world.

    Raises:
        ConfigError: the world does not fit the configuration; raised before any process group exists.
    """
    rank, world = environment_rank()
    mesh = Mesh(rank, config.parallel.pipeline, config.data_parallel_size(world), config.parallel.expert)
    if not dist.is_initialized():
        _start_process_group(config, rank, world)
    elif dist.get_world_size() != world:
        raise ConfigError(f"WORLD_SIZE is {world}, but the process group has {counted(dist.get_world_size(), 'rank')}")

    from deepspeed import comm, ops
    from deepspeed.utils import groups

    # On a CPU DeepSpeed would compile C++ now, for an all-reduce that only its inference engine uses.
    ops.__compatible_ops__["deepspeed_shm_comm"] = False

    comm.init_distributed(dist_init_required=False)  # wraps the running group for DeepSpeed
    if mesh.expert > 1:
        groups._create_expert_and_data_parallel(mesh.expert, pp_size=mesh.pipeline)
    return mesh


def limit_waiting(config: Config) -> None:
    """Set the timeout of every process group to `parallel.timeout_seconds`, including DeepSpeed's groups."""
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=config.parallel.timeout_seconds), group)


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


def leave_mesh() -> None:
    """Destroy the process groups, including the ones that DeepSpeed remembers."""
    if dist.is_initialized():
        from deepspeed.comm import comm
        from deepspeed.utils import groups

        groups._release_process_group_references()
        comm.cdb = None  # otherwise the next process group would find the wrapper of this one
        dist.destroy_process_group()


def expert_group(mesh: Mesh) -> dist.ProcessGroup:
    """The ranks that share one set of experts with this one."""
    from deepspeed.utils import groups

    return groups._get_expert_parallel_group(mesh.expert_group_name)


def local_device() -> torch.device:
    """The accelerator of this rank; DS_ACCELERATOR=cpu keeps a run off the GPUs."""
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def _start_process_group(config: Config, rank: int, world: int) -> None:
    if world == 1 and "MASTER_PORT" not in os.environ:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # any port that is free when rank 0 listens
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.setdefault("LOCAL_RANK", "0")
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=config.parallel.timeout_seconds),
        rank=rank,
        world_size=world,
    )
