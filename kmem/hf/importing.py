"""Turn a Hugging Face folder into the checkpoint of a run, tensor by tensor: fp32 masters at step 0, no optimizer
state."""

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

import kmem
from kmem.checkpoint.commit import Progress as RunProgress
from kmem.checkpoint.writer import write_weights
from kmem.config import Config, LatentAttention, ModelConfig, UserError, dump_config, parse_config
from kmem.data.progress import Progress
from kmem.data.tokenizer import adopt_tokenizer, tokenizer_record
from kmem.files import atomic_folder
from kmem.hf.architectures import KMEM
from kmem.hf.digests import verify_export
from kmem.hf.folder import GENERATION_FILE, ModelFolder
from kmem.hf.foreign_config import MTP_FIELD, ignored_fields, read_architecture, read_config, read_model
from kmem.hf.key_map import Piece, check_tensor_sets, folder_pieces, half_split_rows, reordered, row_slices
from kmem.hf.memory_folders import folder_of
from kmem.hf.native import Architecture
from kmem.hf.retrofit import chained, chained_parts
from kmem.model.bank_export import TREE_FOLDER
from kmem.model.exported_memory import exported_memory
from kmem.model.memory_kinds import kinds_of
from kmem.model.parameter_counts import tensor_shapes

TRAINABLE = (torch.float32, torch.bfloat16, torch.float16)
RECOMPUTED = ".rotary_emb.inv_freq"  # in folders of older Transformers; every model recomputes it
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def import_folder(
    source: Path,
    out: Path,
    *,
    drop_mtp: bool = False,
    chain_iterations: int | None = None,
    chain_choices: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> Path:
    """Make the run folder `out`: a checkpoint, the tokenizer, `config.yaml` to edit, `model.yaml` to include.

    Args:
        source: a folder with safetensors weights of an architecture in `native.IMPORTED`, or of kmem.
        out: a folder that does not exist or is empty.
        drop_mtp: leave out the layers for multi-token prediction.
        chain_iterations: turn the MoE layers into chains with this many iterations, which at first compute the same as
            the layers.
        chain_choices: further fields of these chains, such as `residual=outer`.
        say: receives what was found and what was left out.

    Returns:
        The folder of the checkpoint at step 0.

    Raises:
        UserError: names the field of config.json that kmem cannot express, or the tensors that do not fit.
    """
    out = out.resolve()
    verify_export(Path(source))
    folder = ModelFolder(source)
    described = folder.path / "config.json"
    architecture = read_architecture(folder.config, described)
    config = read_config(folder.config, architecture, described)
    model = read_model(config, architecture, described)
    target = model if chain_iterations is None else chained(model, chain_iterations, chain_choices)
    run = starting_config(out, target)
    say(f"architecture: {architecture.name}")
    if chain_iterations is not None:
        say(
            f"its MoE layers become chains of {chain_iterations} iterations; at first all but the first are scaled by "
            "zero"
        )
    ignored = ignored_fields(folder.config, model, architecture)
    if ignored:
        say(f"ignored fields of config.json: {', '.join(ignored)}")

    kinds = kinds_of(model.shape)
    try:
        memories = {kind.name: exported_memory(kind, model.shape, config) for kind in kinds}
    except ValueError as error:
        raise UserError(f"{described}: {error}") from error
    pieces = folder_pieces(model, architecture, {name: memory.parts for name, memory in memories.items()})
    left_out = _left_out(folder, model, architecture, drop_mtp)
    if left_out:
        say(f"tensors left out: {len(left_out)} ({', '.join(left_out[:3])}{', ...' if len(left_out) > 3 else ''})")
    kept = {name: tensor for name, tensor in folder.tensors.items() if name not in left_out}
    beside = {name for kind in kinds for name in kind.exported_tensors(model.shape)}
    for name, tensor in kept.items():
        if name not in beside and tensor.dtype not in TRAINABLE:
            raise UserError(f"{tensor.file}: {name} is {tensor.dtype}; kmem imports fp32, bf16 and fp16 weights")
    check_tensor_sets(
        str(source),
        expected={piece.name: piece.shape for piece in pieces},
        found={name: tensor.shape for name, tensor in kept.items()},
        remedy="the weights do not match its config.json",
    )

    interleaved = architecture.interleaved and getattr(config, "rope_interleave", True)
    shapes = tensor_shapes(target.shape)
    elements = sum(map(prod, shapes.values()))
    facts = {"imported_from": folder.path.resolve().name, "imported_as": architecture.name, "kmem": kmem.__version__}
    with atomic_folder(out) as partial:
        tokenizer = _bring_tokenizer(folder.path, partial / "tokenizer", target.shape.vocab_size, say)
        if (folder.path / GENERATION_FILE).is_file():  # exports of this run have it again
            shutil.copyfile(folder.path / GENERATION_FILE, partial / GENERATION_FILE)
        manifests = {}
        for kind in kinds:
            manifest = folder_of(kind).imported(folder.path, memories[kind.name], target, partial)
            if manifest is not None:
                manifests[kind.name] = manifest
        with Progress(f"importing {elements * 4 / 1e6:,.1f} MB", elements) as bar:
            parts = _parts(folder, model, pieces, interleaved, bar)
            checkpoint = write_weights(
                root=partial / "checkpoints",
                progress=RunProgress(0, consumed_samples=0, tokens=0, optimizer_steps=0, data=tokenizer, facts=facts),
                config=run,
                shapes=shapes,
                parts=parts if chain_iterations is None else chained_parts(parts, target),
                manifests=manifests,
            )
        (partial / "config.yaml").write_text(dump_config(run), encoding="utf-8")
        section = OmegaConf.to_yaml(OmegaConf.create({"model": target.model_dump(mode="json")}))
        (partial / "model.yaml").write_text(section, encoding="utf-8")
    checkpoint = out / checkpoint.relative_to(partial)
    say(f"imported to {checkpoint}")
    return checkpoint


def starting_config(out: Path, model: ModelConfig) -> Config:
    """A configuration whose run folder is `out`, with the imported model; data and optimisation are to be filled in.

    A bank is addressed by the tree in the run folder.

    Raises:
        ConfigError: the folder's name cannot be a run's name.
    """
    return parse_config(
        {
            "name": out.name,
            "folder": str(out.parent),
            "model": model.model_dump(mode="json"),
            "data": {
                "sources": [{"path": "data"}],
                "sequence_length": min(1024, model.max_position_embeddings),
                "addresses": None if model.bank is None else {"tree": str(out / TREE_FOLDER)},
            },
            "train": {
                "steps": 1000,
                "global_batch_size": 8,
                "micro_batch_size": 1,
                "optimizer": {"lr": 1e-5},
                "schedule": {"warmup_steps": 100},
            },
        }
    )


def _parts(
    folder: ModelFolder, model: ModelConfig, pieces: list[Piece], interleaved: bool, bar: Progress
) -> Callable[[str], Iterator[torch.Tensor]]:
    """Name of a kmem tensor -> its parts, read from the folder on demand."""
    holding: dict[str, list[Piece]] = {}
    for piece in pieces:
        for tensor in piece.tensors:
            holding.setdefault(tensor, []).append(piece)

    def parts(tensor: str) -> Iterator[torch.Tensor]:
        order = None
        if interleaved:
            assert isinstance(model.attention, LatentAttention)
            order = half_split_rows(model.attention, tensor)
        for piece in holding[tensor]:  # a stack's pieces come expert by expert, gate before up
            for part in _rows(folder, piece, tensor, order):
                yield part.float()
                bar.advance(part.numel())

    return parts


def _rows(folder: ModelFolder, piece: Piece, tensor: str, order: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
    """The rows of a piece, in `order` if given; of a piece that holds several tensors side by side, this tensor's
    columns."""
    width = prod(piece.shape[1:]) // len(piece.tensors)
    left = piece.tensors.index(tensor) * width
    columns = [slice(left, left + width)] if len(piece.tensors) > 1 else []
    for first, last in row_slices(0, piece.shape[0], width):
        yield reordered(lambda low, high: folder.read(piece.name, slice(low, high), *columns), order, first, last)


def _left_out(folder: ModelFolder, model: ModelConfig, architecture: Architecture, drop_mtp: bool) -> list[str]:
    """Tensors of a native folder that kmem does not import."""
    if architecture is KMEM:
        return []
    layers = ((name, re.match(r"model\.layers\.(\d+)\.", name)) for name in folder.tensors)
    extra = [name for name, layer in layers if layer and int(layer[1]) >= model.num_layers]
    if extra and not drop_mtp and folder.config.get(MTP_FIELD):
        raise UserError(
            f"{folder.path / 'config.json'}: {MTP_FIELD}={folder.config[MTP_FIELD]}: kmem has no layers for "
            f"multi-token prediction ({extra[0]}, ...); import the model without them with --drop-mtp"
        )
    left_out = [name for name in folder.tensors if name.endswith(RECOMPUTED)] + (extra if drop_mtp else [])
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if model.tie_embeddings and head in folder.tensors and embedding in folder.tensors:
        if not torch.equal(folder.read(head), folder.read(embedding)):
            raise UserError(
                f"{folder.path / 'config.json'}: tie_word_embeddings=true, but {head} differs from {embedding}"
            )
        left_out.append(head)
    return left_out


def _bring_tokenizer(source: Path, target: Path, vocab_size: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Copy the tokenizer and return its `tokenizer_record`, which a run compares with its data's tokenizer.

    Raises:
        UserError: it has ids that the model has no embedding for.
    """
    if any((source / name).is_file() for name in TOKENIZER_FILES):
        size = adopt_tokenizer(source, None, target).size
        if size > vocab_size:
            raise UserError(
                f"{source}: its tokenizer has ids up to {size - 1}, and config.json vocab_size={vocab_size}: "
                "texts could have ids without an embedding; enlarge it with Transformers, by "
                f"resize_token_embeddings({size}), and save the folder again"
            )
        return tokenizer_record(target)
    say(f"no tokenizer in {source}; before an export, put one into the run folder as `tokenizer`")
    return {}
