"""lm-evaluation-harness scores with what a bank fetches for the context alone."""

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from kmem.eval.request_contexts import fetches, preceding, score_by_leaf
from kmem.hf.loading import load
from tests.hf.banks import BANKS, random_bank, router, write_bank_run
from tests.hf.models import NATIVE, TEXT, logits, random_weights, write_run

PAIRS = [
    ("the model", " reads the text"),
    ("the model reads", " the text"),  # the same text, of which another part is the context
    ("a reader of the text", " trains"),
    ("a reader of the text", " reads"),
    ("another model trains", " and a reader reads"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(kmem's model, its run)."""
    decoder = random_bank(BANKS["ffn"])
    reader = write_bank_run(tmp_path_factory.mktemp("harness") / "run", BANKS["ffn"], decoder)
    return decoder, reader.run_folder


def log_likelihood(scores, ids, first):
    """Of the tokens from `first` on, by logits [1, T, V] of all of them; and whether each is the likeliest."""
    said, wanted = scores[0, first - 1 : -1].log_softmax(-1), torch.tensor(ids[first:])
    return float(said.gather(1, wanted[:, None]).sum()), bool((said.argmax(-1) == wanted).all())


def expected(decoder, context, scored, leaf):
    ids = torch.tensor([context + scored])
    return log_likelihood(decoder.bank_logits(ids, torch.tensor([leaf])), context + scored, len(context))


def test_requests_are_scored_with_the_blocks_of_their_contexts(run):
    decoder, folder = run
    model, tokenizer = load(folder)
    contexts = [tokenizer.encode(before) for before, _ in PAIRS]
    texts = [context + tokenizer.encode(after) for context, (_, after) in zip(contexts, PAIRS, strict=True)]
    asked, reads = [], []
    for level, source in model.contexts.sources.items():

        def reading(rows, level=level, source=source):
            reads.append((level, rows.tolist()))
            return source(rows)

        model.contexts.sources[level] = reading

    @torch.no_grad()
    def score(numbers):
        asked.append(numbers)
        return [log_likelihood(model(torch.tensor([texts[n]])).logits, texts[n], len(contexts[n])) for n in numbers]

    assert fetches(model)
    found = score_by_leaf(model, contexts, score)
    leaves = router().leaves(contexts).tolist()
    assert len(set(leaves)) > 1
    assert len(asked) == len(set(leaves))
    rows = [(level, row) for level, some in reads for row in some]
    assert len(rows) == len(set(rows))  # none is read twice
    for pair, (context, text, leaf) in zip(found, zip(contexts, texts, leaves, strict=True), strict=True):
        want = expected(decoder, context, text[len(context) :], leaf)
        assert pair[0] == pytest.approx(want[0], abs=1e-4)
        assert pair[1] == want[1]
    assert model.contexts.controls.leaves is None  # later requests begin anew
    assert score_by_leaf(model, [], score) == []
    model.bank_control = "none"
    assert not fetches(model)


def test_windows_are_preceded_by_what_was_read():
    assert preceding([1, 2, 3, 4, 5, 6, 7], [3, 3, 1], 3, 9) == [[9], [1, 2, 3], [4, 5, 6]]
    assert preceding([1, 2, 3], [2, 1], 1, 9) == [[9], [2]]
    assert preceding([], [], 4, 9) == []


@pytest.fixture
def harness():
    """`KmemLM`, and how to ask it: ask(kind, arguments)."""
    pytest.importorskip("lm_eval", reason="pip install 'lm-eval>=0.4.9,<0.5' accelerate")
    pytest.importorskip("accelerate", reason="pip install 'lm-eval>=0.4.9,<0.5' accelerate")
    from kmem.eval.harness import KmemLM

    def ask(model, kind, some):
        return getattr(model, kind)([SimpleNamespace(args=arguments) for arguments in some])

    return KmemLM, ask


@torch.no_grad()
def test_the_harness_fetches_for_contexts(run, harness):
    decoder, folder = run
    open_model, ask = harness
    own = router()
    # The harness's own cache takes the logits of a text for another split of it, bank or not; 0.4.13 misplaces them.
    for options, route in [
        ({"logits_cache": False}, own.leaves),
        ({"blocked": 1}, lambda contexts: own.leaves(contexts, [(1,)])),
        ({"blocked": "0;2.1"}, lambda contexts: own.leaves(contexts, [(0,), (2, 1)])),
    ]:
        model = open_model(str(folder), batch_size=2, **options)
        encode = model.tok_encode
        pairs = PAIRS if "logits_cache" in options else PAIRS[1:]
        for (score, greedy), (before, after) in zip(ask(model, "loglikelihood", pairs), pairs, strict=True):
            context, whole = encode(before), encode(before + after)
            want = expected(decoder, context, whole[len(context) :], int(route([context])))
            assert score == pytest.approx(want[0], abs=1e-4)
            assert greedy == want[1]

    model = open_model(str(folder), batch_size=2, max_length=5)
    totals = ask(model, "loglikelihood_rolling", [(text,) for text in TEXT[:2]])
    for text, total in zip(TEXT[:2], totals, strict=True):
        ids, want = encode(text), 0.0
        for start in range(0, len(ids), 5):
            end = min(start + 5, len(ids))
            leaf = own.leaves([ids[max(0, start - 5) : start] or [model.prefix_token_id]])
            seen = [model.prefix_token_id, *ids][max(0, end - 5) : end + 1]  # five tokens, and the last one scored
            scores = decoder.bank_logits(torch.tensor([seen]), leaf)
            want += log_likelihood(scores, seen, len(seen) - (end - start))[0]
        assert total == pytest.approx(want, abs=1e-4)

    model = open_model(str(folder), batch_size=2)
    prompts = [before for before, _ in PAIRS]
    options = {"until": ["nothing"], "max_gen_toks": 6}
    for prompt, found in zip(prompts, ask(model, "generate_until", [(p, options) for p in prompts]), strict=True):
        ids = encode(prompt)
        leaf = own.leaves([ids])
        for _ in range(6):
            best = int(decoder.bank_logits(torch.tensor([ids]), leaf)[0, -1].argmax())
            if best == model.eot_token_id:
                break
            ids.append(best)
        assert found == model.tok_decode(ids[len(encode(prompt)) :])


@torch.no_grad()
def test_the_harness_runs_controls_and_models_without_a_bank(run, harness, tmp_path):
    decoder, folder = run
    open_model, ask = harness
    plain = random_weights(NATIVE["llama"])
    write_run(tmp_path / "run", NATIVE["llama"], plain)
    for model, found in [
        (open_model(str(folder), control="bank=none"), lambda ids: decoder.bank_logits(ids, None)),
        (open_model(str(tmp_path / "run")), lambda ids: logits(plain, ids)),
    ]:
        encode = model.tok_encode
        for (score, _), (before, after) in zip(ask(model, "loglikelihood", PAIRS[1:]), PAIRS[1:], strict=True):
            ids = encode(before + after)
            want, _ = log_likelihood(found(torch.tensor([ids])), ids, len(encode(before)))
            assert score == pytest.approx(want, abs=1e-4)
        (total,) = ask(model, "loglikelihood_rolling", [(TEXT[0],)])
        ids = [model.prefix_token_id, *encode(TEXT[0])]
        assert total == pytest.approx(log_likelihood(found(torch.tensor([ids])), ids, 1)[0], abs=1e-4)


def test_a_path_that_was_read_as_a_number_is_refused(run, harness):
    from kmem.config import UserError

    with pytest.raises(UserError, match=r"^blocked=2\.1: .*;$"):
        harness[0](str(run[1]), blocked=2.1)


@torch.no_grad()
def test_a_text_begins_in_the_harness_as_documents_do(harness, tmp_path):
    open_model, ask = harness
    decoder = random_weights(NATIVE["qwen3"])
    folder = write_run(tmp_path / "run", NATIVE["qwen3"], decoder, recorded=False).run_folder
    path = folder / "tokenizer" / "tokenizer.json"
    encoder = Tokenizer.from_file(str(path))
    plain = {text: encoder.encode(text).ids for pair in PAIRS[1:] for text in (pair[0], "".join(pair))}
    first = max(encoder.get_added_tokens_decoder())
    token = str(encoder.id_to_token(first))
    encoder.post_processor = TemplateProcessing(single=f"{token} $A", special_tokens=[(token, first)])
    encoder.save(str(path))
    model = open_model(str(folder), batch_size=2)
    for (score, greedy), (before, after) in zip(ask(model, "loglikelihood", PAIRS[1:]), PAIRS[1:], strict=True):
        ids = [first, *plain[before + after]]
        want = log_likelihood(logits(decoder, torch.tensor([ids])), ids, 1 + len(plain[before]))
        assert (score, greedy) == (pytest.approx(want[0], abs=1e-4), want[1])
