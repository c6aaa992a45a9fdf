"""A Hugging Face folder becomes a run: the same function, the same bits, and nothing silently dropped."""

import json
import os
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from kmem.checkpoint.reader import CheckpointReader
from kmem.config import UserError, load_config
from kmem.hf.export import export
from kmem.hf.importing import import_folder
from kmem.model.decoder import Decoder
from tests.hf.models import MEMORY, NATIVE, OWN, VOCABULARY, logits, random_weights, tokenizer, write_run


def decoder_of(reader):
    decoder = Decoder(reader.config.model.shape).eval()
    decoder.load_state_dict({name: reader.read(name) for name in reader.tensors})
    return decoder


@pytest.mark.parametrize("name", [*NATIVE, *OWN, "deepseek", "qwen in branches"])
def test_export_and_import_give_the_same_bits(name, tmp_path):
    config = (NATIVE | OWN | MEMORY)[name]
    decoder = random_weights(config)
    first = write_run(tmp_path / "run", config, decoder)
    export(first, tmp_path / "out", max_shard_bytes=5_000 if config.engram else 50_000, say=str)
    imported = import_folder(tmp_path / "out", tmp_path / "back", say=str)
    reader = CheckpointReader(tmp_path / "back")
    reader.verify()
    assert reader.folder == imported
    assert reader.step == 0
    weights = decoder.weights()
    assert reader.addressing == first.addressing
    assert reader.tensors.keys() == weights.keys()
    for key, tensor in weights.items():
        assert torch.equal(reader.read(key), tensor), key

    # and the other way round, file by file
    export(reader, tmp_path / "again", max_shard_bytes=5_000 if config.engram else 50_000, say=str)
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    first, second = (json.loads((tmp_path / place / "config.json").read_text()) for place in ("out", "again"))
    for tree in (first, second):  # defaults that were made explicit, and sizes of layers that do not exist
        for key in ("head_dim", "intermediate_size"):
            tree.pop(key, None)
        tree.get("model", {}).get("attention", {}).pop("head_dim", None)
    assert first == second


def test_the_run_starts_training_from_its_config(tmp_path):
    export(write_run(tmp_path / "run", NATIVE["qwen3_moe"]), tmp_path / "out", say=str)
    import_folder(tmp_path / "out", tmp_path / "back", say=str)
    config = load_config(tmp_path / "back" / "config.yaml")
    assert config.model == CheckpointReader(tmp_path / "back").config.model
    assert os.path.join(config.folder, config.name) == str(tmp_path / "back")
    (tmp_path / "own.yaml").write_text(
        "include: back/model.yaml\nname: own\ndata: {sources: [{path: x}], sequence_length: 8}\n"
        "train: {steps: 1, global_batch_size: 1, micro_batch_size: 1, optimizer: {lr: 1e-3}}\n"
    )
    assert load_config(tmp_path / "own.yaml").model == config.model
    assert (tmp_path / "back" / "tokenizer" / "tokenizer.json").is_file()


FOREIGN = {
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
    },
    "glm4_moe": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_group": 2,
        "topk_group": 1,
        "attention_bias": True,
        "use_qk_norm": True,
        "num_nextn_predict_layers": 0,
    },
    "deepseek_v2": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 4.0,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
    "mixtral": {"num_local_experts": 8},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
    },
    "mistral": {"head_dim": 16, "sliding_window": None},
    "deepseek_v3": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "rope_interleave": True,
        "num_nextn_predict_layers": 0,
    },
    "qwen3": {"head_dim": 16},
    "qwen2": {"tie_word_embeddings": True},
    "llama": {"tie_word_embeddings": True},
}
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
}


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


