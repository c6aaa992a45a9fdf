"""The native architectures of Transformers: which models ask for each, what prevents its use, how fields translate.

An architecture is native when Transformers computes exactly what kmem computes, so an exported folder loads without
custom code.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kmem.config import GroupedQueryAttention, Llama3Scaling, ModelConfig, YarnScaling
from kmem.wording import counted

LATENT_NORM_EPS = 1e-6  # DeepSeek's norms of compressed queries and keys use it whatever rms_norm_eps says


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
    implied: Mapping[str, Any] = field(default_factory=dict)
    """The same shape: path in the model section -> value that all these models have."""
    shared_experts: bool | None = None
    """Whether these models have shared experts; None: either."""
    supported: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    """Path in the model section -> the only value that the architecture can express, and its reason in words."""
    further_obstacles: Callable[[ModelConfig], list[str]] = lambda model: []
    """Other options of a model of that shape that the architecture cannot express, in words."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Field of config.json -> path in the model section, of what both have, besides SHARED."""
    further_fields: Callable[[ModelConfig], dict[str, Any]] = lambda model: {}
    """Model section -> other fields of config.json."""
    further_section: Callable[[Any], dict[str, Any]] = lambda config: {}
    """A Transformers config -> path in the model section -> value that is not that of a single field."""
    required: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Fields of config.json that must have one of these values for kmem to compute the same model."""
    parameter_names: Mapping[str, str] = field(default_factory=dict)
    """Part of a parameter's name, as `key_map.NATIVE_NAMES` gives it -> the same part of the name in the class."""
    disk_names: Mapping[str, str] = field(default_factory=dict)
    """Part of a parameter's name in the class -> the same part of the name of its tensors in a folder."""
    interleaved: bool = False
    """Whether it rotates neighbouring dimensions, while kmem rotates those that are half a head apart."""
    empty_shared_experts: bool = False
    """Whether it has shared experts of width 0 if a model has none."""

    def asks(self, model: ModelConfig) -> bool:
        """Whether a model has that shape."""
        shared = bool(value_at(model, "moe.num_shared_experts"))
        implied = all(value_at(model, path) == value for path, value in self.implied.items())
        return implied and self.shared_experts in (None, shared)

    def obstacles(self, model: ModelConfig) -> list[str]:
        """The options of a model of that shape that the architecture cannot express, in words."""
        values = {path: value_at(model, path) for path in self.supported}
        unlike = [
            f"{reason} (model.{path}={values[path]})"
            for path, (supported, reason) in self.supported.items()
            if values[path] != supported
        ]
        return unlike + self.further_obstacles(model)


def value_at(model: ModelConfig, path: str) -> Any:
    """The value at a path in the model section, such as `moe.top_k`; None where a section is null or has no such
    field."""
    value: Any = model
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def _gqa(model: ModelConfig) -> GroupedQueryAttention:
    assert isinstance(model.attention, GroupedQueryAttention)
    return model.attention


def _two_scores_obstacles(model: ModelConfig) -> list[str]:
    """Group-limited routing in DeepSeek-V3 and GLM-4-MoE: the score of a group is the sum of its two best scores."""
    assert model.moe
    groups, taken = model.moe.num_groups, model.moe.group_score_top_k
    per_group = model.moe.num_experts // groups
    if per_group >= 2 and (groups == 1 or taken == 2):
        return []
    return [
        f"its router takes two scores of each group, and model.moe.num_groups={groups} leaves "
        f"{counted(per_group, 'expert')} per group, of which model.moe.group_score_top_k takes {taken}"
    ]


def _best_score_obstacles(model: ModelConfig) -> list[str]:
    """Group-limited routing in DeepSeek-V2: the score of a group is its best score."""
    assert model.moe
    if model.moe.num_groups == 1 or model.moe.group_score_top_k == 1:
        return []
    return [f"the score of a group is its best one (model.moe.group_score_top_k={model.moe.group_score_top_k})"]


