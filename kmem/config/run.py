"""The root of a configuration and the rules that span sections."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, field_validator

from kmem.config.data import DataConfig
from kmem.config.errors import ConfigError
from kmem.config.model import ModelConfig
from kmem.config.product_key_memory import PoolTableConfig
from kmem.config.section import Section
from kmem.config.tables import BankTableConfig, TableConfig
from kmem.config.train import TrainConfig
from kmem.wording import counted


class ParallelConfig(Section):
    """How the ranks divide the work: world = pipeline x data, and expert divides data."""

    pipeline: PositiveInt = 1
    """Pipeline stages."""
    expert: PositiveInt = 1
    """Ranks that share one set of experts, neighbours among the data-parallel ranks of a stage."""
    tensor: PositiveInt = 1
    """Tensor parallelism; not built yet, so only 1 is accepted."""
    zero_stage: Literal[0, 1] = 1
    """DeepSpeed ZeRO: 1 shards optimizer state over the data-parallel ranks, 0 replicates it."""
    timeout_seconds: Annotated[int, Field(gt=0, le=10_000_000)] = 600
    """How long a rank waits for the others before it gives up."""

    @field_validator("tensor")
    @classmethod
    def _no_tensor_parallelism(cls, value: int) -> int:
        if value != 1:
            raise ValueError("tensor parallelism is not built yet; use pipeline, expert and data parallelism")
        return value


class CheckpointConfig(Section):
    """When checkpoints are written, which are kept, and where a run starts from."""

    every: PositiveInt | None = None
    """Steps between checkpoints. The last step and an interrupted run are always saved; null saves only these."""
    keep_last: PositiveInt = 2
    """Number of newest checkpoints to keep."""
    keep_every: PositiveInt | None = None
    """Checkpoints at multiples of this step are kept for good."""
    asynchronous: bool = False
    """Write in the background from a copy of the state in host memory."""
    resume: str = "auto"
    """auto: resume from the newest undamaged checkpoint of the run folder, if any. never: refuse a folder that has
    checkpoints. The folder of another run or of one of its steps: continue from there, with its step, optimizers and
    place in the text, while this run has no checkpoint of its own. The folder of an earlier step of this run: go back
    to it; later checkpoints are set aside."""
    start: str | None = None
    """Folder of another run or of one of its steps: begin with its weights only, while this run has no checkpoint of
    its own. Step, schedule, optimizers and the order of the text start anew, and the text may differ. Tokenizer, model
    and the tree of a bank must be the same, but a memory may be added. Null: weights are drawn from
    `train.init_seed`."""


class EvaluationConfig(Section):
    """Held-out evaluation."""

    every: PositiveInt | None = None
    """Steps between evaluations; the end of the run is always evaluated. Null: only the end."""
    sequences: PositiveInt | None = 64
    """Held-out sequences per evaluation, the same ones each time; null takes the whole split."""
    at_start: bool = True
    """Evaluate before the first step too."""
    controls: tuple[Annotated[str, Field(pattern=r"^[a-z_]+=[a-z-]+$")], ...] = ()
    """Evaluate the same sequences again with each of these controls, written KIND=CHOICE as in `kmem eval --control`,
    such as [engram=off, bank=generic]; each costs another evaluation."""


class TrackingConfig(Section):
    """Where metrics go besides `metrics.jsonl`."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases mode; auto is online when logged in and offline otherwise."""
    project: str = "kmem"
    """Weights & Biases project."""
    entity: str | None = None
    """Weights & Biases team or user that owns the project; null is the default of the login."""
    group: str | None = None
    """Weights & Biases group: runs of one group, such as seeds, are shown together."""
    tags: tuple[Annotated[str, Field(min_length=1, max_length=64)], ...] = ()
    """Weights & Biases tags of the run."""
    notes: str | None = None
    """Weights & Biases notes: what the run is for, in Markdown."""
    log_every: PositiveInt = 1
    """Steps between lines of progress output when there is no terminal."""


