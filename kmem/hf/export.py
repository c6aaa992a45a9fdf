"""Write a checkpoint as a Hugging Face folder, tensor by tensor: host memory holds a slice of one tensor at a time."""

import functools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch

from kmem.checkpoint.reader import CheckpointReader
from kmem.config import Config, LatentAttention, UserError
from kmem.data.progress import Progress
from kmem.data.safetensors_file import SafetensorsWriter, in_files
from kmem.data.tokenizer import load_tokenizer
from kmem.files import atomic_folder, check_replaceable, read_json
from kmem.hf.architectures import KMEM, Choice, choose, to_fields
from kmem.hf.custom_code import AUTO_MAP, register
from kmem.hf.digests import write_digests
from kmem.hf.folder import GENERATION_FILE
from kmem.hf.key_map import (
    Piece,
    TableParts,
    check_own_tensors,
    check_tensor_sets,
    folder_pieces,
    interleaved_rows,
    parameters,
    reordered,
    row_slices,
    table_parts,
)
from kmem.hf.memory_folders import FolderParts, folder_of
from kmem.hf.model_card import model_card
from kmem.hf.native import QWEN3_MOE, Architecture
from kmem.model.export_tables import INDEX_FILE, WEIGHTS_FILE
from kmem.model.memory_kinds import kinds_of
from kmem.model.parameter_counts import tensor_shapes
from kmem.wording import counted

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOKENIZER_SUFFIXES = (".json", ".txt", ".model", ".jinja")


def export(
    trained: CheckpointReader,
    out: Path,
    *,
    custom_code: bool = False,
    dtype: str = "fp32",
    max_shard_bytes: int = 2_000_000_000,
    tree: Path | None = None,
    force: bool = False,
    say: Callable[[str], None] = print,
) -> Choice:
    """Write the folder, which appears only when it is complete, and return the choice of architecture.

    Args:
        trained: the checkpoint.
        out: the folder to make; it may exist if it is empty.
        custom_code: ship kmem's own code even where a native architecture fits.
        dtype: fp32 or bf16, for tables too; selection biases stay fp32.
        max_shard_bytes: the largest weight file. A file is larger only if a single tensor is; tables are split into
            tensors that fit.
        tree: folder of the bank's cluster tree; default: the tree of the run.
        force: replace an earlier export.
        say: receives the choice of architecture and its reason.

    Raises:
        UserError: the folder exists; the checkpoint does not match its own model section; the tokenizer is missing or
            has more tokens than the model; the engram was trained with other addresses than the tokenizer gives now;
            the bank has no tree, or another tree; the disk has no space.
    """
    out = out.resolve()
    is_export = (out / "config.json").is_file() and (out / INDEX_FILE).is_file()
    check_replaceable(out, "an export", is_export, force)
    model = trained.config.model
    choice = choose(model, custom_code)
    say(f"architecture: {choice.architecture.name} ({choice.architecture.class_name}): {choice.reason}")

    check_own_tensors(trained)
    tokens = _token_ids(trained.tokenizer_path, model.shape.vocab_size)
    folders = {kind.name: folder_of(kind) for kind in kinds_of(model.shape)}
    if tree is not None and not any(folder.takes_tree for folder in folders.values()):
        raise UserError(f"--tree {tree}: the model has no bank (model.bank)")
    memories = {name: folder.exported(trained, tree) for name, folder in folders.items()}
    parts = table_parts(model, DTYPES[dtype].itemsize, max_shard_bytes)
    pieces = folder_pieces(model, choice.architecture, parts, DTYPES[dtype])
    config = transformers_config(trained.config, choice.architecture, tokens, DTYPES[dtype], memories, parts)
    check_tensor_sets(
        f"{choice.architecture.class_name} of this version of Transformers",
        expected=target_parameters(config, choice.architecture),
        found=parameters(pieces, tensor_shapes(model.shape)),
        remedy="export with --custom-code",
    )

    shards = in_files(pieces, lambda piece: piece.bytes, max_shard_bytes)
    total = sum(piece.bytes for piece in pieces)
    with atomic_folder(out, replace=force) as partial:
        free = shutil.disk_usage(partial).free
        if free < total:
            raise UserError(f"--out {out}: the weights need {total} bytes but {free} are free; choose another folder")
        with Progress(f"exporting {total / 1e6:,.1f} MB", total) as progress:
            _write_weights(trained, choice.architecture, memories, shards, partial, progress)
        _write_descriptions(trained, choice, config, tokens, dtype, list(memories.values()), partial)
        for memory in memories.values():
            if memory.write is not None:
                memory.write(partial)
        write_digests(partial)
    say(f"exported to {out}: {total / 1e6:,.1f} MB in {counted(len(shards), 'weight file')}")
    for memory in memories.values():
        for note in memory.notes:
            say(f"{out}/{note}")
    return choice


