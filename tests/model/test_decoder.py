"""Attention masks, cache, recomputation and dtypes of whole models."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from kmem.model.attention import attend, build_attention
from kmem.model.mask import Documents, padded_positions, padding_mask
from kmem.model.rope import rotation
from tests.model import tiny
from tests.model.dense_mask import document_mask

ROOT = Path(__file__).resolve().parents[2]
MODELS = {
    "gqa": tiny.config({**tiny.GQA, "qk_norm": True}, tiny.SOFTMAX),
    "gqa, biased, half rotated": tiny.config({**tiny.GQA, "qkv_bias": True, "rotary_fraction": 0.5}),
    "mla": tiny.config(tiny.MLA, {**tiny.SIGMOID, **tiny.GROUPS, "first_dense_layers": 1}),
    "mla, full queries": tiny.config({**tiny.MLA, "q_lora_rank": None}),
}


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.fixture(params=MODELS)
def model(request):
    return tiny.decoder(MODELS[request.param]).eval()


@pytest.fixture(autouse=True)
def no_grad(request):
    if "gradient" in request.node.name:
        yield
    else:
        with torch.no_grad():
            yield


def test_future_tokens_do_not_matter(model):
    ids, positions = tiny.tokens()
    changed = ids.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 96
    hidden, other = model(ids, positions), model(changed, positions)
    close(hidden[:, :12], other[:, :12])
    assert (hidden[:, 12:] - other[:, 12:]).abs().max() > 1e-2


@pytest.mark.parametrize("steps", [[24], [10, 1, 1, 12], [1] * 24])
def test_cached_decoding_equals_the_whole(model, steps):
    ids, positions = tiny.tokens()
    cache = DynamicCache()
    found, start = [], 0
    for step in steps:
        part = slice(start, start + step)
        found.append(model(ids[:, part], positions[:, part], cache=cache))
        start += step
    close(torch.cat(found, 1), model(ids, positions))


def test_cached_decoding_with_left_padding_equals_rows_alone(model):
    ids, _ = tiny.tokens()
    padding = [0, 7]
    attention_mask = torch.ones_like(ids)
    attention_mask[1, :7] = 0
    positions = padded_positions(attention_mask)
    cache = DynamicCache()
    prompt = model(ids[:, :20], positions[:, :20], padding_mask(attention_mask[:, :20], 20), cache)
    found = [prompt]
    for t in range(20, 24):
        mask = padding_mask(attention_mask[:, : t + 1], 1)
        found.append(model(ids[:, t : t + 1], positions[:, t : t + 1], mask, cache))
    hidden = torch.cat(found, 1)
    assert hidden.isfinite().all()
    for row, width in enumerate(padding):
        alone = ids[row : row + 1, width:]
        close(hidden[row : row + 1, width:], model(alone, torch.arange(alone.shape[1])[None]))


def documents_of(lengths):
    """Numbers and positions [B, T] of documents of these lengths in each row."""
    ids = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])
    return ids, torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])


def test_packed_documents_equal_separate_ones(model):
    ids, _ = tiny.tokens()
    lengths = [[5, 1, 18], [24]]
    document_ids, positions = documents_of(lengths)
    hidden = model(ids, positions, Documents.of(document_ids))
    for row, parts in enumerate(lengths):
        for document, found in zip(ids[row].split(parts), hidden[row].split(parts), strict=True):
            close(found[None], model(document[None], torch.arange(len(document))[None]))


@pytest.mark.parametrize("lengths", [[[1] * 300], [[300], [1, 299]], [[7, 256, 37], [33, 1, 1, 65, 200]]], ids=str)
def test_packed_documents_equal_their_mask_in_values_and_gradients(model, lengths):
    ids, _ = tiny.tokens(length=300, rows=len(lengths))
    document_ids, positions = documents_of(lengths)
    found = []
    for mask in (Documents.of(document_ids), document_mask(document_ids)):
        hidden = model(ids, positions, mask)
        loss = model.loss(hidden, ids) / ids.numel()
        found.append([hidden, *torch.autograd.grad(loss, list(model.parameters()))])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)  # after several layers


@pytest.mark.parametrize("length", [300, 900])
def test_attention_within_documents_and_its_gradients_are_those_of_the_mask(length):
    """To 1e-6."""
    query, key, value = (
        tiny.random(2, length, heads, 16, seed=seed).requires_grad_() for seed, heads in enumerate((4, 2, 2))
    )
    document_ids = (torch.rand(2, length, generator=torch.Generator().manual_seed(0)) < 0.01).cumsum(1)
    found = []
    for mask in (Documents.of(document_ids), document_mask(document_ids)):
        out = attend(query, key, value, mask)
        found.append([out, *torch.autograd.grad((out * out.detach().cos()).mean(), (query, key, value))])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


PACKED = """
import resource, torch
from kmem.model.decoder import Decoder
from kmem.model.mask import Documents
from tests.model import tiny
torch.set_num_threads(1)
model = Decoder(tiny.config({"num_heads": 2, "num_kv_heads": 1, "head_dim": 16}).shape)
def step(length):
    ids, _ = tiny.tokens(rows=1, length=length)
    documents = torch.arange(length)[None] // 1024
    hidden = model(ids, torch.arange(length)[None] % 1024, Documents.of(documents))
    model.loss(hidden, ids).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
