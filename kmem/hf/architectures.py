"""Which architecture a model is exported to, and the translation of its configuration in both directions."""

from dataclasses import dataclass
from typing import Any

from kmem.config import ModelConfig
from kmem.hf.native import NATIVE, Architecture, rope_parameters, rope_scaling
from kmem.model.memory_kinds import kinds_of
from kmem.wording import counted

KMEM = Architecture(
    name="kmem's own code",
    model_type="kmem",
    class_name="KmemForCausalLM",
    shape="any",
    asks=lambda model: True,
    obstacles=lambda model: [],
    to_fields=lambda model: {"model": model.model_dump(mode="json")},
    from_fields=lambda config: dict(config.model),
)
BY_MODEL_TYPE = {architecture.model_type: architecture for architecture in (*NATIVE, KMEM)}


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
    if model.attention.kind == "gqa" and model.attention.qk_norm_span == "all_heads":
        return Choice(
            KMEM, "no native architecture normalizes queries and keys over all heads (attention.qk_norm_span)"
        )
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
        return architecture.to_fields(model)
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.attention.num_heads,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": rope_parameters(model),
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        **architecture.to_fields(model),
    }


def from_fields(config: Any, architecture: Architecture) -> dict[str, Any]:
    """The model section of a Transformers config that has passed `required`; not yet checked by ModelConfig."""
    if architecture is KMEM:
        return architecture.from_fields(config)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "max_position_embeddings": config.max_position_embeddings,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_parameters["rope_theta"],
        "rope_scaling": rope_scaling(config.rope_parameters),
        "tie_embeddings": config.tie_word_embeddings,
        "init_std": config.initializer_range,
        **architecture.from_fields(config),
    }


def _describe(model: ModelConfig) -> str:
    attention = "latent attention" if model.attention.kind == "mla" else "grouped-query attention"
    if model.attention.kind == "gqa":
        attention += " with qk-norm" if model.attention.qk_norm else " without qk-norm"
    if model.moe is None:
        return f"{attention} and no experts"
    routing = f"{model.moe.score_function} routing" + (", selection bias" if model.moe.selection_bias else "")
    shared = model.moe.num_shared_experts
    return f"{attention}, {routing} and {counted(shared, 'shared expert') if shared else 'no shared experts'}"
