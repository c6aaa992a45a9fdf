"""The native architectures of Transformers: which models ask for each, what prevents its use, how fields translate.

An architecture is native when Transformers computes exactly what kmem computes, so an exported folder loads without
custom code.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kmem.config import GroupedQueryAttention, LatentAttention, ModelConfig, RopeScaling
from kmem.wording import counted

LATENT_NORM_EPS = 1e-6  # DeepSeek-V3's norms of compressed queries and keys use it whatever rms_norm_eps says


@dataclass(frozen=True)
class Architecture:
    """One model type of Transformers and its translation to and from kmem's model section."""

    name: str
    """The name that people use."""
    model_type: str
    """`model_type` in config.json."""
    class_name: str
    """The causal language model class."""
    shape: str
    """The shape of the models that it fits, in words."""
    asks: Callable[[ModelConfig], bool]
    """Whether a model has that shape."""
    obstacles: Callable[[ModelConfig], list[str]]
    """The options of a model of that shape that the architecture cannot express, in words."""
    to_fields: Callable[[ModelConfig], dict[str, Any]]
    """Model section -> fields of config.json."""
    from_fields: Callable[[Any], dict[str, Any]]
    """A Transformers config -> model section, without the fields that all architectures share."""
    required: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Fields of config.json that must have one of these values for kmem to compute the same model."""


def _gqa(model: ModelConfig) -> GroupedQueryAttention:
    assert isinstance(model.attention, GroupedQueryAttention)
    return model.attention


def _mla(model: ModelConfig) -> LatentAttention:
    assert isinstance(model.attention, LatentAttention)
    return model.attention


def _group_obstacles(model: ModelConfig) -> list[str]:
    """Group-limited routing in DeepSeek-V3 and GLM-4-MoE: the score of a group is the sum of its two best scores."""
    assert model.moe
    obstacles = []
    per_group = model.moe.num_experts // model.moe.num_groups
    if per_group < 2:
        obstacles.append(
            f"its router takes two scores of each group, and model.moe.num_groups={model.moe.num_groups} leaves "
            f"{counted(per_group, 'expert')} per group"
        )
    elif model.moe.num_groups > 1 and model.moe.group_score_top_k != 2:
        obstacles.append(
            f"its router takes two scores of each group, not model.moe.group_score_top_k={model.moe.group_score_top_k}"
        )
    return obstacles


def rope_parameters(model: ModelConfig) -> dict[str, Any]:
    """The rotary embedding in Transformers' form; all its architectures support the scaling of Llama 3."""
    scaling = model.rope_scaling
    parameters: dict[str, Any] = {
        "rope_type": "default" if scaling is None else scaling.kind,
        "rope_theta": model.rope_theta,
    }
    return parameters if scaling is None else {**parameters, **scaling.model_dump(exclude={"kind"})}


def rope_scaling(parameters: Mapping[str, Any]) -> dict[str, Any] | None:
    """Transformers' `rope_parameters` as `model.rope_scaling`, not yet checked."""
    if parameters.get("rope_type", "default") == "default":
        return None
    names = RopeScaling.model_fields.keys() - {"kind"}
    return {"kind": parameters["rope_type"], **{name: parameters.get(name) for name in names}}


def _gqa_fields(model: ModelConfig) -> dict[str, Any]:
    return {
        "num_key_value_heads": _gqa(model).num_kv_heads or model.attention.num_heads,
        "head_dim": model.shape.head_dim,
    }


def _gqa_section(config: Any, qk_norm: bool, rotary_fraction: float = 1.0, qkv_bias: bool = False) -> dict[str, Any]:
    return {
        "kind": "gqa",
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "qk_norm": qk_norm,
        "qkv_bias": qkv_bias,
        "rotary_fraction": rotary_fraction,
    }


def _plain_gqa_obstacles(model: ModelConfig) -> list[str]:
    obstacles = []
    if _gqa(model).qkv_bias:
        obstacles.append(
            "its attention has biases on all four projections or on none, but model.attention.qkv_bias is true"
        )
    return obstacles + _whole_heads_obstacles(model)


