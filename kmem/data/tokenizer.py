"""Tokenizers: train one on the corpus or adopt an existing one, save it as a Hugging Face folder, and identify it."""

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kmem.config import UserError
from kmem.data.manifest import Manifest, TokenizerRecord
from kmem.model.file_digest import file_digest

END_OF_TEXT = "<|endoftext|>"
"""The EOS token of tokenizers trained by kmem."""

_KNOWN_EOS = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "<｜end▁of▁sentence｜>")
_SMALLEST = 257  # every byte, and the EOS


def train_tokenizer(texts: Iterator[str], vocab_size: int, folder: Path) -> TokenizerRecord:
    """Train a byte-level BPE and save it as a folder that AutoTokenizer.from_pretrained loads. It has GPT-2's
    pre-tokenizer and no normalisation, so any text decodes to itself.

    The result depends on the texts and `vocab_size` alone. It has fewer than `vocab_size` tokens if the texts give
    fewer merges.

    Raises:
        UserError: vocab_size cannot hold the 256 bytes and the EOS.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < _SMALLEST:
        raise UserError(f"--vocab-size {vocab_size}: a byte-level tokenizer needs at least {_SMALLEST}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _save(tokenizer, END_OF_TEXT, folder, "trained on the corpus")


def adopt_tokenizer(path: Path, eos_token: str | None, folder: Path) -> TokenizerRecord:
    """Copy an existing tokenizer into a folder of its own.

    Args:
        path: a tokenizer.json, or a folder that AutoTokenizer.from_pretrained loads without custom code.
        eos_token: overrides the tokenizer's own EOS; needed if the tokenizer does not name one.

    Raises:
        UserError: `path` is not a tokenizer, or its EOS is unknown.
    """
    from tokenizers import Tokenizer

    if path.is_dir():
        try:
            loaded = load_tokenizer(path)
        except UserError as error:
            raise UserError(f"--tokenizer {error}") from None
        if not loaded.is_fast:
            raise UserError(f"--tokenizer {path}: it has no tokenizer.json, and none can be made")
        eos_token = _eos(loaded.backend_tokenizer, eos_token or loaded.eos_token, path)
        loaded.eos_token = eos_token
        if getattr(loaded, "add_eos_token", False):
            loaded.add_eos_token = False
        _make_trainable(loaded.backend_tokenizer, path)
        loaded.save_pretrained(str(folder))
        saved = _describe(folder, eos_token, str(path))
    else:
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"--tokenizer {path}: not a Hugging Face tokenizer.json: {error}") from None
        _make_trainable(tokenizer, path)
        saved = _save(tokenizer, _eos(tokenizer, eos_token, path), folder, str(path))
    _check_loads_alike(folder, saved.eos_token_id, path)
    return saved


def tokenizer_fingerprint(folder: Path) -> str:
    """Identity of a tokenizer: the SHA-256 hash of everything in tokenizer.json that decides a text's ids.

    Layout, truncation and padding do not change it, nor what a template puts after a text.

    Raises:
        UserError: tokenizer.json is missing or damaged.
    """
    path = folder / "tokenizer.json"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        kept: dict[str, Any] = {key: tree[key] for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
    except FileNotFoundError:
        raise UserError(f"{path}: missing; prepare the data anew") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a Hugging Face tokenizer.json ({error}); prepare the data anew") from None
    merges = kept["model"].get("merges")
    if merges:  # "a b" in older files, ["a", "b"] in newer ones
        kept["model"]["merges"] = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in merges]
    before, _ = template_ids(tree)
    if before:  # left out otherwise, so tokenizers without a beginning keep their identity
        kept["before"] = before
    canonical = json.dumps(kept, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def tokenizer_record(folder: Path) -> dict[str, Any]:
    """What a checkpoint keeps of its tokenizer: `tokenizer`, its fingerprint, and `tokenizer_files`, name -> digest.

    Raises:
        UserError: tokenizer.json is missing or damaged.
    """
    files = {path.name: file_digest(path) for path in sorted(folder.iterdir()) if path.suffix == ".json"}
    return {"tokenizer": tokenizer_fingerprint(folder), "tokenizer_files": files}


def check_tokenizer(folder: Path, manifest: Manifest) -> None:
    """
    Args:
        folder: prepared data.

    Raises:
        UserError: the tokenizer is not the one that the folder was prepared with.
    """
    if tokenizer_fingerprint(folder / "tokenizer") != manifest.tokenizer.fingerprint:
        raise UserError(
            f"{folder}/tokenizer/tokenizer.json: not the tokenizer that the folder was prepared with (see "
            "manifest.json); restore it or prepare the folder anew"
        )


def check_one_tokenizer(field: str, folders: Sequence[str | Path], manifests: Sequence[Manifest]) -> None:
    """
    Args:
        field: names the folders.

    Raises:
        UserError: the folders do not share one tokenizer.
    """
    for folder, manifest in zip(folders, manifests, strict=True):
        if manifest.tokenizer.fingerprint != manifests[0].tokenizer.fingerprint:
            raise UserError(
                f"{field}: {folder} and {folders[0]} were prepared with different tokenizers; prepare one of them "
                f"again with --tokenizer {folders[0]}/tokenizer"
            )


def load_tokenizer(folder: Path) -> Any:
    """The Transformers tokenizer in a folder. No code from the folder is run.

    Raises:
        UserError: there is none, or Transformers cannot load it.
    """
    import transformers

    # AutoTokenizer imports PyTorch and the code of models (2 s of CPU time), and ends at the same class.
    loader = transformers.PreTrainedTokenizerFast if _names_no_model(folder) else transformers.AutoTokenizer
    try:
        return loader.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # Transformers raises many kinds
        raise UserError(f"{folder}: no tokenizer that transformers.AutoTokenizer loads: {error}") from error


def _names_no_model(folder: Path) -> bool:
    """Whether a folder is a tokenizer.json of the general class, as kmem writes it, which no model's class rebuilds."""
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        general = config["tokenizer_class"] in ("PreTrainedTokenizerFast", "TokenizersBackend")
    except (OSError, ValueError, KeyError, TypeError):
        return False
    complete = (folder / "tokenizer.json").is_file() and not (folder / "config.json").exists()
    return general and complete and "auto_map" not in config


