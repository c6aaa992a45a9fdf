"""Saving a pipeline to a checkpoint store and loading it back, on any mesh."""

from pathlib import Path

from kmem.checkpoint.commit import Commit, Progress
from kmem.checkpoint.store import CheckpointStore
from kmem.model.parameter_counts import tensor_shapes
from kmem.parallel.memory_kinds import kinds_of
from kmem.parallel.pipeline import Pipeline
from kmem.parallel.training_state import finish_load, model_state
from kmem.train.load_plan import LoadPlan


def save_training(store: CheckpointStore, pipeline: Pipeline, progress: Progress, asynchronous: bool = False) -> Path:
    """Save weights, moments and progress; collective.

    Raises:
        CheckpointError: on every rank alike.
    """
    config, shape = pipeline.config, pipeline.shape
    manifests, partial = {}, set()
    for kind in kinds_of(shape):
        manifest = kind.manifest(pipeline.prepared.get(kind.name))
        if manifest is not None:
            manifests[kind.name] = manifest
        partial |= kind.partial_tensors(config)
    state = model_state(pipeline, saving=True, moments=True)
    return store.save(
        state, progress, config.model_dump(mode="json"), tensor_shapes(shape), asynchronous, manifests, partial
    )


def load_training(store: CheckpointStore, folder: Path, commit: Commit, pipeline: Pipeline, plan: LoadPlan) -> Progress:
    """Fill a freshly built pipeline from a verified checkpoint as planned; collective.

    Raises:
        CheckpointError: a tensor is missing or has another size or dtype; on every rank alike.
    """
    state = model_state(pipeline, saving=False, moments=plan.moments, row_state=plan.row_state)
    uncounted = any(plan.counts_updates(name) for name in state)
    state = {name: pieces for name, pieces in state.items() if plan.loads(name)}
    if plan.row_state:
        for memory in pipeline.context.memories:
            own = memory.state(saving=False)
            state |= {name: pieces for name, pieces in own.items() if name in commit.tensors}
    store.load(folder, commit, state, rounding=plan.weights_only)
    if uncounted:
        pipeline.stage_tables.count_updates()
    if plan.drawn:
        pipeline.stage_tables.initialise(plan.drawn)
    finish_load(pipeline, commit.progress.optimizer_steps if plan.moments else 0)
    return commit.progress
