"""What fetches the blocks of a memory bank in training: the leaves of the data's cluster tree, and now and then the
generic blocks."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kmem.checkpoint.bank.layout import bank_layout
from kmem.config import Config, UserError
from kmem.data.batch import SequenceBatch
from kmem.model.bank_layout import GENERIC
from kmem.model.bank_router import tree_with_embedder
from kmem.model.bank_tree import read_tree_record
from kmem.tables import counter_random


def tree_folder(config: Config) -> Path | None:
    """The tree whose leaves address the model's bank; None for a model without."""
    if config.model.bank is None:
        return None
    assert config.data.addresses is not None
    return Path(config.data.addresses.tree).expanduser()


def bank_tree(config: Config) -> dict[str, Any] | None:
    """The description of that tree (tree.json), which is whole: training needs its leaves alone, but its run keeps a
    copy, by which contexts are looked up later.

    Raises:
        UserError: there is no such tree, a file of it is missing or another one, or the bank is one for a tree of
            another form.
    """
    folder, layout = tree_folder(config), bank_layout(config)
    if folder is None or layout is None:
        return None
    try:
        layout.check_tree(read_tree_record(folder), folder)
        return dict(tree_with_embedder(folder).record)
    except ValueError as error:
        raise UserError(f"data.addresses.tree: {error}") from None


def with_generic_blocks(config: Config, batch: SequenceBatch, samples: Sequence[int], step: int) -> SequenceBatch:
    """A training batch whose addresses are GENERIC where generic blocks take the place of the leaves'.

    The draw is a function of `data.seed` and the global number of the sequence, or that of the step, so it is the same
    on every mesh.

    Args:
        samples: global numbers of the batch's sequences.
        step: optimizer steps done.
    """
    bank = config.model.bank
    if bank is None or not bank.generic.probability:
        return batch
    assert batch.addresses is not None
    stream = counter_random.key(config.data.seed, "generic blocks", bank.generic.per)
    counters = samples if bank.generic.per == "sequence" else [step] * len(samples)
    bits = [int(counter_random.random_bits(stream, np.uint64(counter))) for counter in counters]
    drawn = torch.tensor([number / 2**64 < bank.generic.probability for number in bits])
    return replace(batch, addresses=batch.addresses.masked_fill(drawn[:, None], GENERIC))
