"""How a run optimises: length, batch, precision, optimizer, schedule."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from kmem.config.section import Section

MEASURED_STEPS = 10
"""Steps that `train.minutes` measures before it chooses the number of steps."""


class OptimizerConfig(Section):
    """The optimizer, with decoupled weight decay on matrices only."""

    name: Literal["adamw"] = "adamw"
    """adamw: `torch.optim.AdamW`, fused."""
    lr: PositiveFloat
    """Peak learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Decay rates of the first and second moments."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decay of matrices; norms, biases and vectors are not decayed."""
    decay_embeddings: bool = True
    """Whether the embedding and the head are decayed."""
    clip_norm: PositiveFloat | None = 1.0
    """Gradients are scaled down to this global 2-norm over all ranks; null turns clipping off."""


class ScheduleConfig(Section):
    """Learning rate over steps: a linear warm-up, then the chosen form, as a factor on `optimizer.lr`."""

    kind: Literal["cosine", "wsd", "step", "constant"] = "cosine"
    """cosine: half a cosine to `min_ratio` at the last step. wsd: constant, then a linear decay to `min_ratio` over the
    last `decay_steps`. step: times `step_factor` at each point of `step_at`. constant: no change."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up from zero."""
    min_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Final factor of cosine and wsd."""
    decay_steps: PositiveInt | None = None
    """Length of the wsd decay. Default: a tenth of the run."""
    step_at: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.8, 0.9)
    """Points of the step schedule, as shares of the run (DeepSeek: 0.8 and 0.9)."""
    step_factor: Annotated[float, Field(gt=0, le=1)] = 0.316
    """Factor at each point of the step schedule."""


class TrainConfig(Section):
    """Length, batch and numerics of a run."""

    steps: PositiveInt
    """Optimizer steps of the whole run; with `minutes`, the most."""
    minutes: PositiveFloat | None = None
    """Time for the steps and evaluations of the run. The first ten steps are measured; then the number of steps, and
    with it the schedule, is chosen once, and kept when the run is resumed. Null: the run has `steps` steps."""
    global_batch_size: PositiveInt
    """Sequences per optimizer step over all ranks."""
    micro_batch_size: PositiveInt
    """Sequences per forward pass on one data-parallel rank."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Compute precision. bf16 keeps fp32 master weights, gradient accumulation and moments."""
    expert_backend: Literal["grouped_mm", "loop", "deepspeed", "liger"] = "grouped_mm"
    """Implementation of the experts' matrix products; a backend that cannot run here is an error. grouped_mm: PyTorch's
    grouped product, on every device; one kernel on GPUs of compute capability 9.0 or more. loop: one product per
    expert, the reference for the other backends. deepspeed: DeepSpeed's Triton kernels, for GPUs of
    capability 8.x, where PyTorch's grouped product is a loop; bf16 only. liger: the Triton kernels of liger-kernel
    (`liger-kernel`), for GPUs of capability 8.0 or more; bf16 only."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again instead of keeping it. selective: norms, activations, rotations, routing
    and the mixing of branches; kept are the results of matrix products, of fused attention and of exchanges between
    ranks. full: whole layers, of which only the inputs are kept."""
    optimizer: OptimizerConfig
    """The optimizer of everything but tables."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning-rate schedule."""
    init_seed: NonNegativeInt = 0
    """Seed of the initial weights; each tensor is drawn from (seed, its name), so it does not depend on the mesh."""
    deterministic: bool = False
    """Ask PyTorch for deterministic kernels alone, so that two runs on GPUs are equal bit for bit; it costs time. Runs
    on CPUs are equal without it."""

    def check(self) -> None:
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is not divisible by "
                f"micro_batch_size={self.micro_batch_size}"
            )
        warmup, decay = self.schedule.warmup_steps, self.schedule.decay_steps
        if self.minutes is not None and self.schedule.kind != "constant" and warmup < MEASURED_STEPS:
            raise ValueError(
                f"minutes={self.minutes} needs schedule.warmup_steps of at least {MEASURED_STEPS}: the learning rate "
                "of the measured steps must not depend on the number of steps"
            )
        if warmup > self.steps:
            raise ValueError(f"schedule.warmup_steps={warmup} exceeds steps={self.steps}")
        if decay is not None and decay + warmup > self.steps:
            raise ValueError(f"schedule.decay_steps={decay} and the warm-up exceed steps={self.steps}")
