"""Turns pydantic's errors into messages about the fields of a YAML file."""

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from kmem.config.renamed import RENAMED
from kmem.config.section import Section
from kmem.wording import counted

_SCALARS = str | int | float | bool


def explain(problems: Sequence[ErrorDetails], top: type[Section]) -> list[str]:
    """One line per problem: the path of the field, what is wrong, and the remedy.

    Args:
        top: the section that was checked.
    """
    found = [(_place(problem["loc"], top), problem) for problem in problems]
    # For a field that takes a number or a list, pydantic reports both alternatives, and only one was meant.
    lists = {place.of_field for place, problem in found if place.list_meant and problem["type"] != "tuple_type"}
    meant = [
        (place, problem)
        for place, problem in found
        if place.alternative is None or place.list_meant == (place.of_field in lists)
    ]
    # A list that lost a bad element is also too short; the first problem says all.
    first = [(place, problem) for place, problem in meant if problem["type"] != "too_short"] or meant
    return list(dict.fromkeys(_explain(place, problem) for place, problem in first))


@dataclass(frozen=True)
class _Place:
    """Where a problem is."""

    path: tuple[str, ...]
    """Keys and numbers of list elements."""
    of_field: tuple[str, ...]
    """The path up to the last field it names."""
    field: FieldInfo | None
    """The last field on the path."""
    siblings: tuple[str, ...]
    """Fields of the section that contains the last key."""
    alternative: str | None
    """For a field that takes several types: pydantic's name of the type that was tried."""

    @property
    def list_meant(self) -> bool:
        return self.alternative is not None and self.alternative.startswith("tuple")


def _place(location: tuple[int | str, ...], top: type[Section]) -> _Place:
    sections: list[type[Section]] = [top]
    path: tuple[str, ...] = ()
    of_field: tuple[str, ...] = ()
    siblings: tuple[str, ...] = ()
    field: FieldInfo | None = None
    alternative: str | None = None
    for part in location:
        if isinstance(part, int):
            path = (*path, str(part))
            continue
        fields = [section.model_fields[part] for section in sections if part in section.model_fields]
        tagged = [section for section in sections if part in kinds_of(section)]
        if not sections:
            alternative = part  # below a field without keys
        elif tagged and not fields:
            sections = tagged  # the kind of a section, not a key
        else:
            path, siblings = (*path, part), tuple(name for section in sections for name in section.model_fields)
            sections = [inner for info in fields for inner in sections_in(info.annotation)]
            if fields:
                field, of_field = fields[0], path
    return _Place(path, of_field, field, siblings, alternative)


def _explain(place: _Place, problem: ErrorDetails) -> str:
    where = ".".join(place.path) or "config"
    kind, given = problem["type"], problem.get("input")
    message = problem["msg"].removeprefix("Value error, ")
    if kind == "value_error" and isinstance(given, dict):
        return ".".join([*place.path, message])  # a rule of the section: its message begins with a field
    if kind == "extra_forbidden":
        new = RENAMED.get(where)
        if new is not None and new.key in place.siblings:
            path, value = ".".join([*place.path[:-1], new.key]), new.value(given)
            return f"{where}: is now called {path}" + ("" if value == given else f"; write {path}={json.dumps(value)}")
        close = difflib.get_close_matches(place.path[-1], place.siblings, n=1)
        return f"{where}: unknown key" + (f"; did you mean {close[0]}?" if close else "")
    if kind == "missing":
        if not isinstance(problem["loc"][-1], int):
            return f"{where}: missing; it has no default"
        where, kind = ".".join(place.of_field), "tuple_type"  # a list that is shorter than its fixed length
    if kind == "too_short":
        fewest = counted(problem.get("ctx", {})["min_length"], "entry", "entries")
        rest = "" if place.field is None or place.field.is_required() else ", or leave it out"
        return f"{where}: an empty list; give at least {fewest}{rest}"
    if kind in ("tuple_type", "too_long"):
        message = _list_expected(place.field, given)
    elif kind in ("model_type", "model_attributes_type", "dict_type"):
        message = "a section of fields is expected"
    elif kind == "string_type":
        message = "text is expected"
    if given is None or isinstance(given, _SCALARS) or (isinstance(given, list) and kind != "value_error"):
        message += f" (got {'null' if given is None else repr(given)})"
    return f"{where}: {message}"


def _list_expected(field: FieldInfo | None, given: Any) -> str:
    entries = () if field is None else get_args(field.annotation)
    if get_origin(None if field is None else field.annotation) is tuple and ... not in entries:
        return f"a list of {counted(len(entries), 'value')} is expected"
    of_sections = field is not None and sections_in(field.annotation)
    example = isinstance(given, _SCALARS) and not of_sections
    return "a list is expected" + (f", as in [{json.dumps(given)}]" if example else "")


def kinds_of(section: type[Section]) -> tuple[str, ...]:
    """The values of `kind` that select a section; none for a section without this field."""
    kind = section.model_fields.get("kind")
    return () if kind is None else get_args(kind.annotation)


def sections_in(annotation: Any) -> list[type[Section]]:
    """The section classes mentioned by a field's annotation."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for inner in get_args(annotation) for section in sections_in(inner)]
