"""Read the tensors of a Hugging Face model folder from memory-mapped safetensors files. Nothing is unpickled."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from kmem.checkpoint.commit import COMMIT_FILE, committed_steps
from kmem.config import UserError
from kmem.data.safetensors_file import TORCH_DTYPES, refuse_pickled
from kmem.files import read_json
from kmem.model.export_tables import INDEX_FILE, WEIGHTS_FILE
from kmem.wording import counted

GENERATION_FILE = "generation_config.json"


@dataclass(frozen=True)
class FolderTensor:
    """The file that holds a tensor, with the tensor's shape and dtype."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class ModelFolder:
    """A folder with config.json and safetensors weights, in one file or in shards with an index.

    Raises:
        UserError: the folder is missing, has no config.json or no safetensors, or a file is missing or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = read_config(self.path)
        """The content of config.json, unchanged."""
        self._files: dict[Path, Any] = {}
        self.tensors: Mapping[str, FolderTensor] = self._find_tensors()
        """Every tensor in the weight files."""

    def read(self, name: str, *slices: slice) -> torch.Tensor:
        """A tensor, or a part of it: rows, or columns of rows."""
        return self._files[self.tensors[name].file].get_slice(name)[slices]

    def _find_tensors(self) -> dict[str, FolderTensor]:
        index, single = self.path / INDEX_FILE, self.path / WEIGHTS_FILE
        if index.is_file():
            places = read_json(index, dict).get("weight_map")
            if not isinstance(places, dict):
                raise UserError(f"{index}: no weight_map")
            files = sorted({str(file) for file in places.values()})
        elif single.is_file():
            places, files = None, [WEIGHTS_FILE]
        else:
            refuse_pickled(self.path, "AutoModelForCausalLM")
            raise UserError(f"{self.path}: neither {WEIGHTS_FILE} nor {INDEX_FILE} here")
        tensors: dict[str, FolderTensor] = {}
        for file in files:
            path = self.path / file
            if Path(file).name != file or not path.is_file():
                raise UserError(f"{index}: names {file}, which is not a file in this folder; fetch the folder again")
            for name, tensor in self._open(path).items():
                if name in tensors:
                    raise UserError(f"{path}: {name} is in {tensors[name].file.name} too")
                tensors[name] = tensor
        if places is not None:
            astray = {name for name, file in places.items() if name not in tensors or tensors[name].file.name != file}
            astray |= tensors.keys() - places.keys()
            if astray:
                listed = ", ".join(sorted(astray)[:5])
                raise UserError(
                    f"{index}: does not agree with the weight files about {counted(len(astray), 'tensor')}: {listed}"
                )
        return tensors

    def _open(self, path: Path) -> dict[str, FolderTensor]:
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a complete safetensors file ({error}); fetch it again") from None
        self._files[path] = file
        tensors = {}
        for name in file.keys():  # noqa: SIM118 - the file is no mapping
            entry = file.get_slice(name)
            dtype = entry.get_dtype()
            if dtype not in TORCH_DTYPES:
                raise UserError(f"{path}: {name} has dtype {dtype}, which kmem does not read")
            tensors[name] = FolderTensor(path, tuple(entry.get_shape()), TORCH_DTYPES[dtype])
        return tensors


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a model folder's config.json, unchanged.

    Raises:
        UserError: the folder is missing or holds no model; for a training run the message says how to export it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name a local folder with config.json and safetensors weights")
    file = folder / "config.json"
    trained = (folder / COMMIT_FILE).is_file() or any(map(committed_steps, (folder, folder / "checkpoints")))
    if trained and not file.exists():
        raise UserError(
            f"{folder}: this is a training run, but a Hugging Face folder is needed; write one with kmem export "
            f"--checkpoint {folder} --out FOLDER"
        )
    return read_json(file, dict)
