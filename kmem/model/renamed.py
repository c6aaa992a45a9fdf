"""Keys of the model section that once had another name. Ships beside exported weights."""

from collections.abc import Mapping
from typing import Any

MODEL_KEYS: Mapping[str, str] = {"memory_bank": "bank"}
"""Old name -> name. `kmem.config.renamed` has the other sections."""


def renamed_keys(section: Mapping[str, Any]) -> dict[str, Any]:
    """The model section of a saved file under the names of today."""
    return {MODEL_KEYS.get(key, key): value for key, value in section.items()}
