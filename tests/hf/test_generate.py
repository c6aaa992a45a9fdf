"""`kmem generate` continues a prompt from a run and from its export alike."""

import argparse

import pytest
from transformers.utils import logging

from kmem.config import UserError
from kmem.hf import generate_command
from kmem.hf.export import export
from tests.hf.banks import bank, write_bank_run
from tests.hf.models import MEMORY, NATIVE, OWN, write_run


def generate(capsys, path, *options):
    parser = argparse.ArgumentParser()
    generate_command.add_arguments(parser)
    assert generate_command.run(parser.parse_args(["--checkpoint", str(path), *options])) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("config", [NATIVE["glm4_moe"], OWN["softmax in groups"], MEMORY["deepseek"]])
def test_a_run_and_its_export_generate_the_same_text(config, tmp_path, capsys):
    reader = write_run(tmp_path / "run", config)
    export(reader, tmp_path / "out", say=str)
    capsys.readouterr()
    options = ("--prompt", "the model", "--max-new-tokens", "8", "--temperature")
    greedy = {generate(capsys, path, *options, "0") for path in (tmp_path / "run", reader.folder, tmp_path / "out")}
    assert len(greedy) == 1
    assert greedy.pop().startswith("the model")
    sampled = [generate(capsys, tmp_path / "out", *options, "5", "--seed", seed) for seed in ("1", "1", "2")]
    assert sampled[0] == sampled[1] != sampled[2]
    generate(capsys, tmp_path / "out", "--prompt", "", "--max-new-tokens", "2")


@pytest.mark.parametrize("shown", [True, False])
def test_loading_shows_no_bars_and_leaves_them_as_they_were(shown, tmp_path, capsys):
    """Warnings stay: one of weights that were not in the folder is the user's to see."""
    export(write_run(tmp_path / "run", NATIVE["llama"]), tmp_path / "out", say=str)
    logging.enable_progress_bar() if shown else logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    try:
        capsys.readouterr()
        parser = argparse.ArgumentParser()
        generate_command.add_arguments(parser)
        words = ["--checkpoint", str(tmp_path / "out"), "--prompt", "the", "--max-new-tokens", "1"]
        assert generate_command.run(parser.parse_args(words)) == 0
        assert capsys.readouterr().err == ""
        assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == (shown, verbosity)
    finally:
        logging.enable_progress_bar()


def test_options_that_do_not_go_with_a_bank_are_named(tmp_path, capsys):
    """Of a run and of an export alike."""
    export(write_bank_run(tmp_path / "run", bank(generic={"probability": 0})), tmp_path / "out", say=str)
    for path in (tmp_path / "run", tmp_path / "out"):
        for option, value, complaint in [
            ("--blocked", "9", r"cluster 9: .*\b0 to 2\b"),
            ("--blocked", "0,1,2", "every cluster"),
            ("--control", "bank=generic", "fetched, none, blocked$"),
            ("--bank-levels", "3", "levels 1, 2$"),
        ]:
            with pytest.raises(UserError, match=f"^{option} {value}: .*{complaint}"):
                generate(capsys, path, "--prompt", "x", option, value)


def test_bad_input(tmp_path, capsys):
    with pytest.raises(UserError, match=f"^{tmp_path}: no complete checkpoint"):
        generate(capsys, tmp_path, "--prompt", "x")
    write_run(tmp_path / "run", NATIVE["llama"])
    for option, value in [
        ("--max-new-tokens", "0"),
        ("--temperature", "-1"),
        ("--temperature", "nan"),
        ("--temperature", "inf"),
        ("--temperature", "1e-300"),
        ("--top-p", "nan"),
        ("--seed", str(2**64)),
        ("--top-p", "0"),
        ("--max-new-tokens", "9999"),
    ]:
        with pytest.raises(UserError, match=f"^{option} "):
            generate(capsys, tmp_path / "run", "--prompt", "x", option, value)
