"""Models with n-gram memory in Transformers: tables as parameters or in mapped files, and the state of generation."""

import copy
import json
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CompileConfig, DynamicCache

from kmem.checkpoint.commit import Commit
from kmem.checkpoint.pieces import CheckpointError
from kmem.checkpoint.reader import CheckpointReader
from kmem.config import UserError
from kmem.data.tokenizer import load_tokenizer
from kmem.hf.custom_code import register
from kmem.hf.export import export
from kmem.hf.importing import import_folder
from kmem.hf.loading import load
from kmem.model.configuration_kmem import KmemConfig
from kmem.model.export_tables import map_tables
from kmem.model.modeling_kmem import KmemForCausalLM
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
from tests.hf.models import MEMORY, VOCABULARY, logits, random_weights, tokenizer, write_run


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folders(name) -> (kmem's model, the folder of its export in fp32, in several weight files)."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("memory")
            decoder = random_weights(MEMORY[name])
            export(write_run(folder / "run", MEMORY[name], decoder), folder / "out", max_shard_bytes=3_000, say=str)
            made[name] = decoder, folder / "out"
        return made[name]

    register()
    return make


def assert_same(found, expected):
    """Equal but for the order of sums, whose rounding grows with the largest numbers."""
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * max(1, float(expected.abs().max())))


