"""Rows of n-grams: published oracle values, and one token at a time."""

import itertools
import json

import numpy as np
import pytest
import torch

from kmem.config.engram import PRESETS
from kmem.model.engram_hash import (
    INT64_MAX,
    is_prime,
    multiplier_bound,
    pcg64_multipliers,
    prime_sizes,
    splitmix64_multipliers,
)
from kmem.model.engram_ngrams import MISSING, NgramAddressing, differences

TINY = {"layers": [0, 1], "raw_vocab_size": 100, "compressed_vocab_size": None, "heads": 2, "rows_per_head": 10}


def of_preset(name, **choices):
    """The addressing of a preset with a vocabulary and layers, some choices changed."""
    names = ("orders", "heads", "rows_per_head", "boundary", "hash", "seed", "row_multiple")
    return NgramAddressing.build(**{"variant": name, **{key: PRESETS[name][key] for key in names}, **choices})


def v41(**choices):
    defaults = {"layers": [1, 14], "raw_vocab_size": 129_280, "compressed_vocab_size": 99_092, "pad_id": 2}
    return of_preset("deepseek-v4.1", **{**defaults, **choices})


def qwen(**choices):
    defaults = {"layers": [1], "raw_vocab_size": 248_320, "compressed_vocab_size": None, "pad_id": 5}
    return of_preset("qwen", **{**defaults, **choices})


def tiny(boundary="document", **choices):
    return of_preset("deepseek", **{**TINY, "pad_id": 2, "boundary": boundary, **choices})


def test_primes():
    tables = v41()
    first, second = tables.sizes
    assert first[:4] == (16000057, 16000079, 16000081, 16000097)
    assert (first[-1], second[0], second[-1]) == (16000463, 16000477, 16000889)
    assert (tables.rows(0), tables.rows(1)) == (384_006_168, 384_016_682)

    demo = of_preset("deepseek", layers=[1, 15], raw_vocab_size=129_280, compressed_vocab_size=99_092, pad_id=2)
    assert demo.sizes[0][:4] == (646403, 646411, 646421, 646423)
    assert demo.sizes[1][0] == 646631
    assert (demo.rows(0), demo.rows(1)) == (10_344_164, 10_348_242)

    tables = qwen()
    assert (tables.sizes[0][0], tables.sizes[0][-1]) == (20000003, 20000171)
    assert (tables.rows(0), tables.padded_rows(0)) == (320_001_446, 320_001_536)
    assert prime_sizes(2, [10, 10], 2) == ((11, 13, 17, 19), (23, 29, 31, 37))


def test_primality():
    sieve = np.ones(5000, dtype=bool)
    sieve[:2] = False
    for divisor in range(2, 71):
        sieve[divisor * divisor :: divisor] = False
    assert [number for number in range(5000) if is_prime(number)] == np.flatnonzero(sieve).tolist()
    assert is_prime(2**61 - 1)
    assert not is_prime((2**31 - 1) * 2147483629)
    assert not is_prime(3215031751)  # a strong pseudoprime to 2, 3, 5 and 7


def test_multipliers():
    assert multiplier_bound(99_092) == 46539438283891
    assert multiplier_bound(248_320) == 18571544855136
    assert pcg64_multipliers(0, 1, 4, 99_092) == (76632096046245, 4839876093313, 35959672319349, 73987337458391)
    assert pcg64_multipliers(0, 14, 4, 99_092) == (67716810739261, 51510806800915, 30921347202721, 82619226485591)
    assert splitmix64_multipliers(1234, 0, 3, 248_320) == (23703573157769, 20109073645365, 8052911324071)
    assert v41().multipliers[1] == pcg64_multipliers(0, 14, 4, 99_092)
    assert qwen().multipliers[0] == splitmix64_multipliers(1234, 0, 3, 248_320)


def test_products_never_overflow():
    for vocab_size in (1, 2, 100, 99_092, 2**31):
        for layer in range(20):
            for multiplier in pcg64_multipliers(3, layer, 4, vocab_size):
                assert multiplier % 2 == 1
                assert (vocab_size - 1) * multiplier <= INT64_MAX


