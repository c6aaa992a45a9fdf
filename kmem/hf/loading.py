"""Load a model and its tokenizer for inference, from a run's checkpoint or from a Hugging Face folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kmem.checkpoint.bank.options import BankOptions, set_controls
from kmem.checkpoint.controls import check_controls
from kmem.checkpoint.reader import CheckpointReader
from kmem.config import UserError
from kmem.data.tokenizer import load_tokenizer
from kmem.hf.architectures import KMEM
from kmem.hf.custom_code import register
from kmem.hf.digests import verify_export
from kmem.hf.folder import ModelFolder
from kmem.hf.key_map import check_own_tensors
from kmem.hf.memory_folders import folder_of
from kmem.model.bank_embedder import without_progress_bars
from kmem.model.bank_tree import format_path
from kmem.model.memory_kinds import kinds_of
from kmem.model.shape import Shape
from kmem.wording import counted


def load(
    path: Path, controls: Mapping[str, str] | None = None, bank: BankOptions | None = None, verify: bool = True
) -> tuple[Any, Any]:
    """(Transformers causal language model in evaluation mode, tokenizer), on the CPU; tables stay in mapped files.

    Args:
        path: a run folder, the folder of one step, or a Hugging Face folder with safetensors weights. No code from the
            folder is run: the class for kmem's own architecture is the installed kmem's.
        controls: kind of memory -> control, which replaces what the memory reads.
        bank: how the bank is used.
        verify: compare the files with their digests, if the folder has them.

    Raises:
        UserError: `path` is neither of these or is damaged, there is no tokenizer, or an option is for a memory that
            the model does not have.
    """
    controls, bank = controls or {}, bank or BankOptions()
    if (path / "config.json").is_file():
        if bank.tree is not None:
            raise UserError(f"--tree {bank.tree}: a Hugging Face folder has its own tree; leave it out")
        if verify:
            verify_export(path)
        model, tokenizer = _load_folder(path)
    else:
        reader = CheckpointReader(path, verify)
        model, tokenizer = _load_checkpoint(reader, bank.tree), load_tokenizer(reader.tokenizer_path)
    _set_controls(model, controls, bank)
    return model, tokenizer


def _set_controls(model: Any, controls: Mapping[str, str], options: BankOptions) -> None:
    shape = getattr(model, "shape", Shape({}))  # native architectures have no memory
    check_controls(controls, shape, "--control")
    for kind, control in controls.items():
        if kind != "bank":
            model.memories[kind].control = control
    bank = getattr(model, "contexts", None)
    if bank is None:
        if options != BankOptions():
            raise UserError("--bank-levels, --blocked and --tree are for models with a bank (model.bank)")
        return
    if controls.get("bank") == "blocked":
        raise UserError("--control bank=blocked: only for kmem eval; here, name clusters with --blocked")
    set_controls(bank, controls.get("bank", "fetched" if options.blocked else bank.control), options.levels)
    try:
        bank.block(options.blocked)
    except ValueError as error:
        raise UserError(f"--blocked {','.join(map(format_path, options.blocked))}: {error}") from None


def _load_folder(path: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    folder = ModelFolder(path)  # its errors name files; it also refuses pickled weights
    register()
    kept = {"tables": "mmap"} if folder.config.get("model_type") == KMEM.model_type else {}
    try:
        with without_progress_bars():
            model, info = AutoModelForCausalLM.from_pretrained(
                str(path),
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **kept,
            )
    except Exception as error:  # Transformers raises many kinds
        raise UserError(f"{path}: not loadable by transformers.AutoModelForCausalLM: {error}") from error
    if info["missing_keys"]:  # Transformers would draw them at random
        raise UserError(
            f"{path}: config.json describes a model with {counted(len(info['missing_keys']), 'tensor')} that the "
            f"weights lack, such as {min(info['missing_keys'])}; fetch or export the folder again"
        )
    return model.eval(), load_tokenizer(path)


def _load_checkpoint(reader: CheckpointReader, tree: Path | None) -> Any:
    from kmem.model.configuration_kmem import KmemConfig
    from kmem.model.modeling_kmem import KmemForCausalLM

    shape = reader.config.model.shape
    check_own_tensors(reader)
    kinds = kinds_of(shape)
    fields: dict[str, Any] = {"model": reader.config.model.model_dump(mode="json")}
    tables = {name for kind in kinds for name in kind.tables(shape)}
    weights = {name: reader.read(name) for name in reader.tensors if name not in tables}
    for kind in kinds:
        parts = folder_of(kind).described(reader)
        fields |= {f"{kind.name}_{field}": value for field, value in parts.fields.items()}
        weights |= parts.tensors
    with torch.device("meta"):
        model = KmemForCausalLM(KmemConfig(**fields), tables="mmap")
    model.load_state_dict(weights, assign=True)
    for kind in kinds:
        folder_of(kind).open(reader, model.memories[kind.name], tree)
    return model.eval()
