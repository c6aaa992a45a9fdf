"""UTF-8 bytes of the text for which token ids stand."""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kmem.data.manifest import TokenizerRecord
from kmem.data.tokenizer import unknown_id


class TextBytes:
    """Counts the bytes of documents' text from their token ids. Special tokens stand for no text.

    Where the tokenizer is byte-level, each token stands for bytes of its own, so the count is exact and needs no text.
    Otherwise the text is decoded; what a normalizer has changed in it counts as changed.

    Args:
        folder: the tokenizer.
    """

    def __init__(self, folder: Path, record: TokenizerRecord) -> None:
        from tokenizers import Tokenizer, pre_tokenizers

        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        added = self._tokenizer.get_added_tokens_decoder()
        special = np.zeros(record.size, bool)
        special[[record.eos_token_id, *(number for number, token in added.items() if token.special)]] = True
        self._special = special
        unknown = unknown_id(self._tokenizer)
        self._unknown = -1 if unknown == record.eos_token_id else unknown
        self._bytes: NDArray[np.int64] | None = None
        """[size] bytes of each token."""
        if (json.loads(self._tokenizer.to_str())["decoder"] or {}).get("type") == "ByteLevel":
            letters = set(pre_tokenizers.ByteLevel.alphabet())  # each stands for a byte
            self._bytes = np.zeros(record.size, np.int64)
            for token, number in self._tokenizer.get_vocab(with_added_tokens=True).items():
                if not special[number]:
                    of_bytes = number not in added and letters.issuperset(token)
                    self._bytes[number] = len(token) if of_bytes else len(token.encode())

    def of_pieces(self, ids: NDArray[np.int64], cuts: NDArray[np.int64]) -> NDArray[np.int64]:
        """[pieces] bytes of each piece of `ids`. cuts: [pieces] where each begins, ascending from 0."""
        if self._bytes is not None:
            return np.add.reduceat(self._bytes[ids], cuts)
        pieces = [piece[~self._special[piece]].tolist() for piece in np.split(ids, cuts[1:])]
        return np.array([len(text.encode()) for text in self._tokenizer.decode_batch(pieces)], np.int64)

    def is_unknown(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each id stands for text that the vocabulary lacks."""
        return ids == self._unknown
