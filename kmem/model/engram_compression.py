"""Compression of the vocabulary (Engram, arXiv 2601.07372, section 2): tokens with the same normalised text, such as
'Apple', ' apple' and 'APPLE', share one id.

The number of compressed ids affects the multipliers of the hashes. So with another tokenizer, or another version of the
tokenizers library, the rows of a table mean something else: a run keeps the digest of the map and refuses a different
one.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .engram_ngrams import MISSING

# Shape letters: V token ids.

REPLACEMENT = "\ufffd"
"""Character that decoding inserts for bytes that are not a whole character."""
SENTINEL = "\ue000"
"""Private-use character that keeps a blank text from being stripped to nothing."""


@dataclass(frozen=True)
class TokenCompression:
    """The map from token ids to compressed ids."""

    lookup: Tensor
    """int64 [V], token id -> compressed id; compressed ids are contiguous from 0, in order of first appearance."""
    vocab_size: int
    """Number of compressed ids."""

    def __post_init__(self) -> None:
        if self.lookup.dtype != torch.int64 or self.lookup.dim() != 1 or not len(self.lookup):
            raise ValueError("a compression's lookup must be an int64 vector with one entry per token id")
        if int(self.lookup.min()) < 0 or int(self.lookup.max()) >= self.vocab_size:
            raise ValueError(f"a compression's lookup must hold ids from 0 to {self.vocab_size - 1}")

    @property
    def digest(self) -> str:
        """SHA-256 of the map as little-endian int64, in hexadecimal."""
        return hashlib.sha256(self.lookup.cpu().numpy().astype("<i8").tobytes()).hexdigest()

    def __call__(self, ids: Tensor) -> Tensor:
        """Compressed ids of token ids int64 [..]; an id below 0 is a missing token and becomes MISSING."""
        lookup = self.lookup.to(ids.device)
        return torch.where(ids < 0, MISSING, lookup[ids.clamp_min(0)])


def compress_vocabulary(tokenizer: Any, vocab_size: int | None = None) -> TokenCompression:
    """The compression of a tokenizer's vocabulary, added tokens included.

    Args:
        tokenizer: from Transformers or from tokenizers.
        vocab_size: number of entries of the map, for a model with more ids than its tokenizer; the surplus ids map to
            compressed id 0.

    The key of a token is its normalised text, or the text itself if normalisation leaves nothing. For a token that is
    only a part of a character, the key is its name in the vocabulary.

    Raises:
        ValueError: `vocab_size` is smaller than the tokenizer's vocabulary.
    """
    normalizer = _normalizer()
    if hasattr(tokenizer, "convert_ids_to_tokens"):
        size, name = len(tokenizer), tokenizer.convert_ids_to_tokens
    else:
        size, name = tokenizer.get_vocab_size(with_added_tokens=True), tokenizer.id_to_token
    if vocab_size is not None and vocab_size < size:
        raise ValueError(f"vocab_size is {vocab_size}, but the tokenizer has {size} ids")
    compressed: dict[str | None, int] = {}
    lookup = torch.zeros(size if vocab_size is None else vocab_size, dtype=torch.int64)
    for token in range(size):
        text = tokenizer.decode([token], skip_special_tokens=False)
        key = name(token) if REPLACEMENT in text else normalizer.normalize_str(text) or text
        lookup[token] = compressed.setdefault(key, len(compressed))
    return TokenCompression(lookup, len(compressed))


def normalized(text: str) -> str:
    """The key of a text: without compatibility forms, accents, case, runs of blanks, or blanks at the ends."""
    return _normalizer().normalize_str(text) or text


def _normalizer() -> Any:
    from tokenizers import Regex, normalizers  # an exported model holds the finished map and needs no tokenizers

    return normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"^ $"), SENTINEL),
            normalizers.Strip(),
            normalizers.Replace(SENTINEL, " "),
        ]
    )
