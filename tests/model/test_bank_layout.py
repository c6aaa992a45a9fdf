"""What the blocks of a memory bank hold: sizes, order, first values, rows of leaves."""

import math
from itertools import pairwise

import pytest
import torch

from kmem.config import ModelConfig
from kmem.config.bank import BankConfig
from kmem.model.bank_layout import MISSING, BankLayout
from kmem.model.decoder import Decoder
from kmem.model.export_tables import RowTable
from kmem.model.init import TRUNCATION
from kmem.model.shape import Shape
from tests.model import tiny
from tests.model.bank_parameters import BankParameters
from tests.model.random_banks import KINDS, shape

ANCHORS = [
    # layers, d, ranks, c0, M values of a block per level, fetched M, bank B
    (35, 512, (256, 64, 16, 0), 53_760, (13.763, 3.441, 0.860), 18.063, 4.624),
    (35, 512, (256, 64, 16, 4), 53_760, (13.763, 3.441, 0.860, 0.215), 18.278, 18.717),
    (24, 1024, (512, 128, 32, 0), 73_728, (37.749, 9.437, 2.359), 49.545, 12.684),
    (24, 2048, (768, 256, 16, 0), 147_456, (113.246, 37.749, 2.359), 153.354, 21.139),
    (18, 640, (512, 128, 32, 0), 34_560, (17.695, 4.424, 1.106), 23.224, 5.945),
    (24, 896, (512, 128, 32, 0), 64_512, (33.030, 8.258, 2.064), 43.352, 11.098),
    (16, 2048, (768, 256, 16, 0), 98_304, (75.497, 25.166, 1.573), 102.236, 14.093),
]


@pytest.mark.parametrize(("layers", "hidden", "ranks", "unit", "blocks", "fetched", "bank"), ANCHORS)
def test_sizes_of_the_paper(layers, hidden, ranks, unit, blocks, fetched, bank):
    model = {"hidden_size": hidden, "num_layers": layers}
    section = BankConfig(levels=ranks).model_dump()
    layout = BankLayout.of(Shape({**tiny.config(**model).model_dump(), "bank": section}))
    assert layout.row_values(1) == unit * ranks[0]
    assert [round(layout.row_values(level) / 1e6, 3) for level in layout.levels] == list(blocks)
    assert round(layout.fetched_values / 1e6, 3) == fetched
    assert round(layout.bank_values / 1e9, 3) == bank


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_of_every_kind(kind):
    """The fact sheet's formulas, which have as many key/value heads as query heads."""
    heads, width, hidden, inner, layers, rank = 4, 16, 32, 48, 3, 5
    values = {
        "ffn": 3 * rank * layers * hidden,
        "lora_qk": 2 * rank * layers * (hidden + heads * width),
        "lora_ov": 2 * rank * layers * (hidden + heads * width),
        "lora_ffn": 3 * rank * layers * (hidden + inner),
        "kv": 2 * rank * layers * heads * width,
    }
    layout = BankLayout.of(shape(kind, {**tiny.GQA, "num_kv_heads": 4}))
    assert layout.row_values(1) == values[kind]
    assert (layout.levels, layout.rows(3), layout.generic_row(3)) == ((1, 3), 28, 27)
    grouped = BankLayout.of(shape(kind))
    fewer = {"lora_qk": 2 * width, "lora_ov": 2 * width}.get(kind, 0)
    assert grouped.row_values(1) == values[kind] - rank * layers * fewer


def test_a_row_is_layers_parts_units_values():
    layout = BankLayout.of(shape())
    row = torch.arange(layout.row_values(3)).view(1, 3, 3, 3, 32)  # layers, parts, r, d
    for number, (layer, block) in enumerate(layout.by_layer(row.flatten(1), 3).items()):
        assert layer == number
        parts = layout.by_part(block)
        assert list(parts) == ["gate", "up", "down"]
        for part, values in enumerate(parts.values()):
            assert torch.equal(values, row[:, number, part])


@pytest.mark.parametrize(
    ("placement", "layers"),
    [
        ({}, range(7)),
        ({"placement": "first", "placed_layers": 2}, [0, 1]),
        ({"placement": "middle", "placed_layers": 2}, [2, 3]),
        ({"placement": "last", "placed_layers": 2}, [5, 6]),
        ({"placement": "last", "placed_layers": 7}, range(7)),
        ({"placement": "listed", "placed_layers": (0, 4)}, [0, 4]),
    ],
)
def test_placement(placement, layers):
    view = shape(model={"num_layers": 7}, **placement)
    layout = BankLayout.of(view)
    assert layout.layers == tuple(layers)
    assert ["bank" in layer.memories for layer in Decoder(view).layers] == [layer in layers for layer in range(7)]
    assert layout.of_layers(range(4)).layers == tuple(layer for layer in layers if layer < 4)


# First values


@pytest.mark.parametrize("kind", KINDS)
def test_first_values_do_not_depend_on_sharding(kind):
    layout = BankLayout.of(shape(kind))
    whole = layout.initial_rows(7, 3, 0, layout.rows(3))
    assert whole.shape == (28, layout.row_values(3))
    assert torch.equal(torch.cat([layout.initial_rows(7, 3, 0, 11), layout.initial_rows(7, 3, 11, 28)]), whole)
    stages = [layout.of_layers(range(2)), layout.of_layers(range(2, 3))]
    assert torch.equal(torch.cat([stage.initial_rows(7, 3, 5, 9) for stage in stages], dim=1), whole[5:9])
    drawn = whole[:, whole[0] != 0]
    assert len(drawn.unique()) > 0.99 * drawn.numel()  # no two blocks, layers or parts alike
    assert not torch.equal(layout.initial_rows(8, 3, 0, 28), whole)
    assert not torch.equal(layout.initial_rows(7, 1, 0, 1)[:, :9], whole[:1, :9])


