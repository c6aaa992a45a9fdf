"""kmem's own class behaves as Transformers' users expect of a model."""

import ast
import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from kmem.hf.custom_code import register
from kmem.hf.export import export
from kmem.model.configuration_kmem import KmemConfig
from kmem.model.init import initialise_
from kmem.model.modeling_kmem import KmemForCausalLM
from tests.hf.models import GQA, NATIVE, OWN, VOCABULARY, model, random_weights, write_run

CONFIG = NATIVE["glm4_moe"]


def build(config=CONFIG):
    own = KmemForCausalLM(KmemConfig(model=config.model_dump(mode="json"))).eval()
    own.load_state_dict(random_weights(config).state_dict())
    return own


def test_code_files_are_a_closed_set_without_kmem(tmp_path):
    export(write_run(tmp_path / "run", CONFIG), tmp_path / "out", custom_code=True, say=str)
    files = list((tmp_path / "out").glob("*.py"))
    names = {file.name for file in files}
    assert {"modeling_kmem.py", "configuration_kmem.py", "decoder.py", "shape.py"} <= names
    assert "__init__.py" not in names
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):  # Transformers finds no other form of import
                module = node.module or ""
                assert module.isidentifier() and node.level == 1 if node.level else not module.startswith("kmem."), file
            assert not (isinstance(node, ast.Import) and any(name.name.startswith("kmem.") for name in node.names)), (
                file
            )


@pytest.mark.parametrize(
    "config", [CONFIG, OWN["chain of experts"], OWN["four branches"]], ids=["experts", "chain", "branches"]
)
def test_new_models_have_kmems_initial_values(config):
    torch.manual_seed(11)
    own = KmemForCausalLM(KmemConfig(model=config.model_dump(mode="json")))
    expected = random_weights(config)
    initialise_(expected, expected.shape, seed=11)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(own.state_dict()[name], tensor), name


def test_saving_and_loading_keeps_every_bit_and_dtype(tmp_path):
    own = build()
    own.save_pretrained(tmp_path)
    register()
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in own.state_dict().items())
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert narrow.embedding.weight.dtype == torch.bfloat16
    assert narrow.layers[1].feed_forward.router.selection_bias.dtype == torch.float32
    assert narrow(torch.tensor([[1, 2]])).logits.isfinite().all()


def test_a_missing_tensor_is_reported_and_leaves_the_loaded_ones_alone(tmp_path):
    own = build()
    own.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["layers.1.feed_forward.router.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again, info = KmemForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"layers.1.feed_forward.router.weight"}
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, own.state_dict()[name]) == (name not in info["missing_keys"]), name


@pytest.mark.parametrize("tied", [False, True])
def test_the_vocabulary_can_be_resized(tied, tmp_path):
    own = build(model(GQA, None, tie_embeddings=tied))
    before = own(torch.tensor([[1, 2, 3]])).logits
    own.resize_token_embeddings(VOCABULARY + 8, mean_resizing=False)
    assert torch.equal(own(torch.tensor([[1, 2, 3]])).logits[..., :VOCABULARY], before)
    own.save_pretrained(tmp_path)
    again = KmemForCausalLM.from_pretrained(tmp_path)
    assert again.config.vocab_size == again.config.model["vocab_size"] == VOCABULARY + 8
    assert again(torch.tensor([[VOCABULARY + 7]])).logits.shape[-1] == VOCABULARY + 8


PLAIN = {"use_cache": False}
SAME = {
    "cache": ({}, PLAIN),
    "static cache": ({"cache_implementation": "static", "disable_compile": True}, PLAIN),
    "beams": ({"num_beams": 3}, {"num_beams": 3, **PLAIN}),
}


@pytest.mark.parametrize("way", SAME)
def test_ways_to_generate_agree(way):
    own = build(OWN["softmax in groups"])
    prompts, mask = torch.tensor([[1, 2, 3, 4, 5], [0, 0, 0, 7, 8]]), torch.tensor([[1] * 5, [0, 0, 0, 1, 1]])
    common = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    first, second = (own.generate(prompts, **common, **options) for options in SAME[way])
    assert first.shape == (2, 11)
    assert torch.equal(first, second)


def test_wrong_calls_are_refused():
    own = build()
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        own()
    with pytest.raises(ValueError, match=r"attention_mask .*\b3 tokens\b.*\b0 .*\b2\b"):
        own(torch.tensor([[1, 2]]), attention_mask=torch.ones(1, 3))
    fields = KmemConfig(model=CONFIG.model_dump(mode="json")).to_dict()
    with pytest.raises(ValueError, match=r"config\.json: hidden_size=64\b.*\b32\b"):
        KmemConfig(**{**fields, "hidden_size": 64})


