"""The training loop. Everything optional is a callback."""

import contextlib
import hashlib
import json
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import kmem
from kmem.checkpoint.commit import Progress
from kmem.checkpoint.pieces import NotFiniteError
from kmem.checkpoint.store import CheckpointStore
from kmem.config import Config, ConfigError, UserError, with_vocab_size
from kmem.data.reader import PreparedData
from kmem.data.tokenizer import tokenizer_record
from kmem.eval.held_out import EvaluationRecord
from kmem.model.matmul import BF16_IS_ONEDNN
from kmem.model.parameter_counts import count_parameters
from kmem.parallel.engine import NonFiniteStepError
from kmem.parallel.joining import check_agreement
from kmem.parallel.memory_kind import BegunStep
from kmem.parallel.memory_kinds import kinds_of
from kmem.parallel.mesh import Mesh, any_rank, lost_peer, raise_on_all_ranks, run_on_all_ranks
from kmem.parallel.pipeline import Pipeline, split_samples
from kmem.parallel.training_state import optimizer_steps
from kmem.train.callback import Callback
from kmem.train.evaluation import HeldOutEvaluation
from kmem.train.interruption import Interruption
from kmem.train.load_plan import LoadPlan, plan_load
from kmem.train.metrics import step_record
from kmem.train.resume_point import ResumePoint, find_resume_point
from kmem.train.run_folder import RunFolder
from kmem.train.saving import load_training, save_training
from kmem.train.schedule import learning_rate
from kmem.train.time_plan import PLANNED, TimePlan
from kmem.wording import counted

log = logging.getLogger(__name__)

TAME_THE_RATE = "Lower train.optimizer.lr or lengthen train.schedule.warmup_steps"


class TrainingError(UserError):
    """Training cannot continue; weights and the last checkpoint are as they were before the failed step."""


