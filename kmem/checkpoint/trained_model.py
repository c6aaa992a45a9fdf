"""What a checkpoint says of its model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from kmem.config import Config


class TrainedModel(Protocol):
    """What describes a model and its memories, and what an export reads; `CheckpointReader` implements it."""

    @property
    def config(self) -> Config: ...

    @property
    def folder(self) -> Path: ...

    @property
    def run_folder(self) -> Path: ...

    @property
    def tokenizer_path(self) -> Path: ...

    @property
    def addressing(self) -> dict[str, Any] | None: ...

    @property
    def tree(self) -> str | None: ...

    @property
    def facts(self) -> Mapping[str, Any]: ...

    @property
    def tensors(self) -> Mapping[str, Any]:
        """Canonical name -> an object with `.shape`."""

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor along its first dimension."""