def _latent_obstacles(model: ModelConfig) -> list[str]:
    eps = value_at(model, "attention.latent_norm_eps") or model.norm_eps
    if eps == LATENT_NORM_EPS:
        return []
    return [f"its latent norms have epsilon {LATENT_NORM_EPS} (model.attention.latent_norm_eps={eps})"]


def rope_parameters(model: ModelConfig) -> dict[str, Any]:
    """The rotary embedding in Transformers' form; all its architectures support both kinds of scaling."""
    scaling = model.rope_scaling
    parameters: dict[str, Any] = {
        "rope_type": "default" if scaling is None else scaling.kind,
        "rope_theta": model.rope_theta,
    }
    return parameters if scaling is None else {**parameters, **scaling.model_dump(exclude={"kind"}, exclude_none=True)}


def rope_scaling(parameters: Mapping[str, Any]) -> dict[str, Any] | None:
    """Transformers' `rope_parameters` as `model.rope_scaling`, not yet checked."""
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        return None
    if kind == "yarn":  # 0 and null stand for a default
        return {"kind": kind, **{name: parameters[name] for name in YarnScaling.model_fields if parameters.get(name)}}
    return {"kind": kind, **{name: parameters.get(name) for name in Llama3Scaling.model_fields if name != "kind"}}


def _glm4_moe_obstacles(model: ModelConfig) -> list[str]:
    obstacles = _two_scores_obstacles(model)
    width = model.shape.head_dim * _gqa(model).rotary_fraction
    if int(width) != round(width):
        obstacles.append(
            f"it rounds head_dim x model.attention.rotary_fraction={_gqa(model).rotary_fraction} down, "
            f"while kmem rounds it to {round(width)}"
        )
    return obstacles


def _head_obstacles(model: ModelConfig) -> list[str]:
    heads, hidden = model.attention.num_heads, model.hidden_size
    if hidden % heads:
        return [f"it requires that model.attention.num_heads={heads} divides model.hidden_size={hidden}"]
    return []


def _olmoe_obstacles(model: ModelConfig) -> list[str]:
    """It has no `head_dim`."""
    heads, hidden, width = model.attention.num_heads, model.hidden_size, model.shape.head_dim
    if heads * width == hidden:
        return []
    return [f"its heads are as wide as the hidden state together, not {heads} x model.attention.head_dim={width}"]


WHOLE_HEADS = {"attention.rotary_fraction": (1, "it rotates whole heads")}
ALIKE_BIASES = {"attention.qkv_bias": (False, "its attention has biases on all four projections or on none")}
NORMED_HEADS = {"attention.qk_norm_span": ("head", "it normalizes every head alone")}
PLAIN_SHARED_EXPERTS = {
    "moe.shared_intermediate_size": (None, "its shared experts are as wide as the routed ones"),
    "moe.shared_expert_gate": (False, "its shared experts have no gate"),
}
PLAIN_ROUTING = {
    "moe.num_groups": (1, "it has no group-limited routing"),
    "moe.scaling_factor": (1, "it does not scale router weights"),
    "moe.selection_bias": (False, "its router has no bias"),
}
EXPERTS_EVERYWHERE = {"moe.first_dense_layers": (0, "all its layers have experts")}
SHARED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "attention.num_heads",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "initializer_range": "init_std",
}
"""The `Architecture.fields` of all architectures."""
GQA = {"num_key_value_heads": "attention.num_kv_heads", "head_dim": "attention.head_dim"}
DEEPSEEK_MOE = {
    "moe_intermediate_size": "moe.intermediate_size",
    "n_routed_experts": "moe.num_experts",
    "num_experts_per_tok": "moe.top_k",
    "n_shared_experts": "moe.num_shared_experts",
    "first_k_dense_replace": "moe.first_dense_layers",
    "n_group": "moe.num_groups",
    "topk_group": "moe.top_groups",
    "norm_topk_prob": "moe.renormalize",
    "routed_scaling_factor": "moe.scaling_factor",
}
"""The experts of GLM-4-MoE and DeepSeek."""
MLA = {
    name: f"attention.{name}"
    for name in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
}
SOFTMAX_MOE = {"num_experts_per_tok": "moe.top_k", "router_aux_loss_coef": "moe.aux_loss"}
"""The experts of Qwen3-MoE, Qwen2-MoE, OLMoE and Mixtral."""
QWEN_MOE = {
    **SOFTMAX_MOE,
    "moe_intermediate_size": "moe.intermediate_size",
    "num_experts": "moe.num_experts",
    "norm_topk_prob": "moe.renormalize",
}


