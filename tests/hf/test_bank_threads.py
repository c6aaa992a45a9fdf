"""Threads that use one model with a memory bank at once: each gets what it gets alone, to the last bit."""

import sys
import threading

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from kmem.hf.custom_code import register
from kmem.hf.export import export
from tests.hf.banks import BANKS, random_bank, router, write_bank_run
from tests.hf.loaded import GREEDY, SAME, opened
from tests.hf.models import VOCABULARY

THREADS, ROUNDS = 3, 3
SCORED = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    register()
    folder = tmp_path_factory.mktemp("threads")
    export(write_bank_run(folder / "run", BANKS["ffn"], random_bank(BANKS["ffn"])), folder / "out", say=str)
    return folder / "out"


@pytest.fixture
def often():
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def at_once(tasks):
    """What each task gives, in a thread of its own."""
    found, start = [None] * len(tasks), threading.Barrier(len(tasks))

    def run(number):
        start.wait()
        try:
            found[number] = tasks[number]()
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def elsewhere(task):
    (found,) = at_once([task])
    if isinstance(found, Exception):
        raise found
    return found


def tokens(seed, rows=2, length=9):
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(seed):
    ids, mask = tokens(seed), torch.ones(2, 9, dtype=torch.int64)
    mask[1, : seed % 5] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


WAYS = {
    "forward": lambda model, seed: model(tokens(seed)).logits,
    "forward with addresses": lambda model, seed: model(tokens(7), addresses=torch.tensor([seed % 9, 8])).logits,
    "addresses": lambda model, seed: model.generate(
        tokens(7), **GREEDY, addresses=torch.tensor([seed % 9, 8]), num_beams=2
    ),
    "route": lambda model, seed: model.route(tokens(seed)),
    "greedy": lambda model, seed: torch.stack(model.generate(**padded(seed), **SCORED).logits),
    "beams": lambda model, seed: model.generate(**padded(seed), **GREEDY, num_beams=3),
    "no cache": lambda model, seed: torch.stack(model.generate(**padded(seed), **SCORED, use_cache=False).logits),
    "chunks": lambda model, seed: model.generate(**padded(seed), **GREEDY, prefill_chunk_size=2),
    "static": lambda model, seed: model.generate(
        **padded(seed), **GREEDY, cache_implementation="static", disable_compile=True
    ),
    "prompt lookup": lambda model, seed: model.generate(tokens(seed, rows=1), **GREEDY, prompt_lookup_num_tokens=2),
}


@torch.no_grad()
@pytest.mark.parametrize("way, memory", [*((way, "mmap") for way in WAYS), ("greedy", "device")])
def test_calls_at_once_are_calls_one_by_one(way, memory, exported, often):
    model = opened(exported, tables=memory)
    seeds = range(THREADS)
    assert len(router().leaves([row for seed in seeds for row in tokens(seed)]).unique()) > 2
    with torch.no_grad():
        expected = [WAYS[way](model, seed) for seed in seeds]
    if way != "route":
        assert not torch.equal(expected[0], expected[1])

    @torch.no_grad()
    def several(seed):
        return [WAYS[way](model, seed) for _ in range(ROUNDS)]

    for seed, found in enumerate(at_once([lambda seed=seed: several(seed) for seed in seeds])):
        assert isinstance(found, list), found
        assert all(torch.equal(result, expected[seed]) for result in found)


@torch.no_grad()
def test_ways_at_once_beside_fetches(exported, often):
    """All ways, among them one that fetches and forgets what they all give way to."""
    model = opened(exported)
    names = ["forward with addresses", "addresses"]
    expected = [WAYS[name](model, seed) for name in names for seed in range(2)]

    @torch.no_grad()
    def fetch(first):
        found = []
        for number in range(20):
            leaves = torch.tensor([(first + number) % 9, number % 9])
            found.append(torch.equal(model.fetch(addresses=leaves).leaves, leaves))
            if number % 7 == 3:
                model.forget()
        return all(found)

    def again(name, seed):
        with torch.no_grad():
            return [WAYS[name](model, seed) for _ in range(ROUNDS)]

    tasks = [lambda name=name, seed=seed: again(name, seed) for name in names for seed in range(2)]
    *found, first, second = at_once([*tasks, lambda: fetch(1), lambda: fetch(5)])
    assert (first, second) == (True, True)
    for results, own in zip(found, expected, strict=True):
        assert isinstance(results, list), results
        assert all(torch.equal(result, own) for result in results)


