"""The time of a step by parts, from counted work (`kmem.parallel.layer_work`) and rates of hardware.

The schedule is 1F1B: with M micro-batches and P stages a step takes M + P - 1 times the slowest stage. Parts are those
of the slowest stage. Operators run one after another, each as fast as its FLOP or its bytes allow; communication is not
hidden behind computation.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from kmem.config import Config
from kmem.parallel.layer_work import LayerWork, Work, layer_work, loss_work
from kmem.parallel.memory_kinds import kinds_of
from kmem.parallel.mesh import Mesh
from kmem.parallel.optimizers import BACKBONE_OPTIMIZERS
from kmem.parallel.stages import stage_bounds
from kmem.plan.hardware import Hardware, Shares
from kmem.tables.table_spec import DTYPES
from kmem.train.dry_run import rank_bytes

_PARTS = {
    "aten::mm": "matrix products",
    "aten::addmm": "matrix products",
    "aten::bmm": "matrix products",
    "kmem_meta::grouped_mm": "products of experts",
    "kmem_meta::grouped_mm_backward": "products of experts",
    "kmem_meta::attention": "attention",
    "kmem_meta::attention_backward": "attention",
    "kmem_kernels::hyper_connection_read": "hyper-connections",
    "kmem_kernels::hyper_connection_read_backward": "hyper-connections",
    "kmem_kernels::hyper_connection_write": "hyper-connections",
    "kmem_kernels::hyper_connection_write_backward": "hyper-connections",
}
_OTHER = "other operators"
_ACCUMULATION = 10
"""Bytes per parameter and micro-batch: a gradient in bf16 is read and added to its sum in fp32."""


@dataclass(frozen=True)
class Prediction:
    """A step of a run."""

    seconds: float
    parts: dict[str, float]
    """Part -> seconds of a step, largest first; together, all of them."""
    tokens: int
    """Of the global batch."""
    flop: float
    """Model FLOP of a step: three times those of the forward passes, without recomputation."""
    mfu: float
    """Share of the devices' FLOP that model FLOP are."""
    device_bytes: int
    """Of the fullest rank, as the dry run counts them."""


def predict(config: Config, mesh: Mesh, hardware: Hardware, shares: Shares, with_kernels: bool = True) -> Prediction:
    """Predict a step.

    Args:
        with_kernels: False: with the torch code in place of kmem's Triton kernels.
    """
    train, bounds, last = config.train, stage_bounds(config), config.model.num_layers + 1
    micro_batches = train.global_batch_size // (train.micro_batch_size * mesh.data)
    works = {place: layer_work(config, place - 1, mesh.expert, with_kernels=with_kernels) for place in range(1, last)}
    works[last] = loss_work(config, with_kernels)
    ranks = rank_bytes(config, mesh)
    stages = []
    for stage in range(mesh.pipeline):
        layers = range(bounds[stage], bounds[stage + 1])
        parts = _sum(_layer_parts(works[place], hardware, shares) for place in layers if place in works)
        experts = [place - 1 for place in layers if 0 < place < last and config.model.shape.has_experts(place - 1)]
        parts["expert exchange"] = len(experts) * _exchange(config, mesh, hardware, shares)
        if mesh.pipeline > 1:
            parts["between stages"] = 2 * _stream_bytes(config) / _link(mesh.data, hardware, shares)
        parts["gradient accumulation"] = (
            _ACCUMULATION * ranks[stage].parameters / (hardware.memory * shares.memory)
            if train.precision == "bf16"
            else 0.0
        )
        stages.append(parts)
    slowest = max(range(mesh.pipeline), key=lambda stage: sum(stages[stage].values()))
    parts = {name: micro_batches * seconds for name, seconds in stages[slowest].items()}
    parts["pipeline bubble"] = (mesh.pipeline - 1) * sum(stages[slowest].values())
    parts["gradients between ranks"] = max(
        _reduction(config, mesh, held.parameters, hardware, shares) for held in ranks
    )
    parts["optimizer"] = max(_optimizer(config, held.optimizer, hardware, shares) for held in ranks)
    parts |= _tables(config, mesh, hardware, shares)
    seconds = sum(parts.values())
    forward = sum(_model_flop(work.forward) for work in works.values()) - 2 / 3 * _model_flop(works[last].forward)
    flop = 3 * forward * micro_batches * mesh.data
    return Prediction(
        seconds=seconds,
        parts=dict(sorted(((name, part) for name, part in parts.items() if part), key=lambda item: -item[1])),
        tokens=train.global_batch_size * config.data.sequence_length,
        flop=flop,
        mfu=flop / (seconds * mesh.world * hardware.flop),
        device_bytes=max(held.total for held in ranks),
    )


def _model_flop(work: Work) -> int:
    """Without products that stand in for other things, such as the mixing of branches."""
    return sum(flop for name, flop in work.flop.items() if _PARTS.get(name, _OTHER) != "hyper-connections")


