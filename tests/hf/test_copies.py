"""Models with tables are copied, pickled and sent to other processes: mapped ones by the paths of their files."""

import copy
import json
import os
import pickle
import shutil

import pytest
import torch

from kmem.hf.custom_code import register
from kmem.hf.export import export
from kmem.hf.loading import load
from kmem.model.pretrained_folder import PretrainedFolder
from tests.hf.banks import BANKS, write_bank_run
from tests.hf.loaded import GREEDY, opened
from tests.hf.models import MEMORY, VOCABULARY, write_run
from tests.warm_processes import WITH_KMEM, start_program

CASES = {"bank": BANKS["ffn"], "bank and n-grams": BANKS["with n-grams"], "n-grams": MEMORY["deepseek"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folders(name) -> (a run, its export)."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("copies")
            write = write_run if name == "n-grams" else write_bank_run
            export(write(folder / "run", CASES[name]), folder / "out", max_shard_bytes=9_000, say=str)
            made[name] = folder / "run", folder / "out"
        return made[name]

    register()
    return make


def of_kind(folders, name, kind):
    run, folder = folders(name)
    return load(run)[0] if kind == "run" else opened(folder, tables=kind)


def tokens():
    return torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))


def again(model):
    return pickle.loads(pickle.dumps(model))  # noqa: S301


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mmap", "device", "run"])
@pytest.mark.parametrize("name", CASES)
def test_copies_compute_the_same(name, kind, folders):
    model = of_kind(folders, name, kind)
    logits, ids = model(tokens()).logits, model.generate(tokens(), **GREEDY)
    for copied in (copy.deepcopy(model), again(model), again(copy.deepcopy(model))):
        assert torch.equal(copied(tokens()).logits, logits)
        assert torch.equal(copied.generate(tokens(), **GREEDY), ids)
    if kind == "device":  # its tables are its own
        copied = copy.deepcopy(model)
        for parameter, table in copied.named_parameters():
            if ".parts." in parameter:
                table.zero_()
        assert not torch.equal(copied(tokens()).logits, logits)
        assert torch.equal(model(tokens()).logits, logits)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mmap", "run"])
def test_a_copy_has_contexts_of_its_own(kind, folders):
    """What was fetched comes along; from then on both go their way. The tree is loaded once for copies in a process."""
    model = of_kind(folders, "bank", kind)
    found = model(tokens()).logits
    model.fetch(addresses=[3])
    fetched = model(tokens()).logits
    assert not torch.equal(fetched, found)
    for copied in (copy.deepcopy(model), again(model)):
        assert torch.equal(copied(tokens()).logits, fetched)
        copied.forget()
        copied.bank_levels = [1]
        assert torch.equal(model(tokens()).logits, fetched)
        copied.bank_levels = None
        assert torch.equal(copied(tokens()).logits, found)
    assert copy.deepcopy(model).contexts.loaded_router() is model.contexts.loaded_router()


PROGRAM = """
import multiprocessing, sys
for name in ("kmem", "kmem_kernels"):
    sys.modules[name] = None
import torch
from transformers import AutoModelForCausalLM

def generated(model):
    ids = torch.tensor([[5, 6, 7, 8]])
    return model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None).tolist()

if __name__ == "__main__":
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.apply_async(generated, (model,)).get(120) == generated(model))
"""


def test_other_processes_generate(folders, tmp_path, run_without_kmem):
    """With the class that ships with the folder, and with kmem's."""
    _, folder = folders("bank")
    (tmp_path / "program.py").write_text(PROGRAM)
    done = run_without_kmem(tmp_path / "program.py", os.path.relpath(folder, tmp_path))
    assert done.stdout.split()[-1] == "True"
    model = opened(folder)
    (tmp_path / "model").write_bytes(pickle.dumps((model, tokens(), GREEDY)))
    own = "model, ids, greedy = pickle.load(open(sys.argv[1], 'rb')); print(model.generate(ids, **greedy).tolist())"
    words = [str(tmp_path / "model")]
    process = start_program(WITH_KMEM, f"import pickle, sys; {own}", words, os.environ, tmp_path)
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert json.loads(out) == model.generate(tokens(), **GREEDY).tolist()


def test_files_that_are_gone_or_others_are_named(folders, tmp_path, monkeypatch):
    _, folder = folders("bank and n-grams")
    shutil.copytree(folder, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    kept = pickle.dumps(opened("out", tables="mmap"))
    monkeypatch.chdir("/")
    model = pickle.loads(kept)  # noqa: S301
    model.fetch("the model")  # its tree is found from anywhere
    file = model.contexts.sources[2].files[0].path
    os.utime(file, ns=(0, 0))
    with pytest.raises(ValueError, match=rf"{file}: changed\b"):
        pickle.loads(kept)  # noqa: S301
    file.unlink()
    with pytest.raises(ValueError, match=rf"{file}: .*No such file"):
        pickle.loads(kept)  # noqa: S301


def test_pickles_hold_no_token():
    folder = PretrainedFolder.of("someone/model", {"token": "hf_secret", "revision": "main", "tables": "mmap"})
    assert folder.options == {"token": "hf_secret", "revision": "main"}
    assert again(folder) == PretrainedFolder("someone/model", {"revision": "main"})
    assert copy.deepcopy(folder).options["token"] == "hf_secret"