class Between(StoppingCriteria):
    """Does something once, between the second token and the third."""

    def __init__(self, act):
        self.act, self.calls = act, 0

    def __call__(self, input_ids, scores, **options):
        self.calls += 1
        if self.calls == 2:
            self.act()
        return torch.zeros(len(input_ids), dtype=torch.bool)


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_generation_keeps_what_it_began_with(use_cache, exported):
    prompts = tokens(1)
    own = router().leaves(prompts)
    other = (own + 4) % 9

    def generated(model, act=lambda: None):
        between = StoppingCriteriaList([Between(act)])
        return torch.stack(
            model.generate(prompts, **SCORED, use_cache=use_cache, stopping_criteria=between).logits, dim=1
        )

    alone = generated(opened(exported))
    model = opened(exported)
    reads = []
    for level, source in model.contexts.sources.items():
        model.contexts.sources[level] = lambda ids, source=source: (reads.append(len(ids)), source(ids))[1]

    def changes(model):
        elsewhere(lambda: model.fetch(addresses=other))
        elsewhere(lambda: model.generate(prompts, **GREEDY))
        elsewhere(lambda: setattr(model, "bank_levels", [1]))
        reads.clear()

    found = generated(model, lambda: changes(model))
    assert torch.equal(found, alone)
    assert not reads  # its own rows are still there
    # What begins afterwards goes by what is set, in whichever thread.
    changed = opened(exported)
    changed.fetch(addresses=other)
    changed.bank_levels = [1]
    expected = generated(changed)
    assert not torch.equal(expected, alone)
    assert torch.equal(generated(model), expected)
    assert torch.equal(elsewhere(lambda: generated(model)), expected)
    # .. and what is fetched is let go of by all.
    elsewhere(lambda: (model.forget(), setattr(model, "bank_levels", None)))
    assert torch.equal(generated(model), alone)
    assert torch.equal(generated(model, lambda: elsewhere(model.forget)), alone)
    # What a generation's own thread does counts from its next token on.
    half = generated(model, lambda: model.fetch(addresses=other))
    assert torch.equal(half[:, :2], alone[:, :2])
    assert not torch.equal(half[:, 2:], alone[:, 2:])
    assert torch.equal(model.contexts.controls.leaves, other)


@pytest.mark.parametrize("way", SAME)
def test_addresses_go_through_every_way_to_generate(way, exported):
    model, prompts, leaves = opened(exported), tokens(3), torch.tensor([2, 7])
    model.fetch(addresses=leaves)
    expected = [model.generate(prompts, **GREEDY, **(kind() if callable(kind) else kind)) for kind in SAME[way]]
    model.forget()
    found = [
        model.generate(prompts, **GREEDY, addresses=leaves, **(kind() if callable(kind) else kind))
        for kind in SAME[way]
    ]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert model.contexts.controls.leaves is None
    assert not torch.equal(found[0], model.generate(prompts, **GREEDY, **SAME[way][1]))


def test_route_changes_nothing(exported):
    model = opened(exported)
    own = model.route(tokens(4))
    assert torch.equal(own, router().leaves(tokens(4)))
    first = int(own[0])
    assert int(model.route(tokens(4)[:1], blocked=[(first // 3,)])) // 3 != first // 3
    assert model.contexts.controls.leaves is None
    model.fetch(addresses=[1])
    assert torch.equal(model.route(tokens(4)), own)
    assert model.contexts.controls.leaves.tolist() == [1]
