"""Models with a memory bank in Transformers: contexts are looked up, and their blocks fetched, as kmem computes."""

import copy
import json
import re
import shutil
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from kmem.checkpoint.bank.options import BankOptions
from kmem.checkpoint.reader import CheckpointReader
from kmem.cli import main
from kmem.config import UserError
from kmem.data.tokenizer import train_tokenizer
from kmem.hf.custom_code import register
from kmem.hf.export import export
from kmem.hf.importing import import_folder
from kmem.hf.loading import load
from kmem.model.bank_router import ContextRouter
from kmem.model.bank_tree import record_fingerprint
from kmem.model.configuration_kmem import KmemConfig
from kmem.model.modeling_kmem import KmemForCausalLM
from tests.hf.banks import BANKS, make_sentence_tree, make_tree, random_bank, router, tree, write_bank_run
from tests.hf.loaded import (
    ASSISTANTS,
    GREEDY,
    SAME,
    TOLERANCE,
    check_assisted_decoding,
    check_bf16,
    check_files,
    check_parts,
    generate_both_ways,
    opened,
)
from tests.hf.models import NATIVE, VOCABULARY, write_run

PLAIN_MODEL = NATIVE["llama"].model_dump(mode="json")
TEXTS = ["the model reads the text", "a reader", "another model trains the export that wrote"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folders(name) -> (kmem's model, the folder of its export in fp32, in several weight files)."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("bank")
            decoder = random_bank(BANKS[name])
            reader = write_bank_run(folder / "run", BANKS[name], decoder)
            export(reader, folder / "out", max_shard_bytes=9_000, say=str)
            made[name] = decoder, folder / "out"
        return made[name]

    register()
    return make


def tokens(rows=4, length=12, seed=2):
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("name", BANKS)
def test_logits_are_kmems(name, folders):
    decoder, folder = folders(name)
    mapped, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert not [key for key in mapped.state_dict() if key.startswith("bank.")]
    ids, leaves = tokens(), router().leaves(tokens())
    assert len(leaves.unique()) > 1
    expected = decoder.bank_logits(ids, leaves)
    torch.testing.assert_close(mapped(ids).logits, expected, **TOLERANCE)
    assert (expected - decoder.bank_logits(ids, None)).abs().mean() > 0.01
    held = opened(folder, tables="device")
    assert [key for key in held.state_dict() if key.startswith("bank.")]
    torch.testing.assert_close(held(ids).logits, expected, **TOLERANCE)
    # Of others' contexts, by address, per token, level by level, and the controls.
    other = (leaves + 4) % 9
    torch.testing.assert_close(mapped(ids, addresses=other).logits, decoder.bank_logits(ids, other), **TOLERANCE)
    each = torch.arange(48).view(4, 12) % 9
    torch.testing.assert_close(mapped(ids, addresses=each).logits, decoder.bank_logits(ids, each), **TOLERANCE)
    for model in (mapped, held):
        for levels in ([1], [2]):
            if set(levels) <= set(decoder.layout.levels):
                model.bank_levels = levels
                found = decoder.bank_logits(ids, leaves, levels=levels)
                torch.testing.assert_close(model(ids).logits, found, **TOLERANCE)
        model.bank_levels = None
        model.bank_control = "none"
        torch.testing.assert_close(model(ids).logits, decoder.bank_logits(ids, None), **TOLERANCE)
        if decoder.layout.generic:
            model.bank_control = "generic"
            torch.testing.assert_close(model(ids).logits, decoder.bank_logits(ids, leaves, generic=True), **TOLERANCE)
        else:
            with pytest.raises(ValueError, match=r"generic blocks.*model\.bank\.generic\.probability"):
                model.bank_control = "generic"


@torch.no_grad()
def test_fetch_reads_what_is_not_there_yet(folders):
    decoder, folder = folders("ffn")
    model, tokenizer = opened(folder), AutoTokenizer.from_pretrained(folder)
    contexts = [tokenizer(text)["input_ids"] for text in TEXTS]
    leaves = router().leaves(contexts)
    found = model.fetch(TEXTS)
    assert torch.equal(found.leaves, leaves)
    assert torch.equal(model.fetch(contexts).leaves, leaves)
    width = max(map(len, contexts))
    padded = torch.tensor([[7] * (width - len(ids)) + ids for ids in contexts])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in contexts])
    assert torch.equal(model.fetch(padded, attention_mask=mask).leaves, leaves)
    assert model.fetch(padded, attention_mask=mask).bytes == 0
    ids = tokens(3)
    torch.testing.assert_close(model(ids).logits, decoder.bank_logits(ids, leaves), **TOLERANCE)
    more = tokens(6)
    torch.testing.assert_close(model(more).logits, decoder.bank_logits(more, leaves.repeat_interleave(2)), **TOLERANCE)
    with pytest.raises(ValueError, match=r"\b3 contexts\b.*\b4 sequences\b"):
        model(tokens(4))
    model.bank_levels = [2]  # of what is fetched, unless levels were named with it
    torch.testing.assert_close(model(ids).logits, decoder.bank_logits(ids, leaves, levels=[2]), **TOLERANCE)
    model.fetch(contexts, levels=[1])
    torch.testing.assert_close(model(ids).logits, decoder.bank_logits(ids, leaves, levels=[1]), **TOLERANCE)
    model.bank_levels = None
    model.bank_blocked = ["2"]
    model.bank_blocked = None
    assert model.bank_blocked == ()

    # Of a topic's neighbour below the same cluster of level 1, only the deep level is read.
    sizes = {level: 4 * decoder.layout.row_values(level) for level in (1, 2)}
    model.forget()
    assert model.fetch(addresses=[3]).bytes == sizes[1] + sizes[2]
    assert model.fetch(addresses=[4]).bytes == sizes[2]
    assert model.fetch(addresses=[4, 3, 8]).bytes == sizes[1] + 2 * sizes[2]
    both = model.fetch(addresses=[3, 8]).levels
    assert [(level.rows, level.read) for level in both.values()] == [(2, 0), (2, 0)]
    assert list(model.fetch(addresses=[3], levels=[2]).levels) == [2]
    torch.testing.assert_close(
        model(ids).logits, decoder.bank_logits(ids, torch.tensor([3, 3, 3]), levels=[2]), **TOLERANCE
    )

    # What is blocked gives way to the next nearest.
    own = int(model.fetch(TEXTS[0]).leaves)
    beside = int(model.fetch(TEXTS[0], blocked=[f"{own // 3}.{own % 3}"]).leaves)
    assert beside != own
    assert beside // 3 == own // 3
    elsewhere = model.fetch(TEXTS[0], blocked=[(own // 3,)]).leaves
    assert int(elsewhere) // 3 != own // 3
    assert int(model.fetch(addresses=[own], blocked=[(own // 3,)]).leaves) // 3 != own // 3
    model.forget()
    # .. and what is blocked for all contexts, unless fetch says otherwise.
    model.bank_blocked = [str(own // 3)]
    assert torch.equal(model.fetch(TEXTS[0]).leaves, elsewhere)
    assert model.fetch(TEXTS[0], blocked=[]).leaves == own
    model.forget()
    prompt = torch.tensor([contexts[0]])
    torch.testing.assert_close(model(prompt).logits, decoder.bank_logits(prompt, elsewhere), **TOLERANCE)
    model.bank_blocked = []
    torch.testing.assert_close(model(ids).logits, decoder.bank_logits(ids, router().leaves(ids)), **TOLERANCE)


@pytest.mark.parametrize("memory", ["device", "mmap"])
@pytest.mark.parametrize("way", SAME)
@pytest.mark.parametrize("name", ["ffn", "kv", "with n-grams"])
def test_ways_to_generate_agree(name, way, memory, folders):
    """A batch of left-padded prompts of different contexts; each generates what it does alone, of its prompt only."""
    decoder, folder = folders(name)
    model = opened(folder, tables=memory)
    prompts, mask = torch.tensor([[1, 2, 3, 4, 5], [0, 0, 0, 57, 8]]), torch.tensor([[1] * 5, [0, 0, 0, 1, 1]])
    leaves = router().leaves([prompts[0], prompts[1, 3:]])
    assert leaves[0] != leaves[1]
    found = generate_both_ways(model, prompts, mask, way)
    if "beams" not in way:
        ids = prompts[:1]
        for _ in range(8):
            ids = torch.cat((ids, decoder.bank_logits(ids, leaves[:1])[:, -1:].argmax(-1)), dim=1)
        assert torch.equal(found[:1], ids)
    # Prompts of other lengths than their padding are found without a mask, too.
    assert torch.equal(model.generate(prompts, **GREEDY, **SAME[way][1]), found)


@ASSISTANTS
def test_assisted_decoding_is_greedy_decoding(way, folders):
    folder = folders("ffn")[1]
    check_assisted_decoding(opened(folder), opened(folder), way)


@torch.no_grad()
def test_a_cache_keeps_its_contexts(folders):
    decoder, folder = folders("ffn")
    model, ids = opened(folder), tokens(2, 14)
    leaves = router().leaves(ids[:, :8])

    def continued(change, rows):
        cache = model(ids[:, :8], use_cache=True).past_key_values
        change(cache)
        found = model(ids[rows, 8:], past_key_values=cache, use_cache=True).logits
        expected = decoder.bank_logits(ids[rows], leaves[rows])[:, 8:]
        torch.testing.assert_close(found, expected, **TOLERANCE)

    continued(lambda cache: None, [0, 1])
    continued(lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1])
    continued(lambda cache: cache.batch_select_indices(torch.tensor([1])), [1])
    continued(lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0])
    continued(copy.deepcopy, [0, 1])

    whole = torch.tensor([4, 4])
    model.fetch(addresses=whole)
    cache, parts = None, []
    for start, stop in pairwise([0, 3, 9, 14]):
        output = model(ids[:, start:stop], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), decoder.bank_logits(ids, whole), **TOLERANCE)
    model.forget()
    cache = DynamicCache()
    cache.update(torch.zeros(2, 2, 3, 16), torch.zeros(2, 2, 3, 16), 0)
    with pytest.raises(ValueError, match=r"past_key_values .*fetch\(context\)"):
        model(ids, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match=r"input_ids .*addresses.*fetch\(context\)"):
        model(inputs_embeds=model.embedding(ids))
    model.fetch(addresses=[4])
    torch.testing.assert_close(
        model(inputs_embeds=model.embedding(ids)).logits, decoder.bank_logits(ids, whole), **TOLERANCE
    )
    model.forget()
    with torch.inference_mode():
        model(ids)
    with torch.enable_grad():
        model(ids).logits.sum().backward()


@pytest.mark.parametrize("size", [600, 9_000, 10**9])
def test_tables_are_cut_into_row_ranges_that_fit(size, tmp_path):
    """Whole rows of all layers, in order, under an index that says where they are; one row at least to a part."""
    reader = write_bank_run(tmp_path / "run", BANKS["ffn"])
    export(reader, tmp_path / "out", max_shard_bytes=size, say=str)
    decoder = random_bank(BANKS["ffn"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for level, rows in decoder.rows.items():
        check_parts(tmp_path / "out", "bank_parts", level, f"bank.level{level}.parts", rows, size)
    check_files(tmp_path / "out", size)
    assert config["bank_tree"] == reader.tree
    for file in ("tree.json", "tree.safetensors", "embedder/tfidf.safetensors", "embedder/LICENSE"):
        assert (tmp_path / "out" / "tree" / file).read_bytes() == (tree() / file).read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{decoder.layout.bank_values:,}" in card
    assert "model.fetch(context)" in card


@pytest.mark.parametrize("name", ["ffn", "ffn in some layers of experts", "with n-grams"])
def test_import_gives_back_every_bit(name, folders, tmp_path):
    _, folder = folders(name)
    first = CheckpointReader(folder.parent / "run")
    import_folder(folder, tmp_path / "back", say=str)
    again = CheckpointReader(tmp_path / "back")
    assert again.commit.shapes == first.commit.shapes
    for tensor in first.tensors:
        assert torch.equal(again.read(tensor), first.read(tensor)), tensor
    assert again.commit.manifests["bank"] == first.commit.manifests["bank"]
    assert again.config.model == first.config.model
    export(again, tmp_path / "out", max_shard_bytes=9_000, say=str)
    for file in folder.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


TEXT_PROGRAM = """
import sys
for name in ("kmem", "kmem_kernels"):
    sys.modules[name] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
several = model.fetch(sys.argv[2:]).leaves.tolist()
model.forget()
found = model.fetch("the model reads")
inputs = tokenizer("the model reads", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
print(several)
print([*found.leaves.tolist(), found.bytes, *output[0].tolist()])
"""


def folder_of_sentences(where):
    """As `folders`: a model whose contexts are found by a sentence encoder, its export, and the router."""
    texts = [*TEXTS, "a whale", "kernel driver", "register 7", "on the mat", "a cat sleeps", "the model reads"]
    decoder, own = random_bank(BANKS["ffn"]), make_sentence_tree(where / "tree", texts)
    export(write_bank_run(where / "run", BANKS["ffn"], decoder, own), where / "out", max_shard_bytes=9_000, say=str)
    text = ContextRouter.load(own, AutoTokenizer.from_pretrained(where / "out"))
    assert len(text.leaves(TEXTS).unique()) > 1
    return decoder, where / "out", text


@pytest.mark.parametrize("embedder", ["tfidf", pytest.param("minilm", marks=pytest.mark.full)])
def test_torch_and_transformers_suffice(embedder, folders, tmp_path, run_without_kmem):
    decoder, folder, own = (*folders("ffn"), router()) if embedder == "tfidf" else folder_of_sentences(tmp_path)
    done = run_without_kmem(TEXT_PROGRAM, folder, *TEXTS)
    several, (leaf, size, *ids) = map(json.loads, done.stdout.splitlines()[-2:])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert several == own.leaves([tokenizer(text)["input_ids"] for text in TEXTS]).tolist()
    prompt = torch.tensor([ids[:-5]])
    leaves = own.leaves(prompt)
    assert leaf == int(leaves)
    assert size == 4 * decoder.layout.fetched_values
    for _ in range(5):
        prompt = torch.cat((prompt, decoder.bank_logits(prompt, leaves)[:, -1:].argmax(-1)), dim=1)
    assert prompt[0].tolist() == ids


def test_a_run_and_its_export_generate_the_same_text(folders, capsys):
    _, folder = folders("ffn")
    said = {}
    own = int(router().leaves([AutoTokenizer.from_pretrained(folder)(TEXTS[0])["input_ids"]]))
    ways = [
        ["--control", "bank=generic"],
        ["--control", "bank=none"],
        ["--bank-levels", "1"],
        ["--blocked", f"{own // 3},0.0"],
    ]
    for options in ([], *ways):
        for path in (folder, folder.parent / "run"):
            command = ["generate", "--checkpoint", str(path), "--prompt", TEXTS[0], "--temperature", "0"]
            assert main([*command, "--max-new-tokens", "12", *options]) == 0
            said.setdefault(str(options), set()).add(capsys.readouterr().out)
    assert all(len(texts) == 1 for texts in said.values())
    assert len({texts.pop() for texts in said.values()}) == len(said)
    for options, complaint in [
        (["--blocked", "7"], r"--blocked 7: cluster 7: .*\b0 to 2\b"),
        (["--blocked", "0,1,2"], "--blocked 0,1,2: every cluster"),
        (["--blocked", "0", "--control", "bank=none"], "--blocked 0: --control bank=none "),
    ]:
        for path in (folder, folder.parent / "run"):
            assert main(["generate", "--checkpoint", str(path), "--prompt", "a", *options]) == 2
            assert re.search(complaint, " ".join(capsys.readouterr().err.split()))


def test_saving_keeps_bank_and_tree(folders, tmp_path):
    _, folder = folders("ffn")
    with pytest.raises(ValueError, match=r'tables="mmap".*tables="device"'):
        opened(folder).save_pretrained(tmp_path / "none")
    model = opened(folder, tables="device")
    model.save_pretrained(tmp_path / "saved")
    again = opened(tmp_path / "saved")
    again.fetch(tokens())  # its tree is there
    again.forget()
    assert torch.equal(again(tokens()).logits, opened(folder)(tokens()).logits)


def test_rows_learn_in_transformers_as_in_kmem(folders):
    decoder, folder = folders("ffn")
    model, ids, leaves = opened(folder, tables="device").train(), tokens(), torch.tensor([1, 2, 2, 8])
    model(ids, addresses=leaves).logits.square().sum().backward()
    for rows in decoder.rows.values():
        rows.requires_grad_()
    decoder.bank_logits.__wrapped__(decoder, ids, leaves).square().sum().backward()
    for level, rows in decoder.rows.items():
        found = torch.cat([part.grad for part in model.get_submodule(f"bank.level{level}.parts")])
        torch.testing.assert_close(found, rows.grad, rtol=1e-4, atol=1e-4)
        rows.requires_grad_(False)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("memory", ["device", "mmap"])
def test_blocks_come_to_the_models_device(memory, folders):
    decoder, folder = folders("ffn")
    model, ids = opened(folder, tables=memory).cuda(), tokens()
    for leaves in (torch.tensor([1, 2, 2, 8]), torch.tensor([1, 0, 2, 7])):
        found = model(ids.cuda(), addresses=leaves).logits.cpu()
        torch.testing.assert_close(found, decoder.bank_logits(ids, leaves), rtol=1e-4, atol=1e-4)
    assert model.generate(ids.cuda(), **GREEDY).shape == (4, 20)


@torch.no_grad()
def test_a_new_model_starts_as_without_a_bank():
    config = KmemConfig(model=BANKS["ffn"].model_dump(mode="json"))
    torch.manual_seed(3)
    model = KmemForCausalLM(config, tables="device")
    expected = model(tokens(), addresses=torch.arange(4)).logits
    assert torch.cat([part for part in model.get_submodule("bank.level1.parts")]).abs().sum() > 0
    model.bank_control = "none"
    assert torch.equal(model(tokens()).logits, expected)


@torch.no_grad()
def test_a_folder_in_bf16(tmp_path):
    register()
    decoder = random_bank(BANKS["ffn"])
    export(write_bank_run(tmp_path / "run", BANKS["ffn"], decoder), tmp_path / "out", dtype="bf16", say=str)
    for tensor in (*decoder.state_dict().values(), *decoder.rows.values()):
        tensor.copy_(tensor.bfloat16())
    check_bf16(tmp_path / "out", tokens(), decoder.bank_logits(tokens(), router().leaves(tokens())))


def test_faults_are_named(folders, tmp_path):
    _, folder = folders("ffn")
    model = opened(folder)
    for call, complaint in [
        (lambda: model.fetch(), "contexts or addresses"),
        (lambda: model.fetch("a", levels=[3]), r"^level 3: .*levels 1, 2$"),
        (lambda: model.fetch("a", blocked=["3.1.2"]), r"^cluster 3\.1\.2: .*\b1 to 2 parts"),
        (lambda: model.fetch("a", blocked=["7"]), r"^cluster 7: .*\b0 to 2\b"),
        (lambda: model.fetch(addresses=[9]), r"^addresses .*\b9\b.*\b0 to 8\b"),
        (lambda: model.fetch("a", blocked="0"), r"^clusters '0': .*\['0'\]"),
        (lambda: setattr(model, "bank_blocked", ["0", "1", "2"]), "^every cluster"),
        (lambda: model.fetch([]), r"^no contexts .*forget\(\)"),
        (lambda: model.fetch(addresses=[]), r"^no contexts .*forget\(\)"),
        (lambda: model.fetch("a", attention_mask=torch.ones(1, 1)), r"attention_mask .*token ids \[B, T\]"),
        (
            lambda: model.fetch(tokens(), attention_mask=torch.ones(4, 1, 12, 12)),
            r"attention_mask .*\[4, 1, 12, 12\] .*\[4, 12\]",
        ),
        (lambda: model(tokens(), addresses=torch.zeros(4, 11).long()), r"addresses .*\[4, 11\].*\[4, 12\]"),
        (lambda: setattr(model, "bank_control", "some"), "bank_control='some': .*fetched, generic, none"),
        (lambda: KmemForCausalLM(model.config)(tokens()), "cluster tree.*from_pretrained.*addresses"),
        (
            lambda: KmemForCausalLM(model.config)(tokens(), addresses=torch.zeros(4).long()),
            r'tables="mmap": .*\bbank\b.*from_pretrained',
        ),
        (
            lambda: KmemForCausalLM(KmemConfig(model=PLAIN_MODEL), bank_control="none"),
            r"bank_control and bank_levels .*\(model\.bank\)",
        ),
        (lambda: KmemForCausalLM(KmemConfig(model=PLAIN_MODEL)).fetch("a"), r"^this model .*\(model\.bank\)"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            call()
    model.bank_control = "none"
    with pytest.raises(ValueError, match=r"bank_control='none' .*'fetched'"):
        model.fetch("a")

    damaged = tmp_path / "damaged"

    def broken(change, complaint):
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(folder, damaged)
        change()
        with pytest.raises((ValueError, OSError), match=complaint):
            opened(damaged).fetch("a")

    broken(lambda: shutil.rmtree(damaged / "tree"), r"^tree/tree\.json: missing")
    broken(lambda: (damaged / "tree" / "tree.safetensors").unlink(), r"^tree/tree\.safetensors: missing")
    other = make_tree(tmp_path / "other", seed=1)

    def another_tree():
        shutil.rmtree(damaged / "tree")
        shutil.copytree(other, damaged / "tree")

    def another_embedder():
        shutil.copyfile(other / "embedder" / "tfidf.safetensors", damaged / "tree" / "embedder" / "tfidf.safetensors")

    broken(another_tree, r"damaged/tree: .*\([0-9a-f]{12} .*\b[0-9a-f]{12}\)")

    def nameless_embedder():
        path = damaged / "tree" / "tree.json"
        record = json.loads(path.read_text())
        del record["embedder"]["files"]
        path.write_text(json.dumps({**record, "fingerprint": record_fingerprint(record)}))
        with pytest.raises(ValueError, match=r"tree\.json: .*\bfiles\b.*\bembedder\b"):
            ContextRouter.load(damaged / "tree")

    broken(nameless_embedder, r"tree\.json: .*\bfiles\b.*\bembedder\b")
    broken(another_embedder, r"embedder/tfidf\.safetensors: .*\btree\b")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    part = index["bank.level2.parts.1"]
    broken(lambda: (damaged / part).unlink(), part)

    run = write_bank_run(tmp_path / "run", BANKS["ffn"])
    with pytest.raises(UserError, match=rf"^{other}: .*step-00000007 .*--tree"):
        export(run, tmp_path / "out", tree=other, say=str)
    shutil.rmtree(tmp_path / "run" / "tree")
    with pytest.raises(UserError, match=r"step-00000007: .*cluster tree.*run/tree.*--tree"):
        export(run, tmp_path / "out", say=str)
    export(run, tmp_path / "out", tree=tree(), say=str)
    with pytest.raises(UserError, match=f"--tree {tree()}: .*Hugging Face"):
        load(tmp_path / "out", bank=BankOptions(tree=tree()))
    shutil.rmtree(tmp_path / "out" / "tree")
    with pytest.raises(UserError, match=r"out/tree/.*: missing.*digests\.json"):
        import_folder(tmp_path / "out", tmp_path / "back", say=str)
    (tmp_path / "out" / "digests.json").unlink()
    with pytest.raises(UserError, match=r"out/tree: missing.*\bbank\b"):
        import_folder(tmp_path / "out", tmp_path / "back", say=str)
    train_tokenizer(iter(["another text of another model"] * 8), VOCABULARY, tmp_path / "words")
    shutil.copyfile(tmp_path / "words" / "tokenizer.json", tmp_path / "run" / "tokenizer" / "tokenizer.json")
    with pytest.raises(UserError, match=f"^{tree()}: .*run/tokenizer .*--tree"):
        export(run, tmp_path / "other-out", tree=tree(), say=str)
    plain = write_run(tmp_path / "plain", NATIVE["llama"])
    with pytest.raises(UserError, match=rf"--tree {tree()}: .*\(model\.bank\)"):
        export(plain, tmp_path / "plain-out", tree=tree(), say=str)
    with pytest.raises(UserError, match=r"--control bank=none: .*\(model\.bank\)"):
        load(tmp_path / "plain", {"bank": "none"})
