"""A model and its tokenizer to run, from a run's checkpoint or from a Hugging Face folder."""

from pathlib import Path
from typing import Any

import torch

from kmem.checkpoint.reader import CheckpointReader
from kmem.config import UserError
from kmem.data.tokenizer import load_tokenizer
from kmem.hf.custom_code import register
from kmem.hf.folder import ModelFolder
from kmem.hf.key_map import account
from kmem.parallel.parameter_counts import tensor_shapes


def load(path: Path) -> tuple[Any, Any]:
    """(Transformers causal language model in evaluation mode, tokenizer), on the CPU.

    Args:
        path: a run folder, the folder of one step, or a Hugging Face folder with safetensors weights. No code from the
            folder is run: kmem's own architecture is taken from the installed kmem.

    Raises:
        UserError: neither of these, damaged, or no tokenizer.
    """
    if (path / "config.json").is_file():
        return _load_folder(path)
    reader = CheckpointReader(path)
    return _load_checkpoint(reader), load_tokenizer(reader.tokenizer_path)


def _load_folder(path: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    ModelFolder(path)  # its errors name files; it also refuses pickled weights
    register()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(path), local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    except Exception as error:  # Transformers raises many kinds
        raise UserError(f"{path}: not loadable by transformers.AutoModelForCausalLM: {error}") from error
    return model.eval(), load_tokenizer(path)


def _load_checkpoint(reader: CheckpointReader) -> Any:
    from kmem.model.configuration_kmem import KmemConfig
    from kmem.model.modeling_kmem import KmemForCausalLM

    model_section = reader.config.model
    account(
        str(reader.folder),
        expected=tensor_shapes(model_section),
        found={name: tuple(info.shape) for name, info in reader.tensors.items()},
        remedy="it was not saved by a run of its own model section",
    )
    with torch.device("meta"):
        model = KmemForCausalLM(KmemConfig(model=model_section.model_dump(mode="json")))
    model.load_state_dict({name: reader.read(name) for name in reader.tensors}, assign=True)
    return model.eval()
