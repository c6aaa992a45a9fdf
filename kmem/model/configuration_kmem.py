"""kmem's model as Transformers configures it. Ships beside exported weights."""

from typing import Any

from transformers import PretrainedConfig

from .renamed import renamed_keys

# Transformers' name -> path of the field in the model section
DERIVED = {
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size",),
    "intermediate_size": ("intermediate_size",),
    "num_hidden_layers": ("num_layers",),
    "num_attention_heads": ("attention", "num_heads"),
    "max_position_embeddings": ("max_position_embeddings",),
    "tie_word_embeddings": ("tie_embeddings",),
}


class KmemConfig(PretrainedConfig):
    """`model` is kmem's model section as plain data, and the only source of truth. The names that Transformers expects
    are read from it, and written to config.json for tools that read nothing else.

    Each kind of memory has further fields, which begin with its name: `NAME_parts` (key of each table, as text -> rows
    of each tensor of the table, in order; default: one tensor), and those in `ModelKind.exported_fields`.

    Raises:
        ValueError: config.json gives one of those names a value that contradicts `model`.
    """

    model_type = "kmem"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        model: dict[str, Any] | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.model = renamed_keys(model or {})
        self.use_cache = use_cache
        for name in DERIVED:
            if name in kwargs:
                given, value = kwargs.pop(name), getattr(self, name)
                if self.model and given != value:
                    raise ValueError(
                        f"config.json: {name}={given!r} contradicts {value!r} in `model`, which describes the weights"
                    )
        super().__init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The contents of config.json, derived names included."""
        return {**super().to_dict(), **{name: getattr(self, name) for name in DERIVED if self.model}}


def _derived(path: tuple[str, ...]) -> property:
    """A field of the model section as an attribute."""
    *parents, last = path

    def section(config: KmemConfig) -> Any:
        value: Any = config.model
        for name in parents:
            value = value.get(name) if value else None
        return value

    def read(config: KmemConfig) -> Any:
        return (section(config) or {}).get(last)

    def write(config: KmemConfig, value: Any) -> None:  # resize_token_embeddings() sets vocab_size
        section(config)[last] = value

    return property(read, write)


for _name, _path in DERIVED.items():
    setattr(KmemConfig, _name, _derived(_path))
