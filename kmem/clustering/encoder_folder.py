"""A sentence encoder from a local folder, in the layout of Sentence-Transformers or of Transformers alone.

kmem reads BERT's config.json, model.safetensors and tokenizer.json or vocab.txt, and Sentence-Transformers'
modules.json, the pooling's config.json, sentence_bert_config.json and config_sentence_transformers.json. No code from
the folder is run and nothing is unpickled. A setting that kmem does not support is an error; it never gives another
embedding.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kmem.clustering.embedders import EmbedderRequest
from kmem.config import UserError
from kmem.data.safetensors_file import refuse_pickled
from kmem.data.tokenizer import load_tokenizer
from kmem.files import read_json, refused_by_system
from kmem.model.bank_embedder import POOLINGS, SentenceEncoder
from kmem.model.file_digest import file_digest

CONFIG, WEIGHTS, TOKENIZER, VOCABULARY = "config.json", "model.safetensors", "tokenizer.json", "vocab.txt"
_MODULES, _POOLING, _LIMITS = "modules.json", "1_Pooling/config.json", "sentence_bert_config.json"
_PROMPTS, _TOKENIZER_CONFIG = "config_sentence_transformers.json", "tokenizer_config.json"
_BESIDE_TOKENIZER = (_TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json")
LICENCES = ("LICEN", "COPYING", "NOTICE")
"""Prefixes of the names of licence texts, in capitals."""
_PIECES = 8
_PLAIN_BERT = {
    "model_type": ("bert",),
    "position_embedding_type": ("absolute", None),
    "is_decoder": (False, None),
    "auto_map": (None,),
    "quantization_config": (None,),
}
"""Field of config.json -> the values for which Transformers' BertModel computes the encoder; None: the field is absent.
"""
_OLD_POOLINGS = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}


@dataclass(frozen=True)
class EncoderFolder:
    """The files and settings that an embedder takes from the folder of an encoder."""

    files: Mapping[str, Path]
    """Name -> path of config.json, the weights and the tokenizer's files."""
    licences: Mapping[str, Path]
    """Name -> path of its licence texts and of README.md, the model card of Hugging Face folders."""
    settings: dict[str, Any]
    """`pooling`, `normalize`, `lower_case` and `max_word_pieces` of `SentenceEncoder`."""


def read_encoder(folder: Path) -> EncoderFolder:
    """
    Raises:
        UserError: the folder or a file is missing, or `SentenceEncoder` does not support the encoder; names the file.
    """
    if not folder.is_dir():
        raise UserError(f"--encoder {folder}: no such folder; name the local folder of a sentence encoder")
    inside, pooling, normalize = _modules(folder)
    config = read_json(inside / CONFIG, dict)
    for field, values in _PLAIN_BERT.items():
        if config.get(field) not in values:
            raise UserError(
                f"{inside / CONFIG}: {field} is {json.dumps(config.get(field))}, which kmem does not support; choose "
                "an encoder of model_type bert that needs no code other than Transformers'"
            )
    limits = read_json(inside / _LIMITS, dict) if (inside / _LIMITS).exists() else {}
    spoken = read_json(folder / _PROMPTS, dict) if (folder / _PROMPTS).exists() else {}
    if spoken.get("default_prompt_name") is not None:
        raise UserError(
            f"{folder / _PROMPTS}: default_prompt_name is {json.dumps(spoken['default_prompt_name'])}, but kmem puts "
            "no prompt before a text; set it to null to embed texts without a prompt"
        )
    if not (inside / WEIGHTS).is_file():
        refuse_pickled(inside, "BertModel")
        raise UserError(f"{inside / WEIGHTS}: missing; kmem reads the encoder's weights from this one file")
    tokenizer = [name for name in (TOKENIZER, VOCABULARY, *_BESIDE_TOKENIZER) if (inside / name).is_file()]
    if not {TOKENIZER, VOCABULARY} & set(tokenizer):
        raise UserError(f"{inside / TOKENIZER}: missing, and so is {VOCABULARY}; fetch either")
    return EncoderFolder(
        {name: inside / name for name in (CONFIG, WEIGHTS, *tokenizer)},
        {
            path.name: path
            for path in sorted(folder.iterdir())
            if path.is_file() and (path.name.upper().startswith(LICENCES) or path.name == "README.md")
        },
        {
            "pooling": pooling,
            "normalize": normalize,
            "lower_case": bool(limits.get("do_lower_case")),
            "max_word_pieces": _max_word_pieces(inside, config, limits),
        },
    )


def encoder_digest(folder: Path) -> str:
    """SHA-256 digest of everything that the embeddings of an encoder depend on; errors as `read_encoder`."""
    encoder = read_encoder(folder)
    files = {name: file_digest(path) for name, path in encoder.files.items()}
    return hashlib.sha256(json.dumps([files, encoder.settings], sort_keys=True).encode()).hexdigest()