@pytest.mark.parametrize("kind", KINDS)
def test_distribution_of_first_values(kind):
    layout = BankLayout.of(shape(kind, levels=(64,), model={"init_std": 0.5}))
    writing = {"down", "values", *(f"{name}_proj.b" for name in ("gate", "up", "down", "q", "k", "v", "o"))}
    block = layout.by_layer(layout.initial_rows(0, 1, 0, 4), 1)[1]
    for part in layout.parts:
        values = layout.by_part(block)[part.name]
        if part.name in writing:
            assert not values.any()
            continue
        bound, std = (1 / math.sqrt(part.width), 1 / math.sqrt(3 * part.width))
        if kind in ("ffn", "kv"):
            bound, std = 0.5 * TRUNCATION, 0.5
        assert 0.97 * bound < values.abs().max() <= bound
        assert abs(float(values.std()) / std - 1) < 0.05
        assert abs(float(values.mean())) < 0.05 * std


def test_rows_of_leaves():
    layout = BankLayout.of(shape(levels=(5, 2, 3)))
    leaves = torch.tensor([[0, 26], [14, MISSING]])
    assert {level: rows.tolist() for level, rows in layout.row_ids(leaves).items()} == {
        1: [[0, 2], [1, MISSING]],
        2: [[0, 8], [4, MISSING]],
        3: [[0, 26], [14, MISSING]],
    }
    drawn = torch.tensor([[True], [False]])
    assert layout.row_ids(leaves, drawn, levels=[2])[2].tolist() == [[9, 9], [4, MISSING]]
    assert list(layout.row_ids(leaves, levels=[3, 2])) == [2, 3]
    assert layout.row_ids(torch.full((3,), MISSING), True)[3].tolist() == [27] * 3
    assert list(BankLayout.of(shape()).row_ids(leaves, levels=[1, 2])) == [1]  # level 2 has no blocks


def test_rows_of_subtrees():
    """Those that the leaves of the subtrees use, and the generic ones."""
    layout = BankLayout.of(shape(levels=(5, 2, 3)))
    for paths in ([(0,)], [(2,)], [(0, 1), (0, 2)], [(1, 0, 2), (2,)], [(0,), (1,), (2,)], [(2, 2, 2)]):
        below = [
            leaf for path in paths for leaf in range(27) if (leaf // 9, leaf // 3 % 3, leaf % 3)[: len(path)] == path
        ]
        used = layout.row_ids(torch.tensor([*below, MISSING]), torch.tensor([False] * len(below) + [True]))
        for level in layout.levels:
            ranges = layout.subtree_rows(level, paths)
            assert [row for rows in ranges for row in rows] == used[level].unique().tolist()
            assert all(one.stop < other.start for one, other in pairwise(ranges))


@pytest.mark.parametrize("leaf", [27, -2])
def test_leaves_outside_the_tree_are_refused(leaf):
    with pytest.raises(ValueError, match=rf"^addresses .*{leaf}\b.*\b0 to 26\b.*\b3 levels of 3 children"):
        BankLayout.of(shape()).row_ids(torch.tensor([1, leaf]))


def test_a_tree_has_the_form_of_its_bank():
    layout = BankLayout.of(shape())
    layout.check_tree({"children": 3, "levels": 3}, "trees/own")
    for record, message in [
        ({"children": 4, "levels": 3}, r"model\.bank\.children: 3\b.*\b4 \(trees/own\).*--children 3"),
        ({"children": 3, "levels": 4}, r"model\.bank\.levels: 3\b.*\b4 \(trees/own\).*\brank of 0\b.*--levels 3"),
        ({"children": 3, "levels": 2}, r"model\.bank\.levels: 3\b.*\b2 \(trees/own\).*\blast ranks\b.*--levels 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            layout.check_tree(record, "trees/own")


def test_generic_blocks_of_a_bank_without_are_refused():
    layout = BankLayout.of(shape(generic=0.0))
    assert layout.rows(3) == 27
    assert layout.row_ids(torch.tensor([4]), torch.tensor([False]))[3].tolist() == [4]
    with pytest.raises(ValueError, match=r"bank\.generic\.probability"):
        layout.row_ids(torch.tensor([4, 3]), torch.tensor([False, True]))


def test_names_are_those_of_exports():
    bank = BankParameters(BankLayout.of(shape()), {3: [20, 8]})
    assert {name: list(values.shape) for name, values in bank.state_dict(prefix="bank.").items()} == {
        "bank.level1.parts.0": [4, 3 * 3 * 5 * 32],
        "bank.level3.parts.0": [20, 3 * 3 * 3 * 32],
        "bank.level3.parts.1": [8, 3 * 3 * 3 * 32],
    }
    assert isinstance(bank.table(3), RowTable)


def test_shape_of_a_model_without_a_bank():
    assert Shape(ModelConfig.model_validate(tiny.config().model_dump()).model_dump()).bank_layers == ()
