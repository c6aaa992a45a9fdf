"""The blocks that a step uses, against a plain account of every token."""

from dataclasses import replace

import pytest
import torch

from kmem.config import parse_config
from kmem.data.batch import SequenceBatch
from kmem.model.bank_layout import GENERIC, MISSING, BankLayout
from kmem.parallel.bank_step import addresses_of, plan_blocks, rows_of
from tests.distributed.bank_case import CHILDREN, LEAVES, bank_config

LAYOUT = BankLayout.of(parse_config(bank_config()).model.shape)
DEPTH = len(LAYOUT.ranks)


def batch_of(addresses):
    nothing = torch.zeros_like(addresses)
    return SequenceBatch(nothing, nothing, nothing, nothing, addresses=addresses)


def random_batch(seed, one_each):
    """[3, 6] leaves, often one of few, sometimes none or the generic blocks; one a sequence or one a token."""
    generator = torch.Generator().manual_seed(seed)
    leaves = torch.randint(LEAVES, (3, 1 if one_each else 6), generator=generator)
    kind = torch.rand(leaves.shape, generator=generator)
    leaves = torch.where(kind < 0.4, leaves % 5, leaves)
    leaves = leaves.masked_fill(kind > 0.8, MISSING).masked_fill((kind > 0.65) & (kind <= 0.8), GENERIC)
    return batch_of(leaves.expand(3, 6).clone())


def row_of(address, level):
    """The row of an address in a level's table; None for no block."""
    if address == MISSING:
        return None
    return CHILDREN**level if address == GENERIC else address // CHILDREN ** (DEPTH - level)


@pytest.mark.parametrize("one_each", [False, True], ids=["tokens", "sequences"])
@pytest.mark.parametrize("seed", range(12))
def test_every_token_meets_its_own_blocks_once(seed, one_each):
    batches = [random_batch(10 * seed + number, one_each) for number in range(3)]
    if seed == 0:  # and with a micro-batch that has no block at all
        batches[1] = batch_of(torch.full((3, 6), MISSING))
    plans, groups = plan_blocks(LAYOUT, batches)
    assert set(plans) == set(LAYOUT.levels)
    for level, plan in plans.items():
        rows = [[row_of(int(address), level) for address in batch.addresses.flatten()] for batch in batches]
        used = [sorted({row for row in found if row is not None}) for found in rows]
        assert plan.rows.tolist() == sorted({row for found in used for row in found})
        assert [plan.rows[index.numpy()].tolist() for index in plan.index] == used
        for number, found in enumerate(rows):
            met = {}
            for tokens, counts in groups[number].groups:
                if level not in counts:
                    continue
                order = range(len(found)) if tokens is None else tokens.tolist()
                blocks = [block for block, count in enumerate(counts[level].tolist()) for _ in range(count)]
                for token, block in zip(order, blocks, strict=True):
                    assert token not in met
                    met[token] = used[number][block]
            assert met == {token: row for token, row in enumerate(found) if row is not None}


def test_a_step_without_blocks_has_no_groups():
    plans, groups = plan_blocks(LAYOUT, [batch_of(torch.full((2, 4), MISSING))])
    assert [found.groups for found in groups] == [()]
    assert all(len(plan.rows) == 0 == plan.look_ups for plan in plans.values())


def test_plans_and_groups_are_made_for_every_micro_batch_in_order():
    one, other = random_batch(1, False), random_batch(2, False)
    plans, groups = plan_blocks(LAYOUT, [one, other])
    swapped, swapped_groups = plan_blocks(LAYOUT, [other, one])
    for level in LAYOUT.levels:
        assert plans[level].rows.tolist() == swapped[level].rows.tolist()
        assert [part.tolist() for part in plans[level].index] == [part.tolist() for part in swapped[level].index[::-1]]
    for found, again in zip(groups, swapped_groups[::-1], strict=True):
        for (tokens, counts), (same_tokens, same_counts) in zip(found.groups, again.groups, strict=True):
            assert (tokens is None) == (same_tokens is None)
            assert tokens is None or torch.equal(tokens, same_tokens)
            assert {level: count.tolist() for level, count in counts.items()} == {
                level: count.tolist() for level, count in same_counts.items()
            }


def test_addresses_are_one_a_sequence_where_no_sequence_has_two():
    batch = random_batch(3, True)
    assert torch.equal(addresses_of(batch), batch.addresses[:, 0])
    batch.addresses[1, 4] = (batch.addresses[1, 4] + 3) % LEAVES
    assert torch.equal(addresses_of(batch), batch.addresses)
    with pytest.raises(AssertionError, match="addresses"):
        addresses_of(replace(batch, addresses=None))


@pytest.mark.parametrize("shape", [(7,), (2, 5), (0,)])
def test_rows_have_the_shape_of_the_addresses(shape):
    generator = torch.Generator().manual_seed(len(shape))
    addresses = torch.randint(GENERIC, LEAVES, shape, generator=generator)
    for level in LAYOUT.levels:
        rows = rows_of(LAYOUT, addresses, level)
        assert rows.shape == shape
        expected = [row_of(int(address), level) for address in addresses.flatten()]
        assert rows.flatten().tolist() == [MISSING if row is None else row for row in expected]


def test_groups_are_moved_whole():
    _, (groups,) = plan_blocks(LAYOUT, [random_batch(5, False)])
    moved = groups.to(torch.device("meta"))
    assert len(moved.groups) == len(groups.groups) > 0
    for tokens, counts in moved.groups:
        assert all(count.is_meta for count in counts.values())
        assert tokens is None or tokens.is_meta
