"""What every model with tables goes through in Transformers, whether they hold n-grams or a bank."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
PLAIN = {"use_cache": False}
SAME = {
    "cache": ({}, PLAIN),
    "an empty cache of the caller": (lambda: {"past_key_values": DynamicCache()}, PLAIN),
    "static cache": ({"cache_implementation": "static", "disable_compile": True}, PLAIN),
    "beams": ({"num_beams": 3}, {"num_beams": 3, **PLAIN}),
    "several beams each": (
        {"num_beams": 4, "num_return_sequences": 2},
        {"num_beams": 4, "num_return_sequences": 2, **PLAIN},
    ),
    "prompt in chunks": ({"prefill_chunk_size": 2}, PLAIN),
}
"""Two ways each to generate the same tokens."""


def opened(folder: Path | str, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def generate_both_ways(model: Any, prompts: torch.Tensor, mask: torch.Tensor, way: str, **options: Any) -> torch.Tensor:
    """What a batch of left-padded prompts generates in either way of SAME; the last prompt, alone, the same."""
    common = {"attention_mask": mask, **GREEDY, **options}
    first, second = (model.generate(prompts, **common, **(kind() if callable(kind) else kind)) for kind in SAME[way])
    assert torch.equal(first, second)
    there = int(mask[-1].sum())
    alone = model.generate(prompts[-1:, -there:], **{**common, **SAME[way][1], "attention_mask": None})
    row = (len(prompts) - 1) * len(second) // len(prompts)
    assert torch.equal(alone[0, there:], second[row, prompts.shape[1] :])
    return second


def check_assisted_decoding(model: Any, other: Any, way: str) -> None:
    """Guesses of a model that differs little are accepted in part; the text is that of greedy decoding."""
    prompt = torch.tensor([[9, 4, 3, 9, 4, 3, 9, 4]])
    options = {"prompt_lookup_num_tokens": 3}
    if way == "assistant":
        other.norm.weight.data.mul_(1 + 0.3 * torch.randn(32, generator=torch.Generator().manual_seed(3)))
        options = {"assistant_model": other}
    common = {**GREEDY, "max_new_tokens": 16, "attention_mask": torch.ones_like(prompt)}
    assert torch.equal(model.generate(prompt, **common, **options), model.generate(prompt, **common))


def check_parts(folder: Path, field: str, table: int, name: str, whole: torch.Tensor, size: int) -> None:
    """The tensors `name`.N of a folder are a table's rows in order, of near equal length, as config.json says; at most
    `size` bytes long, but for single rows."""
    parts = json.loads((folder / "config.json").read_text())[field][str(table)]
    files = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    names = [f"{name}.{part}" for part in range(len(parts))]
    tensors = [load_file(folder / files[part])[part] for part in names]
    assert [len(tensor) for tensor in tensors] == parts
    assert max(parts) - min(parts) <= 1
    assert len(parts) == 1 or max(parts) == 1 or max(tensor.nbytes for tensor in tensors) <= size
    assert torch.equal(torch.cat(tensors), whole)


def check_files(folder: Path, size: int) -> None:
    """Weight files are at most `size` bytes long, but for single tensors."""
    sizes: dict[str, list[int]] = {}
    for name, file in json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].items():
        sizes.setdefault(file, []).append(load_file(folder / file)[name].nbytes)
    assert all(len(held) == 1 or sum(held) <= size for held in sizes.values())


@torch.no_grad()
def check_bf16(folder: Path, ids: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """A folder in bf16 computes, in fp32, the logits expected of rounded weights, wherever its tables are; returns its
    own in bf16."""
    for memory in ("device", "mmap"):
        wide = opened(folder, tables=memory, dtype=torch.float32)
        torch.testing.assert_close(wide(ids).logits, expected, **TOLERANCE)
    narrow = [opened(folder, tables=memory)(ids).logits for memory in ("device", "mmap")]
    assert narrow[0].dtype == torch.bfloat16
    assert torch.equal(*narrow)
    return narrow[0]


ASSISTANTS = pytest.mark.parametrize("way", ["assistant", "prompt lookup"])
