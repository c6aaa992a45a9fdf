"""DeepSpeed's pipeline engine, which here knows the running micro-batch and clips correctly on every mesh.

The subclass has no constructor: an engine built by `deepspeed.initialize` is given this class, which keeps the coupling
to one DeepSpeed version small. `_exec_schedule` takes its functions from a class attribute, so overriding a method
means replacing its entry there too.
"""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch.profiler import record_function

from kmem.parallel.gradients import GradientNorm
from kmem.parallel.step_context import StepContext


class NonFiniteStepError(RuntimeError):
    """The loss or the gradients of a step are not finite. Raised on all ranks alike, before any weight has changed."""


PHASES = {
    schedule.LoadMicroBatch: "load",
    schedule.ForwardPass: "forward",
    schedule.BackwardPass: "backward",
    schedule.SendActivation: "pipeline",
    schedule.RecvActivation: "pipeline",
    schedule.SendGrad: "pipeline",
    schedule.RecvGrad: "pipeline",
    schedule.ReduceTiedGrads: "reduce",
    schedule.ReduceGrads: "reduce",
    schedule.OptimizerStep: "optimizer",
}
"""Instruction of DeepSpeed's schedule -> phase that its time counts towards."""
assert PHASES.keys() == PipelineEngine._INSTRUCTION_MAP.keys(), "this DeepSpeed has other pipeline instructions"


def _timed(phase: str, function: Callable[..., None]) -> Callable[..., None]:
    """Wrap an instruction's function: its host time is added to a phase of the engine, and profiles show the phase."""

    @functools.wraps(function)
    def run(engine: "StepEngine", *arguments: Any, **keywords: Any) -> None:
        began = time.perf_counter()
        with record_function(f"kmem: {phase}"):
            function(engine, *arguments, **keywords)
        engine.phase_seconds[phase] += time.perf_counter() - began

    return run


class StepEngine(PipelineEngine):
    """Numbers the micro-batches of a schedule and guards the optimizer step. If only a bank is trained, this step
    reduces nothing and writes no weight."""

    context: StepContext
    gradient_norm: GradientNorm
    clip_norm: float | None
    grad_norm: float
    """Global 2-norm of the last step's gradients before clipping."""
    phase_seconds: dict[str, float]
    """Host seconds of the last schedule by phase; on a GPU the host runs ahead of the kernels."""

    @classmethod
    def adopt(
        cls,
        engine: PipelineEngine,
        context: StepContext,
        gradient_norm: GradientNorm,
        clip_norm: float | None,
    ) -> "StepEngine":
        """Turn an engine built by `deepspeed.initialize` into this class."""
        assert type(engine) is PipelineEngine, f"expected DeepSpeed's own PipelineEngine, got {type(engine)}"
        engine.__class__ = cls
        engine.context = context
        engine.gradient_norm = gradient_norm
        engine.clip_norm = clip_norm
        engine.grad_norm = 0.0
        engine.phase_seconds = {}
        return engine

    def train_step(self, inputs: Iterator[Any], before_optimizer_step: Callable[[], None]) -> float:
        """Train one step; returns its mean loss.

        Args:
            inputs: inputs of the first and last stage, one per micro-batch.
            before_optimizer_step: called once the step is known to be finite on all ranks, before any weight changes.

        Raises:
            NonFiniteStepError: on all ranks.
        """
        self._before_optimizer_step = before_optimizer_step
        try:
            return float(self.train_batch(inputs))
        finally:
            del self._before_optimizer_step

    def _exec_schedule(self, pipe_schedule):
        self._next_forward = 0
        self._micro_of_buffer: dict[int, int] = {}
        self.phase_seconds = dict.fromkeys(PHASES.values(), 0.0)
        self.context.recording = self.module.training
        try:
            super()._exec_schedule(pipe_schedule)
        finally:
            self.context.current, self.context.recording = None, False

    def _exec_forward_pass(self, buffer_id):
        # Buffers are reused within a schedule: an entry of the map is overwritten exactly when its buffer is.
        self.context.current = self._micro_of_buffer[buffer_id] = self._next_forward
        self._next_forward += 1
        super()._exec_forward_pass(buffer_id)
        self.context.current = None

    def _exec_backward_pass(self, buffer_id):
        # In 1F1B the recomputation of one micro-batch falls between the forward passes of others.
        self.context.current = self._micro_of_buffer[buffer_id]
        super()._exec_backward_pass(buffer_id)
        self.context.current = None

    def _exec_reduce_tied_grads(self):
        if not self.context.frozen:
            super()._exec_reduce_tied_grads()

    def _exec_reduce_grads(self):
        if not self.context.frozen:
            super()._exec_reduce_grads()

    def _exec_optimizer_step(self, lr_kwargs=None):
        self._guard_and_clip()
        self._before_optimizer_step()
        if self.context.frozen:
            self.global_steps += 1
        else:
            super()._exec_optimizer_step(lr_kwargs)

    def _guard_and_clip(self) -> None:
        """One all-reduce decides for all ranks: stop before anything is written, or scale and continue.

        DeepSpeed's own clipping is switched off. In fp32 without ZeRO it counts only the gradients of the first stage
        and averages the norms of expert slices. With ZeRO it reduces group by group, which hangs when stages have
        different groups.
        """
        loss_ok = self.total_loss is None or bool(torch.isfinite(self.total_loss))
        flags = [not loss_ok, not self.context.finite()]
        squares, bad_losses, bad_rows = self.gradient_norm.reduce([float(flag) for flag in flags])
        self.grad_norm = squares**0.5
        if bad_losses or bad_rows or not torch.isfinite(torch.tensor(self.grad_norm)):
            what = "loss" if bad_losses else "gradient of table rows" if bad_rows else "gradient norm"
            raise NonFiniteStepError(f"the {what} is not finite (gradient norm {self.grad_norm})")
        if self.clip_norm is not None and self.grad_norm > self.clip_norm:
            self.gradient_norm.scale(self.clip_norm / (self.grad_norm + 1e-6))


StepEngine._INSTRUCTION_MAP = {
    instruction: _timed(PHASES[instruction], getattr(StepEngine, function.__name__))
    for instruction, function in PipelineEngine._INSTRUCTION_MAP.items()
}


class UnclippedBF16Optimizer(BF16_Optimizer):
    """DeepSpeed's bf16 optimizer without its own norm: the engine has already computed the norm and clipped.

    The base class computes its norm with collectives per expert group over the pipeline, which hangs when one stage has
    no experts. It also casts every gradient into memory of its own before it adds it.
    """

    def _update_hp_grad(self, lp, group_idx, param_idx, clear_lp_grads):
        assert not clear_lp_grads, "gradients of a micro-batch are dropped, not cleared"
        total = self.fp32_groups_gradients[group_idx][param_idx]
        total.add_(lp.grad.view(total.shape))  # widened as it is read
        lp._hp_grad = total
        self.fp32_groups_has_gradients[group_idx][param_idx] = True

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        self.overflow = False
        for master, gradient in zip(
            self.fp32_groups_flat_partition, self.fp32_groups_gradient_flat_partition, strict=True
        ):
            master.grad = gradient
        self.optimizer.step()
        self._lazy_init_hp_params_optimizer_state()
        self.update_lp_params()
        self.clear_hp_grads()
