"""Engram's module: the gate's published values and exact gradients, the convolution, generation, and Qwen's layer."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kmem.config.engram import PRESETS
from kmem.model.engram import HISTOGRAM_BINS, Engram, EngramInput, ShortConvolution, branch_gate
from kmem.model.engram_kind import EngramKind
from kmem.model.engram_ngrams import NgramAddressing
from kmem.model.init import initialise_
from tests.model.tiny import randomise_, shape

BATCH, TOKENS, HIDDEN, WIDTH = 2, 13, 16, 12


def module_choices(preset, **choices):
    chosen = {name: PRESETS[preset][name] for name in ("bias", "zero_centered_norm", "conv_kernel")}
    return {"conv_dilation": 3, "norm_eps": 1e-6, **chosen, **choices}


def engram(preset="deepseek", branches=4, dtype=torch.float64, seed=0, **choices):
    """With every parameter drawn, so that no path is at its neutral start."""
    module = Engram(HIDDEN, WIDTH, branches, **module_choices(preset, **choices)).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return module


def inputs(branches=4, dtype=torch.float64, seed=1, tokens=TOKENS, batch=BATCH):
    generator = torch.Generator().manual_seed(seed)
    stream = (batch, tokens, HIDDEN) if branches == 1 else (batch, tokens, branches, HIDDEN)
    return (
        torch.randn(stream, generator=generator, dtype=dtype),
        torch.randn(batch, tokens, WIDTH, generator=generator, dtype=dtype),
    )


def plain_gate(hidden, keys, value, weight, eps):
    """The gate in autograd's own operations."""
    query = hidden * (hidden.square().mean(-1, keepdim=True) + eps).rsqrt()
    key = keys * (keys.square().mean(-1, keepdim=True) + eps).rsqrt()
    score = (query * weight * key).sum(-1) / hidden.shape[-1] ** 0.5
    gate = torch.sigmoid(score.sign() * score.abs().clamp_min(1e-6).sqrt())
    return gate[..., None] * value[..., None, :]


@pytest.mark.parametrize(
    "score, gate",
    [
        (4, 0.8807970780),
        (1, 0.7310585786),
        (0.25, 0.6224593312),
        (-4, 0.1192029220),
        (1e-9, 0.50025),
        (-1e-9, 0.49975),
        (0, 0.5),
    ],
)
def test_gate_values(score, gate):
    ones = torch.ones(1, 1, 1, 16, dtype=torch.float64)
    out, got = branch_gate(ones, 2 * ones, 3 * ones[:, :, 0], ones[0, 0] * score / 4, 0.0)
    torch.testing.assert_close(got.item(), gate, rtol=0, atol=1e-9)
    torch.testing.assert_close(out, 3 * got[..., None] * ones)


@pytest.mark.parametrize("branches", [1, 3, 4])
def test_gate_gradient_is_autograds(branches):
    generator = torch.Generator().manual_seed(branches)
    shapes = (2, 7, branches, HIDDEN), (2, 7, branches, HIDDEN), (2, 7, HIDDEN), (branches, HIDDEN)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    grad = torch.randn(shapes[0], generator=generator, dtype=torch.float64)
    out = branch_gate(*tensors, 1e-6)[0]
    expected = plain_gate(*tensors, 1e-6)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    got, wanted = torch.autograd.grad(out, tensors, grad), torch.autograd.grad(expected, tensors, grad)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert torch.autograd.gradcheck(lambda *items: branch_gate(*items, 1e-6)[0], tensors)


def test_no_gradient_through_the_gate_at_zero():
    hidden, keys, value = torch.randn(3, 1, 1, 1, HIDDEN, dtype=torch.float64).unbind()
    weight = torch.full((1, HIDDEN), 1e-9, dtype=torch.float64)
    tensors = [item.requires_grad_() for item in (hidden, keys, value[:, :, 0], weight)]
    grads = torch.autograd.grad(branch_gate(*tensors, 1e-6)[0].sum(), tensors)
    assert [bool((grad == 0).all()) for grad in grads] == [True, True, False, True]