def build(request: EmbedderRequest, folder: Path) -> dict[str, Any]:
    """Copy the encoder's files and licences from its folder, and load the copy once as a check.

    Raises:
        UserError: as `read_encoder`, or files are damaged or do not fit each other.
    """
    source = request.options["encoder"]
    encoder = read_encoder(source)
    for name, path in {CONFIG: encoder.files[CONFIG], WEIGHTS: encoder.files[WEIGHTS], **encoder.licences}.items():
        shutil.copyfile(path, folder / name)
    _write_tokenizer(encoder.files[CONFIG].parent, folder / TOKENIZER)
    settings = {**encoder.settings, "max_pieces": request.options.get("pieces", _PIECES)}
    tokenizer = load_tokenizer(request.corpora[0].folder / "tokenizer")
    try:
        loaded = SentenceEncoder.load(folder, settings, tokenizer, "cpu")
        finite = bool(loaded.embed([torch.empty(0, dtype=torch.int64)]).isfinite().all())
    except Exception as error:  # safetensors, tokenizers and Transformers have error types of their own
        said = _first_line(error).replace(str(folder), str(encoder.files[CONFIG].parent))
        raise UserError(f"--encoder {source}: cannot be loaded: {said}") from error
    if not finite:
        raise UserError(f"--encoder {source}: its embeddings are not finite numbers; fetch {WEIGHTS} again")
    licences = [name for name in encoder.licences if name.upper().startswith(LICENCES)]
    if not licences:
        print(
            f"--encoder {source}: no LICENSE file here, so the tree, and exports of models that use it, will not carry "
            "the encoder's licence; if the licence requires that, put its text there and run the command again with "
            "--force",
            file=sys.stderr,
            flush=True,
        )
    return {"dim": loaded.dim, "encoder": source.resolve().name, "licences": licences, **settings}


def _modules(folder: Path) -> tuple[Path, str, bool]:
    """(Folder of the transformer's files, pooling, whether vectors are scaled to length 1). Without modules.json they
    are, like the vectors of kmem's other embedders."""
    if not (folder / _MODULES).exists():
        pooling = _pooling(folder / _POOLING) if (folder / _POOLING).exists() else "mean"
        return folder, pooling, True
    path = folder / _MODULES
    modules = read_json(path, list)
    try:
        names = [module["type"].rsplit(".", 1)[-1] for module in modules]
        places = [folder / module["path"] for module in modules]
    except (TypeError, KeyError, AttributeError):
        raise UserError(f"{path}: not a list of modules, each with type and path; fetch it again") from None
    if names not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UserError(
            f"{path}: its modules are {', '.join(names)}, but kmem supports only Transformer, Pooling and optionally "
            "Normalize, in this order"
        )
    return places[0], _pooling(places[1] / CONFIG), len(names) == 3


def _pooling(path: Path) -> str:
    """mean or cls. Reads Sentence-Transformers' older form, which has a switch for each pooling, and its newer one."""
    config = read_json(path, dict)
    chosen = config.get("pooling_mode")
    if chosen is None:
        switches = [name for name, on in config.items() if name.startswith("pooling_mode_") and on]
        chosen = [_OLD_POOLINGS.get(name, name) for name in switches] or "mean"
    chosen = [chosen] if isinstance(chosen, str) else chosen
    if not isinstance(chosen, list) or len(chosen) != 1 or chosen[0] not in POOLINGS:
        raise UserError(f"{path}: the pooling is {json.dumps(chosen)}, but kmem supports {' and '.join(POOLINGS)}")
    return str(chosen[0])


def _write_tokenizer(source: Path, path: Path) -> None:
    """Write tokenizer.json as Transformers loads it: for BERT, the settings in tokenizer_config.json override those in
    the folder's own tokenizer.json."""
    try:
        tokenizer = load_tokenizer(source).backend_tokenizer
    except Exception as error:  # as in build
        raise UserError(
            f"{source}: its tokenizer ({TOKENIZER} or {VOCABULARY}, {_TOKENIZER_CONFIG}) cannot be read: "
            f"{_first_line(error)}"
        ) from error
    try:
        tokenizer.save(str(path))
    except Exception as error:
        refused = refused_by_system(error)
        if refused is None:
            raise
        raise refused from error


def _max_word_pieces(folder: Path, config: Mapping[str, Any], limits: Mapping[str, Any]) -> int:
    """The number of word pieces that the encoder reads at a time, with its two special tokens: the smallest that the
    files name."""
    named = {
        folder / CONFIG: config.get("max_position_embeddings", 512),
        folder / _LIMITS: limits.get("max_seq_length"),
    }
    if (folder / _TOKENIZER_CONFIG).exists():
        named[folder / _TOKENIZER_CONFIG] = read_json(folder / _TOKENIZER_CONFIG, dict).get("model_max_length")
    least = 0
    for path, number in named.items():
        if number is None:
            continue
        if not isinstance(number, int | float) or number < 3:
            raise UserError(f"{path}: {json.dumps(number)} word pieces at a time, but at least 3 are needed")
        least = min(least or int(number), int(number))
    return least


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
