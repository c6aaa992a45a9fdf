"""Make a TF-IDF embedder: document frequencies of the corpus, and a projection fitted to a sample of it."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save

from kmem.clustering.corpus import Chunk, read_chunk
from kmem.clustering.embedders import KINDS, EmbedderRequest
from kmem.config import UserError
from kmem.data.order import permutation
from kmem.files import atomic_write
from kmem.model.bank_embedder import TFIDF_FILE, term_weights
from kmem.wording import counted

SVD_UNITS = 32_768
"""Most units that the projection is made from; the matrix of their counts is held in host memory."""
_DIM = 128


def build(request: EmbedderRequest, folder: Path) -> dict[str, Any]:
    """Count document frequencies over all training units and fit the projection to a sample of them.

    Raises:
        UserError: the corpus does not have that many dimensions, or no token distinguishes units.
    """
    from sklearn.decomposition import TruncatedSVD
    from threadpoolctl import threadpool_limits

    tokenizer, chunk_tokens = request.corpora[0].manifest.tokenizer, KINDS["tfidf"].chunk_tokens
    chunks = [chunk for corpus in request.corpora for chunk in corpus.chunks("train", request.unit, chunk_tokens)]
    units, vocabulary = sum(chunk.stop - chunk.start for chunk in chunks), tokenizer.size
    most = min(units, vocabulary) - 1
    dim = request.options.get("dim", min(_DIM, most))
    if not 1 <= dim <= most:
        raise UserError(f"--dim {dim}: {counted(units, 'unit')} with {vocabulary:,} tokens allow 1 to {most}")
    counting = [(chunk, vocabulary) for chunk in chunks]
    tokens = [chunk.tokens for chunk in chunks]
    frequency = np.zeros(vocabulary, dtype=np.int64)
    request.workspace.add_up("count", "counting tokens", counting, document_frequencies, frequency, tokens)
    # No constant is added: a token that every unit holds carries no information and gets weight 0.
    idf = np.array([math.log((1 + units) / (1 + count)) for count in frequency.tolist()], dtype=np.float32)
    idf[tokenizer.eos_token_id] = 0
    chosen = np.sort(permutation(request.seed, "units", 0, "projection", units)[:SVD_UNITS])
    matrix = _weights(chunks, chosen, idf)
    if not matrix.data.any():
        raise UserError("every token occurs in every unit, so TF-IDF cannot distinguish units; use smaller units")
    with threadpool_limits(1):  # sums must not depend on the number of cores
        seed = int(permutation(request.seed, "embedder", 0, "svd", 1 << 16)[0])
        svd = TruncatedSVD(dim, algorithm="randomized", n_iter=5, random_state=seed).fit(matrix)
    projection = torch.from_numpy(np.ascontiguousarray(svd.components_.T, dtype=np.float32))
    atomic_write(folder / TFIDF_FILE, save({"idf": torch.from_numpy(idf), "projection": projection}))
    return {"dim": dim, "vocab_size": vocabulary, "units": units}


def document_frequencies(job: tuple[Chunk, int]) -> NDArray[np.int64]:
    """Number of units of a chunk in which each token occurs: int64 [vocabulary]."""
    chunk, vocabulary = job
    _, token, _ = _counts(read_chunk(chunk), vocabulary)
    return np.bincount(token, minlength=vocabulary)


def _weights(chunks: list[Chunk], chosen: NDArray[np.int64], idf: NDArray[np.float32]) -> Any:
    """Rows of unit length, sparse [chosen, vocabulary]: (1 + ln count) * idf of the chosen units.

    Args:
        chosen: numbers over all chunks, ascending.
    """
    from scipy.sparse import csr_array

    parts: list[tuple[NDArray[np.int64], ...]] = []
    before = 0
    for chunk in chunks:
        after = before + chunk.stop - chunk.start
        first, last = np.searchsorted(chosen, [before, after])
        if first < last:
            units = read_chunk(chunk, chosen[first:last] - before)
            unit, token, count = _counts(units, len(idf))
            parts.append((np.bincount(unit, minlength=len(units)), token, count))
        before = after
    per_unit, token, count = (np.concatenate(some) for some in zip(*parts, strict=True))
    weight = term_weights(torch.from_numpy(count)).numpy() * idf[token]
    starts = np.append(0, np.cumsum(per_unit))
    matrix = csr_array((weight, token, starts), shape=(len(per_unit), len(idf)))
    norms = np.sqrt(np.add.reduceat(np.append(weight.astype(np.float64) ** 2, 0), starts[:-1]))
    matrix.data /= np.repeat(np.maximum(norms, 1e-12), per_unit).astype(np.float32)
    return matrix


def _counts(units: list[torch.Tensor], vocabulary: int) -> tuple[NDArray[np.int64], ...]:
    """The units' distinct tokens: (index of the unit, token, its count in the unit), sorted by unit and token."""
    unit = np.repeat(np.arange(len(units)), [len(ids) for ids in units])
    key, count = np.unique(unit * vocabulary + torch.cat(units).numpy(), return_counts=True)
    return key // vocabulary, key % vocabulary, count
