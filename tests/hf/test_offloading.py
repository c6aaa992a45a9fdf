"""Weights on disk: Accelerate's `device_map` brings a module's weights when the module is called, and not otherwise."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from kmem.hf.custom_code import register
from kmem.hf.export import export
from kmem.model import matmul
from kmem.model.memory_kinds import kinds_of
from tests.hf.banks import BANKS, write_bank_run
from tests.hf.loaded import GREEDY, opened
from tests.hf.models import GQA, MEMORY, OWN, VOCABULARY, model, random_weights, write_run

MODELS = {
    "tied": OWN["softmax and shared experts"],
    "latent attention": OWN["latent attention without experts"],
    "chain of experts": OWN["chain of experts"],
    "four branches": OWN["four branches"],
    "engram": MEMORY["deepseek"],
    "over-encoding": model(GQA, None, over_encoding={"rows": 61}, tie_embeddings=True),
    "gemma3n": model(GQA, None, per_layer_embeddings={"width": 8}),
    "stem": model(GQA, None, per_layer_embeddings={"form": "stem", "layers": [1]}),
    "product keys": model(GQA, None, product_key_memory={"layers": [1], "num_keys": 8, "key_dim": 16, "top_k": 2}),
    "bank": BANKS["ffn"],
}


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory):
    """An export; its tables are cut into several tensors."""
    config, folder = MODELS[request.param], tmp_path_factory.mktemp("model")
    if config.bank is None:
        decoder, generator = random_weights(config), torch.Generator().manual_seed(1)
        tables = {
            name: torch.randn(table.rows, table.width, generator=generator)
            for kind in kinds_of(config.shape)
            for name, table in kind.tables(config.shape).items()
        }
        held: Any = SimpleNamespace(weights=lambda: decoder.state_dict() | tables)
        run = write_run(folder / "run", config, held)
    else:
        run = write_bank_run(folder / "run", config)
    export(run, folder / "out", max_shard_bytes=4_000, say=str)
    register()
    return folder / "out"


@pytest.mark.parametrize(
    "where",
    ["all on disk", *(pytest.param(part, marks=pytest.mark.full) for part in ("ends on disk", "layers on disk"))],
)
def test_weights_on_disk_give_the_same_logits(folder, tmp_path, where):
    plain = opened(folder)
    disk = {"ends on disk": {"embedding", "head", "norm"}, "layers on disk": {"layers"}}.get(where)
    # A device_map needs one module on a device.
    places = {name: "disk" if disk is None or name in disk else "cpu" for name, _ in plain.named_children()}
    if disk is None:
        places["norm"] = "cpu"
    places |= {name: "cpu" for name, _ in plain.named_buffers(recurse=False)}
    moved = opened(folder, device_map=places, offload_folder=tmp_path / "offload")
    assert any(parameter.device.type == "meta" for parameter in moved.parameters())
    ids = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(moved(ids).logits, plain(ids).logits)
    assert torch.equal(moved.generate(ids, **GREEDY), plain.generate(ids, **GREEDY))


def test_linear_layers_are_plain_where_nothing_is_gained(folder):
    """bitsandbytes replaces layers whose type is nn.Linear, and no subclass."""
    linear = {type(module) for module in opened(folder).modules() if isinstance(module, nn.Linear)}
    assert linear == {matmul.Linear}
    if matmul.Linear is not nn.Linear:
        pytest.skip("on this processor oneDNN's products are faster")
