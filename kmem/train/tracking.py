"""Weights & Biases."""

from __future__ import annotations

import netrc
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from kmem.config import Config
from kmem.eval.held_out import EvaluationRecord
from kmem.train.callback import Callback
from kmem.train.metrics import StepRecord

if TYPE_CHECKING:
    from kmem.train.trainer import Trainer


class WandbTracking(Callback):
    """Sends metrics to Weights & Biases: online when logged in, otherwise into the run folder.

    A resumed run continues under the id that its checkpoint stores.
    """

    def __init__(self) -> None:
        self.run_id: str | None = None
        self._run: Any = None
        self._ended = False

    def on_start(self, trainer: Trainer) -> None:
        config = trainer.config
        mode = wandb_mode(config)
        if mode == "disabled":
            return
        import wandb

        self.run_id = trainer.tracking.get("wandb_run_id")
        os.environ.setdefault("WANDB_SILENT", "true")
        self._run = wandb.init(
            project=config.tracking.project,
            entity=config.tracking.entity,
            group=config.tracking.group,
            tags=list(config.tracking.tags),
            notes=config.tracking.notes,
            name=config.name,
            id=self.run_id,
            resume="allow" if self.run_id else None,
            dir=str(trainer.folder.path),
            mode=mode,  # type: ignore[arg-type]  # one of its four words
            config=config.model_dump(mode="json"),
        )
        self.run_id = self._run.id
        print(f"Weights & Biases: {mode}, run {self.run_id}{self._where(mode)}", file=sys.stderr)

    def _where(self, mode: str) -> str:
        """The page of the run, or the command that sends it."""
        if mode == "online":
            return f", {self._run.url}"
        return f"; send it by: wandb sync {Path(self._run.dir).parents[1]}/offline-run-*" if mode == "offline" else ""

    def on_step(self, record: StepRecord) -> None:
        if self._run is not None:
            figures = record.to_json()
            del figures["coactivation"]  # matrices; they are in metrics.jsonl
            figures |= _flat("phase", figures.pop("phases")) | _flat("experts", figures.pop("experts"))
            for kind, places in figures.pop("memories").items():
                figures |= _flat(kind, places)
            self._run.log(figures, step=record.step)

    def on_evaluation(self, record: EvaluationRecord) -> None:
        if self._run is not None:
            figures = record.to_json()
            del figures["kind"]
            figures |= figures.pop("controls")
            self._run.log(_flat("held_out", figures), step=record.step)

    def on_end(self, reason: str) -> None:
        self._ended = True

    def close(self) -> None:
        if self._run is not None:
            self._run.finish(exit_code=0 if self._ended else 1)
            self._run = None

    def state(self) -> dict[str, object]:
        return {"wandb_run_id": self.run_id} if self.run_id else {}


def wandb_mode(config: Config) -> str:
    """The configured mode; `auto` is online with a stored or given API key, offline without. WANDB_MODE wins."""
    if "WANDB_MODE" in os.environ:
        return os.environ["WANDB_MODE"]
    mode = config.tracking.wandb
    if mode != "auto":
        return mode
    return "online" if os.environ.get("WANDB_API_KEY") or _stored_login() else "offline"


def _stored_login() -> bool:
    """Whether `wandb login` has left a key in the user's netrc."""
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _flat(path: str, value: Any) -> dict[str, Any]:
    """Flatten nested numbers to path -> number; histograms of gates become W&B histograms."""
    if value is None:
        return {}
    if path.endswith("gate_histogram"):
        import numpy as np
        import wandb

        edges = [np.linspace(0, 1, len(counts) + 1) for counts in value]
        return {
            f"{path}/{branch}": wandb.Histogram(np_histogram=(counts, edges[branch]))
            for branch, counts in enumerate(value)
        }
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {name: number for key, inner in items for name, number in _flat(f"{path}/{key}", inner).items()}
    return {path: value}