@pytest.mark.parametrize("chosen", [{}, {"gate_norm_eps": 0.3, "conv_norm_eps": 0.7}], ids=["the model's", "own"])
def test_norms_have_the_chosen_epsilons(chosen):
    view = shape(engram={"layers": [0], "heads": 2, "rows_per_head": 31, "row_dim": 3, **chosen}, norm_eps=0.1)
    module = randomise_(EngramKind().module(view, 0).double())
    hidden, rows = torch.randn(2, 1, 5, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64).split(1)
    hidden, rows = hidden[0], rows[0][..., :12]
    weight = module.query_norm() * module.key_norm()
    keys, value = module.key_proj(rows)[:, :, None], module.value_proj(rows)
    gated = plain_gate(hidden[:, :, None], keys, value, weight, chosen.get("gate_norm_eps", 0.1))
    scale = (gated.square().mean(-1, keepdim=True) + chosen.get("conv_norm_eps", 0.1)).rsqrt()
    expected = gated + F.silu(module.conv((gated * scale * module.conv_norm.weight).flatten(2))).view_as(gated)
    torch.testing.assert_close(module(hidden, EngramInput(rows)), expected[:, :, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("branches", [1, 4])
def test_every_parameter_and_input_has_its_gradient(preset, branches):
    module = engram(preset, branches)
    tensors = [item.requires_grad_() for item in inputs(branches, tokens=5, batch=1)]
    names, parameters = zip(*module.named_parameters(), strict=True)

    def update(hidden, rows, *values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (hidden, EngramInput(rows)))

    assert torch.autograd.gradcheck(update, (*tensors, *parameters), fast_mode=True)
    assert ("conv.weight" in names) == (preset != "deepseek-v4.1")
    assert ("key_proj.bias" in names) == (preset == "deepseek")


def test_starts_without_convolution():
    hidden, rows = inputs()
    torch.manual_seed(0)
    module = Engram(HIDDEN, WIDTH, 4, norm_eps=1e-6, conv_kernel=4, conv_dilation=3).double()
    gate = plain_gate(
        hidden,
        module.key_proj(rows).view_as(hidden),
        module.value_proj(rows),
        torch.ones(4, HIDDEN, dtype=torch.float64),
        1e-6,
    )
    torch.testing.assert_close(module(hidden, EngramInput(rows)), gate, rtol=0, atol=1e-12)
    assert torch.equal(
        module(hidden, EngramInput(torch.zeros_like(rows))), torch.zeros_like(hidden)
    )  # empty tables: a no-op


@pytest.mark.parametrize("preset", PRESETS)
def test_initialisation_sets_constants(preset):
    module = engram(preset, dtype=torch.float32)
    initialise_(module, shape(), 0, "layers.1.engram")
    fresh = Engram(HIDDEN, WIDTH, 4, **module_choices(preset)).state_dict()
    for name, tensor in module.state_dict().items():
        if name.endswith("proj.weight"):
            assert 0 < tensor.std() < 0.1
        else:
            assert torch.equal(tensor, torch.zeros_like(tensor) if name.endswith("bias") else fresh[name])


@pytest.mark.parametrize("branches", [1, 4])
@pytest.mark.parametrize("preset", PRESETS)
def test_bfloat16_follows_float32(preset, branches):
    module = engram(preset, branches, torch.float32)
    hidden, rows = (item.to(torch.bfloat16) for item in inputs(branches, torch.float32))
    expected = module(hidden.float(), EngramInput(rows.float()))
    got = module.to(torch.bfloat16)(hidden, EngramInput(rows))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, rtol=0.05, atol=0.1)


def test_convolution_is_conv1d():
    channels, kernel, dilation = 6, 4, 3
    conv = ShortConvolution(channels, kernel, dilation).double()
    torch.nn.init.normal_(conv.weight)
    x = torch.randn(2, 11, channels, dtype=torch.float64)
    padded = F.pad(x.transpose(1, 2), ((kernel - 1) * dilation, 0))
    expected = F.conv1d(padded, conv.weight[:, None], dilation=dilation, groups=channels)
    torch.testing.assert_close(conv(x), expected.transpose(1, 2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel, dilation, tokens", [(4, 3, 13), (2, 1, 5), (1, 2, 4), (4, 4, 3)])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_generation_equals_the_whole(kernel, dilation, tokens, size):
    module = engram(conv_kernel=kernel, conv_dilation=dilation)
    hidden, rows = inputs(tokens=tokens)
    state = module.start(BATCH)
    chunks = zip(hidden.split(size, dim=1), rows.split(size, dim=1), strict=True)
    got = torch.cat([module(part, EngramInput(part_rows, state=state)) for part, part_rows in chunks], dim=1)
    torch.testing.assert_close(got, module(hidden, EngramInput(rows)), rtol=0, atol=1e-12)
    assert state.inputs.shape == (BATCH, (kernel - 1) * dilation, 4 * HIDDEN)


def test_left_padding_changes_nothing():
    module = engram()
    hidden, rows = inputs()
    filler, filler_rows = inputs(seed=9, tokens=4)
    present = torch.arange(4 + TOKENS).expand(BATCH, -1) >= 4
    state = module.start(BATCH)
    padded = torch.cat((filler, hidden), dim=1), torch.cat((filler_rows, rows), dim=1)
    got = [module(padded[0][:, part], EngramInput(padded[1][:, part], present[:, part], state=state)) for part in
           (slice(0, 3), slice(3, 9), slice(9, None))]  # fmt: skip
    got = torch.cat(got, dim=1)
    torch.testing.assert_close(got[:, 4:], module(hidden, EngramInput(rows)), rtol=0, atol=1e-12)
    assert not got[:, :4].any()


def test_missing_tokens_get_and_give_nothing():
    module = engram()
    hidden, rows = inputs()
    present = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    present[0, 5:7] = present[1, 9:] = False
    got = module(hidden, EngramInput(rows, present))
    assert not got[~present].any()
    noise = torch.where(present[:, :, None], rows, 100 * rows)
    torch.testing.assert_close(module(hidden, EngramInput(noise, present)), got, rtol=0, atol=1e-12)


def test_state_follows_beams():
    module = engram()
    hidden, rows = inputs(batch=3)
    state = module.start(3)
    module(hidden[:, :8], EngramInput(rows[:, :8], state=state))
    order = torch.tensor([2, 0, 2, 1])
    state.reorder(order)
    got = module(hidden[order, 8:], EngramInput(rows[order, 8:], state=state))
    torch.testing.assert_close(got, module(hidden, EngramInput(rows))[order, 8:], rtol=0, atol=1e-12)


def test_documents_keep_apart():
    hidden, rows = inputs(batch=1)
    document_ids = torch.tensor([[0] * 5 + [1] * 2 + [2] * 6])
    separate = engram(conv_within_documents=True)
    memory = EngramInput(rows, document_ids=document_ids)
    got = separate(hidden, memory)
    parts = (slice(0, 5), slice(5, 7), slice(7, None))
    alone = [separate(hidden[:, part], EngramInput(rows[:, part])) for part in parts]
    torch.testing.assert_close(got, torch.cat(alone, dim=1), rtol=0, atol=1e-12)
    crossing = engram()
    assert torch.equal(
        crossing(hidden, EngramInput(rows, document_ids=document_ids)), crossing(hidden, EngramInput(rows))
    )
    assert not torch.equal(got, crossing(hidden, EngramInput(rows)))


def test_recomputation_gives_the_same_bits():
    module = engram(dtype=torch.float32)
    results = []
    for run in (module, lambda *items: checkpoint(module, *items, use_reentrant=False)):
        hidden, rows = (item.requires_grad_() for item in inputs(dtype=torch.float32))
        module.zero_grad()
        out = run(hidden, EngramInput(rows))
        out.square().sum().backward()
        results.append([out, hidden.grad, rows.grad, *(parameter.grad for parameter in module.parameters())])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_gate_statistics():
    module = engram(branches=3)
    hidden, rows = inputs(3)
    seen = []
    module.on_gate = seen.append
    present = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    present[0, :4] = False
    module(hidden, EngramInput(rows))
    module(hidden, EngramInput(rows, present))
    keys, value = module.key_proj(rows).view_as(hidden), module.value_proj(rows)
    gate = branch_gate(hidden, keys, value, module.query_norm.factor() * module.key_norm.factor(), 1e-6)[1]
    for statistics, gates, count in ((seen[0], gate.flatten(0, 1), 26), (seen[1], gate[present], 22)):
        torch.testing.assert_close(statistics.mean_M, gates.mean(0).float())
        assert statistics.histogram.shape == (3, HISTOGRAM_BINS)
        expected = [torch.histc(gates[:, branch].float(), HISTOGRAM_BINS, 0, 1) for branch in range(3)]
        assert statistics.histogram.tolist() == torch.stack(expected).long().tolist()
        assert statistics.histogram.sum(1).tolist() == [count] * 3
        assert not statistics.mean_M.requires_grad


@pytest.mark.parametrize("masked", [False, True])
def test_matches_transformers_qwen(masked):
    """Ids, rows, gate, norms and convolution of one layer, with equal weights."""
    module = pytest.importorskip("transformers.models.qwen4_exp.modeling_qwen4_exp")
    branches, vocab_size, end, rows_per_head, heads = 4, 50, 5, 30, 2
    config = SimpleNamespace(
        hidden_size=HIDDEN,
        hc_count=branches,
        ple_embed_dim=WIDTH,
        ple_conv_kernel_size=4,
        ngram_size=3,
        heads_per_ngram=heads,
        vocab_size=vocab_size,
        ngram_vocab_size_base=rows_per_head,
        seed=1234,
        eos_token_id=end,
        make_ngram_vocab_size_divisible_by=128,
        rms_norm_eps=1e-6,
    )
    theirs = module.Qwen4ExpTextPLELayer(config, 1, 0).double()
    torch.nn.init.normal_(theirs.ple_embedding.ngram_embedding.weight)
    ours = engram("qwen", branches)
    with torch.no_grad():
        for name, source in (("key_proj", ours.key_proj), ("value_proj", ours.value_proj)):
            getattr(theirs, name).weight.copy_(source.weight)
        for name, norm in (("norm_key", ours.key_norm), ("norm_query", ours.query_norm), ("norm_conv", ours.conv_norm)):
            getattr(theirs, name).weight.copy_(norm.weight.flatten())
        theirs.conv1d.weight.copy_(ours.conv.weight[:, None])

    chosen = {name: PRESETS["qwen"][name] for name in ("orders", "boundary", "hash", "seed", "row_multiple")}
    addressing = NgramAddressing.build(
        variant="qwen", layers=[1], raw_vocab_size=vocab_size, compressed_vocab_size=None, pad_id=end,
        heads=heads, rows_per_head=rows_per_head, **chosen,
    )  # fmt: skip
    table = theirs.ple_embedding.ngram_embedding.weight
    assert len(table) == addressing.padded_rows(0)
    ids = torch.randint(vocab_size, (BATCH, TOKENS), generator=torch.Generator().manual_seed(3))
    ids[0, 4] = ids[1, 9] = end
    hidden, _ = inputs(branches)
    present = torch.ones_like(ids, dtype=torch.bool)
    if masked:
        present[0, :3] = present[1, 6:8] = False
    expected = theirs(hidden.flatten(2), ids.where(present, end), None, present.double() if masked else None)
    rows = addressing.row_ids(0, ids.where(present, -1))
    looked_up = table[rows.clamp_min(0)].flatten(2)
    got = ours(hidden, EngramInput(looked_up, present if masked else None))
    torch.testing.assert_close(got.flatten(2)[present], expected[present], rtol=0, atol=5e-6)  # its norms are fp32