def test_v41_rows():
    tables = v41()
    ids = [[31, 99091, 12345, 7]]

    def rows(table, documents=None):
        documents = None if documents is None else torch.tensor(documents)
        return tables.row_ids(table, torch.tensor(ids), documents)[0].numpy()

    def local(table, row):
        return [int(row[head]) - tables.offsets(table)[head] for head in (0, 7, 8, 23)]

    whole, split = rows(0), rows(0, [[0, 0, 1, 1]])
    assert local(0, whole[0]) == [9051119, 2294822, 13967014, 6820864]
    assert whole[0][23] == 374826569
    assert local(0, whole[3]) == [6730274, 12267277, 11111724, 6365381]
    assert whole[3][23] == 374371086
    assert local(0, split[3]) == [6730274, 12267277, 5989309, 9673153]
    assert split[3][23] == 377678858
    second = rows(1)
    assert local(1, second[3]) == [13662559, 2676110, 14158674, 14192795]
    assert second[3][23] == 382208588


def test_v41_mixes():
    mix, mixes = 0, []
    for multiplier, token in zip(v41().multipliers[0], [7, 12345, 99091, 31], strict=True):
        mix ^= multiplier * token
        mixes.append(mix)
    assert mixes[1:] == [60133786200580410, 3577814626687164309, 3580033450114570140]


def test_qwen_rows():
    tables = qwen()
    expected = {
        ((10, 20, 248319), 0): [12405336, 159187808, 177779891, 304203213],
        ((10, 20, 248319), 1): [4810669, 158375242, 179910010, 309919519],
        ((10, 20, 248319), 2): [4120023, 159244078, 165304392, 306141637],
        ((10, 5, 248319, 20), 1): [13528464, 153722640, 163799099, 308405172],
        ((10, 5, 248319, 20), 2): [14967857, 153624824, 171196566, 316225257],
        ((10, 5, 248319, 20), 3): [11292027, 151848959, 178011600, 309503529],
    }
    for (ids, position), rows in expected.items():
        got = tables.row_ids(0, torch.tensor([ids]))
        assert got[0, position, [0, 7, 8, 15]].tolist() == rows


def test_tiny_end_to_end():
    tables = tiny()
    assert tables.multipliers[0] == (58749346153885371, 24883432316446259, 3779140549244981)
    rows = tables.row_ids(0, torch.tensor([[31, 99, 45, 7]]))
    assert rows.tolist() == [[[5, 22, 39, 50], [10, 14, 37, 43], [6, 23, 36, 43], [4, 11, 37, 58]]]


def test_matches_transformers_qwen():
    module = pytest.importorskip("transformers.models.qwen4_exp.modeling_qwen4_exp")
    for ordinal in (0, 2):
        tables = qwen(layers=[1, 4, 6], rows_per_head=1000)
        for index, size in enumerate(tables.sizes[ordinal]):
            assert size == module._find_nth_prime_after(999, ordinal * 16 + index + 1)
        theirs = module._build_layer_multipliers(248_320, 3, ordinal, 1234)
        assert tables.multipliers[ordinal] == tuple(theirs.tolist())


BOUNDARIES = ["none", "document", "eos"]


def random_batch(seed, batch=4, tokens=23, vocab_size=100, missing=0.1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (batch, tokens), generator=generator)
    ids[torch.rand(ids.shape, generator=generator) < 0.2] = 2
    ids[torch.rand(ids.shape, generator=generator) < missing] = MISSING
    return ids, (torch.rand(ids.shape, generator=generator) < 0.2).cumsum(1)


def gram(ids, documents, place, order, boundary):
    """The n-gram that ends at a place, nearest token first."""
    found, outside = [ids[place]], False
    for back in range(1, order):
        past, home = (ids[place - back], documents[place - back]) if place >= back else (MISSING, None)
        outside = outside and boundary != "none"
        outside |= (
            past < 0 or (boundary == "document" and home != documents[place]) or (boundary == "eos" and past == 2)
        )
        found.append(2 if outside else past)
    return tuple(found)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("orders", [(2,), (2, 3, 4), (2, 5), (4,)])
