"""Translate config.json of a Hugging Face folder into kmem's model section; refuse what kmem cannot express."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kmem.config import ModelConfig, UserError
from kmem.config.problems import explain
from kmem.hf.architectures import BY_MODEL_TYPE, KMEM, from_fields, to_fields
from kmem.hf.custom_code import register
from kmem.hf.native import GLM4_MOE, QWEN2_MOE, QWEN3_MOE, Architecture

MTP_FIELD = "num_nextn_predict_layers"
_REFUSED = {
    "gpt_oss": "its attention has sinks, its experts are clamped and have biases, and its weights are stored in mxfp4; "
    "kmem's models have none of these",
}
"""`model_type` of known models that kmem cannot compute -> what it lacks."""

_REMEDIES = {
    "quantization_config": "the weights are quantized; convert them to bf16 (fp8 blocks, as DeepSeek-V3 and R1 have "
    "them, with fp8_cast_bf16.py of DeepSeek's repository) and remove the field",
    "sliding_window": "kmem attends to all earlier tokens; if no sequence will be longer than the window, set null",
}
"""Field of config.json that can be made to fit -> how."""

_HARMLESS = {
    # tokens, versions and settings of training or serving: the model computes the same function
    *("_name_or_path", "architectures", "auto_map", "aux_loss_alpha", "bos_token_id", "dtype", "eos_token_id"),
    *("ep_size", "model_type", "output_router_logits", "pad_token_id", "pretraining_tp", "seq_aux", "torch_dtype"),
    *("transformers_version", "use_cache"),
    # checked below, or another name for a field that is read
    *("head_dim", "layer_types", "max_window_layers", "num_local_experts", "partial_rotary_factor", "qk_head_dim"),
    *("rope_scaling", "rope_theta", "sliding_window", MTP_FIELD, "num_mtp_layers"),
}


def read_architecture(fields: Mapping[str, Any], path: Path) -> Architecture:
    """The architecture that `model_type` names.

    Raises:
        UserError: kmem does not import it.
    """
    kind = fields.get("model_type")
    if kind in _REFUSED:
        raise UserError(f"{path}: kmem does not import model_type={kind!r}: {_REFUSED[kind]}")
    if kind not in BY_MODEL_TYPE:
        known = ", ".join(sorted(BY_MODEL_TYPE))
        raise UserError(f"{path}: kmem does not import model_type={kind!r}; it imports {known}")
    return BY_MODEL_TYPE[str(kind)]


def read_config(fields: Mapping[str, Any], architecture: Architecture, path: Path) -> Any:
    """The Transformers configuration with the defaults of its class, checked against what kmem can express.

    Raises:
        UserError: names the field that kmem cannot express.
    """
    import transformers

    if architecture is KMEM:
        register()
    try:
        config = transformers.AutoConfig.for_model(**{"model_type": architecture.model_type, **fields})
    except Exception as error:  # Transformers' validation has error types of its own
        raise UserError(f"{path}: Transformers refuses it: {error}") from error
    problems = []
    for name, allowed in architecture.required.items():
        value = getattr(config, name, fields.get(name))
        if value not in allowed:
            remedy = _REMEDIES.get(name, f"kmem's models have {name}={allowed[0]!r}")
            problems.append(f"{name}={value!r} is not supported: {remedy}")
    if architecture is not KMEM:
        problems += [*_rope_problems(config, fields, architecture), *_layer_problems(config, architecture)]
    if problems:
        raise UserError(f"{path}: " + "\n  ".join(problems))
    return config


def read_model(config: Any, architecture: Architecture, path: Path) -> ModelConfig:
    """The model section of a checked configuration.

    Raises:
        UserError: names the invalid field of the section.
    """
    try:
        return ModelConfig.model_validate(from_fields(config, architecture))
    except ValidationError as error:
        problem = explain(error.errors(), ModelConfig)[0]
        raise UserError(f"{path}: describes a model that kmem cannot build: model.{problem}") from None


def ignored_fields(fields: Mapping[str, Any], model: ModelConfig, architecture: Architecture) -> list[str]:
    """Fields of config.json that kmem neither reads nor knows to be harmless."""
    read = to_fields(model, architecture).keys() | architecture.required.keys() | _HARMLESS
    return [] if architecture is KMEM else sorted(fields.keys() - read)


def _rope_problems(config: Any, fields: Mapping[str, Any], architecture: Architecture) -> Iterator[str]:
    rope = config.rope_parameters
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    known = rope.get("rope_type", "default") in ("default", "llama3", "yarn")
    if not known or not isinstance(rope.get("rope_theta"), int | float):
        yield (
            f"{name}={rope} is not supported: kmem's rotary embedding has rope_theta and no scaling, that of Llama 3 "
            "(rope_type llama3) or YaRN (yarn)"
        )
    for field, default in (("attention_factor", None), ("truncate", True)):
        if rope.get(field, default) not in (default, None):
            yield f"{name}: {field}={rope[field]} is not supported: kmem computes YaRN with {field}={default}"
    if architecture is not GLM4_MOE and rope.get("partial_rotary_factor", 1) != 1:
        yield f"partial_rotary_factor is not supported for {architecture.name}: it rotates whole heads"


def _layer_problems(config: Any, architecture: Architecture) -> Iterator[str]:
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention"}:
        yield f"layer_types has {sorted(kinds)}; kmem computes full attention in every layer"
    if architecture in (QWEN3_MOE, QWEN2_MOE):
        dense = sorted(config.mlp_only_layers)
        if dense != list(range(len(dense))):
            yield f"mlp_only_layers={dense}: in kmem the dense layers must come first"
        if not config.num_experts:
            yield f"num_experts=0: a dense model has model_type {architecture.model_type.removesuffix('_moe')}"