def transformers_config(
    config: Config,
    architecture: Architecture,
    tokens: Mapping[str, int],
    dtype: torch.dtype,
    memories: Mapping[str, FolderParts],
    parts: TableParts,
) -> Any:
    """The Transformers configuration object of an export.

    Args:
        tokens: name -> id of the special tokens, such as `eos_token_id`.
        memories: kind -> parts of the model's memory.
        parts: rows of the tensors that hold each table.

    Raises:
        UserError: Transformers refuses the values.
    """
    import transformers

    fields = to_fields(config.model, architecture)
    for kind, memory in memories.items():
        fields |= {f"{kind}_{name}": value for name, value in memory.fields.items()}
    for kind, tables in parts.items():
        fields[f"{kind}_parts"] = {str(key): list(rows) for key, rows in tables.items()}
    ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **tokens}
    try:
        if architecture is KMEM:
            from kmem.model.configuration_kmem import KmemConfig

            made = KmemConfig(**fields, **ids)
            made.auto_map = dict(AUTO_MAP)
        else:
            made = getattr(transformers, architecture.class_name).config_class(**fields, **ids)
    except Exception as error:  # Transformers' validation has error types of its own
        raise UserError(
            f"Transformers refuses this model as {architecture.name}: {error}; add --custom-code"
        ) from error
    made.architectures = [architecture.class_name]
    made.dtype = dtype
    return made