def tokens(rows=2, length=24, seed=1):
    """Ids with repetitions and ends of text."""
    ids = torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[:, length // 2 : length // 2 + 4] = ids[:, :4]
    ids[0, 5] = ids[-1, 9] = load_tokenizer(tokenizer()).eos_token_id
    return ids


@torch.no_grad()
@pytest.mark.parametrize("name", MEMORY)
def test_mapped_tables_give_kmems_logits(name, folders):
    decoder, folder = folders(name)
    mapped, info = opened(folder, tables="mmap", output_loading_info=True)
    assert not any(info.values()), info
    assert not [key for key in mapped.state_dict() if ".table." in key]
    expected = logits(decoder, tokens())
    torch.testing.assert_close(mapped(tokens(), use_cache=False).logits, expected, **TOLERANCE)
    held = opened(folder)
    assert len([key for key in held.state_dict() if ".table." in key]) > 2
    assert torch.equal(mapped(tokens()).logits, held(tokens()).logits)
    assert torch.equal(copy.deepcopy(mapped)(tokens()).logits, mapped(tokens()).logits)
    # The memory matters: with other rows the logits are others.
    for table in decoder.tables.values():
        table.neg_()
    assert (logits(decoder, tokens()) - expected).abs().mean() > 0.01
    for table in decoder.tables.values():
        table.neg_()


@torch.no_grad()
@pytest.mark.parametrize("memory", ["device", "mmap"])
@pytest.mark.parametrize("name", MEMORY)
def test_a_prompt_in_chunks_is_the_prompt_at_once(name, memory, folders):
    """Left-padded sequences, in one pass, in chunks and token by token; the same numbers but for rounding."""
    decoder, folder = folders(name)
    ids, mask = tokens(3), torch.ones(3, 24, dtype=torch.long)
    mask[0, :2] = mask[1, :15] = 0
    for dtype, tolerance in [(torch.float32, 1e-5), (torch.float64, 1e-12)]:
        if dtype == torch.float64 and MEMORY[name].moe is not None:
            continue  # torch has no grouped matrix product of this type
        model = opened(folder, tables=memory).to(dtype)
        whole = model(ids, attention_mask=mask, use_cache=False).logits
        for cuts in ([0, 1, 9, 16, 24], list(range(25))):
            cache, parts = None, []
            for start, stop in pairwise(cuts):
                output = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                parts.append(output.logits)
            found = torch.cat(parts, 1)
            for row, kept in enumerate(mask.bool()):
                torch.testing.assert_close(found[row, kept], whole[row, kept], rtol=tolerance, atol=tolerance)
                alone = logits(decoder, ids[row, kept][None])[0]
                torch.testing.assert_close(found[row, kept].float(), alone, **TOLERANCE)


@pytest.mark.parametrize("memory", ["device", "mmap"])
@pytest.mark.parametrize("way", SAME)
@pytest.mark.parametrize("name", ["deepseek", "qwen", "deepseek-v4.1 in branches"])
def test_ways_to_generate_agree(name, way, memory, folders):
    model = opened(folders(name)[1], tables=memory)
    prompts, mask = torch.tensor([[1, 2, 3, 4, 5], [0, 0, 0, 7, 8]]), torch.tensor([[1] * 5, [0, 0, 0, 1, 1]])
    generate_both_ways(model, prompts, mask, way, max_new_tokens=12)


@pytest.mark.full
@pytest.mark.parametrize("memory", ["device", "mmap"])
def test_compiled_decoding_is_decoding(memory, folders):
    """With a cache of fixed length, as Transformers compiles it on GPUs."""
    model = opened(folders("deepseek")[1], tables=memory)
    prompts, mask = torch.tensor([[1, 2, 3, 4, 5], [0, 0, 0, 7, 8]]), torch.tensor([[1] * 5, [0, 0, 0, 1, 1]])
    common = {"attention_mask": mask, **GREEDY}
    compiled = CompileConfig()
    compiled._compile_all_devices = True
    found = model.generate(prompts, **common, cache_implementation="static", compile_config=compiled)
    assert torch.equal(found, model.generate(prompts, **common))


@ASSISTANTS
@pytest.mark.parametrize("name", ["deepseek", "qwen"])
def test_assisted_decoding_takes_back_what_was_wrong(name, way, folders):
    folder = folders(name)[1]
    check_assisted_decoding(opened(folder, tables="mmap"), opened(folder), way)


@torch.no_grad()
@pytest.mark.parametrize("name", ["deepseek", "qwen"])
def test_what_is_done_to_the_sequences_of_a_cache_is_done_to_the_state(name, folders):
    model, ids = opened(folders(name)[1]), tokens(2, 14)

    def continued(change, rows):
        cache = model(ids[:, :8], use_cache=True).past_key_values
        change(cache)
        found = model(ids[rows, 8:], past_key_values=cache, use_cache=True).logits
        assert_same(found, model(ids[rows], use_cache=False).logits[:, 8:])

    continued(lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1])
    continued(lambda cache: cache.batch_select_indices(torch.tensor([1])), [1])
    continued(lambda cache: cache.batch_select_indices(torch.tensor([False, True])), [1])
    continued(lambda cache: cache.reorder_cache(torch.tensor([1, 1])), [1, 1])
    continued(copy.deepcopy, [0, 1])

    cache = model(ids[:, :3], use_cache=True).past_key_values
    cache.activate_past_recording()
    model(ids[:, 3:9], past_key_values=cache, use_cache=True)
    model(ids[:, 9:11], past_key_values=cache, use_cache=True)
    cache.crop(-5)
    found = model(ids[:, 6:], past_key_values=cache, use_cache=True).logits
    assert_same(found, model(ids, use_cache=False).logits[:, 6:])
    cache.reset()
    found = model(ids, past_key_values=cache, use_cache=True).logits
    assert_same(found, model(ids, use_cache=False).logits)

    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"activate_past_recording\(\)"):
        cache.crop(-1)
    cache = DynamicCache()
    cache.update(torch.zeros(2, 2, 3, 16), torch.zeros(2, 2, 3, 16), 0)
    with pytest.raises(ValueError, match=r"past_key_values .*engram"):
        model(ids, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match=r"cache .*\b2 sequences\b.*\b1\b"):
        model(ids[:1], past_key_values=model(ids, use_cache=True).past_key_values)


def test_tables_learn_in_transformers_as_in_kmem(folders):
    decoder, folder = folders("deepseek")
    model = opened(folder).train()
    for table in decoder.tables.values():
        table.requires_grad_()
    logits(decoder, tokens()).square().sum().backward()
    model(tokens()).logits.square().sum().backward()
    for layer, table in decoder.tables.items():
        found = torch.cat([part.grad for part in model.layers[layer].engram.table.parts])
        torch.testing.assert_close(found, table.grad, rtol=1e-4, atol=1e-4)
        table.requires_grad_(False)