class Trainer:
    """Trains one configuration on this rank's part of the mesh.

    Args:
        config: the resolved configuration.
        mesh: the joined mesh.
        data: the opened data, the same on every rank.
        callbacks: the same on every rank; those that are not collective are called on the first.
    """

    def __init__(self, config: Config, mesh: Mesh, data: PreparedData, callbacks: Sequence[Callback] = ()):
        self.config = config = with_vocab_size(config, data.tokenizer_size)
        self.mesh = mesh
        self.data = data
        every_rank = [*callbacks, HeldOutEvaluation(config)]
        self.callbacks = [callback for callback in every_rank if callback.collective or mesh.rank == 0]
        self.folder = RunFolder(config)
        self.step = 0
        self.consumed_samples = 0
        self.positions = {data.selection: 0}
        """Selection of the text -> sequences consumed from it."""
        self.tokens = 0
        self._failed: set[int] = set()
        """Places of the callbacks that have failed."""
        self.tracking: dict[str, Any] = {}
        self.facts: dict[str, Any] = {}
        self.counts = count_parameters(config.model.shape)
        raise_on_all_ranks(self.folder.claim() if mesh.rank == 0 else None, TrainingError)
        self.store = CheckpointStore(self.folder.checkpoints, config.checkpoint.keep_last, config.checkpoint.keep_every)
        resume_point = find_resume_point(config.checkpoint, self.store)
        self.kinds = kinds_of(config.model.shape)
        self.prepared = run_on_all_ranks(
            lambda: {kind.name: kind.prepare(config, data.tokenizer_path) for kind in self.kinds}
        )
        check_agreement(
            {
                "data.sources": data.fingerprint,
                "data.sources (held out)": data.held_out_fingerprint,
                "data.sources (tokenizer)": data.tokenizer_fingerprint,
                "checkpoint": None if resume_point is None else resume_point.identity,
            }
            | {f"model.{kind.name}": _identity(kind.manifest(self.prepared[kind.name])) for kind in self.kinds}
        )
        plan = None
        if resume_point is not None:
            plan = run_on_all_ranks(lambda: self._load_plan(resume_point))
        elif config.model.frozen_anchor:
            raise ConfigError(
                "model.bank.anchor: frozen, but the run begins without a checkpoint, so the anchor would stay random: "
                "name a run with a trained anchor in checkpoint.start, or train it (anchor: train)"
            )
        self._notify("on_preparing", "building the model and its tables")
        self.pipeline = Pipeline(config, mesh, self.prepared, initialise_rows=resume_point is None)
        self._begun: deque[BegunStep] = deque()
        """Steps whose rows are being fetched, the next one first."""
        self._saved_at = -1
        self._tokenizer = tokenizer_record(data.tokenizer_path)
        self._time_plan: TimePlan | None = None
        """While the number of steps is not chosen yet."""
        self.origins = self._origins(resume_point)
        try:
            if resume_point is not None and plan is not None:
                self._notify("on_preparing", f"reading {resume_point.folder}")
                self._begin_with(resume_point, plan)
                if config.train.minutes is not None and PLANNED in self.facts:
                    self._set_steps(self.facts[PLANNED])
        except BaseException as error:
            self.pipeline.close(error)
            raise

    def fit(self, interruption: Interruption | None = None) -> str:
        """Train to the end of the run; returns `done` or `interrupted`.

        Args:
            interruption: begins to listen here, and is left listening; default: one of this call.

        Raises:
            TrainingError: a step was not finite, or another rank is gone.
            CheckpointError: a checkpoint could not be written.
        """
        end = "done"
        finished = self.step >= self.config.train.steps  # nothing to do: the folder stays as it is
        with contextlib.ExitStack() as stack:
            if interruption is None:
                interruption = Interruption()
                stack.callback(interruption.close)
            interruption.listen()
            try:
                self._prepare_folder(finished)
                if self.config.train.minutes is not None and PLANNED not in self.facts:
                    self._time_plan = TimePlan(self.config, self.step)
                self._notify("on_start", self)
                if finished:
                    self._notify("on_end", "finished")
                    self.pipeline.close()
                    return "done"
                while self.step < self.config.train.steps and end == "done":
                    self._train_one_step()
                    last = self.step == self.config.train.steps
                    if self._asked_to_stop(interruption) and not last:
                        end = "interrupted"  # saved at once: an evaluation may outlast the grace of a scheduler
                    else:
                        self._notify("before_checkpoint", self)
                    if due(self.step, self.config.checkpoint.every) or last or end == "interrupted":
                        self._save()
                self.store.wait()
                self._asked_to_stop(interruption)
                interruption.saved = True
                self._notify("on_end", end)
                self.pipeline.close()
            except BaseException as error:
                self.pipeline.close(error)
                if lost_peer(error):
                    raise TrainingError(
                        f"after step {self.step}: another rank is gone or does not answer; its own log names the "
                        f"cause. {self._last_good()}: run the same command again to continue"
                    ) from error
                raise
            finally:
                self._notify("close")
                self.folder.release()
        return end

    def _prepare_folder(self, finished: bool) -> None:
        problem = None
        if self.mesh.rank == 0 and not finished:
            copied: dict[str, Path] = {}
            for kind in self.kinds:
                copied |= kind.copied_folders(self.config, self.folder.path)
            problem = self.folder.prepare(self.config, self.data.tokenizer_path, copied)
        raise_on_all_ranks(problem, TrainingError)

    def _asked_to_stop(self, interruption: Interruption) -> bool:
        """Whether any rank was asked to stop; collective, so that all ranks stop after the same step.

        Raises:
            TrainingError: a background save failed on any rank; on all ranks alike.
        """
        problem = self.store.failure()
        asked, failed = any_rank([interruption.received is not None, problem is not None])
        if failed:
            raise_on_all_ranks(problem, TrainingError)
        return asked

    def summary(self) -> str:
        """Model, data and mesh in two lines."""
        counts, train = self.counts, self.config.train
        return (
            f"{self.config.name}: {counts.total / 1e6:.2f}M parameters, {counts.active / 1e6:.2f}M active per token; "
            f"mesh {self.mesh}; {train.precision} on {self.pipeline.device.type}\n"
            f"{'at most ' if self._time_plan else ''}{counted(train.steps, 'step')} of {train.global_batch_size} x "
            f"{self.config.data.sequence_length} tokens, "
            + (f"from step {self.step}" if self.step else "from the start")
            + f"; run folder {self.folder.path}"
            + self._selected_text()
            + self._slow_text()
        )

    def _slow_text(self) -> str:
        """A warning if this machine is slow at what the run asks for, with the remedy."""
        on_cpu = self.pipeline.device.type == "cpu"
        if self.config.train.precision != "bf16" or not on_cpu or BF16_IS_ONEDNN:
            return ""
        return (
            "\ntrain.precision: bf16 takes about nine times as long as fp32 on this processor, which has no AVX-512; "
            "set it to fp32"
        )

    def _selected_text(self) -> str:
        """The selected part of the text, if the run does not use all of it."""
        if not self.data.selection:
            return ""
        held_out = len(self.data.validation)
        evaluated = f"evaluated on {counted(held_out, 'held-out sequence')} of it"
        return (
            f"\ntext of the subtrees {self.data.selection}: {counted(len(self.data.training), 'sequence')} per epoch, "
            + (evaluated if held_out else "not evaluated: none is held out")
        )

    def _train_one_step(self) -> None:
        config, began = self.config, time.perf_counter()
        train = config.train
        torch.manual_seed(train.init_seed + self.step)  # randomness of a step is a function of its number
        while len(self._begun) <= config.prefetch_depth and self.step + len(self._begun) < train.steps:
            self._begun.append(self._begin(self.step + len(self._begun)))
        read = time.perf_counter() - began
        lr = learning_rate(train, self.step)
        try:
            result = self.pipeline.train_step(self._begun.popleft(), lr, sampled=self.evaluation_due(self.step + 1))
        except NonFiniteStepError as error:
            self.store.wait()  # a background save decides which checkpoint is the last good one
            raise TrainingError(self._explain(error)) from None
        self.step += 1
        self.consumed_samples += train.global_batch_size
        self.positions[self.data.selection] += train.global_batch_size
        self.tokens += result.tokens
        self.facts["loss"] = result.loss
        seconds = time.perf_counter() - began
        record = step_record(self, result, lr, seconds)
        record.phases = {"data": read, **self.pipeline.engine.phase_seconds}
        self._notify("on_step", record)
        chosen = None if self._time_plan is None else self._time_plan.steps(self.step, seconds)
        if chosen is not None:
            self._time_plan = None
            self.facts[PLANNED] = chosen
            self._set_steps(chosen)
            self._notify("on_steps_chosen", chosen, seconds)

    def _set_steps(self, steps: int) -> None:
        """Give the run another number of steps: in the schedule, in later checkpoints and in the run folder."""
        train = self.config.train.model_copy(update={"steps": steps})
        self.config = self.pipeline.config = self.config.model_copy(update={"train": train})
        if self.mesh.rank == 0:
            with contextlib.suppress(OSError):  # a full disk; checkpoints have it, too
                self.folder.write_config(self.config)

    def _begin(self, step: int) -> BegunStep:
        """Read this rank's micro-batches of a later step and start fetching their rows."""
        train = self.config.train
        first = self.positions[self.data.selection] + (step - self.step) * train.global_batch_size
        plan = split_samples(first, train.global_batch_size, train.micro_batch_size, self.mesh)
        batches = []
        for samples in plan:
            batch = self.data.training.read(samples)
            for kind in self.kinds:
                batch = kind.training_batch(self.config, batch, samples, step)
            batches.append(batch)
        return self.pipeline.begin_step(batches)

    def evaluation_due(self, step: int) -> bool:
        """Whether the held-out evaluation follows this step."""
        return due(step, self.config.evaluation.every) or step == self.config.train.steps

    def _save(self) -> None:
        if self._saved_at == self.step:
            return
        for state in self._notify("state"):
            self.tracking |= state
        progress = Progress(
            step=self.step,
            consumed_samples=self.consumed_samples,
            tokens=self.tokens,
            optimizer_steps=optimizer_steps(self.pipeline),
            data={"fingerprint": self.data.fingerprint, **self._tokenizer},
            tracking=self.tracking,
            facts={
                **self.facts,
                "parameters": {k: v for k, v in asdict(self.counts).items() if k != "layers"},
                "mesh": str(self.mesh),
                "kmem": kmem.__version__,
                "torch": torch.__version__,
            },
            positions=dict(self.positions),
            memories=self.origins,
        )
        try:
            folder = save_training(self.store, self.pipeline, progress, self.config.checkpoint.asynchronous)
        except NotFiniteError as error:
            raise TrainingError(f"{error}. {self._last_good()}. {TAME_THE_RATE}") from None
        self._saved_at = self.step
        self._notify("on_checkpoint", folder, not self.config.checkpoint.asynchronous)

    def _load_plan(self, resume_point: ResumePoint) -> LoadPlan:
        """What the run takes over; refuses text or a model that the checkpoint cannot go on with.

        Raises:
            CheckpointError: names the field and the remedy.
        """
        resume_point.check(self.data, self.config, self.prepared)
        return plan_load(
            resume_point.folder,
            resume_point.commit,
            self.config,
            self.prepared,
            weights_only=resume_point.kind == "weights",
            hint=resume_point.hint,
            own_run=resume_point.kind == "own",
        )

    def _origins(self, resume_point: ResumePoint | None) -> dict[str, dict[str, Any]]:
        """Kind of memory -> origin of its rows."""
        stored, folder, weights_only = None, None, False
        if resume_point is not None:
            stored, folder, weights_only = resume_point.commit, resume_point.folder, resume_point.kind == "weights"
        origins = {kind.name: kind.origin(self.config, stored, folder, weights_only) for kind in self.kinds}
        return {name: origin for name, origin in origins.items() if origin}

    def _begin_with(self, resume_point: ResumePoint, plan: LoadPlan) -> None:
        """Fill the pipeline, and continue where the checkpoint stands, or begin with only its weights.

        Raises:
            CheckpointError: a tensor is missing or has another size or dtype.
        """
        progress = load_training(self.store, resume_point.folder, resume_point.commit, self.pipeline, plan)
        if plan.weights_only:
            return
        self.step, self.consumed_samples, self.tokens = progress.step, progress.consumed_samples, progress.tokens
        self.positions |= progress.sequences_read
        self.facts = dict(progress.facts)
        if resume_point.kind == "own":
            self.tracking = dict(progress.tracking)
            self._saved_at = self.step
            self.store.continue_from(self.step)

    def _explain(self, error: NonFiniteStepError) -> str:
        step, first = self.step + 1, self.positions[self.data.selection]
        last = first + self.config.train.global_batch_size - 1
        return (
            f"step {step}: {error}; no rank changed a weight. {self._last_good()}. "
            f"{TAME_THE_RATE}, or check the data of samples {first} to {last}"
        )

    def _last_good(self) -> str:
        saved = self._saved_at if self.store.last_committed is None else self.store.last_committed
        return f"The checkpoint of step {saved} is valid" if saved >= 0 else "There is no checkpoint yet"

    def announce(self, record: EvaluationRecord) -> None:
        """An evaluation is done: keep its figures for the checkpoint and tell the callbacks; on every rank."""
        figures = {name: getattr(record, name) for name in ("step", "loss", "bits_per_byte", "tokens")}
        self.facts["held_out"] = figures
        if self._time_plan is not None:
            self._time_plan.note_evaluation(record.seconds)
        if self.step == 0:
            self.facts["held_out_at_start"] = figures
        self._notify("on_evaluation", record)

    def _notify(self, event: str, *arguments: Any) -> list[Any]:
        """Call the callbacks, and return their answers. One that fails, such as a console without a reader or a file
        on a full disk, is reported once, and the run goes on; it is called again at the next event."""
        answers = []
        for place, callback in enumerate(self.callbacks):
            try:
                answers.append(getattr(callback, event)(*arguments))
            except Exception as error:
                if callback.collective:
                    raise
                if place not in self._failed:
                    self._failed.add(place)
                    log.warning(
                        "%s failed at %s, and the run goes on without what it would have done: %s: %s",
                        type(callback).__name__, event, type(error).__name__, error,
                        exc_info=None if isinstance(error, OSError) else error,
                    )  # fmt: skip
        return answers


def due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _identity(manifest: dict[str, Any] | None) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
