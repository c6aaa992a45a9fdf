"""Which architecture a model is exported to, and the translation of its configuration in both directions."""

from dataclasses import dataclass
from typing import Any

from kmem.config import ModelConfig
from kmem.hf.native import IMPORTED, NATIVE, SHARED, Architecture, rope_parameters, rope_scaling, value_at
from kmem.model.memory_kinds import kinds_of
from kmem.wording import counted

KMEM = Architecture(name="kmem's own code", model_type="kmem", class_name="KmemForCausalLM", shape="any")
BY_MODEL_TYPE = {architecture.model_type: architecture for architecture in (*IMPORTED, KMEM)}


@dataclass(frozen=True)
class Choice:
    """An architecture and why it was chosen."""

    architecture: Architecture
    reason: str


def choose(model: ModelConfig, custom_code: bool = False) -> Choice:
    """The architecture a model is exported to.

    Args:
        model: the model section of a run.
        custom_code: choose kmem's own code whatever the shape.
    """
    if custom_code:
        return Choice(KMEM, "--custom-code was given")
    if model.moe is not None and model.moe.chain is not None:
        return Choice(KMEM, "no native architecture has a chain of experts (model.moe.chain)")
    for kind in kinds_of(model.shape):
        return Choice(KMEM, f"no native architecture has {kind.title} (model.{kind.name})")
    if model.shape.branches > 1:
        return Choice(KMEM, "no native architecture has a residual stream of branches (model.hyper_connections)")
    for architecture in NATIVE:
        if architecture.asks(model):
            obstacles = architecture.obstacles(model)
            if not obstacles:
                return Choice(architecture, architecture.shape)
            return Choice(KMEM, f"{architecture.shape} would be {architecture.name}, but {'; '.join(obstacles)}")
    return Choice(KMEM, f"no native architecture has {_describe(model)}")


def to_fields(model: ModelConfig, architecture: Architecture) -> dict[str, Any]:
    """The fields of config.json that describe a model, without tokens and dtype."""
    if architecture is KMEM:
        return {"model": model.model_dump(mode="json")}
    fields = {name: value_at(model, path) for name, path in {**SHARED, **architecture.fields}.items()}
    defaults = {
        "intermediate_size": value_at(model, "moe.intermediate_size"),
        "num_key_value_heads": model.attention.num_heads,
    }
    fields |= {name: fields[name] or default for name, default in defaults.items() if name in fields}
    if "head_dim" in fields:
        fields["head_dim"] = model.shape.head_dim
    constants = {"attention_dropout": 0.0, "hidden_act": "silu"}
    return {**fields, **constants, "rope_parameters": rope_parameters(model), **architecture.further_fields(model)}


def from_fields(config: Any, architecture: Architecture) -> dict[str, Any]:
    """The model section of a Transformers config that has passed `required`; not yet checked by ModelConfig."""
    if architecture is KMEM:
        return dict(config.model)
    values = {path: getattr(config, name, None) for name, path in {**SHARED, **architecture.fields}.items()}
    values |= {**architecture.implied, **architecture.further_section(config)}
    if "attention.head_dim" in values and not values["attention.head_dim"]:
        values["attention.head_dim"] = config.hidden_size // config.num_attention_heads
    if values.get("moe.first_dense_layers") == 0:
        values["intermediate_size"] = None  # no layer has a dense feed-forward
    section: dict[str, Any] = {
        "rope_theta": config.rope_parameters["rope_theta"],
        "rope_scaling": rope_scaling(config.rope_parameters),
    }
    for path, value in values.items():
        name, _, inner = path.partition(".")
        if inner:
            section.setdefault(name, {})[inner] = value
        else:
            section[name] = value
    return section


def _describe(model: ModelConfig) -> str:
    attention = "latent attention" if model.attention.kind == "mla" else "grouped-query attention"
    if model.attention.kind == "gqa":
        attention += " with qk-norm" if model.attention.qk_norm else " without qk-norm"
    if model.moe is None:
        return f"{attention} and no experts"
    routing = f"{model.moe.score_function} routing" + (", selection bias" if model.moe.selection_bias else "")
    shared = model.moe.num_shared_experts
    return f"{attention}, {routing} and {counted(shared, 'shared expert') if shared else 'no shared experts'}"