class Config(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)]
    """Name of the run; its folder is `<folder>/<name>`."""
    folder: str = "runs"
    """Folder that holds the runs."""
    model: ModelConfig
    """Shape of the model."""
    data: DataConfig
    """Training and held-out text."""
    train: TrainConfig
    """Optimisation."""
    engram: TableConfig = TableConfig()
    """Tables of the engram."""
    over_encoding: TableConfig = TableConfig()
    """Table of over-encoding."""
    per_layer_embeddings: TableConfig = TableConfig()
    """Tables of per-layer embeddings."""
    product_key_memory: PoolTableConfig = PoolTableConfig()
    """Table of the product-key memory."""
    bank: BankTableConfig = BankTableConfig()
    """Tables of the bank."""
    parallel: ParallelConfig = ParallelConfig()
    """Mesh of ranks."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Held-out evaluation."""
    tracking: TrackingConfig = TrackingConfig()
    """Metrics."""

    def check(self) -> None:
        experts = self.model.moe.num_experts if self.model.moe else 1
        if experts % self.parallel.expert:
            raise ValueError(
                f"parallel.expert={self.parallel.expert} does not divide "
                + (f"model.moe.num_experts={experts}" if self.model.moe else "a model without model.moe")
            )
        if self.parallel.pipeline > self.model.num_layers + 2:
            raise ValueError(
                f"parallel.pipeline={self.parallel.pipeline} stages are more than the embedding, "
                f"{counted(self.model.num_layers, 'layer')} and the head can fill"
            )
        if self.model.moe is None and self.train.expert_backend != "grouped_mm":
            raise ValueError(
                f"train.expert_backend={self.train.expert_backend} needs a model with experts (model.moe); leave it out"
            )
        if self.train.precision == "bf16" and self.parallel.zero_stage == 0:
            raise ValueError(
                "parallel.zero_stage=0 does not go with train.precision=bf16: DeepSpeed's bf16 optimizer is always "
                "sharded; use 1"
            )
        for section in self.model.memories.values():
            section.check_run(self)
        for control in self.evaluation.controls:
            kind = control.partition("=")[0]
            if getattr(self.model, kind, None) is None:
                raise ValueError(
                    f"evaluation.controls={list(self.evaluation.controls)}: the model has no {kind} (model.{kind}); "
                    "leave the control out"
                )
        addresses = self.data.addresses
        if self.bank.hold == "subtrees" and (addresses is None or addresses.subtrees is None):
            raise ValueError(
                "bank.hold=subtrees keeps only the blocks of data.addresses.subtrees, and none are chosen; name the "
                "clusters of this job there, or set hold to all"
            )
        for name in self.tables:
            if self.checkpoint.asynchronous:
                raise ValueError(
                    f"checkpoint.asynchronous=true does not go with model.{name}: tables are written from where they "
                    "lie, and a copy of them may not fit; set it to false"
                )
        if self.data.sequence_length > self.model.max_position_embeddings:
            raise ValueError(
                f"data.sequence_length={self.data.sequence_length} exceeds "
                f"model.max_position_embeddings={self.model.max_position_embeddings}"
            )

    @property
    def tables(self) -> dict[str, TableConfig]:
        """Kind of memory of the model -> how its tables are kept: the section of its name."""
        sections = {name: section for name, section in self if isinstance(section, TableConfig)}
        return {name: section for name, section in sections.items() if getattr(self.model, name) is not None}

    @property
    def prefetch_depth(self) -> int:
        """Steps begun ahead of the running one: the largest prefetch depth of the model's tables."""
        return max((section.prefetch_depth for section in self.tables.values()), default=0)

    def data_parallel_size(self, world_size: int) -> int:
        """Data-parallel ranks of a world, checked against batch and mesh before any process group exists.

        Raises:
            ConfigError: the world does not fit the mesh, or the batch does not fit the world.
        """
        pipeline, expert = self.parallel.pipeline, self.parallel.expert
        if world_size % pipeline:
            raise ConfigError(
                f"parallel.pipeline: {pipeline} stages do not divide {counted(world_size, 'rank')}; start {pipeline} "
                "ranks or a multiple (--nproc; of plans, --ranks)"
            )
        data = world_size // pipeline
        if data % expert:
            raise ConfigError(
                f"parallel.expert: {expert} does not divide the {counted(data, 'data-parallel rank')} "
                f"({counted(world_size, 'rank')} / {counted(pipeline, 'pipeline stage')})"
            )
        unit = data * self.train.micro_batch_size
        if self.train.global_batch_size % unit:
            raise ConfigError(
                f"train.global_batch_size: {self.train.global_batch_size} is not divisible by {unit} "
                f"({counted(data, 'data-parallel rank')} x train.micro_batch_size {self.train.micro_batch_size}); "
                "change one of them"
            )
        return data