def _whole_heads_obstacles(model: ModelConfig) -> list[str]:
    fraction = _gqa(model).rotary_fraction
    return [] if fraction == 1 else [f"it rotates whole heads, not model.attention.rotary_fraction={fraction}"]


# Qwen3-MoE ------------------------------------------------------------------------------------------------------------


def _qwen3_moe_obstacles(model: ModelConfig) -> list[str]:
    assert model.moe
    obstacles = _plain_gqa_obstacles(model)
    if model.moe.num_groups > 1:
        obstacles.append(f"it has no group-limited routing (model.moe.num_groups={model.moe.num_groups})")
    if model.moe.scaling_factor != 1:
        obstacles.append(f"it does not scale router weights (model.moe.scaling_factor={model.moe.scaling_factor})")
    if model.moe.selection_bias:
        obstacles.append("its router has no bias (model.moe.selection_bias is true)")
    return obstacles


def _qwen3_moe_fields(model: ModelConfig) -> dict[str, Any]:
    assert model.moe
    return {
        **_gqa_fields(model),
        "intermediate_size": model.intermediate_size or model.moe.intermediate_size,
        "moe_intermediate_size": model.moe.intermediate_size,
        "num_experts": model.moe.num_experts,
        "num_experts_per_tok": model.moe.top_k,
        "norm_topk_prob": model.moe.renormalize,
        "mlp_only_layers": list(range(model.moe.first_dense_layers)),
        "decoder_sparse_step": 1,
        "router_aux_loss_coef": model.moe.aux_loss,
    }


def _qwen3_moe_section(config: Any) -> dict[str, Any]:
    dense = len(config.mlp_only_layers)
    return {
        "intermediate_size": config.intermediate_size if dense else None,
        "attention": _gqa_section(config, qk_norm=True),
        "moe": {
            "num_experts": config.num_experts,
            "top_k": config.num_experts_per_tok,
            "intermediate_size": config.moe_intermediate_size,
            "first_dense_layers": dense,
            "score_function": "softmax",
            "renormalize": config.norm_topk_prob,
            "aux_loss": config.router_aux_loss_coef,
        },
    }


# GLM-4-MoE and DeepSeek-V3 share their router -------------------------------------------------------------------------


def _biased_moe_fields(model: ModelConfig) -> dict[str, Any]:
    assert model.moe
    return {
        "intermediate_size": model.intermediate_size or model.moe.intermediate_size,
        "moe_intermediate_size": model.moe.intermediate_size,
        "n_routed_experts": model.moe.num_experts,
        "num_experts_per_tok": model.moe.top_k,
        "n_shared_experts": model.moe.num_shared_experts,
        "first_k_dense_replace": model.moe.first_dense_layers,
        "n_group": model.moe.num_groups,
        "topk_group": model.moe.top_groups,
        "norm_topk_prob": model.moe.renormalize,
        "routed_scaling_factor": model.moe.scaling_factor,
        "num_nextn_predict_layers": 0,
    }


def _biased_moe_section(config: Any) -> dict[str, Any]:
    return {
        "num_experts": config.n_routed_experts,
        "top_k": config.num_experts_per_tok,
        "intermediate_size": config.moe_intermediate_size,
        "num_shared_experts": config.n_shared_experts,
        "first_dense_layers": config.first_k_dense_replace,
        "score_function": "sigmoid",
        "num_groups": config.n_group or 1,
        "top_groups": config.topk_group or 1,
        "group_score_top_k": 2,
        "renormalize": config.norm_topk_prob,
        "scaling_factor": config.routed_scaling_factor,
        "selection_bias": True,
    }


