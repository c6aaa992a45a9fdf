"""The README.md of an exported folder: what was trained, on what, and how to load it."""

from collections.abc import Mapping, Sequence
from typing import Any

import kmem
from kmem.config import Config, dump_config
from kmem.hf.architectures import KMEM, Choice
from kmem.hf.memory_folders import FolderParts
from kmem.hf.native import DEEPSEEK_V2
from kmem.model.parameter_counts import count_parameters


def model_card(
    config: Config, facts: Mapping[str, Any], choice: Choice, dtype_name: str, memories: Sequence[FolderParts] = ()
) -> str:
    """Markdown with the front matter that the Hugging Face hub reads.

    Args:
        config: the configuration of the run.
        facts: name -> value of what the checkpoint records about the run.
        choice: the architecture of the export and its reason.
        dtype_name: dtype of the weights.
        memories: parts of the model's memories.
    """
    counts = count_parameters(config.model.shape)
    own = choice.architecture is KMEM
    tags = ["kmem", *(["moe"] if config.model.moe else []), *(["custom_code"] if own else [])]
    rows = {
        "Architecture": f"{choice.architecture.name} ({choice.reason})",
        "Parameters": f"{counts.total:,}",
        "Active parameters per token": f"{counts.active:,}",
        "Parameters without embeddings": f"{counts.non_embedding:,}",
        "Longest sequence": f"{config.model.max_position_embeddings:,} tokens",
        "Weights": dtype_name,
        **{_title(name): _figure(value) for name, value in facts.items() if isinstance(value, str | int | float)},
        **_held_out(facts),
        "Trained on": "; ".join(source.path for source in config.data.sources)
        + f", sequences of {config.data.sequence_length:,} tokens",
        "Exported by": f"kmem {kmem.__version__}",
    }
    remote = ", trust_remote_code=True" if own else ""
    note = (
        "\nThe model class ships with this folder as Python files, which need torch 2.10 and transformers 5.10 or "
        "newer. Read them before you allow them to run.\n"
        if own
        else ""
    )
    if choice.architecture is DEEPSEEK_V2 and getattr(config.model.rope_scaling, "mscale_all_dim", None):
        note += (
            "\nNeeds transformers 5: version 4 ignores `mscale_all_dim` of the rotary scaling without a word, so its "
            "logits are others.\n"
        )
    note += "".join(f"\n{parts.card(counts)}\n" for parts in memories if parts.card is not None)
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [{", ".join(tags)}]
---

# {config.name}

A language model trained with kmem.

| | |
|---|---|
{table}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER"{remote})
model = AutoModelForCausalLM.from_pretrained("FOLDER"{remote})
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```
{note}
This is a base model: it continues text and follows no instructions. It repeats what its training text says, wrong or
harmful statements included.

## Configuration of the run

```yaml
{dump_config(config).rstrip()}
```
"""


def _held_out(facts: Mapping[str, Any]) -> dict[str, str]:
    """The evaluations that a run recorded, each with its step."""
    rows = {}
    for name in ("held_out", "held_out_at_start"):
        result = facts.get(name)
        if isinstance(result, Mapping):
            rows[f"Held out at step {result['step']}"] = (
                f"{result['bits_per_byte']:.4f} bits per byte, loss {result['loss']:.4f} ({result['tokens']:,} tokens)"
            )
    return rows


def _title(name: str) -> str:
    return "Trained with kmem" if name == "kmem" else name.replace("_", " ").capitalize()


def _figure(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value).replace("|", "\\|").replace("\n", " ")
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