def template_ids(tree: dict[str, Any]) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before and after a text, such as BOS and EOS, from what tokenizer.json holds."""
    processor = tree.get("post_processor") or {}
    before: list[int] = []
    after: list[int] = []
    if processor.get("type") == "Sequence":
        for step in processor["processors"]:
            outer = template_ids({"post_processor": step})
            before, after = [*outer[0], *before], [*after, *outer[1]]
    elif processor.get("type") == "TemplateProcessing":
        side = before
        for piece in processor["single"]:
            if "Sequence" in piece:
                side = after
            else:
                side += processor["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    elif processor.get("type") in ("BertProcessing", "RobertaProcessing"):
        before, after = [processor["cls"][1]], [processor["sep"][1]]
    return before, after


def unknown_id(tokenizer: Any) -> int:
    """The id, in a `tokenizers.Tokenizer`, that stands for text that the vocabulary lacks; -1 if there is none."""
    model = json.loads(tokenizer.to_str())["model"]
    unknown = model.get("unk_id") if "unk_id" in model else tokenizer.token_to_id(model.get("unk_token") or "")
    return -1 if unknown is None else unknown


def drop_beginning(folder: Path, record: TokenizerRecord) -> TokenizerRecord:
    """Change the tokenizer in a folder so that it puts nothing before a text; its new record."""
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)  # which adds no tokens
    changed = _save(tokenizer, record.eos_token, folder, record.origin)
    _check_loads_alike(folder, changed.eos_token_id, Path(record.origin))
    return changed


def _make_trainable(tokenizer: Any, path: Path) -> None:
    """Let training and prompts have the same tokens: no truncation or padding, nothing after a text (kmem ends
    documents itself, and a prompt must not end one), and the same ids for the same text each time."""
    from tokenizers import processors

    tokenizer.no_truncation()
    tokenizer.no_padding()
    tree = json.loads(tokenizer.to_str())
    before, after = template_ids(tree)
    if after:
        marks = [tokenizer.id_to_token(number) for number in before]
        tokenizer.post_processor = (
            processors.TemplateProcessing(
                single=[*marks, "$A"], pair=[*marks, "$A", "$B"], special_tokens=list(zip(marks, before, strict=True))
            )
            if before
            else processors.ByteLevel(trim_offsets=False)  # which adds no tokens
        )
        names = " ".join(str(tokenizer.id_to_token(number)) for number in after)
        print(f"{path}: {names} is no longer put after every text: a prompt would end the document", file=sys.stderr)
    if tree["model"].get("dropout"):
        tokenizer.model.dropout = None
        print(f"{path}: BPE dropout, which encodes at random, is switched off", file=sys.stderr)


class Encoder:
    """Encodes text as prompts are encoded, with one EOS after each document. Used inside worker processes."""

    def __init__(self, folder: Path, eos_token_id: int):
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        # In a document the text `<|endoftext|>` is ordinary characters, not the end of the document.
        self._tokenizer.encode_special_tokens = True
        self._eos_token_id = eos_token_id
        self._before, _ = template_ids(json.loads(self._tokenizer.to_str()))
        self.unknown_id = unknown_id(self._tokenizer)
        """Stands for text that the vocabulary lacks; -1 if there is no such token."""
        self._cut = _PIECE_CHARACTERS if _splits_as_gpt2(self._tokenizer) else None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each document, with what the tokenizer's template puts before a text, and its EOS."""
        pieces = [pieces_of(text, self._cut) for text in texts]
        flat = [piece for document in pieces for piece in document]
        encoded = iter(self._tokenizer.encode_batch_fast(flat, add_special_tokens=False))
        documents = []
        for document in pieces:
            ids = list(self._before)
            for _ in document:
                ids += next(encoded).ids
            documents.append([*ids, self._eos_token_id])
        return documents


