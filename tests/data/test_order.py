import hashlib

import numpy as np

from kmem.data.order import ORDER_VERSION, CorpusOrder, natural_order

LENGTHS = np.random.default_rng(0).integers(1, 60, size=200)


def order(seed: int = 7, digest: str = "corpus", sequence_length: int = 16) -> CorpusOrder:
    return CorpusOrder(LENGTHS, sequence_length, seed, digest)


def test_every_document_and_span_once_per_epoch():
    corpus = order()
    for number in (0, 1, 5):
        epoch = corpus.epoch(number)
        assert sorted(epoch.documents) == list(range(len(LENGTHS)))
        assert sorted(epoch.spans) == list(range((LENGTHS.sum() - 1) // 16))
        assert np.array_equal(np.diff(epoch.offsets), LENGTHS[epoch.documents])


def test_epochs_seeds_and_corpora_differ():
    orders = [order().epoch(0), order().epoch(1), order(seed=8).epoch(0), order(digest="other").epoch(0)]
    assert len({tuple(epoch.documents) for epoch in orders}) == len(orders)
    assert len({tuple(epoch.spans) for epoch in orders}) == len(orders)
    assert not np.array_equal(orders[0].documents, np.arange(len(LENGTHS)))


def test_an_epoch_does_not_depend_on_what_was_read_before():
    wanderer = order()
    for number in (3, 0, 9, 1, 3):
        epoch, fresh = wanderer.epoch(number), order().epoch(number)
        assert np.array_equal(epoch.documents, fresh.documents)
        assert np.array_equal(epoch.spans, fresh.spans)


def test_few_epochs_are_kept():
    corpus = order()
    for number in range(50):
        corpus.epoch(number)
    assert corpus.epoch.cache_info().currsize == 2


def test_the_order_is_that_of_its_version():
    """Resumed runs rely on it: whoever changes the order must change ORDER_VERSION and this digest."""
    epoch = order().epoch(3)
    digest = hashlib.sha256(np.concatenate([epoch.documents, epoch.spans]).astype("<i8").tobytes()).hexdigest()
    assert (ORDER_VERSION, digest[:16]) == (1, "b99db0d2804ac7bc")


def test_natural_order_reaches_the_last_token():
    for tokens in (1, 2, 16, 17, 18, 33):
        epoch = natural_order(np.array([tokens]), 16)
        assert len(epoch.spans) == -(-(tokens - 1) // 16)
