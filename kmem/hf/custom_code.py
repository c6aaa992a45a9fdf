"""kmem's own model class in Transformers: its registration inside kmem, and registered embedders beside it."""

import ast
import inspect
import shutil
from pathlib import Path

from kmem.config import UserError
from kmem.model import bank_embedder

AUTO_MAP = {
    "AutoConfig": "configuration_kmem.KmemConfig",
    "AutoModel": "modeling_kmem.KmemModel",
    "AutoModelForCausalLM": "modeling_kmem.KmemForCausalLM",
    "AutoModelForSequenceClassification": "modeling_kmem.KmemForSequenceClassification",
}
REGISTERED = "registered_embedder"
"""Module of an export that holds the class of a registered embedder, one that is not kmem's own."""


def embedder_class(name: str) -> type | None:
    """The class that reads an embedder registered from outside kmem; None for kmem's own embedders.

    Raises:
        UserError: its file imports kmem or its neighbours, which an export does not carry.
    """
    reader = bank_embedder.EMBEDDERS[name]
    if reader.__module__ == bank_embedder.__name__:
        return None
    path = Path(inspect.getsourcefile(reader) or "")
    imported = {name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) for name in _packages(node)}
    if imported & {"", "kmem"}:
        raise UserError(
            f"{path}: imports {'kmem' if 'kmem' in imported else 'its neighbours'}, but an export carries this file "
            f"alone; put {reader.__name__}, which reads the embedder {name}, in a file of its own that imports only "
            "torch and Transformers"
        )
    return reader


def write_embedder(folder: Path, embedder: str) -> None:
    """Add the class that reads a registered embedder to an export that has the model class.

    Raises:
        UserError: as `embedder_class`.
    """
    reader = embedder_class(embedder)
    if reader is None:
        return
    shutil.copyfile(str(inspect.getsourcefile(reader)), folder / f"{REGISTERED}.py")
    with open(folder / Path(str(bank_embedder.__file__)).name, "a", encoding="utf-8") as code:
        code.write(f"\n\nfrom .{REGISTERED} import {reader.__name__}\n\n")
        code.write(f"EMBEDDERS[{embedder!r}] = {reader.__name__}\n")


def register() -> None:
    """Let Transformers' Auto classes load kmem folders with the installed kmem instead of the folder's copy."""
    import transformers

    from kmem.model import modeling_kmem
    from kmem.model.configuration_kmem import KmemConfig

    transformers.AutoConfig.register(KmemConfig.model_type, KmemConfig, exist_ok=True)
    for auto, path in AUTO_MAP.items():
        if auto != "AutoConfig":
            model = getattr(modeling_kmem, path.rpartition(".")[2])
            getattr(transformers, auto).register(KmemConfig, model, exist_ok=True)


def _packages(node: ast.AST) -> list[str]:
    """Packages that a node of a module imports; '' for a relative import."""
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return ["" if node.level else str(node.module).split(".")[0]]
    return []
