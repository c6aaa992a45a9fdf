from kmem.config import load_config
from kmem.train.run_folder import RunFolder


def test_the_tree_of_a_run_is_replaced_whole(tmp_path):
    """Exports copy the embedder's folder: a file of an earlier tree must not stay in it."""
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in ("one", "other"):
        (tmp_path / name / "embedder").mkdir(parents=True)
        (tmp_path / name / "embedder" / f"{name}.safetensors").touch()
    config = load_config("quickstart", [f"folder={tmp_path}/runs"])
    run = RunFolder(config)
    left = run.path / "tree.copying" / "embedder" / "left"  # by a process that was killed
    left.parent.mkdir(parents=True)
    left.touch()
    for name in ("one", "other", "other"):
        assert run.prepare(config, tokenizer, tmp_path / name) is None
        assert [file.name for file in (run.path / "tree" / "embedder").iterdir()] == [f"{name}.safetensors"]
    assert run.prepare(config, tokenizer, run.path / "tree") is None
    assert (run.path / "tree" / "embedder" / "other.safetensors").is_file()
    assert {entry.name for entry in run.path.iterdir()} == {"config.yaml", "tokenizer", "tree"}
