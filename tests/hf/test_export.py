"""An exported folder loads in Transformers and computes what kmem computes."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kmem.config import UserError
from kmem.hf import key_map
from kmem.hf.architectures import choose
from kmem.hf.custom_code import register
from kmem.hf.export import export
from tests.hf.models import MEMORY, NATIVE, OWN, VOCABULARY, logits, random_weights, write_run

CASES = {name: (config, False) for name, config in (NATIVE | OWN | MEMORY).items()}
CASES["forced"] = (NATIVE["deepseek_v3"], True)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module", params=CASES)
def exported(request, tmp_path_factory):
    """(kmem's model, Transformers' model loaded from its export)."""
    config, custom_code = CASES[request.param]
    folder = tmp_path_factory.mktemp("case")
    decoder = random_weights(config)
    said = []
    choice = export(
        write_run(folder / "run", config, decoder), folder / "out", custom_code=custom_code, say=said.append
    )
    native = choice.architecture.model_type != "kmem"
    assert native == (request.param in NATIVE)
    assert not native or request.param.startswith(choice.architecture.model_type)
    assert choice.reason in said[0]
    register()
    model, info = AutoModelForCausalLM.from_pretrained(folder / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert type(model).__name__ == choice.architecture.class_name
    return decoder, model.eval()


@torch.no_grad()
def test_logits_are_kmems(exported):
    decoder, model = exported
    input_ids = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    expected = logits(decoder, input_ids)
    torch.testing.assert_close(model(input_ids, use_cache=False).logits, expected, **TOLERANCE)
    assert expected.std() > 0.4  # otherwise the tolerance would hide differences


@torch.no_grad()
def test_logits_at_long_positions_are_kmems(exported):
    """Frequencies rounded otherwise would show here."""
    decoder, model = exported
    input_ids = torch.randint(VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(6))
    positions = torch.arange(50_000, 50_024)[None]
    expected = logits(decoder, input_ids, positions)
    torch.testing.assert_close(model(input_ids, position_ids=positions, use_cache=False).logits, expected, **TOLERANCE)


@torch.no_grad()
def test_logits_with_a_cache_are_kmems(exported):
    """A prompt, then a chunk of several tokens, then one at a time."""
    decoder, model = exported
    input_ids = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(2))
    cache, parts = None, []
    for start, stop in [(0, 10), (10, 17), *((at, at + 1) for at in range(17, 24))]:
        output = model(input_ids[:, start:stop], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), logits(decoder, input_ids), **TOLERANCE)


@torch.no_grad()
def test_logits_of_left_padded_sequences_are_kmems(exported):
    """With and without a cache."""
    decoder, model = exported
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(VOCABULARY, (1, length), generator=generator) for length in (12, 7, 1)]
    length = max(row.shape[1] for row in rows)
    padded = torch.cat([torch.nn.functional.pad(row, (length - row.shape[1], 0), value=5) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (length - row.shape[1], 0)) for row in rows])
    whole = model(padded, attention_mask=mask, use_cache=False).logits
    first = model(padded[:, :8], attention_mask=mask[:, :8], use_cache=True)
    second = model(padded[:, 8:], attention_mask=mask, past_key_values=first.past_key_values, use_cache=True)
    for found in (whole, torch.cat([first.logits, second.logits], 1)):
        for row, values in zip(rows, found, strict=True):
            torch.testing.assert_close(values[None, length - row.shape[1] :], logits(decoder, row), **TOLERANCE)


@torch.no_grad()
def test_generate_is_greedy_without_cache(exported):
    """Batched, left-padded generation gives each prompt what repeated argmax over its own logits gives."""
    decoder, model = exported
    prompts = [torch.tensor([[7, 8, 9, 10, 11]]), torch.tensor([[30, 31]])]
    padded = torch.cat([torch.nn.functional.pad(prompt, (5 - prompt.shape[1], 0)) for prompt in prompts])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
    found = model.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None)
    for prompt, row in zip(prompts, found[:, 5:], strict=True):
        ids = prompt
        for _ in range(8):
            ids = torch.cat([ids, logits(decoder, ids)[:, -1:].argmax(-1)], 1)
        assert row.tolist() == ids[0, prompt.shape[1] :].tolist()


def test_loss_and_gradients_are_those_of_shifted_labels(exported):
    decoder, model = exported
    input_ids = torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(4))
    labels = input_ids.clone()
    labels[0, :4] = -100
    loss = model(input_ids, labels=labels, use_cache=False).loss
    expected = torch.nn.functional.cross_entropy(
        logits(decoder, input_ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    model.zero_grad()
    decoder.zero_grad()
    loss.backward()
    expected.backward()
    found = model.get_input_embeddings().weight.grad
    torch.testing.assert_close(found, decoder.embedding.weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*NATIVE, *OWN, "deepseek"])
def test_the_folder_is_complete(name, tmp_path):
    config = (NATIVE | OWN | MEMORY)[name]
    reader = write_run(tmp_path / "run", config)
    choice = export(reader, tmp_path / "out", dtype="bf16", max_shard_bytes=20_000, say=str)
    files = {file.name for file in (tmp_path / "out").iterdir()}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    weights = {
        name: tensor
        for file in sorted(set(index["weight_map"].values()))
        for name, tensor in load_file(tmp_path / "out" / file).items()
    }
    assert weights.keys() == index["weight_map"].keys()
    assert sum(tensor.nbytes for tensor in weights.values()) == index["metadata"]["total_size"]
    assert len(set(index["weight_map"].values())) > 2
    for key, tensor in weights.items():
        wide = key.endswith(("selection_bias", "e_score_correction_bias"))
        expected = torch.int64 if key == "token_compression" else torch.float32 if wide else torch.bfloat16
        assert tensor.dtype == expected, key
    assert {"config.json", "generation_config.json", "README.md", "tokenizer.json", "tokenizer_config.json"} <= files
    assert ("modeling_kmem.py" in files) == (choice.architecture.model_type == "kmem")
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("ignores `mscale_all_dim` of the rotary scaling" in card) == (name == "deepseek_v2, lite")
    assert choice.reason in card
    assert "2.5" in card
    assert "from_pretrained" in card
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_token_id == generation["pad_token_id"]
    register()
    assert AutoConfig.from_pretrained(tmp_path / "out").vocab_size == VOCABULARY
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


WITHOUT_KMEM = """
import sys
sys.modules.update(dict.fromkeys(("kmem", "kmem_kernels", "deepspeed", "pydantic_settings")))  # as if not installed
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
ids = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    torch.save(model(ids).logits, sys.argv[3])
inputs = tokenizer(["the model reads", "and"], return_tensors="pt", padding=True)
assert inputs["attention_mask"][1, 0] == 0
assert inputs["attention_mask"][:, -1].all()
text = tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=4))
if hasattr(model.config, "engram_addressing"):
    mapped = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, tables="mmap")
    assert not [name for name, _ in mapped.named_parameters() if ".table." in name]
    assert torch.equal(mapped(ids).logits, model(ids).logits)
    assert tokenizer.batch_decode(mapped.generate(**inputs, max_new_tokens=4)) == text
