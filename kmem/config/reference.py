"""The configuration reference, generated from the sections' docstrings.

python -m kmem.config.reference > docs/configuration.md
"""

import json
from collections.abc import Iterator
from typing import Any, get_origin

from kmem.config.problems import kinds_of, sections_in
from kmem.config.run import Config
from kmem.config.section import Section

_HEAD = """# Configuration

Generated from the docstrings in `kmem/config` by `python -m kmem.config.reference > docs/configuration.md`; a test
checks that it is up to date.

A configuration is a YAML file with the sections below. `kmem train --config FILE` takes a path or the name of a
packaged config (`configs/`, for example `quickstart`).

- `include: other.yaml` (or a list) at the top of a file reads another file first; later values win. A path is looked up
  beside the file, then among the packaged configs.
- `--set model.moe.top_k=4 train.steps=100` overrides single fields; values are YAML, list elements are addressed by
  number (`data.sources.0.path=...`).
- `--print-config` prints every field of the run as YAML, and exits.
- `--dry-run` prints parameter counts and memory per rank, and exits; `--dry-run --json`
  prints the same as one JSON object.
- An unknown key, a wrong type, a value out of range or an impossible combination ends the command with exit code 2 and
  one line that begins with the path of the field, before any process group starts.
- Every run folder holds the resolved configuration as `config.yaml`; every checkpoint holds it, too.
- A key that has been renamed is an error that gives the new name. Run folders, checkpoints and exports written with the
  old name can still be read.
"""
_NAMES = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}
_LIMITS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}


def reference() -> str:
    """The whole page."""
    return _HEAD + "".join(_section("", "Top level", Config))


def _section(path: str, heading: str, section: type[Section]) -> Iterator[str]:
    yield f"\n## {heading}\n\n{_one_line(section.__doc__)}\n\n"
    yield "| field | type | default | meaning |\n|---|---|---|---|\n"
    inner = []
    for name, schema in section.model_json_schema()["properties"].items():
        annotation = section.model_fields[name].annotation
        meaning = _one_line(schema.get("description") or (sections_in(annotation) or [Section])[0].__doc__)
        yield f"| `{name}` | {_type(schema)} | {_default(schema)} | {meaning} |\n"
        for nested in sections_in(annotation):
            where = (f"{path}.{name}" if path else name) + ("[]" if get_origin(annotation) is tuple else "")
            kinds = kinds_of(nested)
            inner.append((where, f"{where} (kind: {kinds[0]})" if len(kinds) == 1 else where, nested))
    for where, label, nested in inner:
        yield from _section(where, label, nested)


def _type(schema: dict[str, Any]) -> str:
    """The values that a JSON schema allows."""
    alternatives = schema.get("anyOf") or schema.get("oneOf")
    if alternatives:
        return " or ".join(dict.fromkeys(_type(alternative) for alternative in alternatives))
    if "$ref" in schema:
        return "section"
    if "enum" in schema or "const" in schema:
        return " or ".join(f"`{value}`" for value in schema.get("enum") or [schema["const"]])
    if "prefixItems" in schema:
        return f"[{', '.join(_type(item) for item in schema['prefixItems'])}]"
    if "items" in schema:
        return f"list of {_type(schema['items'])}"
    limits = ", ".join(f"{sign} {schema[limit]}" for limit, sign in _LIMITS.items() if limit in schema)
    return f"{_NAMES[schema['type']]} {limits}".strip()


def _default(schema: dict[str, Any]) -> str:
    if "default" not in schema:
        return "required"
    value = schema["default"]
    if isinstance(value, dict):
        return "see below"
    return value if isinstance(value, str) else json.dumps(value)


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


if __name__ == "__main__":
    print(reference(), end="")
