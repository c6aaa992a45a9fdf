"""A model as a DeepSpeed pipeline: built, partitioned, and stepped.

A training step on one rank. Each line has the name of its range in a profile (`torch.profiler`); the worker is the
thread of the rank's tables.

    main thread                            worker                               device
    -------------------------------------  -----------------------------------  --------------------------------
    begin_step(t + 1): read the batch      "kmem: fetch" t + 1: plan the rows
                                           from ids and addresses, ask their
                                           owners; rows that step t holds wait
    train_step(t)
      "kmem: wait for rows" of t           (all of t were handed out before)    rows of t arrive
      "kmem: forward", "kmem: backward"    rows of t + 1 that t does not hold   layers look rows up and add their
        micro-batch by micro-batch, 1F1B   arrive                               gradients into one buffer a table
      "kmem: reduce": gradients of
        weights over data ranks
      "kmem: optimizer"
        guard: one all-reduce; all ranks
          go on, or raise
        stage_tables.commit(t)             "kmem: update" t: gradients to the   row optimizer, where rows are on
                                           owners, who update their rows; then  the device
                                           the rows of t + 1 that waited go out
        optimizer of the weights                                                weights of t + 1
      "kmem: figures of memories"

A row that step t changes is handed out to step t + 1 after that change, and only then: the owner knows both steps.

Rows that follow from hidden states (product keys) have no part in this: layers look them up in "kmem: forward", on the
main thread, and `stage_tables.commit` updates them there.
"""

import contextlib
import importlib
import io
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor, nn
from torch.profiler import record_function

from kmem.config import Config
from kmem.data.batch import SequenceBatch
from kmem.model.decoder import DecoderLayer
from kmem.model.expert_backends import find_backend, problem
from kmem.model.init import initialise_
from kmem.model.memory_kind import MemoryModule
from kmem.model.moe import ExpertLayer
from kmem.model.shape import Shape
from kmem.parallel.engine import StepEngine, UnclippedBF16Optimizer
from kmem.parallel.expert_dispatch import AllToAllDispatcher
from kmem.parallel.gradients import GradientNorm
from kmem.parallel.memory_kind import BegunStep, StageMemory, StageParts
from kmem.parallel.memory_kinds import kinds_of
from kmem.parallel.mesh import Mesh, expert_group, local_device, raise_on_all_ranks
from kmem.parallel.optimizers import make_backbone_optimizer
from kmem.parallel.routing_ledger import RoutingLedger, StepRouting
from kmem.parallel.selective_recompute import checkpoint_selectively
from kmem.parallel.stage_layers import EmbeddingLayer, LossLayer, NormLayer, StageLayer, TransformerLayer, tied_loss
from kmem.parallel.stage_tables import LookedUp, StageTables
from kmem.parallel.stages import stage_bounds
from kmem.parallel.step_context import MicroBatch, StepContext

