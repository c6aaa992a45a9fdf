"""How the ranks of a run find each other, and agree on what they run, before anything collective depends on it."""

import errno
import json
import os
import resource
import socket
import time
from collections import defaultdict
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import constants, distributed_c10d

import kmem
from kmem.config import Config, ConfigError
from kmem.parallel.launch_environment import environment_number, environment_rank
from kmem.parallel.mesh import Mesh, choose_kernels, local_device
from kmem.wording import counted

LISTED = 5
"""Number of differences that an error names."""
_LINGER_SECONDS = 2.0
"""How long rank 0, which answers the others, waits before it ends with an error that they must read."""


def join_mesh(config: Config) -> Mesh:
    """Start (or join) the process group, compare the configuration and versions of all ranks, check the mesh, and make
    every group that later work needs.

    All ranks create the groups in the same order, including stages without experts: `new_group` is collective over the
    world.

    Raises:
        ConfigError: the world does not fit the configuration, ranks do not meet, or they differ. An error names the
            field or variable, and the ranks.
    """
    rank, world = environment_rank()
    if not dist.is_initialized():
        _start_process_group(config.parallel.timeout_seconds, rank, world)
    elif dist.get_world_size() != world:
        raise ConfigError(f"WORLD_SIZE is {world}, but the process group has {counted(dist.get_world_size(), 'rank')}")

    import deepspeed
    from deepspeed import comm, ops
    from deepspeed.utils import groups

    versions = {"kmem": kmem.__version__, "torch": torch.__version__, "deepspeed": deepspeed.__version__}
    check_agreement({f"version of {name}": version for name, version in versions.items()} | fields_of(config))
    choose_kernels(config.train.deterministic)
    mesh = Mesh(rank, config.parallel.pipeline, config.data_parallel_size(world), config.parallel.expert)
    # On a CPU DeepSpeed would compile C++ now, for an all-reduce that only its inference engine uses.
    ops.__compatible_ops__["deepspeed_shm_comm"] = False

    comm.init_distributed(dist_init_required=False)  # wraps the running group for DeepSpeed
    if mesh.expert > 1:
        groups._create_expert_and_data_parallel(mesh.expert, pp_size=mesh.pipeline)
    return mesh


def leave_mesh() -> None:
    """Destroy the process groups, including the ones that DeepSpeed remembers."""
    distributed_c10d.default_pg_timeout = constants.default_pg_timeout
    distributed_c10d.default_pg_nccl_timeout = constants.default_pg_nccl_timeout
    if dist.is_initialized():
        from deepspeed.comm import comm
        from deepspeed.utils import groups

        groups._release_process_group_references()
        comm.cdb = None  # otherwise the next process group would find the wrapper of this one
        dist.destroy_process_group()


def fields_of(config: Config) -> dict[str, Any]:
    """Dotted name of each field of a configuration -> its value."""

    def flat(prefix: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict | list):
            return {prefix: value}
        items = value.items() if isinstance(value, dict) else enumerate(value)
        parts = [flat(f"{prefix}.{name}" if prefix else str(name), part) for name, part in items]
        return {name: part for fields in parts for name, part in fields.items()}

    return flat("", config.model_dump(mode="json"))


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Refuse to go on if a fact differs between ranks, or is missing on some. Collective over the world.

    Args:
        facts: name -> plain value, such as a field's value or a digest.

    Raises:
        ConfigError: names the facts that differ, their values and the ranks; on all ranks alike.
    """
    everywhere: list[Mapping[str, Any]] = [facts] * dist.get_world_size()
    if len(everywhere) > 1:
        dist.all_gather_object(everywhere, dict(facts))
    differing = []
    for name in sorted({name for known in everywhere for name in known}):
        ranks = defaultdict(list)
        for rank, known in enumerate(everywhere):
            ranks[json.dumps(known[name]) if name in known else "missing"].append(rank)
        if len(ranks) > 1:
            values = [f"{_shortened(value)} on {_ranks(having)}" for value, having in ranks.items()]
            differing.append(f"{name}: {', '.join(values)}")
    if differing:
        more = f"; and {len(differing) - LISTED} more" if len(differing) > LISTED else ""
        raise ConfigError(
            f"{'; '.join(differing[:LISTED])}{more}. All ranks need the same configuration, data and software: start "
            "them with the same command, in the same environment"
        )


def _shortened(text: str) -> str:
    """A value; the beginning of a digest."""
    return text if len(text) < 64 else f'{text[:13]}..."'


def _ranks(numbers: list[int]) -> str:
    """The words for ascending ranks: "ranks 0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return f"rank{'s' if len(numbers) > 1 else ''} " + ", ".join("-".join(map(str, run)) for run in runs)


