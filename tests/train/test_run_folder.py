import subprocess
import sys
import time

from kmem.config import load_config
from kmem.parallel.bank_kind import KIND as BANK_KIND
from kmem.train.run_folder import RunFolder


def test_the_tree_of_a_run_is_replaced_whole(tmp_path):
    """Exports copy the embedder's folder: a file of an earlier tree must not stay in it."""
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in ("one", "other"):
        (tmp_path / name / "embedder").mkdir(parents=True)
        for file in ("tree.json", "tree.safetensors", f"embedder/{name}.safetensors"):
            (tmp_path / name / file).touch(mode=0o600)
    config = load_config("quickstart", [f"folder={tmp_path}/runs"])
    run = RunFolder(config)

    def prepared(tree):
        addressed = load_config("quickstart", [f"data.addresses.tree={tree}"])
        return run.prepare(config, tokenizer, BANK_KIND.copied_folders(addressed, run.path))

    left = run.path / "tree.partial" / "embedder" / "left"  # by a process that was killed
    left.parent.mkdir(parents=True)
    left.touch()
    for name in ("one", "other", "other"):
        assert prepared(tmp_path / name) is None
        assert [file.name for file in (run.path / "tree" / "embedder").iterdir()] == [f"{name}.safetensors"]
    assert prepared(run.path / "tree") is None
    copied = run.path / "tree" / "embedder" / "other.safetensors"
    assert copied.stat().st_mode == (run.path / "config.yaml").stat().st_mode  # the umask's, for whoever reads the run
    assert {entry.name for entry in run.path.iterdir()} == {"config.yaml", "tokenizer", "tree"}


def test_one_process_at_a_time_in_a_folder(tmp_path):
    """A second one is told who is there; one that comes right after a kill has the folder as soon as it is free."""
    config = load_config("quickstart", [f"folder={tmp_path}/runs"])
    code = (
        "import sys, time\n"
        "from kmem.config import load_config\n"
        "from kmem.train.run_folder import RunFolder\n"
        f"run = RunFolder(load_config('quickstart', ['folder={tmp_path}/runs']))\n"
        "print(run.claim(), flush=True)\n"
        "time.sleep(60)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "None\n"
        run = RunFolder(config)
        refused = run.claim(seconds=0.3)
        assert f"process {other.pid} on " in refused
        assert str(run.path) in refused
        assert "another name" in refused
    finally:
        other.kill()
    began = time.monotonic()
    assert run.claim() is None
    assert time.monotonic() - began < 10
    other.wait()
    run.release()
    assert run.claim(seconds=0) is None
    run.release()


def test_a_folder_that_cannot_be_written_is_not_claimed(tmp_path):
    (tmp_path / "runs").write_text("a file")
    run = RunFolder(load_config("quickstart", [f"folder={tmp_path}/runs"]))
    assert run.claim(seconds=0) is None
    assert "cannot be written" in run.prepare(load_config("quickstart", []), tmp_path, {})
