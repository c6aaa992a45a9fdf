"""The configuration reference, generated from the sections' docstrings.

python -m kmem.config.reference > docs/configuration.md
"""

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from kmem.config.problems import sections_in
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
- `--dry-run` prints the resolved configuration, parameter counts and memory per rank, and exits; `--dry-run --json`
  prints the same as one JSON object.
- An unknown key, a wrong type, a value out of range or an impossible combination ends the command with exit code 2 and
  one line that begins with the path of the field, before any process group starts.
- Every run folder holds the resolved configuration as `config.yaml`; every checkpoint holds it, too.
- A key that has been renamed is an error that gives the new name. Run folders, checkpoints and exports written with the
  old name can still be read.
"""


def reference() -> str:
    """The whole page."""
    return _HEAD + "".join(_section("", Config))


def _section(path: str, section: type[Section]) -> Iterator[str]:
    yield f"\n## {path or 'Top level'}\n\n{_one_line(section.__doc__)}\n\n"
    yield "| field | type | default | meaning |\n|---|---|---|---|\n"
    inner = []
    for name, field in section.model_fields.items():
        meaning = _one_line(field.description or (sections_in(field.annotation) or [Section])[0].__doc__)
        yield f"| `{name}` | {_type(field)} | {_default(field)} | {meaning} |\n"
        for nested in sections_in(field.annotation):
            where = f"{path}.{name}" if path else name
            tag = nested.model_fields.get("kind")
            many = get_origin(field.annotation) is tuple
            label = f"{where}[]" if many else where
            if tag is not None:
                label += f" (kind: {get_args(tag.annotation)[0]})" if len(get_args(tag.annotation)) == 1 else ""
            inner.append((label, where + ("[]" if many else ""), nested))
    for label, where, nested in inner:
        first, *rest = _section(where, nested)
        yield first.replace(f"## {where}\n", f"## {label}\n", 1)
        yield from rest


def _type(field: FieldInfo) -> str:
    text = _name(field.annotation)
    limits = [limit for item in field.metadata for limit in _limits(item)]
    return f"{text} {', '.join(limits)}" if limits else text


def _name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is type(None):
        return "null"
    if origin is Annotated:
        limits = [limit for item in arguments[1:] for limit in _limits(item)]
        return " ".join([_name(arguments[0]), ", ".join(limits)]).strip()
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_name(argument) for argument in arguments)
    if origin is tuple:
        inner = [_name(argument) for argument in arguments if argument is not Ellipsis]
        return f"list of {inner[0]}" if Ellipsis in arguments else f"[{', '.join(inner)}]"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    return {"int": "integer", "float": "number", "str": "text", "bool": "true or false"}[annotation.__name__]


def _limits(item: Any) -> Iterator[str]:
    inner = getattr(item, "metadata", None)  # a FieldInfo inside Annotated carries its own list
    for part in inner if inner is not None else [item]:
        for name, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤")):
            if getattr(part, name, None) is not None:
                yield f"{sign} {getattr(part, name)}"


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if isinstance(field.default, Section):
        return "see below"
    value = field.default
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


if __name__ == "__main__":
    print(reference(), end="")
