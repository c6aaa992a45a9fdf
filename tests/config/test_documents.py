"""What the guides say of configurations."""

import json
import re
from pathlib import Path

import pytest

from kmem.config import ChainOfExperts, MixtureOfExperts, load_config

DOCS = Path(__file__).resolve().parents[2] / "docs"


def snippets(page: str) -> list[str]:
    return re.findall(r"^```yaml\n(.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["experts.md", "chain-of-experts.md"])
def test_snippets_load(page, tmp_path):
    """As parts of a configuration: over a packaged one, for what they leave out."""
    found = snippets(page)
    assert found
    for snippet in found:
        path = tmp_path / "snippet.yaml"
        path.write_text(f"include: bench/train\n{snippet}")
        load_config(path)


@pytest.mark.parametrize("section", [MixtureOfExperts, ChainOfExperts])
def test_the_guide_names_every_field_of_experts_with_its_default(section):
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", (DOCS / "experts.md").read_text(), re.MULTILINE)
    for name, field in section.model_fields.items():
        default = "required" if field.is_required() else json.dumps(field.default).strip('"')
        assert (name, default) in rows
