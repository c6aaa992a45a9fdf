"""The base of every configuration section."""

import types
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, model_validator

LARGEST = 2**63 - 1
Width = Annotated[int, Field(gt=0, le=1 << 20)]
"""A number of values or heads. The bytes of a tensor of three such sizes can still be counted in 64 bits."""
_WORDS: dict[type, str] = {bool: "true or false", int: "an integer", float: "a number", str: "text"}


class Section(BaseModel):
    """A typed part of the configuration: unknown keys are errors, values never change after loading.

    Every field is documented by the string below it; docs/configuration.md is generated from these strings.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _as_written(cls, values: Any) -> Any:
        """Refuse flags as numbers, and text as either: pydantic would read `steps: true` as 1 and `'7'` as 7."""
        for name, value in values.items() if isinstance(values, dict) else ():
            if type(value) is int and abs(value) > LARGEST:
                raise ValueError(f"{name}: {value} does not fit in 64 bits")
            allowed = _scalars(cls.model_fields[name].annotation) if name in cls.model_fields else set()
            lenient = type(value) in (bool, str) and type(value) not in allowed
            if allowed and (lenient or (allowed == {bool} and type(value) in (int, float))):
                expected = " or ".join(sorted(_WORDS[kind] for kind in allowed))
                raise ValueError(f"{name}: Input should be {expected} (got {value!r})")
        return values

    def check(self) -> None:
        """Refuse values that do not go together; each field is valid already.

        Raises:
            ValueError: begins with the path of a field, and names the remedy.
        """

    @model_validator(mode="after")
    def _checked(self) -> Self:
        self.check()
        return self


def _scalars(annotation: Any) -> set[type]:
    """The scalar types an annotation allows, outside of containers."""
    if annotation in _WORDS:
        return {annotation}
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return {type(value) for value in parts}
    if origin is Annotated:
        return _scalars(parts[0])
    if origin in (Union, types.UnionType):
        return {kind for part in parts for kind in _scalars(part)}
    return set()
