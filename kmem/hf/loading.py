"""A model and its tokenizer to run, from a run's checkpoint or from a Hugging Face folder."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kmem.checkpoint.bank.layout import bank_layout, bank_tensors, checkpoint_router, mapped_bank
from kmem.checkpoint.bank.options import set_controls
from kmem.checkpoint.engram.reading import checkpoint_addresses, mapped_tables
from kmem.checkpoint.reader import CheckpointReader
from kmem.config import UserError
from kmem.data.tokenizer import load_tokenizer
from kmem.hf.architectures import KMEM
from kmem.hf.custom_code import register
from kmem.hf.folder import ModelFolder
from kmem.hf.key_map import check_tensor_sets
from kmem.model.bank_embedder import without_progress_bars
from kmem.model.bank_tree import ClusterPath, format_path
from kmem.model.engram_export import COMPRESSION
from kmem.model.engram_reader import EngramAddresses, table_name
from kmem.parallel.parameter_counts import tensor_shapes


def load(
    path: Path,
    tree: Path | None = None,
    bank_control: str | None = None,
    bank_levels: Sequence[int] | None = None,
    bank_blocked: Sequence[ClusterPath] = (),
) -> tuple[Any, Any]:
    """(Transformers causal language model in evaluation mode, tokenizer), on the CPU; tables stay in mapped files.

    Args:
        path: a run folder, the folder of one step, or a Hugging Face folder with safetensors weights. No code from the
            folder is run: kmem's own architecture is taken from the installed kmem.
        tree: of a checkpoint's memory bank; default: that of the run. A Hugging Face folder has its own.
        bank_control: what a memory bank gives contexts, "fetched", "generic" or "none"; default: what it was trained
            with.
        bank_levels: levels of a memory bank that are on; default: all.
        bank_blocked: clusters of a memory bank that contexts may not use.

    Raises:
        UserError: neither of these, damaged, or no tokenizer.
    """
    if (path / "config.json").is_file():
        if tree is not None:
            raise UserError(f"--tree {tree}: a Hugging Face folder has its own; leave it out")
        model, tokenizer = _load_folder(path)
    else:
        reader = CheckpointReader(path)
        model, tokenizer = _load_checkpoint(reader, tree), load_tokenizer(reader.tokenizer_path)
    bank = getattr(model, "contexts", None)
    if bank is None and (bank_control, bank_levels, tree, bank_blocked) != (None, None, None, ()):
        raise UserError("--bank, --bank-levels, --blocked and --tree are for models with a memory bank (model.bank)")
    if bank is not None:
        set_controls(bank, bank_control or ("fetched" if bank_blocked else bank.control), bank_levels)
        try:
            bank.block(bank_blocked)
        except ValueError as error:
            raise UserError(f"--blocked {','.join(map(format_path, bank_blocked))}: {error}") from None
    return model, tokenizer


def _load_folder(path: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    folder = ModelFolder(path)  # its errors name files; it also refuses pickled weights
    register()
    section = folder.config.get("model")
    own = folder.config.get("model_type") == KMEM.model_type
    kept = {"tables": "mmap"} if own and isinstance(section, dict) and section.get("engram") else {}
    try:
        with without_progress_bars():
            model = AutoModelForCausalLM.from_pretrained(
                str(path), local_files_only=True, use_safetensors=True, trust_remote_code=False, **kept
            )
    except Exception as error:  # Transformers raises many kinds
        raise UserError(f"{path}: not loadable by transformers.AutoModelForCausalLM: {error}") from error
    return model.eval(), load_tokenizer(path)


def _load_checkpoint(reader: CheckpointReader, tree: Path | None) -> Any:
    from kmem.model.configuration_kmem import KmemConfig
    from kmem.model.modeling_kmem import KmemForCausalLM

    model_section = reader.config.model
    check_tensor_sets(
        str(reader.folder),
        expected=tensor_shapes(model_section),
        found={name: tuple(info.shape) for name, info in reader.tensors.items()},
        remedy="it was not saved by a run of its own model section",
    )
    addresses = checkpoint_addresses(reader)
    layout = bank_layout(reader.config)
    fields: dict[str, Any] = {"model": model_section.model_dump(mode="json")}
    tables = _tables(addresses) | bank_tensors(layout)
    weights = {name: reader.read(name) for name in reader.tensors if name not in tables}
    if addresses is not None:
        fields["engram_addressing"] = addresses.addressing.to_manifest()
        if addresses.compression is not None:
            weights[COMPRESSION] = addresses.compression.lookup
    with torch.device("meta"):
        model = KmemForCausalLM(KmemConfig(**fields), tables="mmap")
    model.load_state_dict(weights, assign=True)
    if addresses is not None:
        model.use_rows(mapped_tables(reader, addresses))
    if layout is not None:
        assert model.contexts is not None
        model.contexts.sources = mapped_bank(reader, layout)
        model.contexts.router = partial(checkpoint_router, reader, tree)
    return model.eval()


def _tables(addresses: EngramAddresses | None) -> set[str]:
    return set() if addresses is None else {table_name(layer) for layer in addresses.layers}
