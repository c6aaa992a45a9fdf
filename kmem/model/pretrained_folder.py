"""Where `from_pretrained` found a model: what is read later lies there, too. Ships beside exported weights."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.utils.hub import cached_file

from .bank_export import BankDescription
from .bank_router import ContextRouter, DeferredTokenizer

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


@dataclass(frozen=True)
class PretrainedFolder:
    """A folder, or a repository of the Hugging Face hub."""

    source: Any
    """Its path or name."""
    options: Mapping[str, Any]
    """Of `from_pretrained`, those of HUB_OPTIONS."""

    @classmethod
    def of(cls, source: Any, options: Mapping[str, Any]) -> "PretrainedFolder":
        """What `from_pretrained` was called with."""
        source = os.path.abspath(source) if os.path.isdir(source) else source
        return cls(source, {name: options[name] for name in HUB_OPTIONS if name in options})

    def find(self, file: str) -> str | None:
        """Path of a file, which is downloaded if need be; None where there is none."""
        return cached_file(self.source, file, _raise_exceptions_for_missing_entries=False, **self.options)

    def tokenizer(self, config: Any) -> Any:
        """The model's."""
        return AutoTokenizer.from_pretrained(self.source, config=config, trust_remote_code=False, **self.options)

    def tree(self, bank: BankDescription) -> Path:
        """The folder of a bank's tree; as `BankDescription.find_tree`."""
        return bank.find_tree(self.find)

    def router(self, bank: BankDescription, config: Any) -> ContextRouter:
        """A bank's tree and embedder; as `BankDescription.router`."""
        return bank.router(self.tree(bank), DeferredTokenizer(partial(self.tokenizer, config)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles hold no access token."""
        kept = {name: value for name, value in self.options.items() if name != "token"}
        return PretrainedFolder, (self.source, kept)

    def __deepcopy__(self, memo: dict[int, Any]) -> "PretrainedFolder":
        return self