def _glm4_moe_obstacles(model: ModelConfig) -> list[str]:
    obstacles = _group_obstacles(model)
    width = model.shape.head_dim * _gqa(model).rotary_fraction
    if int(width) != round(width):
        obstacles.append(
            f"it rounds head_dim x model.attention.rotary_fraction={_gqa(model).rotary_fraction} down, "
            f"while kmem rounds it to {round(width)}"
        )
    return obstacles


def _glm4_moe_fields(model: ModelConfig) -> dict[str, Any]:
    return {
        **_gqa_fields(model),
        **_biased_moe_fields(model),
        "attention_bias": _gqa(model).qkv_bias,
        "use_qk_norm": _gqa(model).qk_norm,
        "rope_parameters": {**rope_parameters(model), "partial_rotary_factor": _gqa(model).rotary_fraction},
    }


def _glm4_moe_section(config: Any) -> dict[str, Any]:
    return {
        "intermediate_size": config.intermediate_size if config.first_k_dense_replace else None,
        "attention": _gqa_section(
            config,
            qk_norm=config.use_qk_norm,
            qkv_bias=config.attention_bias,
            rotary_fraction=config.rope_parameters.get("partial_rotary_factor", 1.0),
        ),
        "moe": _biased_moe_section(config),
    }


def _deepseek_v3_obstacles(model: ModelConfig) -> list[str]:
    obstacles = _group_obstacles(model)
    if model.norm_eps != LATENT_NORM_EPS:
        obstacles.append(f"its latent norms have epsilon {LATENT_NORM_EPS}, not model.norm_eps={model.norm_eps}")
    return obstacles


def _deepseek_v3_fields(model: ModelConfig) -> dict[str, Any]:
    attention = _mla(model)
    return {
        **_biased_moe_fields(model),
        "num_key_value_heads": attention.num_heads,
        "q_lora_rank": attention.q_lora_rank,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_nope_head_dim": attention.qk_nope_head_dim,
        "qk_rope_head_dim": attention.qk_rope_head_dim,
        "v_head_dim": attention.v_head_dim,
        "rope_interleave": False,
    }


def _deepseek_v3_section(config: Any) -> dict[str, Any]:
    return {
        "intermediate_size": config.intermediate_size if config.first_k_dense_replace else None,
        "attention": {
            "kind": "mla",
            "num_heads": config.num_attention_heads,
            "q_lora_rank": config.q_lora_rank,
            "kv_lora_rank": config.kv_lora_rank,
            "qk_nope_head_dim": config.qk_nope_head_dim,
            "qk_rope_head_dim": config.qk_rope_head_dim,
            "v_head_dim": config.v_head_dim,
        },
        "moe": _biased_moe_section(config),
    }


# Dense models ---------------------------------------------------------------------------------------------------------


def _dense_fields(model: ModelConfig) -> dict[str, Any]:
    return {**_gqa_fields(model), "intermediate_size": model.intermediate_size}


def _llama_obstacles(model: ModelConfig) -> list[str]:
    obstacles = _whole_heads_obstacles(model)
    if model.hidden_size % model.attention.num_heads:
        obstacles.append(
            f"it requires that model.attention.num_heads={model.attention.num_heads} divides "
            f"model.hidden_size={model.hidden_size}"
        )
    return obstacles


EVERYWHERE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0, None),
    "quantization_config": (None,),
}
PLAIN_BIAS: dict[str, tuple[Any, ...]] = {"attention_bias": (False,)}  # True would put a bias on o_proj too
FULL_ATTENTION: dict[str, tuple[Any, ...]] = {"use_sliding_window": (False,)}