def _layer_parts(work: LayerWork, hardware: Hardware, shares: Shares) -> dict[str, float]:
    return _sum(_pass_parts(each, hardware, shares) for each in (work.forward, work.backward))


def _pass_parts(work: Work, hardware: Hardware, shares: Shares) -> dict[str, float]:
    """Seconds by part; where the host is slower than the device, it is the host that counts."""
    reached = {
        "matrix products": shares.products,
        "products of experts": shares.grouped,
        "attention": shares.attention,
        "hyper-connections": shares.products,
    }
    parts: dict[str, float] = {}
    for name in work.operators:
        part = _PARTS.get(name, _OTHER)
        computing = work.flop[name] / (hardware.flop * reached.get(part, shares.products))
        moving = work.bytes[name] / (hardware.memory * shares.memory)
        parts[part] = parts.get(part, 0.0) + max(computing, moving)
    waiting = work.operators.total() * shares.launch - sum(parts.values())
    return parts | ({"launches": waiting} if waiting > 0 else {})


def _sum(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for name, seconds in part.items():
            total[name] = total.get(name, 0.0) + seconds
    return total


def _width(config: Config) -> int:
    """Bytes of a value of the weights and of the stream."""
    return DTYPES[config.train.precision].itemsize


def _stream_bytes(config: Config) -> int:
    shape, tokens = config.model.shape, config.train.micro_batch_size * config.data.sequence_length
    return tokens * shape.branches * shape.hidden_size * _width(config)


def _link(ranks: int, hardware: Hardware, shares: Shares) -> float:
    """Bytes per second between ranks that lie `ranks` apart or span as many."""
    return shares.links * (hardware.node_link if ranks <= hardware.per_node else hardware.network)


def _exchange(config: Config, mesh: Mesh, hardware: Hardware, shares: Shares) -> float:
    """All-to-all of a layer's rows: out and home, in both passes, and again where the layer is recomputed."""
    moe = config.model.moe
    if moe is None or mesh.expert == 1:
        return 0.0
    rows = config.train.micro_batch_size * config.data.sequence_length * moe.top_k
    chain = 1 if moe.chain is None else moe.chain.iterations
    times = chain * (6 if config.train.recompute == "full" else 4)
    sent = rows * config.model.hidden_size * _width(config) * (mesh.expert - 1) / mesh.expert
    return times * sent / _link(mesh.expert, hardware, shares)


def _reduction(config: Config, mesh: Mesh, parameters: int, hardware: Hardware, shares: Shares) -> float:
    """A ring over the data ranks: gradients in fp32, and with sharded optimizers the new weights."""
    sent = (mesh.data - 1) / mesh.data * parameters
    sharded = config.train.precision == "bf16" or config.parallel.zero_stage == 1
    return sent * (4 + (_width(config) if sharded else 4)) / _link(mesh.data, hardware, shares)


def _optimizer(config: Config, state: int, hardware: Hardware, shares: Shares) -> float:
    """State is read and written; gradients are read and weights written once."""
    per_parameter = 4 * (1 + len(BACKBONE_OPTIMIZERS[config.train.optimizer.name].moments))
    updated = state / per_parameter
    return updated * (2 * per_parameter + 4 + 2) / (hardware.memory * shares.memory)


def _tables(config: Config, mesh: Mesh, hardware: Hardware, shares: Shares) -> dict[str, float]:
    """Rows of a step, as if each look-up were of another row: their exchange between owners, the bus, their update."""
    shape, bounds = config.model.shape, stage_bounds(config)
    tokens = config.train.global_batch_size // mesh.data * config.data.sequence_length
    worst: dict[str, float] = {}
    for stage in range(mesh.pipeline):
        parts = {"table exchange": 0.0, "table bus": 0.0, "table update": 0.0}
        for kind in kinds_of(shape):
            layers = [place - 1 for place in range(bounds[stage], bounds[stage + 1])]
            for table in kind.table_bytes(config, mesh, layers):
                values = kind.model.row_values(shape, table.number) if table.place == "layer" else 0
                width = DTYPES[kind.settings(config).dtype].itemsize
                rows = min(tokens * values * width // table.row_bytes, table.rows * mesh.data)
                out, home = rows * table.row_bytes, rows * table.row_bytes // width * 4
                away = (mesh.data - 1) / mesh.data
                owned = min(rows, table.rows)
                device = table.store == "device"
                if mesh.data > 1:
                    parts["table exchange"] += away * (out + home) / (hardware.network * shares.links)
                if not device:
                    parts["table bus"] += (out + home) / (hardware.bus * shares.links)
                rate = hardware.memory * shares.memory if device else hardware.host_memory * shares.host
                gradient = table.row_bytes // width * 4
                parts["table update"] += owned * (2 * (table.row_bytes + table.state_bytes) + gradient) / rate
        if sum(parts.values()) > sum(worst.values()):
            worst = parts
    return worst
