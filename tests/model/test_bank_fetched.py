"""What the blocks of a memory bank compute."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import DynamicCache

from kmem.model.bank_blocks import BankInput, group_tokens
from kmem.model.bank_fetched import distinct_rows, without_blocks
from kmem.model.bank_layout import MISSING, BankLayout, bank_table_name, bank_table_part_name
from kmem.model.decoder import Decoder
from kmem.model.mapped_rows import MappedRows
from kmem.model.shape import Shape
from tests.model import tiny
from tests.model.bank_parameters import BankParameters, FetchedBlocks
from tests.model.random_banks import BY_TOKEN, KINDS, LEAVES, MLA, addressed, random_bank, shape, without_bank

MODELS = [
    ("ffn", {}),
    ("ffn", {"moe": tiny.SIGMOID}),
    ("ffn", {"moe": {**tiny.SOFTMAX, "chain": {"iterations": 2}}}),
    ("ffn", {"model": {"hyper_connections": {"branches": 2}}}),
    ("ffn", {"attention": MLA}),
    ("lora_ffn", {}),
    ("lora_ffn", {"moe": {**tiny.SOFTMAX, "first_dense_layers": 1}, "placement": "first", "placed_layers": 1}),
    ("lora_qk", {}),
    ("lora_ov", {"model": {"hyper_connections": {"branches": 2}}}),
    ("kv", {}),
    ("kv", {"attention": {**tiny.GQA, "qk_norm": True, "rotary_fraction": 0.5}}),
    ("kv", {"attention": MLA}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "changes"), MODELS)
def test_every_kind_starts_as_a_no_op(kind, changes, dtype):
    view = shape(kind, **changes)
    decoder = tiny.decoder(view).to(dtype)
    plain = Decoder(without_bank(view))
    plain.load_state_dict(decoder.state_dict())  # a bank adds no parameter to the layers
    bank = BankParameters(BankLayout.of(view))
    bank.initialise_(3)
    ids, positions = tiny.tokens(6, 8)
    expected = plain.to(dtype)(ids, positions)
    for leaves in (LEAVES, BY_TOKEN.repeat(3, 1)):
        assert torch.equal(decoder(ids, positions, memories={"bank": bank(leaves).inputs(8)}), expected)
    assert torch.equal(decoder(ids, positions, memories={"bank": bank(LEAVES, generic=True).inputs(8)}), expected)
    decoder.double()
    random = random_bank(view)
    difference = decoder(ids, positions, memories={"bank": random(LEAVES).inputs(8)}) - plain.double()(ids, positions)
    changed = difference.flatten(1).abs().amax(1) > 1e-6
    assert changed.tolist() == (LEAVES != MISSING).tolist()
    none = decoder(ids, positions, memories={"bank": without_blocks(random.layout)})
    assert torch.equal(none, plain(ids, positions))


def test_a_layer_with_a_bank_asks_for_its_blocks():
    view = shape(placement="last", placed_layers=1)
    ids, positions = tiny.tokens()
    with pytest.raises(AssertionError, match=r"memories .*\['bank'\]"):
        Decoder(view)(ids, positions)
    with pytest.raises(AssertionError, match=r"memories .*\['bank'\]"):
        Decoder(without_bank(view))(ids, positions, memories={"bank": without_blocks(BankLayout.of(view))})


# Addresses


def test_distinct_rows():
    ids = torch.tensor([[7, MISSING, 2], [2, 7, 9]])
    rows, places = distinct_rows(ids)
    assert rows.tolist() == [2, 7, 9]
    assert places.tolist() == [[1, MISSING, 0], [0, 1, 2]]
    rows, places = distinct_rows(torch.tensor([MISSING]))
    assert (rows.tolist(), places.tolist()) == ([], [MISSING])


def test_one_order_of_tokens_serves_all_levels_of_a_tree():
    layout = BankLayout.of(shape(levels=(5, 2, 3)))

    def groups(leaves, tokens, generic=False):
        found = {level: distinct_rows(rows) for level, rows in layout.row_ids(leaves, generic).items()}
        return group_tokens(
            {level: places for level, (_, places) in found.items()},
            {level: len(rows) for level, (rows, _) in found.items()},
            tokens,
        )

    (shared,) = groups(torch.tensor([14, 2, 14, 26, MISSING, 12]), 2)
    assert shared.tokens.tolist() == [2, 3, 10, 11, 0, 1, 4, 5, 6, 7]
    assert {level: counts.tolist() for level, counts in shared.counts.items()} == {
        1: [2, 6, 2],
        2: [2, 6, 2],
        3: [2, 2, 4, 2],
    }
    (shared,) = groups(BY_TOKEN, 8, torch.tensor([[False], [True]]))
    assert (len(shared.tokens), shared.counts[1].tolist()) == (15, [5, 2, 8])
    (shared,) = groups(torch.tensor([3, 3, 9]), 4)  # sorted already
    assert shared.tokens is None
    assert groups(torch.tensor([MISSING, MISSING]), 4) == ()


# Values


def reference(kind, layout, table, rows, layer, x, model):
    """One token of one layer: what memory makes of x, whose meaning is the kind's. Loops only."""
    alpha, found = layout.alpha, []
    for level, row in rows.items():
        if row != MISSING:
            block = layout.by_layer(table(level)[None, row], level)[layer]
            found.append({name: part[0] for name, part in layout.by_part(block).items()})
    if kind == "ffn":
        out = torch.zeros_like(x)
        for parts in found:
            out = out + parts["down"].T @ (F.silu(parts["gate"] @ x) * (parts["up"] @ x))
        return out
    if kind == "kv":
        heads = []
        for head, query in enumerate(x):
            out = 0
            for parts in found:
                keys = parts["keys"].unflatten(1, (len(x), -1))[:, head]
                values = parts["values"].unflatten(1, (len(x), -1))[:, head]
                out = out + (keys @ query / math.sqrt(len(query))).softmax(0) @ values
            heads.append(out)
        return torch.cat(heads) if found else None
    updates = {}
    for name in {"lora_ffn": "gate up down", "lora_qk": "q k", "lora_ov": "o v"}[kind].split():
        delta = 0
        for parts in found:
            read, written = parts[f"{name}_proj.a"], parts[f"{name}_proj.b"]
            delta = delta + alpha / len(read) * written.T @ read
        updates[name] = delta
    return updates