def _qwen_moe_fields(model: ModelConfig) -> dict[str, Any]:
    return {"mlp_only_layers": list(range(value_at(model, "moe.first_dense_layers"))), "decoder_sparse_step": 1}


def _qwen_moe_section(config: Any) -> dict[str, Any]:
    return {"moe.first_dense_layers": len(config.mlp_only_layers)}


def _biased_moe_section(config: Any) -> dict[str, Any]:
    return {
        "moe.num_groups": config.n_group or 1,
        "moe.top_groups": config.topk_group or 1,
        "moe.group_score_top_k": 2,
    }


EVERYWHERE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0, None),
    "quantization_config": (None,),
}
PLAIN_BIAS: dict[str, tuple[Any, ...]] = {"attention_bias": (False,)}  # True would put a bias on o_proj too
FULL_ATTENTION: dict[str, tuple[Any, ...]] = {"use_sliding_window": (False,)}
NO_WINDOW: dict[str, tuple[Any, ...]] = {"sliding_window": (None,)}

QWEN3_MOE = Architecture(
    name="Qwen3-MoE",
    model_type="qwen3_moe",
    class_name="Qwen3MoeForCausalLM",
    shape="grouped-query attention with qk-norm, softmax routing, no shared expert",
    implied={"attention.kind": "gqa", "attention.qk_norm": True, "moe.score_function": "softmax"},
    shared_experts=False,
    supported={**NORMED_HEADS, **ALIKE_BIASES, **WHOLE_HEADS, **PLAIN_ROUTING},
    fields={**GQA, **QWEN_MOE},
    further_fields=_qwen_moe_fields,
    further_section=_qwen_moe_section,
    required={**EVERYWHERE, **PLAIN_BIAS, **FULL_ATTENTION, "decoder_sparse_step": (1,)},
)
QWEN2_MOE = Architecture(
    name="Qwen2-MoE",
    model_type="qwen2_moe",
    class_name="Qwen2MoeForCausalLM",
    shape="grouped-query attention without qk-norm, softmax routing, shared experts with a gate",
    implied={
        "attention.kind": "gqa",
        "attention.qk_norm": False,
        "moe.score_function": "softmax",
        "moe.shared_expert_gate": True,
    },
    shared_experts=True,
    supported={**WHOLE_HEADS, **PLAIN_ROUTING},
    fields={**GQA, **QWEN_MOE, "qkv_bias": "attention.qkv_bias"},
    further_fields=lambda model: {
        **_qwen_moe_fields(model),
        "shared_expert_intermediate_size": model.shape.shared_width,
    },
    further_section=lambda config: {
        **_qwen_moe_section(config),
        "moe.num_shared_experts": 1,
        "moe.shared_intermediate_size": config.shared_expert_intermediate_size,
    },
    required={**EVERYWHERE, **FULL_ATTENTION, "decoder_sparse_step": (1,)},
    parameter_names={".shared_experts.output_gate.": ".shared_expert_gate.", ".shared_experts.": ".shared_expert."},
)
OLMOE = Architecture(
    name="OLMoE",
    model_type="olmoe",
    class_name="OlmoeForCausalLM",
    shape="grouped-query attention with qk-norm over all heads, softmax routing, no shared expert",
    implied={
        "attention.kind": "gqa",
        "attention.qk_norm": True,
        "attention.qk_norm_span": "all_heads",
        "moe.score_function": "softmax",
    },
    shared_experts=False,
    supported={**ALIKE_BIASES, **WHOLE_HEADS, **PLAIN_ROUTING, **EXPERTS_EVERYWHERE},
    further_obstacles=_olmoe_obstacles,
    fields={
        **SOFTMAX_MOE,
        "num_key_value_heads": "attention.num_kv_heads",
        "intermediate_size": "moe.intermediate_size",
        "num_experts": "moe.num_experts",
        "norm_topk_prob": "moe.renormalize",
    },
    required={**EVERYWHERE, **PLAIN_BIAS, "clip_qkv": (None,)},
)
MIXTRAL = Architecture(
    name="Mixtral",
    model_type="mixtral",
    class_name="MixtralForCausalLM",
    shape="grouped-query attention without qk-norm, softmax routing, no shared expert",
    implied={"attention.kind": "gqa", "attention.qk_norm": False, "moe.score_function": "softmax"},
    shared_experts=False,
    supported={
        "attention.qkv_bias": (False, "its attention has no biases"),
        **WHOLE_HEADS,
        **PLAIN_ROUTING,
        **EXPERTS_EVERYWHERE,
        "moe.renormalize": (True, "it divides the chosen scores by their sum"),
    },
    fields={
        **GQA,
        **SOFTMAX_MOE,
        "intermediate_size": "moe.intermediate_size",
        "num_local_experts": "moe.num_experts",
    },
    required={**EVERYWHERE, **NO_WINDOW, "router_jitter_noise": (0,)},
    disk_names={".mlp.": ".block_sparse_moe.", ".gate_proj.": ".w1.", ".up_proj.": ".w3.", ".down_proj.": ".w2."},
)
GLM4_MOE = Architecture(
    name="GLM-4-MoE",
    model_type="glm4_moe",
    class_name="Glm4MoeForCausalLM",
    shape="grouped-query attention, sigmoid routing with selection bias, shared experts",
    implied={"attention.kind": "gqa", "moe.score_function": "sigmoid", "moe.selection_bias": True},
    shared_experts=True,
    supported={**NORMED_HEADS, **PLAIN_SHARED_EXPERTS},
    further_obstacles=_glm4_moe_obstacles,
    fields={**GQA, **DEEPSEEK_MOE, "attention_bias": "attention.qkv_bias", "use_qk_norm": "attention.qk_norm"},
    further_fields=lambda model: {
        "rope_parameters": {**rope_parameters(model), "partial_rotary_factor": _gqa(model).rotary_fraction},
        "num_nextn_predict_layers": 0,
    },
    further_section=lambda config: {
        "attention.rotary_fraction": config.rope_parameters.get("partial_rotary_factor", 1.0),
        **_biased_moe_section(config),
    },
    required=EVERYWHERE,
)
DEEPSEEK_V3 = Architecture(
    name="DeepSeek-V3",
    model_type="deepseek_v3",
    class_name="DeepseekV3ForCausalLM",
    shape="latent attention, sigmoid routing with selection bias",
    implied={"attention.kind": "mla", "moe.score_function": "sigmoid", "moe.selection_bias": True},
    supported=PLAIN_SHARED_EXPERTS,
    further_obstacles=lambda model: _two_scores_obstacles(model) + _latent_obstacles(model),
    fields={**DEEPSEEK_MOE, **MLA},
    further_fields=lambda model: {
        "num_key_value_heads": model.attention.num_heads,
        "rope_interleave": True,  # as published: engines other than Transformers do not read this field
        "num_nextn_predict_layers": 0,
    },
    further_section=lambda config: {**_biased_moe_section(config), "attention.latent_norm_eps": LATENT_NORM_EPS},
    required={
        **EVERYWHERE,
        **PLAIN_BIAS,
        # fields that only the original repository's code reads, not Transformers
        "moe_layer_freq": (1, None),
        "scoring_func": ("sigmoid", None),
        "topk_method": ("noaux_tc", None),
    },
    interleaved=True,
    empty_shared_experts=True,
)
DEEPSEEK_V2 = Architecture(
    name="DeepSeek-V2",
    model_type="deepseek_v2",
    class_name="DeepseekV2ForCausalLM",
    shape="latent attention, softmax routing",
    implied={"attention.kind": "mla", "moe.score_function": "softmax"},
    supported={
        **PLAIN_SHARED_EXPERTS,
        "moe.selection_bias": (False, "its router has no bias"),
        "moe.renormalize": (False, "it takes the chosen scores as they are"),
    },
    further_obstacles=lambda model: _best_score_obstacles(model) + _latent_obstacles(model) + _head_obstacles(model),
    fields={**DEEPSEEK_MOE, **MLA},
    further_fields=lambda model: {
        "num_key_value_heads": model.attention.num_heads,
        "topk_method": "greedy" if value_at(model, "moe.num_groups") == 1 else "group_limited_greedy",
    },
    further_section=lambda config: {
        "moe.num_groups": 1 if config.topk_method == "greedy" else config.n_group,
        "moe.top_groups": 1 if config.topk_method == "greedy" else config.topk_group,
        "moe.group_score_top_k": 1,
        "attention.latent_norm_eps": LATENT_NORM_EPS,
    },
    required={
        **EVERYWHERE,
        **PLAIN_BIAS,
        "mlp_bias": (False,),
        "topk_method": ("greedy", "group_limited_greedy"),
        # Transformers does not read these. The original code scales router weights only if it does not divide them by
        # their sum.
        "norm_topk_prob": (False, None),
        "moe_layer_freq": (1, None),
        "scoring_func": ("softmax", None),
    },
    interleaved=True,
    empty_shared_experts=True,
)
QWEN3 = Architecture(
    name="Qwen3",
    model_type="qwen3",
    class_name="Qwen3ForCausalLM",
    shape="grouped-query attention with qk-norm, no experts",
    implied={"attention.kind": "gqa", "attention.qk_norm": True, "moe": None},
    supported={**NORMED_HEADS, **ALIKE_BIASES, **WHOLE_HEADS},
    fields=GQA,
    required={**EVERYWHERE, **PLAIN_BIAS, **FULL_ATTENTION},
)
QWEN2 = Architecture(
    name="Qwen2",
    model_type="qwen2",
    class_name="Qwen2ForCausalLM",
    shape="grouped-query attention without qk-norm but with qkv biases, no experts",
    implied={"attention.kind": "gqa", "attention.qk_norm": False, "attention.qkv_bias": True, "moe": None},
    supported=WHOLE_HEADS,
    fields=GQA,
    required={**EVERYWHERE, **FULL_ATTENTION},
)
LLAMA = Architecture(
    name="Llama",
    model_type="llama",
    class_name="LlamaForCausalLM",
    shape="grouped-query attention without qk-norm or biases, no experts",
    implied={"attention.kind": "gqa", "attention.qk_norm": False, "attention.qkv_bias": False, "moe": None},
    supported=WHOLE_HEADS,
    further_obstacles=_head_obstacles,
    fields=GQA,
    required={**EVERYWHERE, **PLAIN_BIAS, "mlp_bias": (False,)},
)
MISTRAL = replace(
    LLAMA,
    name="Mistral",
    model_type="mistral",
    class_name="MistralForCausalLM",
    required={**EVERYWHERE, **NO_WINDOW},
)
NATIVE = (OLMOE, QWEN3_MOE, QWEN2_MOE, MIXTRAL, GLM4_MOE, DEEPSEEK_V3, DEEPSEEK_V2, QWEN3, QWEN2, LLAMA)
"""Of two that fit a model, the first is chosen."""
IMPORTED = (*NATIVE, MISTRAL)
"""A Mistral is a Llama under another name, so it is exported as one."""
