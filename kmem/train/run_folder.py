"""The folder of a run: resolved configuration, tokenizer, cluster tree, metrics, checkpoints."""

import json
import shutil
from pathlib import Path
from typing import Any

from kmem.config import Config, dump_config
from kmem.model.exported_bank import TREE_FOLDER

METRICS = "metrics.jsonl"


class RunFolder:
    """Paths and files of one run. Only the first rank writes."""

    def __init__(self, config: Config):
        self.path = Path(config.folder) / config.name
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / METRICS

    def prepare(self, config: Config, tokenizer: Path, tree: Path | None = None) -> str | None:
        """Create the folder, write the resolved configuration, keep a copy of the tokenizer, and of the cluster tree of
        a memory bank, for exports; returns what stands in the way, if anything."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "config.yaml").write_text(dump_config(config))
            shutil.copytree(tokenizer, self.path / "tokenizer", dirs_exist_ok=True)
            if tree is not None and tree.resolve() != (self.path / TREE_FOLDER).resolve():
                # Whole in place of what is there: exports would carry the files of an earlier tree's embedder.
                copy = self.path / f"{TREE_FOLDER}.copying"
                shutil.rmtree(copy, ignore_errors=True)
                shutil.copytree(tree, copy)
                shutil.rmtree(self.path / TREE_FOLDER, ignore_errors=True)
                copy.rename(self.path / TREE_FOLDER)
        except OSError as error:
            return f"folder: {self.path} cannot be written: {error}"
        return None

    def forget_after(self, step: int) -> None:
        """Drop metrics of steps that a run resumed after `step` will repeat; a fresh start repeats all."""
        if self.metrics.exists():
            kept = [line for line in self.metrics.read_text().splitlines(True) if step and _step_of(line) <= step]
            temporary = self.metrics.with_suffix(".partial")
            temporary.write_text("".join(kept))
            temporary.replace(self.metrics)

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl."""
        with open(self.metrics, "a") as file:
            file.write(json.dumps(record) + "\n")


def _step_of(line: str) -> float:
    try:
        return json.loads(line).get("step", 0)
    except ValueError:  # the last line of a run that was killed while writing
        return float("inf")