QWEN3_MOE = Architecture(
    name="Qwen3-MoE",
    model_type="qwen3_moe",
    class_name="Qwen3MoeForCausalLM",
    shape="grouped-query attention with qk-norm, softmax routing, no shared expert",
    asks=lambda model: (
        model.attention.kind == "gqa"
        and model.attention.qk_norm
        and model.moe is not None
        and model.moe.score_function == "softmax"
        and not model.moe.num_shared_experts
    ),
    obstacles=_qwen3_moe_obstacles,
    to_fields=_qwen3_moe_fields,
    from_fields=_qwen3_moe_section,
    required={**EVERYWHERE, **PLAIN_BIAS, **FULL_ATTENTION, "decoder_sparse_step": (1,)},
)
GLM4_MOE = Architecture(
    name="GLM-4-MoE",
    model_type="glm4_moe",
    class_name="Glm4MoeForCausalLM",
    shape="grouped-query attention, sigmoid routing with selection bias, shared experts",
    asks=lambda model: (
        model.attention.kind == "gqa"
        and model.moe is not None
        and model.moe.score_function == "sigmoid"
        and model.moe.selection_bias
        and model.moe.num_shared_experts > 0
    ),
    obstacles=_glm4_moe_obstacles,
    to_fields=_glm4_moe_fields,
    from_fields=_glm4_moe_section,
    required=EVERYWHERE,
)
DEEPSEEK_V3 = Architecture(
    name="DeepSeek-V3",
    model_type="deepseek_v3",
    class_name="DeepseekV3ForCausalLM",
    shape="latent attention, sigmoid routing with selection bias",
    asks=lambda model: (
        model.attention.kind == "mla"
        and model.moe is not None
        and model.moe.score_function == "sigmoid"
        and model.moe.selection_bias
    ),
    obstacles=_deepseek_v3_obstacles,
    to_fields=_deepseek_v3_fields,
    from_fields=_deepseek_v3_section,
    required={
        **EVERYWHERE,
        **PLAIN_BIAS,
        "rms_norm_eps": (LATENT_NORM_EPS,),
        # fields that only the original repository's code reads, not Transformers
        "moe_layer_freq": (1, None),
        "scoring_func": ("sigmoid", None),
        "topk_method": ("noaux_tc", None),
    },
)
QWEN3 = Architecture(
    name="Qwen3",
    model_type="qwen3",
    class_name="Qwen3ForCausalLM",
    shape="grouped-query attention with qk-norm, no experts",
    asks=lambda model: model.attention.kind == "gqa" and model.attention.qk_norm and model.moe is None,
    obstacles=_plain_gqa_obstacles,
    to_fields=_dense_fields,
    from_fields=lambda config: {
        "intermediate_size": config.intermediate_size,
        "attention": _gqa_section(config, qk_norm=True),
    },
    required={**EVERYWHERE, **PLAIN_BIAS, **FULL_ATTENTION},
)
QWEN2 = Architecture(
    name="Qwen2",
    model_type="qwen2",
    class_name="Qwen2ForCausalLM",
    shape="grouped-query attention without qk-norm but with qkv biases, no experts",
    asks=lambda model: (
        model.attention.kind == "gqa" and not model.attention.qk_norm and model.attention.qkv_bias and model.moe is None
    ),
    obstacles=_whole_heads_obstacles,
    to_fields=_dense_fields,
    from_fields=lambda config: {
        "intermediate_size": config.intermediate_size,
        "attention": _gqa_section(config, qk_norm=False, qkv_bias=True),
    },
    required={**EVERYWHERE, **FULL_ATTENTION},
)
LLAMA = Architecture(
    name="Llama",
    model_type="llama",
    class_name="LlamaForCausalLM",
    shape="grouped-query attention without qk-norm or biases, no experts",
    asks=lambda model: (
        model.attention.kind == "gqa"
        and not model.attention.qk_norm
        and not model.attention.qkv_bias
        and model.moe is None
    ),
    obstacles=_llama_obstacles,
    to_fields=_dense_fields,
    from_fields=lambda config: {
        "intermediate_size": config.intermediate_size,
        "attention": _gqa_section(config, qk_norm=False),
    },
    required={**EVERYWHERE, **PLAIN_BIAS, "mlp_bias": (False,)},
)
NATIVE = (QWEN3_MOE, GLM4_MOE, DEEPSEEK_V3, QWEN3, QWEN2, LLAMA)
