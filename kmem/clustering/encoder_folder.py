"""A sentence encoder from a local folder, in the layout of Sentence-Transformers or of Transformers alone.

Read are BERT's config.json, model.safetensors, tokenizer.json or vocab.txt, and of Sentence-Transformers modules.json,
the pooling's config.json, sentence_bert_config.json and config_sentence_transformers.json. No code of the folder is run
and nothing is unpickled. What the folder says and kmem cannot do is an error: never another embedding.
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
from kmem.files import read_json
from kmem.model.bank_embedder import POOLINGS, SentenceEncoder
from kmem.model.file_digest import file_digest

CONFIG, WEIGHTS, TOKENIZER, VOCABULARY = "config.json", "model.safetensors", "tokenizer.json", "vocab.txt"
_MODULES, _POOLING, _LIMITS = "modules.json", "1_Pooling/config.json", "sentence_bert_config.json"
_PROMPTS, _TOKENIZER_CONFIG = "config_sentence_transformers.json", "tokenizer_config.json"
_BESIDE_TOKENIZER = (_TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json")
LICENCES = ("LICEN", "COPYING", "NOTICE")
"""Beginnings of the names of licence texts, in capitals."""
_PIECES = 8
_PLAIN_BERT = {
    "model_type": ("bert",),
    "position_embedding_type": ("absolute", None),
    "is_decoder": (False, None),
    "auto_map": (None,),
    "quantization_config": (None,),
}
"""Field of config.json -> the values, None where it is not there, with which Transformers' BertModel is the encoder."""
_OLD_POOLINGS = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}


@dataclass(frozen=True)
class EncoderFolder:
    """What an embedder takes from the folder of an encoder."""

    name: str
    """Of the folder."""
    files: Mapping[str, Path]
    """Name -> the file, of config.json, the weights, and what the tokenizer is made of."""
    licences: Mapping[str, Path]
    """Its licence texts, and the README.md that Hugging Face folders have for a model card."""
    settings: Mapping[str, Any]
    """`pooling`, `normalize`, `lower_case` and `max_word_pieces` of `SentenceEncoder`."""

    def digest(self) -> str:
        """Of all that embeddings depend on."""
        files = {name: file_digest(path) for name, path in self.files.items()}
        content = json.dumps([files, dict(self.settings)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def licence_files(self) -> list[str]:
        """Names of the licence texts."""
        return [name for name in self.licences if name.upper().startswith(LICENCES)]


def read_encoder(folder: Path) -> EncoderFolder:
    """
    Raises:
        UserError: no such folder, a file that is missing, or an encoder that `SentenceEncoder` is not; names the file.
    """
    if not folder.is_dir():
        raise UserError(f"--encoder {folder}: no such folder; name the local folder of a sentence encoder")
    inside, pooling, normalize = _modules(folder)
    config = read_json(inside / CONFIG, dict)
    for field, values in _PLAIN_BERT.items():
        if config.get(field) not in values:
            raise UserError(
                f"{inside / CONFIG}: {field} is {json.dumps(config.get(field))}, which is none of the encoders that "
                "kmem runs; choose one of model_type bert, whose code is Transformers' own"
            )
    limits = read_json(inside / _LIMITS, dict) if (inside / _LIMITS).exists() else {}
    spoken = read_json(folder / _PROMPTS, dict) if (folder / _PROMPTS).exists() else {}
    if spoken.get("default_prompt_name") is not None:
        raise UserError(
            f"{folder / _PROMPTS}: default_prompt_name is {json.dumps(spoken['default_prompt_name'])}, and kmem puts "
            "no prompt before a text; set it to null to embed texts as they are"
        )
    return EncoderFolder(
        folder.resolve().name,
        {CONFIG: inside / CONFIG, WEIGHTS: _weights(inside), **_tokenizer_files(inside)},
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


def build(request: EmbedderRequest, folder: Path) -> dict[str, Any]:
    """The encoder's files, and its licences, out of its folder; it is loaded once from where it then is.

    Raises:
        UserError: as `read_encoder`, or files that are damaged or do not fit each other.
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
        raise UserError(f"--encoder {source}: its embeddings are not numbers; fetch {WEIGHTS} again")
    if not encoder.licence_files:
        print(
            f"--encoder {source}: no LICENSE file here, so neither the tree nor exports of models that use it hold the "
            "encoder's licence; if it asks for that, put its text there and run the command again with --force",
            file=sys.stderr,
            flush=True,
        )
    return {"dim": loaded.dim, "encoder": encoder.name, "licences": encoder.licence_files, **settings}


def _modules(folder: Path) -> tuple[Path, str, bool]:
    """Where the transformer's files are, the pooling, and whether vectors get length 1; without modules.json they do,
    as those of kmem's other embedders."""
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
            f"{path}: its modules are {', '.join(names)}, and kmem knows Transformer, Pooling and Normalize, in this "
            "order, the last one or none"
        )
    return places[0], _pooling(places[1] / CONFIG), len(names) == 3


def _pooling(path: Path) -> str:
    """mean or cls, as the file says in Sentence-Transformers' older form (a switch for each) or its newer one."""
    config = read_json(path, dict)
    chosen = config.get("pooling_mode")
    if chosen is None:
        switches = [name for name, on in config.items() if name.startswith("pooling_mode_") and on]
        chosen = [_OLD_POOLINGS.get(name, name) for name in switches] or "mean"
    chosen = [chosen] if isinstance(chosen, str) else chosen
    if not isinstance(chosen, list) or len(chosen) != 1 or chosen[0] not in POOLINGS:
        raise UserError(f"{path}: the pooling is {json.dumps(chosen)}, and kmem knows {' and '.join(POOLINGS)}")
    return str(chosen[0])


def _weights(folder: Path) -> Path:
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    refuse_pickled(folder, "BertModel")
    raise UserError(f"{folder / WEIGHTS}: missing; the encoder's weights are read from this one file")


def _tokenizer_files(folder: Path) -> dict[str, Path]:
    found = {name: folder / name for name in (TOKENIZER, VOCABULARY, *_BESIDE_TOKENIZER) if (folder / name).is_file()}
    if not {TOKENIZER, VOCABULARY} & found.keys():
        raise UserError(f"{folder / TOKENIZER}: missing, and so is {VOCABULARY}; fetch either")
    return found


def _write_tokenizer(source: Path, path: Path) -> None:
    """tokenizer.json as Transformers has it: of BERT's, the switches of tokenizer_config.json come before those of the
    folder's own tokenizer.json."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), local_files_only=True, trust_remote_code=False)
        tokenizer.backend_tokenizer.save(str(path))
    except Exception as error:  # as in build
        raise UserError(
            f"{source}: its tokenizer ({TOKENIZER} or {VOCABULARY}, {_TOKENIZER_CONFIG}) cannot be read: "
            f"{_first_line(error)}"
        ) from error


def _max_word_pieces(folder: Path, config: Mapping[str, Any], limits: Mapping[str, Any]) -> int:
    """How many word pieces, its two marks included, the encoder reads at a time: the least of what the files say."""
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
            raise UserError(f"{path}: {json.dumps(number)} word pieces at a time; at least 3 are needed")
        least = min(least or int(number), int(number))
    return least


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