_PIECE_CHARACTERS = 1 << 18
_LONGEST_PIECE = 1 << 20
"""Characters. A longer text without a safe place is cut anyway, since encoding takes about 200 bytes per byte of it.
The ids at the cut may then differ from those of the whole."""
# Before a newline or a single space that follows no whitespace, and before a mark that follows a letter.
_SAFE_PLACE = re.compile(r"(?<=\S)(?=\n)|(?<=\S)(?= \S)|(?<=[^\W\d_])(?=[.,;:!?)\]}。、，！？；：」』）])")


def pieces_of(text: str, characters: int | None) -> list[str]:
    """Cut a long text every `characters` or a little later, where it does not change the token ids.

    Encoding a book at once would take gigabytes. GPT-2's pre-tokenizer begins a token at a single space before a word,
    looks ahead only within a run of whitespace, and never joins letters and marks.
    """
    if characters is None or len(text) <= characters:
        return [text]
    pieces, start = [], 0
    while len(text) - start > characters:
        safe = _SAFE_PLACE.search(text, start + characters, start + max(characters, _LONGEST_PIECE))
        cut = start + max(characters, _LONGEST_PIECE) if safe is None else safe.start()
        if cut >= len(text):
            break
        pieces.append(text[start:cut])
        start = cut
    return [*pieces, text[start:]]


def _splits_as_gpt2(tokenizer: Any) -> bool:
    """Whether `pieces_of` keeps this tokenizer's ids: it has only GPT-2's pre-tokenizer, and nothing spans pieces."""
    tree = json.loads(tokenizer.to_str())
    pre_tokenizer = tree["pre_tokenizer"] or {}
    return (
        tree["normalizer"] is None
        and pre_tokenizer.get("type") == "ByteLevel"
        and pre_tokenizer.get("use_regex", True)
        and not pre_tokenizer.get("add_prefix_space")
        and all(token["special"] for token in tree["added_tokens"])
    )


def _save(tokenizer: Any, eos_token: str, folder: Path, origin: str) -> TokenizerRecord:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos_token,
        "pad_token": eos_token,  # batched generation needs one; padding is masked, so its id does not matter
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "model_max_length": 10**30,  # Transformers' own mark for "no limit"
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return _describe(folder, eos_token, origin)


def _describe(folder: Path, eos_token: str, origin: str) -> TokenizerRecord:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    eos_token_id = tokenizer.token_to_id(eos_token)
    assert eos_token_id is not None
    return TokenizerRecord(
        fingerprint=tokenizer_fingerprint(folder),
        size=max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1,
        eos_token=eos_token,
        eos_token_id=eos_token_id,
        before_ids=tuple(template_ids(json.loads(tokenizer.to_str()))[0]),
        origin=origin,
    )


def _eos(tokenizer: Any, named: str | None, path: Path) -> str:
    """The EOS token: `named`, or the only known EOS among the tokenizer's special tokens."""
    if named is not None:
        if tokenizer.token_to_id(named) is None:
            raise UserError(f"--eos-token {named}: not in the vocabulary of {path}")
        return named
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    candidates = [token for token in _KNOWN_EOS if token in special]
    if len(candidates) != 1:
        listed = ", ".join(sorted(special)[:20]) or "none"
        raise UserError(
            f"--tokenizer {path}: it does not say which token ends a document; add --eos-token TOKEN "
            f"(special tokens: {listed})"
        )
    return candidates[0]


def _check_loads_alike(folder: Path, eos_token_id: int, path: Path) -> None:
    """Check that Transformers gives the ids that the corpus is encoded with: it rebuilds some tokenizers from their
    class."""
    probe = "The  quick brown fox\n\njumped over 12,345 dogs' tails: naïve — 東京 🙂\tdon't!"
    try:
        loaded = load_tokenizer(folder)
    except UserError as error:
        raise UserError(f"--tokenizer {path}: its copy cannot be used: {error}") from None
    through_transformers = loaded(probe)["input_ids"]
    direct = Encoder(folder, eos_token_id).encode([probe])[0][:-1]
    if through_transformers != direct or loaded.eos_token_id != eos_token_id:
        raise UserError(
            f"--tokenizer {path}: transformers.AutoTokenizer and its tokenizer.json give different ids for the same "
            "text; pass the tokenizer.json itself, or a folder saved by save_pretrained"
        )
