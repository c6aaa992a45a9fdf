"""A small model with a memory bank, and addresses for the synthetic data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from kmem.data.batch import SequenceBatch
from kmem.model.bank_layout import GENERIC, MISSING
from tests.distributed.training_case import small_config

CHILDREN, LEVELS = 3, (5, 2, 0, 1)
LEAVES = CHILDREN ** len(LEVELS)
EXPERTS = {"num_experts": 4, "top_k": 2, "intermediate_size": 32, "first_dense_layers": 1}


def bank_config(**changes: Any) -> dict[str, Any]:
    """Blocks in every layer, of three levels of four, with experts in all layers but the first."""
    defaults = {
        "model__moe": EXPERTS,
        "model__bank": {"children": CHILDREN, "levels": LEVELS, "generic": {"probability": 0.2}},
        "data__addresses": {"tree": "none"},
        # A larger eps: Adam makes a full step of a gradient that is 0 but for rounding.
        "bank__optimizer": {"betas": [0.9, 0.99], "eps": 1e-5, "lr_multiplier": 3.0, "weight_decay": 0.1},
        "train__optimizer__lr": 0.003,
    }
    return small_config(**{**defaults, **changes})


def addressed(batch: SequenceBatch, samples: list[int], generic: bool = True) -> SequenceBatch:
    """The batch with a leaf for every document that follows from the sample number alone: often one of a few, sometimes
    none, and, where a bank has them, for some sequences the generic blocks."""
    rows = []
    for sample, documents in zip(samples, batch.document_ids, strict=True):
        generator = torch.Generator().manual_seed(1000 + sample)
        leaves = torch.randint(LEAVES, (4,), generator=generator)
        leaves = torch.where(torch.rand(4, generator=generator) < 0.4, leaves % 7, leaves)
        if sample % 5 == 1:
            leaves[1] = MISSING
        if sample % 7 == 3 and generic:
            leaves[:] = GENERIC
        if sample % 3 == 0:
            leaves[:] = leaves[0]  # one address for the whole sequence
        rows.append(leaves[documents])
    return replace(batch, addresses=torch.stack(rows))
