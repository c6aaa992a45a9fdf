"""The shape of a model: its configuration in the form that modules read."""

from collections.abc import Iterator, Mapping
from typing import Any


class Shape(Mapping[str, Any]):
    """Read-only attribute view of a nested mapping: `shape.attention.num_heads`.

    The mapping is kmem's model section as plain data. A run takes it from its configuration and an export from its
    config.json, so both use the same modules. Nested mappings become shapes.
    """

    __slots__ = ("_values",)
    _values: dict[str, Any]

    def __init__(self, mapping: Mapping[str, Any]) -> None:
        values = {key: Shape(value) if isinstance(value, Mapping) else value for key, value in mapping.items()}
        object.__setattr__(self, "_values", values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle look for special methods
            raise AttributeError(name)
        try:
            return self._values[name]
        except KeyError:
            raise AttributeError(f"the model's shape has no field {name!r}; it has {', '.join(self._values)}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a shape is read-only: {name!r}")

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Shape({self.as_dict()})"

    def __reduce__(self) -> tuple[type["Shape"], tuple[dict[str, Any]]]:
        return Shape, (self.as_dict(),)

    def as_dict(self) -> dict[str, Any]:
        """The nested mapping as new plain dictionaries."""
        return {key: value.as_dict() if isinstance(value, Shape) else value for key, value in self._values.items()}

    def has_experts(self, layer: int) -> bool:
        """Whether the feed-forward of this layer is a mixture of experts."""
        return self.moe is not None and layer >= self.moe.first_dense_layers

    @property
    def chain(self) -> Any:
        """The section of the chain of experts, or None."""
        return None if self.moe is None else self.moe.get("chain")  # models saved before chains existed lack the field

    @property
    def shared_width(self) -> int:
        """Hidden width of all shared experts of a layer together; they are one feed-forward."""
        # models saved before shared experts had a width of their own lack the field
        width = self.moe.get("shared_intermediate_size") or self.moe.intermediate_size
        return self.moe.num_shared_experts * width

    @property
    def engram(self) -> Any:
        """The section of the engram, or None."""
        return self.get("engram")  # models saved before engrams existed lack the field

    @property
    def bank_control(self) -> str:
        """The bank control under which the model was trained. `generic` if generic blocks always replaced the fetched
        ones, which then learned nothing; otherwise `fetched`."""
        return "generic" if self.bank.generic.probability == 1 else "fetched"

    @property
    def bank(self) -> Any:
        """The section of the bank, or None."""
        return self.get("bank")  # models saved before banks existed lack the field

    @property
    def bank_layers(self) -> tuple[int, ...]:
        """Layers that have blocks of the bank, ascending."""
        bank, layers = self.bank, self.num_layers
        if bank is None:
            return ()
        if bank.placement == "listed":
            return tuple(bank.placed_layers)
        count = layers if bank.placement == "uniform" else bank.placed_layers
        first = {"middle": (layers - count) // 2, "last": layers - count}.get(bank.placement, 0)
        return tuple(range(first, first + count))

    @property
    def branches(self) -> int:
        """Number of branches of the residual stream."""
        connections = self.get("hyper_connections")
        return 1 if connections is None else connections["branches"]

    @property
    def head_dim(self) -> int:
        """Width of one query or key head of GQA."""
        return self.attention.head_dim or self.hidden_size // self.attention.num_heads