YARN = {
    "type": "yarn",
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
    "original_max_position_embeddings": 4096,
}
VARIANTS = {
    "deepseek_v3 half-split": {"rope_interleave": False},
    "deepseek_v3 without query compression": {"q_lora_rank": None},
    "deepseek_v3 as published": {"rope_parameters": None, "rope_scaling": YARN, "rope_theta": 1e4},
    "deepseek_v3 as Moonlight": {"q_lora_rank": None, "n_group": 1, "rms_norm_eps": 1e-3},
    "deepseek_v2 lite": {
        "q_lora_rank": None,
        "topk_method": "greedy",
        "rope_parameters": None,
        "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        "rope_theta": 1e4,
    },
    "qwen2 with YaRN": {"rope_parameters": {**YARN, "rope_type": "yarn", "rope_theta": 1e6, "mscale": None}},
    "llama 3": {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
    "llama 3.1": {"rope_scaling": LLAMA3, "rope_theta": 5e5},  # as written by older Transformers
}
"""Kind of `FOREIGN` and variant -> its fields."""


def foreign_folder(folder, kind, **changes):
    """A folder written by Transformers itself, with random weights throughout."""
    config = AutoConfig.for_model(kind, **{**SMALL, **FOREIGN[kind], **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        values = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(1 + 0.2 * values if "norm" in name else 0.2 * values)
    model.tie_weights()
    model.save_pretrained(folder)
    return model


@torch.no_grad()
@pytest.mark.parametrize("kind", [*FOREIGN, *VARIANTS])
def test_logits_are_those_of_transformers(kind, tmp_path):
    model = foreign_folder(tmp_path / "from", kind.split()[0], **VARIANTS.get(kind, {}))
    shutil.copytree(tokenizer(), tmp_path / "from", dirs_exist_ok=True)
    import_folder(tmp_path / "from", tmp_path / "run", say=str)
    decoder = decoder_of(CheckpointReader(tmp_path / "run"))
    input_ids = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    expected = model(input_ids).logits
    torch.testing.assert_close(logits(decoder, input_ids), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.3
    export(CheckpointReader(tmp_path / "run"), tmp_path / "out", say=str)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again) is (LlamaForCausalLM if kind == "mistral" else type(model))
    unset = ("type", "mscale")  # another name of rope_type; null
    described = [
        {name: value for name, value in rope.items() if name not in unset or value not in (None, "yarn")}
        for rope in (again.config.rope_parameters, model.config.rope_parameters)
    ]
    assert described[0] == described[1]
    torch.testing.assert_close(again(input_ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_bf16_weights_become_exact_fp32_masters(tmp_path):
    model = foreign_folder(tmp_path / "from", "qwen3")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "from")
    import_folder(tmp_path / "from", tmp_path / "run", say=str)
    read = CheckpointReader(tmp_path / "run").read("layers.1.attention.o_proj.weight")
    assert read.dtype == torch.float32
    assert torch.equal(read, model.model.layers[1].self_attn.o_proj.weight.detach().float())


REFUSED = {
    "rope_parameters": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "rope_scaling": (
        "qwen3",
        {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 1e4},
    ),
    "high_freq_factor": (
        "llama",
        {"rope_parameters": {**LLAMA3, "rope_theta": 1e4, "high_freq_factor": 1.0}},
    ),
    "rope_parameters: attention_factor": (
        "llama",
        {"rope_parameters": {**YARN, "rope_type": "yarn", "rope_theta": 1e4, "attention_factor": 1.5}},
    ),
    "beta_fast": ("llama", {"rope_parameters": {**YARN, "rope_type": "yarn", "rope_theta": 1e4, "beta_fast": 1}}),
    "use_sliding_window": ("qwen3", {"use_sliding_window": True}),
    "layer_types": ("qwen3", {"layer_types": ["sliding_attention", *["full_attention"] * 2], "sliding_window": 8}),
    "attention_bias": ("qwen3", {"attention_bias": True}),
    "mlp_bias": ("llama", {"mlp_bias": True}),
    "hidden_act": ("llama", {"hidden_act": "gelu"}),
    "attention_dropout": ("llama", {"attention_dropout": 0.1}),
    "mlp_only_layers": ("qwen3_moe", {"mlp_only_layers": [1]}),
    "decoder_sparse_step": ("qwen3_moe", {"decoder_sparse_step": 2}),
    "clip_qkv": ("olmoe", {"clip_qkv": 8.0}),
    "norm_topk_prob": ("deepseek_v2", {"norm_topk_prob": True}),
    "router_jitter_noise": ("mixtral", {"router_jitter_noise": 0.1}),
    "sliding_window=4096.*longer than the window": ("mistral", {"sliding_window": 4096}),
    "num_experts=0: .*qwen2$": ("qwen2_moe", {"num_experts": 0}),
    "topk_method": ("deepseek_v3", {"topk_method": "greedy"}),
    "scoring_func": ("deepseek_v3", {"scoring_func": "softmax"}),
    "quantization_config=.*fp8_cast_bf16": ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}),
    r"quantization_config=(.*\n)*  rope_scaling=(.*\n)*  mlp_only_layers": (
        "qwen3_moe",  # all at once
        {
            "quantization_config": {"quant_method": "fp8"},
            "rope_parameters": None,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            "rope_theta": 1e4,
            "mlp_only_layers": [1],
        },
    ),
    "partial_rotary_factor": ("qwen3", {"partial_rotary_factor": 0.5}),
    "model_type": ("llama", {"model_type": "gpt2"}),
    "gpt_oss.*sinks.*clamped.*mxfp4": ("llama", {"model_type": "gpt_oss"}),
    "num_experts": ("qwen3_moe", {"num_experts_per_tok": 9}),
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_kmem_cannot_express_is_refused_by_field(field, tmp_path):
    kind, changes = REFUSED[field]
    foreign_folder(tmp_path / "from", kind)
    path = tmp_path / "from" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    expected = "top_k=9 " if field == "num_experts" else field
    with pytest.raises(UserError, match=expected) as error:
        import_folder(tmp_path / "from", tmp_path / "run", say=str)
    assert str(path) in str(error.value)
    assert os.listdir(tmp_path) == ["from"]


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_every_tensor_is_used_exactly_once(tmp_path):
    foreign_folder(tmp_path / "from", "qwen3_moe")

    def change(weights):
        weights["model.layers.1.mlp.experts.8.gate_proj.weight"] = weights.pop(
            "model.layers.1.mlp.experts.3.gate_proj.weight"
        )
        weights["lm_head.weight"] = weights["lm_head.weight"][:, :16].contiguous()

    edit_weights(tmp_path / "from", change)
    with pytest.raises(UserError) as error:
        import_folder(tmp_path / "from", tmp_path / "run", say=str)
    assert "missing: model.layers.1.mlp.experts.3.gate_proj.weight [16, 32]" in str(error.value)
    assert "not expected: model.layers.1.mlp.experts.8.gate_proj.weight [16, 32]" in str(error.value)
    assert "lm_head.weight is [320, 16], expected [320, 32]" in str(error.value)
    assert os.listdir(tmp_path) == ["from"]


def test_multi_token_prediction_is_dropped_only_when_asked(tmp_path):
    foreign_folder(tmp_path / "from", "deepseek_v3")
    path = tmp_path / "from" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_nextn_predict_layers": 1}))
    edit_weights(
        tmp_path / "from", lambda weights: weights.update({"model.layers.3.eh_proj.weight": torch.zeros(4, 4)})
    )
    with pytest.raises(UserError, match=r"num_nextn_predict_layers=1.*--drop-mtp"):
        import_folder(tmp_path / "from", tmp_path / "run", say=str)
    said = []
    import_folder(tmp_path / "from", tmp_path / "run", drop_mtp=True, say=said.append)
    assert any("model.layers.3.eh_proj.weight" in line for line in said)


def test_a_tied_head_must_equal_the_embedding(tmp_path):
    foreign_folder(tmp_path / "from", "llama")
    embedding = "model.embed_tokens.weight"
    edit_weights(tmp_path / "from", lambda weights: weights.update({"lm_head.weight": weights[embedding].clone()}))
    import_folder(tmp_path / "from", tmp_path / "run", say=str)
    edit_weights(tmp_path / "from", lambda weights: weights["lm_head.weight"].mul_(2))
    with pytest.raises(UserError, match="tie_word_embeddings"):
        import_folder(tmp_path / "from", tmp_path / "other", say=str)


def test_unread_fields_are_named(tmp_path):
    foreign_folder(tmp_path / "from", "llama")
    path = tmp_path / "from" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "logit_cap": 30.0}))
    said = []
    import_folder(tmp_path / "from", tmp_path / "run", say=said.append)
    assert [line.partition(": ")[2] for line in said if "config.json" in line] == ["logit_cap"]


