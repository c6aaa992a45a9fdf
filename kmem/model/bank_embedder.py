"""Embeddings of contexts. The embedding decides the cluster of a context, in training data and in prompts alike.

A context is a run of token ids of the model's tokenizer. An embedding is a float32 vector of norm 1 (norm 0 for a
context without countable tokens), unless its encoder does not normalise. It depends on its own context alone, to the
last bit, and not on the other contexts of the call.

An embedder is a folder with embedder.json: its kind, dimension and settings. To add a kind, write a class with the
methods of `ContextEmbedder` and register it under its name in `EMBEDDERS`.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .one_thread import with_one_thread

# Shape letters: N contexts, D embedding dimension, V vocabulary, T word pieces.

EMBEDDER_FILE = "embedder.json"
EMBEDDER_FORMAT, EMBEDDER_VERSION = "kmem-embedder", 1
TFIDF_FILE = "tfidf.safetensors"
POOLINGS = ("mean", "cls")
"""Ways to pool the hidden states of a text into one vector."""


class ContextEmbedder(Protocol):
    """Turns contexts into vectors."""

    dim: int
    """Dimension of the embeddings, D."""

    @classmethod
    def load(cls, folder: Path, record: Mapping[str, Any], tokenizer: Any, device: str) -> "ContextEmbedder":
        """Load it from a folder; `record` is its embedder.json. `tokenizer` decodes token ids; None without one."""
        ...

    def embed(self, contexts: Sequence[Tensor]) -> Tensor:
        """Embeddings float32 [N, D], on the CPU. Each context is an int64 vector of token ids and may be empty."""
        ...


class TfidfEmbedder:
    """TF-IDF over the model's own token ids, projected by a truncated SVD and normalised to norm 1.

    A token that occurs c times weighs (1 + ln c) * idf. The columns of the projection are right singular vectors, so
    two contexts get near vectors if their tokens tend to occur in similar contexts.
    """

    def __init__(self, idf_V: Tensor, projection_VD: Tensor):
        """Both float32. Tokens that do not count, such as the end of a document, have an idf of 0."""
        self._idf = idf_V
        self._projection = projection_VD
        self.dim = projection_VD.shape[1]

    @classmethod
    def load(cls, folder: Path, record: Mapping[str, Any], tokenizer: Any, device: str) -> "TfidfEmbedder":
        """Load it from a folder with tfidf.safetensors. It needs no tokenizer and computes on the CPU."""
        from safetensors.torch import load_file

        tensors = load_file(str(folder / TFIDF_FILE))
        if tensors["projection"].shape != (len(tensors["idf"]), record["dim"]):
            raise ValueError(f"{folder / TFIDF_FILE}: its tensors do not match {EMBEDDER_FILE}")
        return cls(tensors["idf"], tensors["projection"])

    def embed(self, contexts: Sequence[Tensor]) -> Tensor:
        """Embeddings float32 [N, D].

        Raises:
            ValueError: a token id lies outside the vocabulary that was counted.
        """
        if not len(contexts):
            return torch.empty(0, self.dim)
        vocabulary = len(self._idf)
        context = torch.repeat_interleave(torch.tensor([len(ids) for ids in contexts]))
        ids = torch.cat([ids.long() for ids in contexts])
        if len(ids) and (int(ids.max()) >= vocabulary or int(ids.min()) < 0):
            raise ValueError(
                f"token id {int(ids.max())}: the embedder counts ids below {vocabulary}; use its tokenizer"
            )
        key, count = torch.unique(context * vocabulary + ids, return_counts=True)
        token = key % vocabulary
        weight = term_weights(count) * self._idf[token]
        # One bag per context, each in the order of its token ids: a sum does not depend on the other contexts.
        starts = torch.searchsorted(key, torch.arange(len(contexts)) * vocabulary)
        summed = F.embedding_bag(token, self._projection, starts, mode="sum", per_sample_weights=weight)
        return F.normalize(summed, dim=-1)


def term_weights(counts: Tensor) -> Tensor:
    """1 + ln(count), float32. One scalar logarithm per distinct count: the rounding of vectorised logarithms depends on
    the position in the vector."""
    distinct, place = torch.unique(counts, return_inverse=True)
    return torch.tensor([1 + math.log(count) for count in distinct.tolist()], dtype=torch.float32)[place]


class SentenceEncoder:
    """A sentence encoder with BERT's architecture, such as all-MiniLM-L6-v2; it pools the last hidden states.

    A context is decoded to text and cut into pieces of at most `max_word_pieces` word pieces (the encoder's input
    length, its two special tokens included). The embedding is the mean over all tokens of all pieces, or with `cls`
    over the first special token of each piece. If there are more than `max_pieces` pieces, `max_pieces` evenly spread
    ones are read. Pieces are encoded one by one, so a vector does not depend on the rest of a batch.
    """

    def __init__(self, model: Any, word_pieces: Any, tokenizer: Any, settings: Mapping[str, Any]):
        """Args:
        model: a Transformers BertModel.
        word_pieces: the encoder's tokenizer, from tokenizers.
        tokenizer: the model's tokenizer, from Transformers; contexts are its ids.
        settings: `max_word_pieces` and `max_pieces`; optionally `pooling` (mean or cls; default mean), `normalize`
            (whether vectors have norm 1; default true) and `lower_case` (lower-case texts before tokenizing; default
            false). The defaults are the settings of all-MiniLM-L6-v2.
        """
        self._model, self._word_pieces, self._tokenizer = model, word_pieces, tokenizer
        self._first, self._last = word_pieces.encode("").ids
        self._room, self._max_pieces = settings["max_word_pieces"] - 2, settings["max_pieces"]
        self._pooling, self._normalize = settings.get("pooling", "mean"), settings.get("normalize", True)
        if self._pooling not in POOLINGS:
            raise ValueError(f"pooling {self._pooling!r} is not one of {', '.join(POOLINGS)}")
        self._lower_case = settings.get("lower_case", False)
        self.dim = int(model.config.hidden_size)

    @classmethod
    def load(cls, folder: Path, record: Mapping[str, Any], tokenizer: Any, device: str) -> "SentenceEncoder":
        """Load it from a folder with the encoder's config.json, model.safetensors and tokenizer.json."""
        if tokenizer is None:
            raise ValueError(f"{folder}: this embedder reads text; pass the tokenizer that decodes the token ids")
        model = _load_bert(folder)
        word_pieces = _load_word_pieces(folder / "tokenizer.json", model.config.vocab_size)
        return cls(model.to(device), word_pieces, tokenizer, record)

    def embed(self, contexts: Sequence[Tensor]) -> Tensor:
        """Embeddings float32 [N, D]. On the CPU one thread computes, however many the process has: the rounding of
        matrix products depends on the number of threads, and a context must always get the address it was trained
        with."""
        texts = [self._tokenizer.decode(ids.tolist(), skip_special_tokens=True) for ids in contexts]
        if self._lower_case:
            texts = [text.lower() for text in texts]
        read = self._word_pieces.encode_batch(texts, add_special_tokens=False)

        def encoded() -> list[Tensor]:
            return [self._one(pieces.ids) for pieces in read]

        rows = with_one_thread(encoded) if self._model.device.type == "cpu" else encoded()
        return torch.stack(rows).cpu() if rows else torch.empty(0, self.dim)

    @torch.inference_mode()
    def _one(self, ids: list[int]) -> Tensor:
        pieces = [ids[start : start + self._room] for start in range(0, len(ids), self._room)] or [[]]
        if len(pieces) > self._max_pieces:
            pieces = [pieces[number * len(pieces) // self._max_pieces] for number in range(self._max_pieces)]
        device = self._model.device
        total, count = torch.zeros(self.dim, dtype=torch.float32, device=device), 0
        with torch.autocast(device.type, enabled=False):  # the calling model may run under autocast
            for piece in pieces:
                row = torch.tensor([[self._first, *piece, self._last]], device=device)
                states_TD = self._model(input_ids=row).last_hidden_state[0]
                pooled_TD = states_TD if self._pooling == "mean" else states_TD[:1]
                total += pooled_TD.sum(dim=0)
                count += len(pooled_TD)
        mean = total / count
        return F.normalize(mean, dim=-1) if self._normalize else mean


def _load_bert(folder: Path) -> Any:
    """The BertModel of a folder, without BERT's pooling layer.

    Raises:
        ValueError: tensors are missing; names the file.
    """
    from transformers import BertModel
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # no warnings about position ids, a pooler and heads, which are not needed
    try:
        with without_progress_bars():
            model, loading_info = BertModel.from_pretrained(
                str(folder), add_pooling_layer=False, local_files_only=True, use_safetensors=True,
                dtype=torch.float32, output_loading_info=True,
            )  # fmt: skip
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(loading_info["missing_keys"])  # Transformers would draw them at random
    if missing:
        raise ValueError(
            f"{folder / 'model.safetensors'}: lacks {len(missing)} tensors of a BERT, such as {missing[0]}"
        )
    return model.eval()


def _load_word_pieces(path: Path, vocab_size: int) -> Any:
    """An encoder's tokenizer, set to neither truncate nor pad texts.

    Raises:
        ValueError: it does not add BERT's two special tokens, or has more than `vocab_size` word pieces; names the
            file.
    """
    from tokenizers import Tokenizer

    word_pieces = Tokenizer.from_file(str(path))
    word_pieces.no_truncation()
    word_pieces.no_padding()
    marks, size = len(word_pieces.encode("").ids), word_pieces.get_vocab_size()
    if marks != 2:
        raise ValueError(f"{path}: adds {marks} special tokens to a text; BERT adds two, [CLS] and [SEP]")
    if size > vocab_size:
        raise ValueError(f"{path}: has {size} word pieces, and the vocab_size of config.json is {vocab_size}")
    return word_pieces


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Hide Transformers' progress bars while weights load. The switch is global to the process; warnings stay on."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


EMBEDDERS: dict[str, type[ContextEmbedder]] = {
    "tfidf": TfidfEmbedder,
    "minilm": SentenceEncoder,
    "encoder": SentenceEncoder,
}
"""Name -> class that loads the folder. `kmem.clustering.embedders.register_embedder` adds to it."""


def read_embedder_record(folder: str | Path) -> dict[str, Any]:
    """Contents of embedder.json.

    Raises:
        ValueError: it is missing or damaged, or this kmem does not know its kind or format.
    """
    path = Path(folder) / EMBEDDER_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        known = (record["format"], record["version"]) == (EMBEDDER_FORMAT, EMBEDDER_VERSION)
        known = known and record["name"] in EMBEDDERS and record["dim"] > 0
    except FileNotFoundError:
        raise ValueError(f"{path}: missing; copy the tree again, with its embedder") from None
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise ValueError(
            f"{path}: not an embedder that this kmem knows ({', '.join(EMBEDDERS)}); for your own embedder, call "
            "register_embedder in a script (docs/bank.md)"
        )
    return dict(record)


def load_embedder(folder: str | Path, tokenizer: Any = None, device: str = "cpu") -> ContextEmbedder:
    """The embedder of a folder, such as TREE/embedder.

    Args:
        tokenizer: the model's tokenizer, from Transformers; decodes contexts for embedders that read text.
        device: where an encoder computes.

    Raises:
        ValueError: a file is missing or damaged, or a tokenizer is needed and was not given.
    """
    record = read_embedder_record(folder)
    return EMBEDDERS[record["name"]].load(Path(folder), record, tokenizer, device)