@torch.no_grad()
@pytest.mark.parametrize("name", ["deepseek", "qwen"])
def test_a_folder_in_bf16(name, tmp_path):
    """Rows are bf16 in the files; computed in fp32 they give what kmem's weights, rounded, give."""
    register()
    decoder = random_weights(MEMORY[name])
    reader = write_run(tmp_path / "run", MEMORY[name], decoder)
    export(reader, tmp_path / "out", dtype="bf16", max_shard_bytes=3_000, say=str)
    for tensor in decoder.weights().values():
        tensor.copy_(tensor.bfloat16())
    expected = logits(decoder, tokens())
    assert (check_bf16(tmp_path / "out", tokens(), expected) - expected).abs().mean() < 0.02


@pytest.mark.parametrize("size", [1_000, 3_000, 10**9])
def test_tables_are_cut_into_row_ranges_that_fit(size, tmp_path):
    reader = write_run(tmp_path / "run", MEMORY["deepseek"])
    export(reader, tmp_path / "out", max_shard_bytes=size, say=str)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["engram_addressing"] == reader.addressing
    assert 'tables="mmap"' in (tmp_path / "out" / "README.md").read_text()
    for layer in (0, 2):
        name = f"layers.{layer}.engram.table"
        check_parts(tmp_path / "out", "engram_parts", layer, f"{name}.parts", reader.read(name), size)
    check_files(tmp_path / "out", size)


def test_a_mapped_model_finds_its_files_in_the_hubs_cache(folders, tmp_path):
    decoder, folder = folders("qwen")
    snapshot = tmp_path / "models--someone--model" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(folder)
    (tmp_path / "models--someone--model" / "refs").mkdir()
    (tmp_path / "models--someone--model" / "refs" / "main").write_text("0" * 40)
    model = opened("someone/model", tables="mmap", cache_dir=tmp_path, local_files_only=True)
    torch.testing.assert_close(model(tokens()).logits, logits(decoder, tokens()), **TOLERANCE)


@torch.no_grad()
def test_saved_by_transformers_it_loads_again(folders, tmp_path):
    _, folder = folders("deepseek")
    model = opened(folder)
    model.save_pretrained(tmp_path)
    for memory in ("device", "mmap"):
        assert torch.equal(opened(tmp_path, tables=memory)(tokens()).logits, model(tokens()).logits)
    with pytest.raises(ValueError, match='tables="device"'):
        opened(folder, tables="mmap").save_pretrained(tmp_path / "again")


@pytest.mark.parametrize("name", ["deepseek", "qwen in branches"])
def test_a_run_is_used_where_it_lies(name, tmp_path):
    """`kmem generate` reads rows from the checkpoint's own files."""
    decoder = random_weights(MEMORY[name])
    write_run(tmp_path / "run", MEMORY[name], decoder)
    model, _ = load(tmp_path / "run")
    assert not [key for key in model.state_dict() if ".table." in key]
    torch.testing.assert_close(model(tokens()).logits, logits(decoder, tokens()), **TOLERANCE)