def target_parameters(config: Any, architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the parameters and buffers that the Transformers class holds, without tied copies."""
    from transformers import AutoModelForCausalLM

    held = {}
    if architecture is KMEM:
        register()
        held = {"tables": "device"}
    with torch.device("meta"):
        target = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **held)
    # On the meta device nothing is tied yet, so tied copies are recognised by name.
    tied = set(target._tied_weights_keys or ()) if config.tie_word_embeddings else set()
    return {name: tuple(tensor.shape) for name, tensor in target.state_dict().items() if name not in tied}


def _write_weights(
    trained: CheckpointReader,
    architecture: Architecture,
    memories: Mapping[str, FolderParts],
    shards: list[list[Piece]],
    folder: Path,
    progress: Progress,
) -> None:
    count, places = len(shards), {}
    beside = {name: tensor for memory in memories.values() for name, tensor in memory.tensors.items()}
    for number, shard in enumerate(shards, start=1):
        name = WEIGHTS_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        shard = sorted(shard, key=lambda piece: -piece.dtype.itemsize)  # so every tensor is aligned
        declared = {piece.name: (piece.shape, piece.dtype) for piece in shard}
        with SafetensorsWriter(folder / name, declared, {"format": "pt"}) as writer:
            for piece in shard:
                if not piece.tensors:
                    writer.write(piece.name, beside.get(piece.name, torch.empty(piece.shape, dtype=piece.dtype)))
                    continue
                for values in _values(trained, piece, architecture.interleaved):
                    writer.write_values(piece.name, values.to(piece.dtype))
                    progress.advance(values.numel() * piece.dtype.itemsize)
                    del values  # before the next part is read
        places.update(dict.fromkeys(declared, name))
    total = sum(piece.bytes for shard in shards for piece in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _values(trained: CheckpointReader, piece: Piece, interleaved: bool = False) -> Iterator[torch.Tensor]:
    """The values of a piece whose rows are those of tensors, in row-major order, a slice at a time.

    A row of several tensors that is longer than a slice comes tensor by tensor. `interleaved`: rotary rows of latent
    attention come in pairs that are rotated together.
    """
    if piece.expert is not None:
        (stack,) = piece.tensors
        yield trained.read_rows(stack, piece.expert, piece.expert + 1)[0, piece.start : piece.stop]
        return
    order, attention = None, trained.config.model.attention
    if interleaved:
        assert isinstance(attention, LatentAttention)
        order = interleaved_rows(attention, piece.tensors[0])
    copies = min(len(piece.tensors), 2)  # the tensors' rows, and joined
    for first, last in row_slices(piece.start, piece.stop, copies * prod(piece.shape[1:])):
        parts = (
            reordered(functools.partial(trained.read_rows, tensor), order, first, last) for tensor in piece.tensors
        )
        if copies == 1 or last - first == 1:
            yield from parts
        else:
            yield torch.cat(list(parts), dim=1)


def _write_descriptions(
    trained: CheckpointReader,
    choice: Choice,
    config: Any,
    tokens: Mapping[str, int],
    dtype: str,
    memories: Sequence[FolderParts],
    folder: Path,
) -> None:
    from transformers import GenerationConfig
    from transformers.dynamic_module_utils import custom_object_save

    from kmem.model.modeling_kmem import KmemForCausalLM

    config.save_pretrained(folder)
    _add_older_names(folder / "config.json")
    padding = {"pad_token_id": tokens["eos_token_id"]} if "eos_token_id" in tokens else {}
    GenerationConfig(**{**padding, **tokens, **_imported_generation(trained)}).save_pretrained(folder)
    for file in sorted(trained.tokenizer_path.iterdir()):
        if file.suffix in TOKENIZER_SUFFIXES and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
    _pad_left(folder / "tokenizer_config.json")
    if choice.architecture is KMEM:
        custom_object_save(KmemForCausalLM, str(folder))  # with all files that it imports relatively
    card = model_card(trained.config, trained.facts, choice, dtype, memories)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _add_older_names(path: Path) -> None:
    """Add the names that Transformers 4 has for fields of config.json: it reads no others, and would take its defaults
    instead, such as rope_theta=10000. Transformers 5 reads both."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    older: dict[str, Any] = {"torch_dtype": fields["dtype"]} if "dtype" in fields else {}
    rope = dict(fields.get("rope_parameters") or {})
    if rope:
        older |= {name: rope.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in rope}
        older["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    if fields["model_type"] == QWEN3_MOE.model_type:
        older["num_experts"] = fields["num_local_experts"]
    path.write_text(json.dumps({**fields, **older}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _imported_generation(trained: CheckpointReader) -> dict[str, Any]:
    """How the model generates by default, such as temperature and all end tokens, as the imported folder had it."""
    path = trained.run_folder / GENERATION_FILE
    if not path.is_file():
        return {}
    written_by = ("transformers_version", "_from_model_config")
    return {name: value for name, value in read_json(path, dict).items() if name not in written_by}


def _pad_left(path: Path) -> None:
    """Make the tokenizer pad on the left unless it names a side: generated text follows the last token of a row."""
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps({"padding_side": "left", **settings}, indent=2, ensure_ascii=False), encoding="utf-8")


def _token_ids(tokenizer: Path, vocab_size: int) -> dict[str, int]:
    """Ids of the special tokens that the tokenizer names.

    Raises:
        UserError: there is no tokenizer, or it has ids that the model has no embedding for.
    """
    if not tokenizer.is_dir():
        raise UserError(
            f"{tokenizer}: no tokenizer here; copy the folder `tokenizer` of the prepared data to this place"
        )
    loaded = load_tokenizer(tokenizer)
    largest = max(loaded.get_vocab().values(), default=0)
    if largest >= vocab_size:
        raise UserError(
            f"{tokenizer}: token id {largest} is beyond model.vocab_size={vocab_size}; this is not the tokenizer that "
            "the model was trained with"
        )
    named = {f"{kind}_token_id": getattr(loaded, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    return {name: number for name, number in named.items() if number is not None}
