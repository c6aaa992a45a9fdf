"""Models with a memory bank in Transformers: contexts are looked up, and their blocks fetched, as kmem computes."""

import copy
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from kmem.hf.custom_code import register
from kmem.hf.export import export
from tests.hf.banks import BANKS, random_bank, router, write_bank_run
from tests.hf.models import VOCABULARY

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
TEXTS = ["the model reads the text", "a reader", "another model trains the export that wrote"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folders(name) -> (kmem's model, the folder of its export in fp32, in several weight files)."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("bank")
            decoder = random_bank(BANKS[name])
            reader = write_bank_run(folder / "run", BANKS[name], decoder)
            export(reader, folder / "out", max_shard_bytes=9_000, say=str)
            made[name] = decoder, folder / "out"
        return made[name]

    register()
    return make


def opened(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def tokens(rows=4, length=12, seed=2):
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("name", BANKS)
def test_logits_are_kmems(name, folders):
    decoder, folder = folders(name)
    mapped, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert not [key for key in mapped.state_dict() if key.startswith("bank.")]
    ids, leaves = tokens(), router().leaves(tokens())
    assert len(leaves.unique()) > 1
    expected = decoder.bank_logits(ids, leaves)
    torch.testing.assert_close(mapped(ids).logits, expected, **TOLERANCE)
    assert (expected - decoder.bank_logits(ids, None)).abs().mean() > 0.01
    held = opened(folder, memory="device")
    assert [key for key in held.state_dict() if key.startswith("bank.")]
    torch.testing.assert_close(held(ids).logits, expected, **TOLERANCE)
    # Of others' contexts, by address, per token, level by level, and the controls.
    other = (leaves + 4) % 9
    torch.testing.assert_close(mapped(ids, addresses=other).logits, decoder.bank_logits(ids, other), **TOLERANCE)
    each = torch.arange(48).view(4, 12) % 9
    torch.testing.assert_close(mapped(ids, addresses=each).logits, decoder.bank_logits(ids, each), **TOLERANCE)
    for model in (mapped, held):
        for levels in ([1], [2]):
            if set(levels) <= set(decoder.layout.levels):
                model.bank_levels = levels
                found = decoder.bank_logits(ids, leaves, levels=levels)
                torch.testing.assert_close(model(ids).logits, found, **TOLERANCE)
        model.bank_levels = None
        model.bank_memory = "none"
        torch.testing.assert_close(model(ids).logits, decoder.bank_logits(ids, None), **TOLERANCE)
        if decoder.layout.generic:
            model.bank_memory = "generic"
            torch.testing.assert_close(model(ids).logits, decoder.bank_logits(ids, leaves, generic=True), **TOLERANCE)
        else:
            with pytest.raises(ValueError, match="no generic blocks"):
                model.bank_memory = "generic"


@torch.no_grad()
def test_fetch_reads_what_is_not_there_yet(folders):
    decoder, folder = folders("ffn")
    model, tokenizer = opened(folder), AutoTokenizer.from_pretrained(folder)
    contexts = [tokenizer(text)["input_ids"] for text in TEXTS]
    leaves = router().leaves(contexts)
    found = model.fetch(TEXTS)
    assert torch.equal(found.leaves, leaves)
    assert torch.equal(model.fetch(contexts).leaves, leaves)
    width = max(map(len, contexts))
    padded = torch.tensor([[7] * (width - len(ids)) + ids for ids in contexts])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in contexts])
    assert torch.equal(model.fetch(padded, attention_mask=mask).leaves, leaves)
    assert model.fetch(padded, attention_mask=mask).bytes == 0
    ids = tokens(3)
    torch.testing.assert_close(model(ids).logits, decoder.bank_logits(ids, leaves), **TOLERANCE)
    more = tokens(6)
    torch.testing.assert_close(model(more).logits, decoder.bank_logits(more, leaves.repeat_interleave(2)), **TOLERANCE)
    with pytest.raises(ValueError, match=r"3 contexts were fetched, and 4 sequences"):
        model(tokens(4))

    # Of a topic's neighbour below the same cluster of level 1, only the deep level is read.
    sizes = {level: 4 * decoder.layout.row_values(level) for level in (1, 2)}
    model.forget()
    assert model.fetch(addresses=[3]).bytes == sizes[1] + sizes[2]
    assert model.fetch(addresses=[4]).bytes == sizes[2]
    assert model.fetch(addresses=[4, 3, 8]).bytes == sizes[1] + 2 * sizes[2]
    both = model.fetch(addresses=[3, 8]).levels
    assert [(level.rows, level.read) for level in both.values()] == [(2, 0), (2, 0)]
    assert list(model.fetch(addresses=[3], levels=[2]).levels) == [2]
    torch.testing.assert_close(
        model(ids).logits, decoder.bank_logits(ids, torch.tensor([3, 3, 3]), levels=[2]), **TOLERANCE
    )

    # What is blocked gives way to the next nearest.
    own = int(model.fetch(TEXTS[0]).leaves)
    beside = int(model.fetch(TEXTS[0], blocked=[f"{own // 3}.{own % 3}"]).leaves)
    assert beside != own
    assert beside // 3 == own // 3
    assert int(model.fetch(TEXTS[0], blocked=[(own // 3,)]).leaves) // 3 != own // 3
    model.forget()
    torch.testing.assert_close(model(ids).logits, decoder.bank_logits(ids, router().leaves(ids)), **TOLERANCE)


PLAIN = {"use_cache": False}
SAME = {
    "cache": ({}, PLAIN),
    "an empty cache of the caller": (lambda: {"past_key_values": DynamicCache()}, PLAIN),
    "static cache": ({"cache_implementation": "static", "disable_compile": True}, PLAIN),
    "beams": ({"num_beams": 3}, {"num_beams": 3, **PLAIN}),
    "several beams each": (
        {"num_beams": 4, "num_return_sequences": 2},
        {"num_beams": 4, "num_return_sequences": 2, **PLAIN},
    ),
    "prompt in chunks": ({"prefill_chunk_size": 2}, PLAIN),
}
COMMON = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.mark.parametrize("memory", ["device", "mmap"])
@pytest.mark.parametrize("way", SAME)
@pytest.mark.parametrize("name", ["ffn", "kv", "with n-grams"])
def test_ways_to_generate_agree(name, way, memory, folders):
    """A batch of left-padded prompts of different contexts; each generates what it does alone, of its prompt only."""
    decoder, folder = folders(name)
    model = opened(folder, memory=memory)
    prompts, mask = torch.tensor([[1, 2, 3, 4, 5], [0, 0, 0, 57, 8]]), torch.tensor([[1] * 5, [0, 0, 0, 1, 1]])
    leaves = router().leaves([prompts[0], prompts[1, 3:]])
    assert leaves[0] != leaves[1]
    common = {"attention_mask": mask, **COMMON}
    first, second = (
        model.generate(prompts, **common, **(options() if callable(options) else options)) for options in SAME[way]
    )
    assert torch.equal(first, second)
    alone = model.generate(prompts[1:, 3:], **{**common, **SAME[way][1], "attention_mask": None})
    assert torch.equal(alone[0, 2:], second[len(second) // 2, 5:])
    if "beams" not in way:
        ids = prompts[:1]
        for _ in range(8):
            ids = torch.cat((ids, decoder.bank_logits(ids, leaves[:1])[:, -1:].argmax(-1)), dim=1)
        assert torch.equal(first[:1], ids)
    # Prompts of other lengths than their padding are found without a mask, too.
    assert torch.equal(model.generate(prompts, **COMMON, **SAME[way][1]), second)


@pytest.mark.parametrize("way", ["assistant", "prompt lookup"])
def test_assisted_decoding_is_greedy_decoding(way, folders):
    model = opened(folders("ffn")[1])
    prompt = torch.tensor([[9, 4, 3, 9, 4, 3, 9, 4]])
    options = {"prompt_lookup_num_tokens": 3}
    if way == "assistant":
        other = opened(folders("ffn")[1])
        other.norm.weight.data.mul_(1 + 0.3 * torch.randn(32, generator=torch.Generator().manual_seed(3)))
        options = {"assistant_model": other}
    common = {**COMMON, "max_new_tokens": 16, "attention_mask": torch.ones_like(prompt)}
    assert torch.equal(model.generate(prompt, **common, **options), model.generate(prompt, **common))


@torch.no_grad()
def test_a_cache_keeps_its_contexts(folders):
    decoder, folder = folders("ffn")
    model, ids = opened(folder), tokens(2, 14)
    leaves = router().leaves(ids[:, :8])

    def continued(change, rows):
        cache = model(ids[:, :8], use_cache=True).past_key_values
        change(cache)
        found = model(ids[rows, 8:], past_key_values=cache, use_cache=True).logits
        expected = decoder.bank_logits(ids[rows], leaves[rows])[:, 8:]
        torch.testing.assert_close(found, expected, **TOLERANCE)

    continued(lambda cache: None, [0, 1])
    continued(lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1])
    continued(lambda cache: cache.batch_select_indices(torch.tensor([1])), [1])
    continued(lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0])
    continued(copy.deepcopy, [0, 1])

    whole = torch.tensor([4, 4])
    model.fetch(addresses=whole)
    cache, parts = None, []
    for start, stop in pairwise([0, 3, 9, 14]):
        output = model(ids[:, start:stop], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), decoder.bank_logits(ids, whole), **TOLERANCE)
    model.forget()
    cache = DynamicCache()
    cache.update(torch.zeros(2, 2, 3, 16), torch.zeros(2, 2, 3, 16), 0)
    with pytest.raises(ValueError, match="not looked up"):
        model(ids, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="fetch\\(context\\) first"):
        model(inputs_embeds=model.embedding(ids))
    model.fetch(addresses=[4])
    torch.testing.assert_close(
        model(inputs_embeds=model.embedding(ids)).logits, decoder.bank_logits(ids, whole), **TOLERANCE
    )
    model.forget()
    with torch.inference_mode():
        model(ids)
    with torch.enable_grad():
        model(ids).logits.sum().backward()