def test_wrong_calls_are_refused(folders):
    _, folder = folders("deepseek")
    with pytest.raises(ValueError, match=r"tables='disk': .*device, mmap"):
        opened(folder, tables="disk")
    model = opened(folder)
    with pytest.raises(ValueError, match=r"token ids: .*input_ids.*inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 2, 32))
    with pytest.raises(ValueError, match=r"vocabulary.*addresses"):
        model.resize_token_embeddings(VOCABULARY + 8)
    fields = model.config.to_dict()
    with pytest.raises(ValueError, match=r"config\.json: engram_addressing .*model\.engram"):
        KmemForCausalLM(KmemConfig(model=fields["model"]))
    with pytest.raises(ValueError, match=r'tables="mmap": .*\btables\b.*from_pretrained'):
        KmemForCausalLM(KmemConfig(**fields), tables="mmap")(tokens())
    manifest = fields["engram_addressing"]
    for change, message in [
        ({"engram_addressing": {**manifest, "raw_vocab_size": 400}}, r"engram_addressing .*\b400 token ids.*\b320$"),
        (
            {"engram_addressing": {**manifest, "layers": [2, 1]}},
            r"engram_addressing .*\{2: \d+, 1: \d+\} .*\{2: \d+, 0: \d+\} ",
        ),
        ({"engram_addressing": {**manifest, "orders": [3, 2]}}, r"engram_addressing: .*orders .*\[3, 2\]"),
        ({"engram_parts": {"0": [1, 2]}}, r"engram_parts .*layers\.0\.engram.*\b348 rows"),
    ]:
        with pytest.raises(ValueError, match=message):
            KmemForCausalLM(KmemConfig(**{**fields, **change}))


def cut_short(folder, file):
    (folder / file).write_bytes((folder / file).read_bytes()[:-8])


def no_header(folder, file):
    (folder / file).write_bytes(b"\x10")


def renamed(folder, file):
    tensors = load_file(folder / file)
    save_file({key + "_": tensor for key, tensor in tensors.items()}, folder / file, metadata={"format": "pt"})


DAMAGE = {
    "truncated: ": cut_short,
    "safetensors file": no_header,
    r"tensor layers\.2\.engram\.table\.parts\.1": renamed,
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damaged_files_of_a_table_are_named(message, folders, tmp_path):
    _, folder = folders("qwen")
    model = opened(folder, tables="mmap")
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    file = index["layers.2.engram.table.parts.1"]
    DAMAGE[message](tmp_path, file)

    def find(name):
        return str(tmp_path / name) if (tmp_path / name).is_file() else None

    with pytest.raises(ValueError, match=f"{file}: .*{message}"):
        map_tables(model.memories["engram"].tables, find)
    (tmp_path / file).unlink()
    with pytest.raises(ValueError, match=rf"model\.safetensors\.index\.json: .*{file}"):
        map_tables(model.memories["engram"].tables, find)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json nor model\.safetensors"):
        map_tables(model.memories["engram"].tables, lambda name: None)


def test_another_compression_of_the_vocabulary_is_refused(folders, tmp_path):
    _, folder = folders("deepseek")
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    path = tmp_path / index["token_compression"]
    tensors = load_file(path)
    tensors["token_compression"][5] = tensors["token_compression"][6]
    save_file(tensors, path, metadata={"format": "pt"})
    for memory in ("device", "mmap"):
        with pytest.raises(ValueError, match="compression_digest"):
            opened(tmp_path, tables=memory)


def test_a_checkpoint_with_other_addresses_is_not_exported(tmp_path):
    reader = write_run(tmp_path / "run", MEMORY["deepseek"])
    commit = Commit.read(reader.folder)
    manifest = dict(commit.manifests["engram"])
    for addressing, message in [
        ({**manifest, "tokenizer_fingerprint": "0" * 64}, r"^model\.engram: .*tokenizer_fingerprint "),
        ({**manifest, "multipliers": [[3] * 3] * 2}, r"^model\.engram: .*multipliers .*\[\[3, 3, 3\]"),
        (None, r"^/.*/step-\d+: .*addressing .*model\.engram"),
    ]:
        manifests = {} if addressing is None else {"engram": addressing}
        Commit(**{**vars(commit), "manifests": manifests}).write(reader.folder)
        with pytest.raises(CheckpointError, match=message):
            export(CheckpointReader(tmp_path / "run"), tmp_path / "out", say=str)
        assert not (tmp_path / "out").exists()


def test_memory_is_imported_with_its_tokenizer_alone(folders, tmp_path):
    _, folder = folders("deepseek")
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "digests.json").unlink()  # the folder is changed on purpose
    config = json.loads((folder / "config.json").read_text())
    for change, message in [
        ({"engram_addressing": {**config["engram_addressing"], "seed": 1}}, r"^model\.engram: .*\bseed .*\b0 .*\b1 "),
        ({"engram_addressing": None}, r"config\.json: engram_addressing .*model\.engram"),
        ({"engram_parts": {"0": [1]}}, r"config\.json: engram_parts .*layers\.0\.engram"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match=message):
            import_folder(tmp_path, tmp_path / "run", say=str)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=rf"^{tmp_path}: .*\btokenizer\b.*\brows\b"):
        import_folder(tmp_path, tmp_path / "run", say=str)
    assert not (tmp_path / "run").exists()