model.save_pretrained(sys.argv[4])
assert not [name for name in sys.modules if name.split(".")[0] == "kmem" and sys.modules[name]]
"""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("softmax and shared experts", marks=pytest.mark.full),
        pytest.param("chain of experts", marks=pytest.mark.full),
        "deepseek",
    ],
)
def test_custom_code_needs_no_kmem(name, tmp_path, run_without_kmem):
    """In a process where kmem cannot be imported, from another folder, and again after save_pretrained."""
    config = (OWN | MEMORY)[name]
    decoder = random_weights(config)
    export(write_run(tmp_path / "run", config, decoder), tmp_path / "out", say=str)
    ids = torch.randint(VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(5))
    torch.save(ids, tmp_path / "ids")
    for source, again in [("out", "again"), ("again", "third")]:
        run_without_kmem(WITHOUT_KMEM, *(tmp_path / name for name in (source, "ids", "logits", again)))
        torch.testing.assert_close(
            torch.load(tmp_path / "logits", weights_only=True), logits(decoder, ids), **TOLERANCE
        )
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / again / file).write_bytes((tmp_path / "out" / file).read_bytes())


def test_every_checkpoint_tensor_is_used_exactly_once(tmp_path):
    config = NATIVE["qwen3_moe"]
    reader = write_run(tmp_path / "run", config)
    info = reader.tensors.pop("norm.weight")
    reader.tensors["surprise"] = info
    with pytest.raises(UserError) as error:
        export(reader, tmp_path / "out", say=str)
    assert "missing: norm.weight [32]" in str(error.value)
    assert "not expected: surprise [32]" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_every_target_tensor_is_written_exactly_once(tmp_path, monkeypatch):
    monkeypatch.setitem(key_map.NATIVE_NAMES, "o_proj", "dense")
    with pytest.raises(UserError) as error:
        export(write_run(tmp_path / "run", NATIVE["glm4_moe"]), tmp_path / "out", say=str)
    assert "missing: model.layers.0.self_attn.o_proj.weight" in str(error.value)
    assert "not expected: model.layers.0.self_attn.dense.weight" in str(error.value)
    assert os.listdir(tmp_path) == ["run"]


def test_an_existing_folder_is_replaced_only_when_asked(tmp_path):
    reader = write_run(tmp_path / "run", NATIVE["llama"])
    (tmp_path / "out").mkdir()
    export(reader, tmp_path / "out", say=str)
    (tmp_path / "out" / "note").write_text("old")
    with pytest.raises(UserError, match=f"--out {tmp_path / 'out'}: .*--force"):
        export(reader, tmp_path / "out", say=str)
    export(reader, tmp_path / "out", say=str, force=True)
    assert not (tmp_path / "out" / "note").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("do not touch")
    with pytest.raises(UserError, match=rf"--out {tmp_path / 'mine'}: .*\bexport\b"):
        export(reader, tmp_path / "mine", say=str, force=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"--out {tmp_path / 'file'}: .*\bfile\b"):
        export(reader, tmp_path / "file", say=str, force=True)
    assert sorted(os.listdir(tmp_path)) == ["file", "mine", "out", "run"]


def test_an_error_half_way_leaves_nothing(tmp_path):
    reader = write_run(tmp_path / "run", NATIVE["llama"])

    def broken(name, start, stop):
        raise OSError(5, "Input/output error")

    reader.read_rows = broken
    with pytest.raises(UserError, match=f"{tmp_path / 'out'}: .*Input/output error"):
        export(reader, tmp_path / "out", say=str)
    assert os.listdir(tmp_path) == ["run"]


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    config = NATIVE["llama"].model_copy(update={"vocab_size": 200})
    with pytest.raises(UserError, match=r"/tokenizer: .*model\.vocab_size=200\b"):
        export(write_run(tmp_path / "run", config), tmp_path / "out", say=str)


def test_a_chain_of_experts_is_the_reason_for_own_code():
    choice = choose(OWN["chain of experts"])
    assert choice.architecture.model_type == "kmem"
    assert "model.moe.chain" in choice.reason


OBSTACLES = {
    "moe.scaling_factor": ("qwen3_moe", {"moe": {"scaling_factor": 2.0}}),
    "moe.selection_bias": ("qwen3_moe", {"moe": {"selection_bias": True}}),
    "moe.num_groups": ("qwen3_moe", {"moe": {"num_groups": 2}}),
    "attention.qkv_bias": ("qwen3_moe", {"attention": {"qkv_bias": True}}),
    "attention.rotary_fraction": ("qwen3", {"attention": {"rotary_fraction": 0.5}}),
    "moe.group_score_top_k": ("glm4_moe", {"moe": {"group_score_top_k": 1}}),
    "leaves 1 expert per group": ("deepseek_v3", {"moe": {"num_groups": 8, "group_score_top_k": 1}}),
    "norm_eps": ("deepseek_v3", {"norm_eps": 1e-5}),
    "latent_norm_eps": ("deepseek_v2", {"norm_eps": 1e-5}),
    "score of a group": ("deepseek_v2", {"moe": {"group_score_top_k": 2}}),
    "moe.shared_expert_gate": ("glm4_moe", {"moe": {"shared_expert_gate": True}}),
    "moe.shared_intermediate_size": ("deepseek_v3", {"moe": {"shared_intermediate_size": 24}}),
    "moe.renormalize": ("mixtral", {"moe": {"renormalize": False}}),
    "moe.first_dense_layers": ("olmoe", {"moe": {"first_dense_layers": 1}}),
    "attention.head_dim": ("olmoe", {"attention": {"head_dim": 16}}),
    "attention.qk_norm_span": ("qwen3", {"attention": {"qk_norm_span": "all_heads"}}),
    "attention.num_heads": ("llama", {"attention": {"num_heads": 6, "num_kv_heads": 2}}),
    "rounds head_dim": ("glm4_moe", {"attention": {"head_dim": 16, "rotary_fraction": 0.74}}),
}


@pytest.mark.parametrize("option", OBSTACLES)
def test_an_option_the_native_architecture_lacks_leads_to_own_code(option):
    name, changes = OBSTACLES[option]
    tree = NATIVE[name].model_dump()
    for section, values in changes.items():
        tree[section] = {**tree[section], **values} if isinstance(values, dict) else values
    choice = choose(type(NATIVE[name]).model_validate(tree))
    assert choice.architecture.model_type == "kmem"
    assert option in choice.reason
