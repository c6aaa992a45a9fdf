"""The folder from which `from_pretrained` loaded a model; further files are read from it later. Ships beside exported
weights."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer
from transformers.utils.hub import cached_file

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


@dataclass(frozen=True)
class PretrainedFolder:
    """A folder, or a repository of the Hugging Face hub."""

    source: Any
    """Path of the folder, or name of the repository."""
    options: Mapping[str, Any]
    """The arguments of `from_pretrained` that HUB_OPTIONS lists."""

    @classmethod
    def of(cls, source: Any, options: Mapping[str, Any]) -> "PretrainedFolder":
        """The folder for the arguments of a call of `from_pretrained`."""
        source = os.path.abspath(source) if os.path.isdir(source) else source
        return cls(source, {name: options[name] for name in HUB_OPTIONS if name in options})

    def find(self, file: str) -> str | None:
        """Path of a file of the folder, downloaded if necessary; None if it does not exist."""
        return cached_file(self.source, file, _raise_exceptions_for_missing_entries=False, **self.options)

    def tokenizer(self, config: Any) -> Any:
        """The model's tokenizer."""
        return AutoTokenizer.from_pretrained(self.source, config=config, trust_remote_code=False, **self.options)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without the access token."""
        kept = {name: value for name, value in self.options.items() if name != "token"}
        return PretrainedFolder, (self.source, kept)

    def __deepcopy__(self, memo: dict[int, Any]) -> "PretrainedFolder":
        return self