_NOTHING: Mapping[str, Any] = MappingProxyType({})
_REDUCE_BUCKET = 1 << 24
"""Elements per gradient bucket: 64 MiB in fp32, large enough to be bound by bandwidth."""


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every rank."""

    loss: float
    """Mean cross entropy in nats over the trained tokens of the global batch."""
    tokens: int
    """Trained tokens of the global batch (labels that are not masked)."""
    grad_norm: float
    """Global 2-norm of the gradients before clipping, without table rows; 0 if only table rows are trained."""
    routing: StepRouting | None
    memories: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """Kind of memory -> layer or level -> its figures, as plain data."""


class Pipeline:
    """One rank's stage of the model with its engine and its tables.

    Canonical parameter names are the same on every mesh; see `named_parameters`. `close` releases the tables' memory.

    Args:
        prepared: kind of memory -> result of its `MemoryKind.prepare`.
        initialise_rows: draw the initial rows of tables; False if a checkpoint will be loaded.

    Raises:
        UserError: `train.expert_backend` does not run on a rank, or a table does not fit its store; on all ranks alike.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        prepared: Mapping[str, Any] = _NOTHING,
        initialise_rows: bool = True,
    ):
        self.config = config
        self.mesh = mesh
        self.prepared = prepared
        self.device = local_device()
        self.context = StepContext()
        self.shape = shape = config.model.shape
        self.frozen = config.model.frozen_anchor
        raise_on_all_ranks(expert_problem(config))
        with _quiet():
            self.module = _StagedModule(_layer_specs(config, shape, mesh), mesh.pipeline, stage_bounds(config))
        self.context.frozen = self.frozen
        for layer in self.layers():
            layer.context = self.context
            initialise_(layer.module, shape, config.train.init_seed, layer.prefix)
        self.moe_layers = self._connect_experts()
        self.engine = self._initialise_engine()
        if config.train.recompute == "selective":
            self.module.activation_checkpoint_func = checkpoint_selectively
        self.ledger = None
        if config.model.moe is not None:
            self.ledger = RoutingLedger(self.moe_layers, shape, mesh, self.context)
        self.context.memories = memories = self._stage_memories(prepared)
        self.stage_tables = StageTables(config, mesh, memories, self.device, initialise_rows)

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches of one rank in a step."""
        return self.config.train.global_batch_size // (self.config.train.micro_batch_size * self.mesh.data)

    def layers(self) -> list[StageLayer]:
        """The layers of this stage, in order, each once."""
        return [module for module in self.module.modules() if isinstance(module, StageLayer)]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(canonical name, parameter) of this stage; a stacked expert tensor is this rank's slice."""
        for layer in self.layers():
            for name, parameter in layer.module.named_parameters():
                yield layer.prefix + name, parameter

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """(canonical name, buffer) of the persistent buffers of this stage, such as selection biases."""
        for layer in self.layers():
            parameters = dict(layer.module.named_parameters())
            for name, value in layer.module.state_dict().items():
                if name not in parameters:
                    yield layer.prefix + name, value

    def begin_step(self, micro_batches: Sequence[SequenceBatch]) -> BegunStep:
        """Start fetching the rows of a later step, at most `prefetch_depth` steps ahead of the running one. Steps are
        trained in the order in which they are begun, which is the same on every rank."""
        assert len(micro_batches) == self.micro_batches
        return self.stage_tables.begin(micro_batches)

    def train_step(self, step: BegunStep | Sequence[SequenceBatch], lr: float, sampled: bool = False) -> StepResult:
        """Forward, backward and update on this rank's micro-batches of one step.

        Args:
            step: micro-batches, or a step that was begun with them.
            lr: learning rate.
            sampled: also collect figures that are too costly for every step: pairs of experts that tokens visit in
                consecutive iterations of a chain, collisions of n-grams and norms of rows. The same on every rank.

        Raises:
            NonFiniteStepError: on all ranks, before any weight has changed.
        """
        begun = step if isinstance(step, BegunStep) else self.begin_step(step)
        with record_function("kmem: wait for rows"):
            looked_up = self.stage_tables.activate(begun)
        tokens = self._load(begun.micro_batches, looked_up)
        # DeepSpeed averages over micro-batches and data-parallel ranks; the loss is a mean over the step's tokens.
        self.context.loss_factor = self.micro_batches * self.mesh.data / max(tokens, 1)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        if self.ledger is not None:
            self.ledger.begin_step(sampled)
        try:
            loss = self.engine.train_step(self._inputs(), lambda: self.stage_tables.commit(begun, lr))
        finally:
            self.context.unload()
        routing = None
        if self.ledger is not None:
            assert self.config.model.moe is not None
            routing = self.ledger.close_step(self.micro_batches)
            if not self.frozen:
                self.ledger.update_biases(routing, self.config.model.moe.bias_update_rate)
        with record_function("kmem: figures of memories"):
            figures = {memory.kind: memory.close_step(begun, sampled) for memory in self.context.memories}
        return StepResult(loss, tokens, self.engine.grad_norm, routing, figures)

    def evaluate(
        self, micro_batches: Sequence[SequenceBatch], controls: Mapping[str, str] = _NOTHING
    ) -> tuple[float, int]:
        """(summed cross entropy in nats, tokens) over the micro-batches of all ranks; every rank passes equally many.

        Args:
            controls: kind of memory -> one of its `ModelKind.controls`, which replaces what training reads.
        """
        looked_up = self.stage_tables.evaluate(micro_batches, controls)
        tokens = self._load(micro_batches, looked_up)
        self.context.loss_factor = 1.0
        mean = self.engine.eval_batch(self._inputs(), num_micro_batches=len(micro_batches))
        self.context.unload()
        return float(mean) * len(micro_batches) * self.mesh.data, tokens

    def close(self, error: BaseException | None = None) -> None:
        """Skip the steps that are begun and release the tables' memory.

        Args:
            error: an error that other ranks may not share; nothing is exchanged any more after it.
        """
        self.stage_tables.close(error)

    def _load(self, micro_batches: Sequence[SequenceBatch], looked_up: LookedUp) -> int:
        """Make these the running micro-batches; returns the trained tokens over all data-parallel ranks."""
        on_device = []
        for number, batch in enumerate(micro_batches):
            beside = {kind: by_batch[number] for kind, by_batch in looked_up.beside.items() if by_batch}
            on_device.append(MicroBatch.on_device(batch, self.shape, self.device, beside))
        self.context.load(on_device, looked_up)
        count = torch.stack([(micro.sequences.labels >= 0).sum() for micro in self.context.micro_batches]).sum()
        dist.all_reduce(count, group=self.engine.grid.get_data_parallel_group())
        return int(count)

    def _inputs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The iterator that the first and last stage pull from; labels reach the last layer through the context."""
        no_labels = torch.empty(0)
        return ((micro.sequences.input_ids, no_labels) for micro in self.context.micro_batches)

    def _stage_memories(self, prepared: Mapping[str, Any]) -> list[StageMemory]:
        """The memories of the model on this stage; collective over the world."""
        modules: dict[str, dict[int, MemoryModule]] = {}
        for layer in self.layers():
            if isinstance(layer, TransformerLayer):
                assert isinstance(layer.module, DecoderLayer)
                for kind, module in layer.module.memories.items():
                    modules.setdefault(kind, {})[layer.index] = module
        parts = StageParts(self.config, self.shape, self.mesh, self.context, modules)
        return [kind.stage(parts, prepared.get(kind.name)) for kind in kinds_of(self.shape)]

    def _connect_experts(self) -> dict[int, ExpertLayer]:
        expert_layers = {}
        backend = find_backend(self.config.train.expert_backend)
        for layer in self.layers():
            for module in layer.modules():
                if isinstance(module, ExpertLayer):
                    assert isinstance(layer, TransformerLayer)
                    expert_layers[layer.index] = module
                    module.loss_scale = 1.0 / self.micro_batches
                    module.padding = self.context.padding
                    module.experts.backend = backend
                    if self.mesh.expert > 1:
                        module.dispatcher = AllToAllDispatcher(expert_group(self.mesh))
                        for parameter in module.experts.parameters():  # DeepSpeed's marks of an expert parameter
                            setattr(parameter, "allreduce", False)  # noqa: B010 - not an attribute of its class
                            setattr(parameter, "group_name", self.mesh.expert_group_name)  # noqa: B010
        if expert_layers and self.mesh.expert > 1:
            assert self.config.model.moe is not None
            self.module.add_module("expert_mark", _ExpertMark(self.config.model.moe.num_experts))
        return expert_layers

    def _initialise_engine(self) -> StepEngine:
        train = self.config.train
        optimizer = make_backbone_optimizer(list(self.named_parameters()), train.optimizer, self.mesh)
        with _quiet():
            engine, *_ = deepspeed.initialize(
                model=self.module, optimizer=optimizer, config=engine_config(self.config, self.mesh)
            )
        if type(engine.optimizer) is BF16_Optimizer:
            engine.optimizer.__class__ = UnclippedBF16Optimizer
        if self.frozen:
            # Only now: while it builds, DeepSpeed looks for trainable parameters and keeps masters of bf16 weights.
            self.module.requires_grad_(False)
        norm = GradientNorm(self.module, engine.optimizer, self.mesh)
        return StepEngine.adopt(engine, self.context, norm, train.optimizer.clip_norm)


def expert_problem(config: Config) -> str | None:
    """Why this process cannot compute the experts as configured, and the remedy; None if it can."""
    if config.model.moe is not None and local_device().type == "cuda":
        # A loaded export may run without these kernels; a training run must use what its configuration names.
        try:
            for kernel in ("route", "permute", "swiglu"):
                importlib.import_module(f"kmem_kernels.{kernel}.op")
        except ImportError as error:
            return f"model.moe: its kernels cannot be imported ({error}): pip install 'triton>=3.6'"
    name = config.train.expert_backend
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    refusal = problem(name, local_device(), dtype)
    if refusal is None:
        return None
    return f"train.expert_backend={name}: {refusal}; or choose grouped_mm, which runs everywhere"


def engine_config(config: Config, mesh: Mesh) -> dict[str, Any]:
    """DeepSpeed's configuration. Clipping, schedule, logging and checkpoints are off here, since kmem does them."""
    train = config.train
    bf16 = train.precision == "bf16"
    # Without data parallelism there is nothing to shard, and fp32 ZeRO-1 would keep every weight twice. A frozen anchor
    # has no optimizer state.
    stage = 1 if bf16 or (config.parallel.zero_stage == 1 and mesh.data > 1 and not config.model.frozen_anchor) else 0
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_bucket_size": _REDUCE_BUCKET,
    }
    if stage == 1 and not bf16:
        zero["compute_grad_norm"] = False
    settings: dict[str, Any] = {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "pipeline": {
            "use_reentrant": False,  # recomputation must keep working when a layer's inputs hold no gradient
            "activation_checkpoint_interval": 0 if train.recompute == "none" else 1,
        },
    }
    if bf16:
        # Every gradient goes into its fp32 sum as soon as it is computed, and its own memory is free again.
        settings["bf16"] = {"enabled": True, "immediate_grad_update": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def _layer_specs(config: Config, shape: Shape, mesh: Mesh) -> list[LayerSpec]:
    local_experts = None
    if config.model.moe is not None:
        count = config.model.moe.num_experts // mesh.expert
        local_experts = range(mesh.expert_rank * count, (mesh.expert_rank + 1) * count)
    layers = [LayerSpec(TransformerLayer, shape, index, local_experts) for index in range(config.model.num_layers)]
    if not config.model.tie_embeddings:
        return [LayerSpec(EmbeddingLayer, shape), *layers, LayerSpec(LossLayer, shape)]

    def tied(forward=None):
        return TiedLayerSpec("embedding", EmbeddingLayer, shape, forward_fn=forward, tied_weight_attr="module.weight")

    return [tied(), *layers, LayerSpec(NormLayer, shape), tied(tied_loss)]


class _StagedModule(PipelineModule):
    """A PipelineModule with given stage bounds: DeepSpeed's own balancing would build every layer on every rank."""

    def __init__(self, specs: list[LayerSpec], num_stages: int, bounds: list[int]):
        self._bounds = bounds
        super().__init__(specs, num_stages=num_stages, checkpointable_layers=[TransformerLayer.__name__])

    def _partition_layers(self, method: str = "given") -> None:
        self.parts = self._bounds
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])


class _ExpertMark(DeepSpeedMoE):
    """Tells DeepSpeed that a stage holds expert parameters: DeepSpeed looks for an instance of its own MoE layer."""

    def __init__(self, num_experts: int):
        nn.Module.__init__(self)
        self.num_experts = num_experts

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """The groups exist already; see `join_mesh`."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the settings that DeepSpeed prints while it builds; errors still show."""
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(max(level, logging.WARNING))


def split_samples(first: int, global_batch: int, micro_batch: int, mesh: Mesh) -> list[list[int]]:
    """This rank's sample numbers in the step that begins at sample `first`, one list per micro-batch.

    Consecutive samples form a micro-batch, and micro-batches are dealt to the data-parallel ranks in turn. With
    the same micro-batch size, the micro-batches are therefore the same on every mesh.
    """
    starts = itertools.count(first + mesh.data_rank * micro_batch, mesh.data * micro_batch)
    return [
        list(range(start, start + micro_batch))
        for start in itertools.islice(starts, global_batch // (micro_batch * mesh.data))
    ]