def test_what_is_not_computed_is_refused():
    own, ids = build(), torch.tensor([[1, 2]])
    for name in ("output_attentions", "output_router_logits"):
        with pytest.raises(ValueError, match=rf"^{name}\b"):
            own(ids, **{name: True})
    own.config.output_router_logits = True
    with pytest.raises(ValueError, match="output_router_logits"):
        own(ids)
    own.config.output_router_logits = False
    assert own(ids, output_attentions=False).attentions is None
    with pytest.raises(ValueError, match="use_reentrant"):
        own.gradient_checkpointing_enable({"use_reentrant": True})


def gradients(own, ids, **options):
    own.zero_grad()
    own(ids, labels=ids, **options).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in own.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", ["softmax and shared experts", "chain of experts", "four branches"])
def test_recomputed_layers_have_the_same_gradients(name):
    own, ids = build(OWN[name]).train(), torch.tensor([[1, 2, 3, 4, 5, 6]])
    kept = gradients(own, ids)
    calls = []
    for layer in own.layers:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    own.gradient_checkpointing_enable()
    recomputed = gradients(own, ids)
    assert len(calls) == 2 * len(own.layers)
    assert kept.keys() == recomputed.keys()
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)
    own.gradient_checkpointing_disable()
    gradients(own, ids)
    assert len(calls) == 3 * len(own.layers)


@torch.no_grad()
def test_documents_in_one_sequence_are_computed_alone():
    """Positions that start again, as Transformers' packing collators give them."""
    own = build(OWN["four branches"])
    first, second = torch.randint(VOCABULARY, (2, 5)).split(1)
    packed, positions = torch.cat((first, second[:, :3]), 1), torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])
    output = own(packed, position_ids=positions)
    alone = torch.cat((own(first).logits, own(second[:, :3]).logits), 1)
    torch.testing.assert_close(output.logits, alone, atol=1e-5, rtol=1e-5)
    assert output.past_key_values is None
    assert own(packed, position_ids=torch.arange(8)[None]).past_key_values is not None
    assert not torch.allclose(own(packed).logits, alone, atol=1e-3)
    with pytest.raises(ValueError, match="position_ids"):
        own(packed, position_ids=positions, use_cache=True)


@pytest.mark.full
@torch.no_grad()
def test_compiled_it_computes_the_same():
    own, ids = build(OWN["softmax and shared experts"]), torch.tensor([[1, 2, 3, 4, 5, 6]])
    torch.testing.assert_close(torch.compile(own)(ids).logits, own(ids).logits, atol=1e-5, rtol=1e-5)


def test_the_decoder_alone_and_as_a_classifier(tmp_path):
    own, ids = build(), torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    own.save_pretrained(tmp_path)
    register()
    decoder, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    hidden = decoder(ids, attention_mask=mask).last_hidden_state
    assert torch.equal(own.head(hidden), own(ids, attention_mask=mask).logits)
    assert torch.equal(decoder.get_input_embeddings().weight, own.embedding.weight)

    sorting, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    assert info["missing_keys"] == {"score.weight"}
    output = sorting(ids, attention_mask=mask, labels=torch.tensor([0, 2]))
    last = torch.stack((hidden[0, 3], hidden[1, 1]))
    assert torch.equal(output.logits, sorting.score(last))
    expected = torch.nn.functional.cross_entropy(output.logits, torch.tensor([0, 2]))
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    assert sorting.layers[1].feed_forward.experts.down_proj.grad.abs().sum() > 0
    sorting.save_pretrained(tmp_path / "sorting")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "sorting")
    assert again.config.num_labels == 3
    assert torch.equal(again(ids, attention_mask=mask).logits, output.logits)


@pytest.mark.parametrize("config", [CONFIG, OWN["four branches"]], ids=["one stream", "branches"])
def test_outputs_that_users_ask_for(config):
    own = build(config)
    ids = torch.tensor([[1, 2, 3]])
    output = own(ids, output_hidden_states=True)
    assert len(output.hidden_states) == config.num_layers + 1
    assert {hidden.shape for hidden in output.hidden_states} == {(1, 3, config.hidden_size)}
    assert torch.equal(own.head(output.hidden_states[-1]), output.logits)
    assert torch.equal(own(inputs_embeds=own.get_input_embeddings()(ids)).logits, output.logits)
    torch.testing.assert_close(own(ids, logits_to_keep=1).logits, output.logits[:, -1:])
    assert torch.equal(own(ids, return_dict=False)[0], output.logits)
    assert torch.equal(copy.deepcopy(own)(ids).logits, output.logits)
