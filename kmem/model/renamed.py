"""Renamed keys of the model section. Ships beside exported weights."""

from collections.abc import Mapping
from typing import Any

MODEL_KEYS: Mapping[str, str] = {"memory_bank": "bank"}
"""Old name -> current name. `kmem.config.renamed` handles the other sections."""


def renamed_keys(section: Mapping[str, Any]) -> dict[str, Any]:
    """The model section of a saved file, with current key names."""
    return {MODEL_KEYS.get(key, key): value for key, value in section.items()}