def _start_process_group(seconds: int, rank: int, world: int) -> None:
    if world == 1 and "MASTER_PORT" not in os.environ:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # any port that is free when rank 0 listens
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.setdefault("LOCAL_RANK", "0")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # every group has a connection to every rank
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = _meet(seconds, rank, world)
    # DeepSpeed makes groups without a timeout, and torch's own lets the others wait half an hour for a lost rank. So
    # the default is changed: all groups have it from their beginning.
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timedelta(seconds=seconds)
    try:
        dist.init_process_group(
            backend="nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("group", store),
            timeout=timedelta(seconds=seconds),
            rank=rank,
            world_size=world,
        )
    except (RuntimeError, OSError) as error:
        raise open_files_problem(error) or ConfigError(
            f"rank {rank} of {world} could not connect to the other ranks ({_first_line(error)}). On several machines, "
            "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names the network interface to use"
        ) from error


def open_files_problem(error: BaseException) -> ConfigError | None:
    """The user's error, if a process had too many open files. gloo's error has no type, so the message decides."""
    if os.strerror(errno.EMFILE) not in str(error):
        return None
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return ConfigError(
        f"{os.strerror(errno.EMFILE)}: this process may have {limit}, and each of its groups connects it with "
        "every rank; allow more, such as 65536, with ulimit -n or in the limits of the job"
    )


def _meet(seconds: int, rank: int, world: int) -> dist.Store:
    """The store at MASTER_ADDR:MASTER_PORT, once all ranks are there.

    torch's own rendezvous would wait for a number of clients, whoever they are: two processes with one RANK, or another
    WORLD_SIZE on one machine, would go on and hang.

    Raises:
        ConfigError: names the variable and the ranks.
    """
    address, port = os.environ.get("MASTER_ADDR", ""), environment_number("MASTER_PORT")
    place, until = f"{address}:{port}", time.monotonic() + seconds
    # torchrun's agent listens there itself, and has done so before it started the ranks.
    listens = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
    within = f"within {counted(seconds, 'second')} (parallel.timeout_seconds)"
    try:
        # torch would print a trace of C++ for what is only a wrong port.
        if listens and port:
            socket.create_server(("", port)).close()
        elif not listens:
            _await_listener(address, port, until)
        store: dist.Store = dist.TCPStore(
            address,
            port,
            is_master=listens,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            multi_tenant=listens,
        )
        # torchrun's store may outlive the processes that it starts again.
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        _await_all(dist.PrefixStore("joining", store), place, within, until, rank, world, listens)
        return store
    except (dist.DistError, OSError, OverflowError, ValueError) as error:
        told = (
            f"rank 0 cannot listen at {place} ({_first_line(error)}); give all ranks another MASTER_PORT, or end the "
            "process that uses it"
            if listens
            else f"rank {rank} of {world} found no rank 0 at {place} {within} ({_first_line(error)}); check that rank "
            "0 runs, and that all ranks have the MASTER_ADDR and MASTER_PORT of its machine"
        )
        raise ConfigError(f"MASTER_PORT: {told}") from error


def _await_listener(address: str, port: int, until: float) -> None:
    """Wait until something listens there.

    Raises:
        OSError: nothing does, at the time `until` of the monotonic clock.
    """
    while True:
        try:
            return socket.create_connection((address, port), timeout=max(0.1, until - time.monotonic())).close()
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


def _await_all(
    joining: dist.Store, place: str, within: str, until: float, rank: int, world: int, listens: bool
) -> None:
    """Wait until every rank has joined exactly once, with the same world size."""

    def refuse(problem: str) -> None:
        joining.set("problem", problem)
        if listens:
            time.sleep(_LINGER_SECONDS)
        raise ConfigError(problem)

    if rank == 0:
        joining.set("world", str(world))
    elif (expected := int(joining.get("world"))) != world:
        refuse(f"WORLD_SIZE: {expected} on rank 0, {world} on rank {rank}; start all ranks with the same number")
    if joining.add(f"rank {rank}", 1) > 1:
        refuse(f"RANK: two processes that met at {place} are rank {rank}; give every process a rank of its own")
    if joining.add("joined", 1) == world:
        joining.set("all", "")
    pause = 0.01
    while not joining.check(["all"]):
        if joining.check(["problem"]):
            refuse(joining.get("problem").decode())
        if time.monotonic() > until:
            missing = [other for other in range(world) if not joining.check([f"rank {other}"])]
            raise ConfigError(
                f"WORLD_SIZE: {_ranks(missing)} of {world} did not join at {place} {within}; check that all ranks run, "
                "with the same WORLD_SIZE, MASTER_ADDR and MASTER_PORT and a RANK of their own"
            )
        time.sleep(pause)
        pause = min(1.0, 2 * pause)


def _first_line(error: BaseException) -> str:
    """The first line of an error's message. torch appends traces of C++."""
    return str(error).strip().split("\n")[0]
