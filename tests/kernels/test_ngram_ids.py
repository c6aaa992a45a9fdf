"""The kernel's rows are the reference's and the model's, bit for bit; the same cases run interpreted and on a GPU."""

import pytest
import torch

from kmem.model.engram_ngrams import NgramAddressing
from tests.kernels.devices import DEVICES

pytest.importorskip("triton")
from kmem_kernels.ngram_ids.op import ngram_ids


def addressing(boundary, orders, heads, vocab_size, pad_id, rows_per_head):
    return NgramAddressing.build(
        variant="test",
        layers=[0, 3],
        raw_vocab_size=vocab_size,
        compressed_vocab_size=None,
        orders=orders,
        heads=heads,
        rows_per_head=rows_per_head,
        boundary=boundary,
        pad_id=pad_id,
        hash="pcg64",
        seed=7,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("boundary", ["none", "document", "eos"])
@pytest.mark.parametrize(
    "orders, heads, batch, tokens",
    [((2, 3), 8, 3, 37), ((2, 3, 4), 5, 2, 130), ((2, 5), 3, 1, 1), ((3,), 1, 4, 2), ((4,), 2, 1, 257)],
)
def test_kernel_equals_reference_and_model(device, boundary, orders, heads, batch, tokens):
    generator = torch.Generator().manual_seed(tokens)
    vocab_size, pad_id = (11, 1) if tokens % 2 else (248_320, 5)  # few ids: many end-of-sequence tokens
    tables = addressing(boundary, orders, heads, vocab_size, pad_id, [16_000_000 + 9 * order for order in orders])
    ids = torch.randint(vocab_size, (batch, tokens), generator=generator)
    ids[torch.rand(ids.shape, generator=generator) < 0.15] = -1
    ids[torch.rand(ids.shape, generator=generator) < 0.15] = pad_id
    document_ids = (torch.rand(ids.shape, generator=generator) < 0.2).cumsum(1)
    context = torch.randint(-1, vocab_size, (batch, tables.context), generator=generator)
    for documents, before in ((document_ids, context), (None, None)):
        history, homes = tables._history(ids, documents, before)
        for table in (0, 1):
            constants = (orders, tables.multipliers[table], tables.sizes[table], tables.offsets(table))
            expected = ngram_ids(history, homes, *constants, boundary, pad_id, backend="torch")
            on_device = history.to(device), None if homes is None else homes.to(device)
            rows = ngram_ids(*on_device, *constants, boundary, pad_id, backend="triton")
            torch.testing.assert_close(rows.cpu(), expected, rtol=0, atol=0)
            torch.testing.assert_close(tables.row_ids(table, ids, documents, before), expected, rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_non_contiguous_and_empty(device):
    tables = addressing("none", (2, 3), 2, 100, 2, 10)
    history = torch.arange(60, device=device).view(6, 10).T  # [10, 6], transposed
    constants = ((2, 3), tables.multipliers[0], tables.sizes[0], tables.offsets(0))
    expected = ngram_ids(history.cpu().contiguous(), None, *constants, "none", 2, backend="torch")
    assert torch.equal(ngram_ids(history, None, *constants, "none", 2, backend="triton").cpu(), expected)
    assert ngram_ids(history[:, :2], None, *constants, "none", 2, backend="triton").shape == (10, 0, 4)