ADDRESSES = {
    "sequences": LEAVES[:2].repeat(3),
    "one sequence": torch.tensor([5]),
    "duplicates and none": LEAVES,
    "tokens": BY_TOKEN,
    "no block": torch.tensor([MISSING, MISSING]),
}


def gaps(layout, leaves, case):
    """Row ids; in the last case with holes that no path has, as where a cluster's block was erased."""
    ids = layout.row_ids(leaves)
    if case == "holes":
        ids[3] = ids[3].where(ids[3] != 5, MISSING)
        ids[1] = ids[1].where(leaves != 20, 1)
    return ids


@pytest.mark.parametrize("case", [*ADDRESSES, "holes"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_a_loop_over_tokens(kind, case):
    view = shape(kind)
    layout, bank = BankLayout.of(view), random_bank(view)
    leaves = ADDRESSES.get(case, BY_TOKEN)
    ids = gaps(layout, leaves, case)
    fetched = FetchedBlocks.read(layout, ids, bank.sources)
    assert all(len(rows) == len(ids[level][ids[level] >= 0].unique()) for level, rows in fetched.rows.items())
    sequences, tokens, layer = len(leaves), 8, 1
    blocks = fetched.inputs(tokens)[layer]
    by_token = {level: addressed(found, tokens) for level, found in ids.items()}

    def table(level):
        return bank.table(level).parts[0].detach()

    def loop(x):
        def one(b, t):
            rows = {level: int(found[b, t]) for level, found in by_token.items()}
            return reference(kind, layout, table, rows, layer, x[b, t], None)

        return [[one(b, t) for t in range(tokens)] for b in range(sequences)]

    if kind == "kv":
        query = tiny.random(sequences, tokens, 4, 16, dtype=torch.float64)
        found = blocks.attend(query)
        expected = [
            torch.stack([torch.zeros(64, dtype=torch.float64) if item is None else item for item in row])
            for row in loop(query)
        ]
        torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-12)
        assert blocks.widen(query, query) is query
        return
    x, out = (tiny.random(sequences, tokens, 32, seed=seed, dtype=torch.float64) for seed in (1, 2))
    if kind == "ffn":
        expected = torch.stack([torch.stack(row) for row in loop(x)])
        torch.testing.assert_close(blocks.widen(x, out), out + expected, rtol=0, atol=1e-12)
        assert blocks.adapt("q_proj", x, out) is out
        assert blocks.attend(x) is None
        return
    updates = loop(x)
    for name in updates[0][0]:
        part_in, part_out = (next(p.width for p in layout.parts if p.name == f"{name}_proj.{half}") for half in "ab")
        x, out = (
            tiny.random(sequences, tokens, width, seed=seed, dtype=torch.float64)
            for seed, width in ((1, part_in), (2, part_out))
        )
        expected = out.clone()
        for b in range(sequences):
            for t in range(tokens):
                delta = updates[b][t][name]
                expected[b, t] += 0 if isinstance(delta, int) else delta @ x[b, t]
        torch.testing.assert_close(blocks.adapt(f"{name}_proj", x, out), expected, rtol=0, atol=1e-12)
    assert blocks.adapt("other_proj", x, out) is out


def test_heads_are_shared_out_where_blocks_are_many(monkeypatch):
    bank = random_bank(shape("kv"))
    query = tiny.random(6, 8, 4, 16, dtype=torch.float64)
    blocks = bank(LEAVES).inputs(8)[0]
    expected = blocks.attend(query)
    for most in (1, 7, 10):
        monkeypatch.setattr("kmem.model.bank_blocks.MOST_GROUPS", most)
        torch.testing.assert_close(blocks.attend(query), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_products_of_many_blocks_are_cut(kind, monkeypatch):
    """Into products of as many groups as grouped_mm takes, with the same results and gradients."""
    monkeypatch.setattr("kmem.model.matmul._USE_ONEDNN", False)  # which takes any number
    view = shape(kind)
    decoder, bank, taken = tiny.decoder(view), random_bank(view, torch.float32), []
    ids, positions = tiny.tokens(6, 8)
    grouped_mm = F.grouped_mm

    def counted(rows, weights, offs):
        taken.append(len(offs))
        return grouped_mm(rows, weights, offs=offs)

    monkeypatch.setattr(F, "grouped_mm", counted)
    found = []
    for most in (1023, 2):
        for module in ("matmul", "bank_blocks"):
            monkeypatch.setattr(f"kmem.model.{module}.MOST_GROUPS", most)
        bank.zero_grad()
        hidden = decoder(ids, positions, memories={"bank": bank(addressed(LEAVES)).inputs(8)})
        hidden.square().sum().backward()
        found.append([hidden, *(parameter.grad for parameter in bank.parameters())])
        assert max(taken) <= most
        assert most == 2 or max(taken) > 2
        taken.clear()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["ffn", "lora_qk", "kv"])
def test_forms_of_an_address_agree(kind):
    view = shape(kind)
    layout, bank = BankLayout.of(view), random_bank(view)
    decoder = tiny.decoder(view).double()
    ids, positions = tiny.tokens(6, 8)
    whole = decoder(ids, positions, memories={"bank": bank(LEAVES).inputs(8)})
    packed = decoder(ids, positions, memories={"bank": bank(addressed(LEAVES)).inputs(8)})
    torch.testing.assert_close(packed, whole, rtol=0, atol=1e-12)
    alone = [decoder(ids[i, None], positions[:1], memories={"bank": bank(LEAVES[i, None]).inputs(8)}) for i in range(6)]
    torch.testing.assert_close(torch.cat(alone), whole, rtol=0, atol=1e-12)
    split = BankParameters(layout, {1: [2, 2], 3: [27, 1]}).double()
    for level in layout.levels:
        start = 0
        for part in split.table(level).parts:
            part.data.copy_(bank.table(level).parts[0][start : start + len(part)])
            start += len(part)
    assert torch.equal(decoder(ids, positions, memories={"bank": split(LEAVES).inputs(8)}), whole)


def test_levels_are_the_units_of_one_wider_feed_forward():
    """Concatenated and added form: a model whose feed-forward has all levels' units beside its own."""
    view = shape(levels=(5, 2, 3))
    layout, bank, leaf = BankLayout.of(view), random_bank(view), 14
    decoder = tiny.decoder(view).double()
    wide = {**without_bank(view).as_dict(), "intermediate_size": 48 + 5 + 2 + 3}
    widened = Decoder(Shape(wide)).double()
    state = decoder.state_dict()
    rows = {level: found for level, found in layout.row_ids(torch.tensor([leaf])).items()}
    for layer in layout.layers:
        prefix = f"layers.{layer}.feed_forward."
        for level, row in rows.items():
            parts = layout.by_part(layout.by_layer(bank.table(level)(row), level)[layer])
            for name in ("gate", "up"):
                name, part = f"{prefix}{name}_proj.weight", parts[name][0]
                state[name] = torch.cat((state[name], part))
            name = f"{prefix}down_proj.weight"
            state[name] = torch.cat((state[name], parts["down"][0].T), dim=1)
    widened.load_state_dict(state)
    ids, positions = tiny.tokens(2, 8)
    added = decoder(ids, positions, memories={"bank": bank(torch.tensor([leaf, leaf])).inputs(8)})
    torch.testing.assert_close(added, widened(ids, positions), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_levels_add_up(kind):
    """A level adds what it adds alone, whatever others do; lora_ffn adds to weights, not to outputs."""
    view = shape(kind)
    bank = random_bank(view)
    x = tiny.random(6, 8, *((4, 16) if kind == "kv" else (32,)), dtype=torch.float64)
    first = next(iter(bank.layout.parts)).name.partition(".")[0]
    width = 64 if kind in ("kv", "lora_qk") else 48 if kind == "lora_ffn" else 32

    def added(levels=None):
        blocks = bank(LEAVES, levels=levels).inputs(8)[0]
        if kind == "kv":
            return blocks.attend(x)
        start = x.new_zeros(6, 8, width)
        if kind == "ffn":
            return blocks.widen(x, start)
        source = tiny.random(6, 8, 64, dtype=torch.float64) if first == "o_proj" else x
        return blocks.adapt(first, source, start)

    torch.testing.assert_close(added([1]) + added([3]), added(), rtol=0, atol=1e-12)
    assert not added([]).any()
    assert not torch.allclose(added([1]), added())


@pytest.mark.parametrize("kind", KINDS)
def test_generic_blocks_are_a_row_of_their_own(kind):
    view = shape(kind)
    bank, decoder = random_bank(view), tiny.decoder(view).double()
    ids, positions = tiny.tokens(6, 8)
    drawn = torch.tensor([False, True, False, True, False, False])
    mixed = decoder(ids, positions, memories={"bank": bank(LEAVES, generic=drawn).inputs(8)})
    fetched, generic = (
        decoder(ids, positions, memories={"bank": bank(LEAVES, generic=on).inputs(8)}) for on in (False, True)
    )
    torch.testing.assert_close(mixed, torch.where(drawn[:, None, None], generic, fetched), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_a_cache(kind):
    """A context's blocks are fetched once and serve every forward after."""
    view = shape(kind)
    decoder, fetched = tiny.decoder(view).double(), random_bank(view)(LEAVES)
    ids, positions = tiny.tokens(6, 8)
    whole = decoder(ids, positions, memories={"bank": fetched.inputs(8)})
    cache, steps = DynamicCache(), []
    for part in (slice(0, 5), slice(5, 6), slice(6, 8)):
        bank = fetched.inputs(part.stop - part.start)
        steps.append(decoder(ids[:, part], positions[:, part], cache=cache, memories={"bank": bank}))
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=0, atol=1e-9)


# Gradients


@pytest.mark.parametrize("leaves", [LEAVES, BY_TOKEN.repeat(2, 1)], ids=["sequences", "tokens"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind, leaves):
    view = shape(kind, levels=(2, 0, 1), attention={"num_heads": 2, "head_dim": 8}, model={"hidden_size": 8})
    layout = BankLayout.of(view)
    bank = random_bank(view)
    fetched = bank(leaves)
    tokens = 8 if leaves.dim() == 2 else 2
    groups = fetched.inputs(tokens)[0].groups
    blocks = [layout.by_layer(rows, level)[0].detach().clone().requires_grad_() for level, rows in fetched.rows.items()]
    if kind == "kv":
        x = [tiny.random(len(leaves), tokens, 2, 8, dtype=torch.float64)]
    else:
        projection = layout.parts[0].name.partition(".")[0]
        widths = [layout.parts[0].width, layout.parts[-1 if kind == "ffn" else 1].width]
        x = [tiny.random(len(leaves), tokens, width, seed=width, dtype=torch.float64) for width in widths]

    def compute(*tensors):
        values = dict(zip(fetched.rows, tensors[: len(blocks)], strict=True))
        at, inputs = BankInput(layout, groups, values), tensors[len(blocks) :]
        if kind == "kv":
            return at.attend(*inputs)
        return at.widen(*inputs) if kind == "ffn" else at.adapt(projection, *inputs)

    tensors = (*blocks, *(item.requires_grad_() for item in x))
    assert torch.autograd.gradcheck(compute, tensors, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "changes"), MODELS)
def test_only_fetched_rows_have_gradients(kind, changes, dtype):
    view = shape(kind, **changes)
    decoder = tiny.decoder(view).to(dtype)
    bank = random_bank(view, torch.float32)
    ids, positions = tiny.tokens(6, 8)
    hidden = decoder(ids, positions, memories={"bank": bank(LEAVES, generic=torch.arange(6) == 1).inputs(8)})
    decoder.loss(hidden, ids).backward()
    for level in bank.layout.levels:
        touched = bank.table(level).parts[0].grad.abs().amax(1).nonzero().flatten().tolist()
        fetched = bank.layout.row_ids(torch.tensor([5, 20]))[level].unique().tolist()
        assert touched == [*fetched, bank.layout.generic_row(level)]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.layers.parameters())


def test_only_what_writes_has_a_gradient_at_first():
    view = shape()
    bank = BankParameters(BankLayout.of(view))
    bank.initialise_(0)
    decoder, (ids, positions) = tiny.decoder(view), tiny.tokens(6, 8)
    decoder.loss(decoder(ids, positions, memories={"bank": bank(LEAVES).inputs(8)}), ids).backward()
    gradient = bank.table(1).parts[0].grad[:1]
    parts = bank.layout.by_part(bank.layout.by_layer(gradient, 1)[0])
    assert {name: bool(part.any()) for name, part in parts.items()} == {"gate": False, "up": False, "down": True}


def test_fp32_groups_of_many_tokens_agree_with_fp64():
    """The sizes at which the CPU's own grouped product serves, with ranks that it pads."""
    view = shape(levels=(20, 9, 3))
    bank, decoder = random_bank(view), tiny.decoder(view).double()
    ids, positions = tiny.tokens(6, 70)
    leaves = LEAVES[:, None].expand(-1, 70).clone()
    leaves[2, 33:] = 14
    expected = decoder(ids, positions, memories={"bank": bank(leaves).inputs(70)})
    found = decoder.float()(ids, positions, memories={"bank": bank.float()(leaves).inputs(70)})
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("longest", [0, 1 << 20])
def test_blocks_stay_in_files(longest, tmp_path, monkeypatch):
    monkeypatch.setattr("kmem.model.mapped_rows.LONG_ROW", longest)
    layout = BankLayout.of(shape())
    bank = random_bank(shape(), torch.float32)
    cuts = {1: [4], 3: [20, 8]}
    tensors, parts = {}, {}
    for level, rows in cuts.items():
        values = bank.table(level).parts[0].detach().split(rows)
        names = [bank_table_part_name(level, part) for part in range(len(rows))]
        tensors |= {name: value.clone() for name, value in zip(names, values, strict=True)}
        parts[level] = [(tmp_path / "bank.safetensors", name, count) for name, count in zip(names, rows, strict=True)]
    save_file(tensors, tmp_path / "bank.safetensors")
    sources = {
        level: MappedRows.open(bank_table_name(level), layout.row_values(level), found)
        for level, found in parts.items()
    }
    drawn = torch.arange(6) == 1
    fetched = FetchedBlocks.read(layout, layout.row_ids(LEAVES, drawn), sources)
    expected = bank(LEAVES, drawn)
    for level in layout.levels:
        assert torch.equal(fetched.rows[level], expected.rows[level])
        assert torch.equal(fetched.places[level], expected.places[level])