def test_rows_are_those_of_the_grams(boundary, orders):
    """Token by token in plain integers."""
    tables = tiny(boundary, orders=orders, heads=3)
    ids, documents = random_batch(len(orders))
    rows = tables.row_ids(1, ids, documents)
    assert bool((rows[ids < 0] == MISSING).all())
    for sequence, places in enumerate(ids.tolist()):
        for place in (place for place, token in enumerate(places) if token >= 0):
            for order, here in zip(orders, rows[sequence, place].view(-1, 3).tolist(), strict=True):
                mix = 0
                found = gram(places, documents[sequence].tolist(), place, order, boundary)
                for token, multiplier in zip(found, tables.multipliers[1], strict=False):
                    mix ^= token * multiplier
                first = orders.index(order) * 3
                sizes, offsets = (numbers[first : first + 3] for numbers in (tables.sizes[1], tables.offsets(1)))
                assert here == [mix % size + offset for size, offset in zip(sizes, offsets, strict=True)]


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_distinct_grams(boundary):
    tables = tiny(boundary, orders=(2, 4))
    ids, documents = random_batch(4, batch=3, tokens=200, vocab_size=4, missing=0)
    expected = [
        len(
            {
                gram(i, d, n, order, boundary)
                for i, d in zip(ids.tolist(), documents.tolist(), strict=True)
                for n in range(200)
            }
        )
        for order in (2, 4)
    ]
    assert tables.distinct_grams(ids.numpy(), documents.numpy()) == expected


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("chunks", [[1] * 23, [2, 1, 7, 13], [23]])
def test_incremental_equals_full(boundary, chunks):
    tables = tiny(boundary, orders=(2, 3, 4))
    ids, _ = random_batch(5)
    context = tables.start(len(ids))
    parts = []
    for chunk in ids.split(chunks, dim=1):
        parts.append(tables.row_ids(0, chunk, None, context))
        context = tables.next_context(chunk, None, context)
    assert torch.equal(torch.cat(parts, dim=1), tables.row_ids(0, ids))


def test_context_keeps_to_the_last_document():
    tables = tiny("document", orders=(2, 3, 4))
    ids, document_ids = random_batch(6, missing=0)
    document_ids[:, 20:] = document_ids[:, 20:21]  # a later chunk goes on in the document of the one before
    context = tables.next_context(ids[:, :21], document_ids[:, :21])
    rest = tables.row_ids(0, ids[:, 21:], document_ids[:, 21:], context)
    assert torch.equal(rest, tables.row_ids(0, ids, document_ids)[:, 21:])


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_left_padding_changes_nothing(boundary):
    tables = tiny(boundary, orders=(2, 3))
    ids, _ = random_batch(7, batch=1, missing=0)
    padded = torch.cat((torch.full((1, 4), MISSING), ids), dim=1)
    assert torch.equal(tables.row_ids(0, padded)[:, 4:], tables.row_ids(0, ids))


def test_packed_documents_equal_separate_ones():
    ids, document_ids = random_batch(8, batch=1, missing=0)
    tables = tiny("document")
    packed = tables.row_ids(0, ids, document_ids)
    alone = [tables.row_ids(0, ids[:, document_ids[0] == document]) for document in document_ids[0].unique()]
    assert torch.equal(packed, torch.cat(alone, dim=1))
    crossing = tiny("none").row_ids(0, ids, document_ids)
    assert not torch.equal(packed, crossing)

    ends = [0, *(torch.nonzero(ids[0] == 2)[:, 0] + 1).tolist(), ids.shape[1]]
    tables = tiny("eos")
    alone = [tables.row_ids(0, ids[:, start:end]) for start, end in itertools.pairwise(ends) if start < end]
    assert torch.equal(tables.row_ids(0, ids), torch.cat(alone, dim=1))


def test_manifest_round_trip_names_differences():
    tables = v41(compression_digest="abc")
    manifest = json.loads(json.dumps(tables.to_manifest()))
    assert NgramAddressing.from_manifest(manifest) == tables
    assert differences(tables, manifest) == []
    assert differences(tables, v41(compression_digest="abd")) == ["compression_digest"]
    assert set(differences(tables, v41(layers=[1, 13], compression_digest="abc"))) == {
        "layers",
        "seeding_ids",
        "multipliers",
    }
    del manifest["pad_id"]
    assert differences(manifest, tables) == ["pad_id"]
    with pytest.raises(ValueError, match="pad_id"):
        NgramAddressing.from_manifest(manifest)
    manifest["pad_id"] = "2"
    with pytest.raises(ValueError, match=r"addressing manifest.*'int' and 'str'"):
        NgramAddressing.from_manifest(manifest)


@pytest.mark.parametrize(
    "choices, message",
    [
        ({"orders": (3, 2)}, r"orders .*\[3, 2\]"),
        ({"orders": (1, 2)}, r"orders .*\[1, 2\]"),
        ({"pad_id": 100}, "pad_id 100 "),
        ({"layers": [1, 1]}, r"layers .*\[1, 1\]"),
        ({"rows_per_head": 2**62}, "rows_per_head"),
        ({"rows_per_head": [10]}, r"rows_per_head .*\b1\b.*\b2\b.*orders"),
        ({"boundary": "segment"}, "boundary .*'segment'"),
        ({"raw_vocab_size": 0}, r"vocabulary .*\b0$"),
    ],
)
def test_refuses(choices, message):
    with pytest.raises(ValueError, match=message):
        tiny(**choices)