def pickled(folder):
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def truncated(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def escaping_index(folder):
    (folder / "model.safetensors").rename(folder.parent / "away.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../away.safetensors"}}))


def in_fp8_blocks(weights):
    name = "model.layers.0.self_attn.q_proj.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    weights[f"{name}_scale_inv"] = torch.ones(1, 1)


DAMAGE = {
    r"/model\.safetensors: .*q_proj\.weight .*float8_e4m3fn.*fp32, bf16 and fp16": lambda folder: edit_weights(
        folder, in_fp8_blocks
    ),
    r"/pytorch_model\.bin: .*from_pretrained": pickled,
    r"/model\.safetensors: .*complete": truncated,
    r"/model\.safetensors\.index\.json: .*\.\./away\.safetensors": escaping_index,
    r"model\.safetensors nor model\.safetensors\.index\.json": lambda folder: (folder / "model.safetensors").unlink(),
    r"config\.json: missing": lambda folder: (folder / "config.json").unlink(),
    r"config\.json: .*JSON \(.*line 1 column": lambda folder: (folder / "config.json").write_text("{"),
    r"/model\.safetensors: model\.norm\.weight .*fp32, bf16 and fp16": lambda folder: edit_weights(
        folder, lambda weights: weights.update({"model.norm.weight": torch.ones(32).int()})
    ),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_folder_is_refused(message, tmp_path):
    foreign_folder(tmp_path / "from", "llama")
    DAMAGE[message](tmp_path / "from")
    with pytest.raises(UserError, match=message):
        import_folder(tmp_path / "from", tmp_path / "run", say=str)
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_with_more_ids_than_the_embedding_is_refused(tmp_path):
    """At once: such a run would train, and its export would be refused."""
    export(write_run(tmp_path / "run", NATIVE["llama"]), tmp_path / "out", say=str)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    tokenizer.add_tokens([f"<new{number}>" for number in range(VOCABULARY)])
    tokenizer.save_pretrained(tmp_path / "out")
    with pytest.raises(UserError, match=r"\bremove digests\.json\b"):
        import_folder(tmp_path / "out", tmp_path / "back", say=str)
    (tmp_path / "out" / "digests.json").unlink()
    with pytest.raises(UserError, match=rf"/out: .*\bvocab_size={VOCABULARY}\b"):
        import_folder(tmp_path / "out", tmp_path / "back", say=str)
    assert not (tmp_path / "back").exists()


def test_an_occupied_run_folder_is_refused(tmp_path):
    foreign_folder(tmp_path / "from", "llama")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "x").write_text("")
    with pytest.raises(UserError, match=f"{tmp_path / 'run'}: exists"):
        import_folder(tmp_path / "from", tmp_path / "run", say=str)
    with pytest.raises(UserError, match=f"^{tmp_path / 'nowhere'}: no such"):
        import_folder(tmp_path / "nowhere", tmp_path / "run2", say=str)


transformers.utils.logging.disable_progress_bar()