print(step(8192), step(32768))
"""


def test_a_packed_sequence_of_32k_needs_memory_for_its_tokens():
    """A mask would be 1 GiB, or 4 GiB as numbers that are added to scores; a layer of the model below keeps 2 KiB a
    token."""
    answer = subprocess.run([sys.executable, "-c", PACKED], cwd=ROOT, capture_output=True, text=True, check=True)
    small, large = map(int, answer.stdout.split())
    assert large - small < 400 << 20


def test_a_third_of_a_batch_of_documents_is_padding_at_most():
    generator = torch.Generator().manual_seed(0)
    document_ids = (torch.rand(4, 5000, generator=generator) < 0.005).cumsum(1)
    documents = Documents.of(document_ids)
    assert sum(number * longest for number, longest in documents.batches) < 1.5 * 4 * 5000
    assert len(documents.batches) < 14
    assert torch.equal(documents.index[documents.place], torch.arange(4 * 5000))


def test_attention_within_a_document_is_the_same_to_the_bit_whatever_is_beside_it():
    query, key, value = (tiny.random(2, 300, heads, 16, seed=heads) for heads in (4, 2, 1))
    key, value = key.clone(), value.expand(-1, -1, 2, -1)
    found = []
    for lengths in ([[70, 200, 30], [300]], [[70, 1, 1, 228], [33, 267]]):
        found.append(attend(query, key, value, Documents.of(documents_of(lengths)[0]))[0, :70])
    alone = Documents.of(documents_of([[70, 230]])[0])
    found.append(attend(query[:1], key[:1], value[:1], alone)[0, :70])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("length, cached", [(256, 0), (301, 0), (257, 40)])
def test_long_causal_attention_equals_its_mask(model, length, cached):
    """Without a mask a CPU goes through long sequences in blocks."""
    ids, positions = tiny.tokens(length=cached + length)
    causal = torch.ones(cached + length, cached + length, dtype=torch.bool).tril()[None, None]
    expected = model(ids, positions, causal)
    cache = DynamicCache()
    if cached:
        model(ids[:, :cached], positions[:, :cached], cache=cache)
    close(model(ids[:, cached:], positions[:, cached:], cache=cache), expected[:, cached:])


def test_masks_that_are_plain_causal_attention_are_none():
    assert Documents.of(torch.zeros(2, 5, dtype=torch.long)) is None
    assert Documents.of(torch.tensor([[0, 0, 0], [0, 0, 1]])) is not None
    assert padding_mask(torch.ones(2, 5), 5) is None


def test_padding_mask_leaves_no_query_alone():
    mask = padding_mask(torch.tensor([[0, 0, 1, 1]]), 3)
    assert mask.int().tolist() == [[[[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]]]


def test_layers_compute_the_rotation_themselves_if_not_given(model):
    ids, positions = tiny.tokens()
    hidden = model.embedding(ids)
    for layer in model.layers:
        hidden = layer(hidden, positions)
    assert torch.equal(hidden, model(ids, positions))


def test_recomputed_gradients_are_bit_identical(model):
    ids, positions = tiny.tokens()

    def gradients(recompute: bool) -> list[torch.Tensor]:
        hidden = model.embedding(ids)
        for layer in model.layers:
            hidden = (
                checkpoint(layer, hidden, positions, use_reentrant=False) if recompute else layer(hidden, positions)
            )
        return list(torch.autograd.grad(model.loss(hidden, ids), list(model.parameters())))

    assert all(map(torch.equal, gradients(False), gradients(True)))


def test_every_parameter_has_a_gradient(model):
    ids, positions = tiny.tokens()
    model.loss(model(ids, positions), ids).backward()
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.any()] == []


@pytest.mark.gpu
def test_cuda_gradients_equal_those_of_the_cpu(model):
    ids, positions = tiny.tokens()
    document_ids = (positions >= 9).long()
    for mask in (None, Documents.of(document_ids)):
        losses, gradients = [], []
        for device in ("cpu", "cuda"):
            model.to(device)
            at = [None if tensor is None else tensor.to(device) for tensor in (ids, positions, mask)]
            losses.append(model.loss(model(*at), at[0]))
            found = torch.autograd.grad(losses[-1], list(model.parameters()))
            gradients.append([gradient.cpu() for gradient in found])
        torch.testing.assert_close(losses[1].cpu(), losses[0], atol=1e-3, rtol=1e-5)
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def test_bfloat16_gradients_follow_fp32(model):
    ids, positions = tiny.tokens()

    def run():
        loss = model.loss(model(ids, positions), ids)
        return loss, torch.autograd.grad(loss, model.head.weight)[0]

    wide_loss, wide_grad = run()
    model.bfloat16()
    loss, grad = run()
    assert model(ids, positions).dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wide_loss, rtol=5e-2, atol=0)
    assert torch.nn.functional.cosine_similarity(grad.flatten().float(), wide_grad.flatten(), dim=0) > 0.97


def test_a_norm_over_all_heads_spans_the_whole_projection():
    """Attention with weights of one is that of projections which are scaled to a mean square of one per token."""
    whole = tiny.shape({**tiny.GQA, "qk_norm": True, "qk_norm_span": "all_heads"})
    attention = build_attention(whole, 0)
    plain = build_attention(tiny.shape(tiny.GQA), 0)
    plain.load_state_dict({name: w for name, w in attention.state_dict().items() if "norm" not in name})
    hidden, positions = tiny.random(2, 5, whole.hidden_size), torch.arange(5).expand(2, 5)
    for name in ("q_proj", "k_proj"):
        projection = getattr(plain, name)
        norm = getattr(attention, name.replace("proj", "norm"))
        assert norm.weight.shape == projection.weight.shape[:1]

        def scaled(_, __, out):
            return out / (out.square().mean(-1, keepdim=True) + whole.norm_eps).sqrt()

        projection.register_forward_hook(scaled)
    rotary = rotation(whole, positions)
    torch.testing.assert_close(attention(hidden, rotary), plain(hidden, rotary))
