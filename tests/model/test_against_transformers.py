"""Whole models equal Transformers' with the same weights."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kmem.config import LatentAttention, ModelConfig
from kmem.hf.architectures import choose, to_fields
from kmem.hf.key_map import folder_pieces, interleaved_rows
from tests.model import tiny

MODELS = {
    "qwen3_moe": tiny.config({**tiny.GQA, "qk_norm": True}, tiny.SOFTMAX, rope_theta=5e5),
    "qwen3_moe, first layer dense": tiny.config(
        {**tiny.GQA, "qk_norm": True}, {**tiny.SOFTMAX, "first_dense_layers": 1, "renormalize": False}
    ),
    "glm4_moe": tiny.config(
        {**tiny.GQA, "qkv_bias": True, "rotary_fraction": 0.5},
        {**tiny.SIGMOID, **tiny.GROUPS, "num_shared_experts": 2, "first_dense_layers": 1},
        norm_eps=1e-5,
    ),
    "glm4_moe, qk-norm": tiny.config({**tiny.GQA, "qk_norm": True}, {**tiny.SIGMOID, "num_shared_experts": 1}),
    "deepseek_v3": tiny.config(
        tiny.MLA, {**tiny.SIGMOID, **tiny.GROUPS, "num_shared_experts": 1, "first_dense_layers": 1}
    ),
    "deepseek_v3, full queries": tiny.config(
        {**tiny.MLA, "q_lora_rank": None}, {**tiny.SIGMOID, "num_shared_experts": 1, "renormalize": False}
    ),
    "deepseek_v2": tiny.config(
        tiny.MLA,
        {
            **tiny.SOFTMAX,
            **tiny.GROUPS,
            "group_score_top_k": 1,
            "renormalize": False,
            "num_shared_experts": 2,
            "first_dense_layers": 1,
        },
    ),
    "olmoe": tiny.config({"num_heads": 4, "qk_norm": True, "qk_norm_span": "all_heads"}, tiny.SOFTMAX),
    "mixtral": tiny.config(tiny.GQA, tiny.SOFTMAX),
    "qwen2_moe": tiny.config(
        {**tiny.GQA, "qkv_bias": True},
        {**tiny.SOFTMAX, "num_shared_experts": 2, "shared_intermediate_size": 24, "shared_expert_gate": True},
    ),
    "qwen3": tiny.config({**tiny.GQA, "qk_norm": True}),
    "qwen2": tiny.config({**tiny.GQA, "qkv_bias": True}, tie_embeddings=True),
    "llama": tiny.config({**tiny.GQA, "num_kv_heads": None}, tie_embeddings=True),
}


def rows_of(model: ModelConfig, tensor: str) -> torch.Tensor | slice:
    """The order of a tensor's rows in Transformers' model of the same shape."""
    rows = None
    if choose(model).architecture.interleaved:
        assert isinstance(model.attention, LatentAttention)
        rows = interleaved_rows(model.attention, tensor)
    return slice(None) if rows is None else rows


def transformers_model(model: ModelConfig, weights: dict[str, torch.Tensor], **fields):
    """Transformers' model of the same shape holding these weights."""
    architecture = choose(model).architecture
    config = AutoConfig.for_model(
        architecture.model_type, **{**to_fields(model, architecture), **fields}, attn_implementation="sdpa"
    )
    other = AutoModelForCausalLM.from_config(config)
    # A stack of experts has the same layout in both, so a parameter is a tensor.
    copied = {
        piece.parameter: weights[tensor][rows_of(model, tensor)]
        for piece in folder_pieces(model, architecture)
        for tensor in piece.tensors
    }
    missing, unexpected = other.load_state_dict(copied, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if model.tie_embeddings else [])
    return other


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal(name):
    model = MODELS[name]
    decoder = tiny.decoder(model)
    other = transformers_model(model, decoder.state_dict()).eval()
    assert other.config.model_type == name.split(",")[0]
    ids, positions = tiny.tokens()
    with torch.no_grad():
        ours = decoder.logits(decoder(ids, positions))
        theirs = other(input_ids=ids).logits
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "llama", "qwen2_moe", "deepseek_v2"])
def test_loss_and_gradients_equal(name):
    model = MODELS[name]
    decoder = tiny.decoder(model)
    other = transformers_model(model, decoder.state_dict()).train()
    ids, positions = tiny.tokens()
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100

    loss = decoder.loss(decoder(ids, positions), labels) / (labels != -100).sum()
    loss.backward()
    their_loss = other(input_ids=ids, labels=labels, shift_labels=labels).loss
    their_loss.backward()
    torch.testing.assert_close(loss, their_loss, atol=1e-5, rtol=1e-5)
    pieces = {
        tensor: piece.parameter
        for piece in folder_pieces(model, choose(model).architecture)
        for tensor in piece.tensors
    }
    for tensor, parameter in decoder.named_parameters():
        theirs = other.get_parameter(pieces[tensor])
        ours = parameter.grad[rows_of(model, tensor)]
        torch.testing.assert_close(ours, theirs.grad, atol=2e-6, rtol=1e-4, msg=lambda m, t=tensor: f"{t}: {m}")


SCALINGS = {
    "llama3": {"factor": 4.0, "low_freq_factor": 1.5, "original_max_position_embeddings": 64},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 512, "mscale": 1.0, "mscale_all_dim": 0.6},
}


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("name", [name for name in MODELS if "," not in name])
def test_scaled_rotary_frequencies_equal(name, kind):
    """At the end of a long sequence, too. The scalings keep, mix and divide some of these frequencies each."""
    scaling = {"kind": kind, **SCALINGS[kind]}
    model = ModelConfig.model_validate({**MODELS[name].model_dump(), "rope_scaling": scaling})
    decoder = tiny.decoder(model)
    other = transformers_model(model, decoder.state_dict()).eval()
    assert other.config.rope_parameters["rope_type"] == kind
    ids, positions = tiny.tokens()
    with torch.no_grad():
        for start in (0, 50_000):
            ours = decoder.logits(decoder(ids, start + positions))
            theirs = other(input_ids=ids, position_ids=start + positions).logits
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        plain = tiny.decoder(MODELS[name])
        assert (plain.logits(plain(ids, 50_000 + positions)) - ours).abs().max() > 0.01
