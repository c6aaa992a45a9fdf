"""Models with a memory bank of random blocks."""

import torch

from kmem.config.bank import BankConfig
from kmem.model.bank_layout import MISSING, BankLayout
from kmem.model.shape import Shape
from tests.model import tiny
from tests.model.bank_parameters import BankParameters

KINDS = ("ffn", "lora_ffn", "lora_qk", "lora_ov", "kv")
MLA = {**tiny.MLA, "qk_nope_head_dim": 16}
LEAVES = torch.tensor([5, 0, 5, MISSING, 20, 5])
BY_TOKEN = torch.tensor([[5, 5, 5, 0, 0, MISSING, 20, 20], [20, 20, 5, 5, 5, 5, 5, 0]])


def shape(kind="ffn", attention=None, moe=None, levels=(5, 0, 3), generic=0.25, model=None, **bank):
    """A model with a bank over a tree of 27 leaves."""
    config = tiny.config(attention, moe, **(model or {}))
    section = BankConfig(children=3, levels=levels, kind=kind, generic={"probability": generic}, **bank)
    section.check_model(config)
    return Shape({**config.model_dump(), "bank": section.model_dump()})


def without_bank(view):
    return Shape({**view.as_dict(), "bank": None})


def random_bank(view, dtype=torch.float64):
    """Every value of every row random."""
    bank = BankParameters(BankLayout.of(view)).to(dtype)
    for number, parameter in enumerate(bank.parameters()):
        parameter.data.copy_(0.3 * tiny.random(*parameter.shape, seed=40 + number))
    return bank


def addressed(leaves, tokens=8):
    """Leaf of every token [B, T]."""
    return leaves if leaves.dim() == 2 else leaves[:, None].expand(-1, tokens)


# Layout
