"""A trained MoE becomes chains of experts that compute the same, to the bit."""

import re

import pytest
import torch

from kmem.checkpoint.reader import CheckpointReader
from kmem.cli import main
from kmem.config import UserError
from kmem.hf.retrofit import chained
from kmem.model.decoder import Decoder
from tests.hf.models import NATIVE, OWN, VOCABULARY, logits, random_weights, write_run


@pytest.mark.parametrize("name", ["qwen3_moe", "glm4_moe", "deepseek_v3", "softmax and shared experts"])
def test_the_chain_starts_as_the_model_it_came_from(name, tmp_path, capsys):
    config = (NATIVE | OWN)[name]
    decoder = random_weights(config)
    write_run(tmp_path / "run", config, decoder)
    run, out, back = (str(tmp_path / folder) for folder in ("run", "out", "back"))
    assert main(["export", "--checkpoint", run, "--out", out]) == 0
    assert main(["import", "--from", out, "--out", back, "--chain-iterations", "3"]) == 0
    assert "chains of 3 iterations" in capsys.readouterr().out
    reader = CheckpointReader(tmp_path / "back")
    reader.verify()
    assert reader.config.model.moe.chain.retrofit_scale
    chain = Decoder(reader.config.model.shape).eval()
    chain.load_state_dict({name: reader.read(name) for name in reader.tensors})
    ids = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
    assert torch.equal(logits(chain, ids), logits(decoder, ids))
    layer, source = chain.layers[-1], decoder.layers[-1]
    for router in layer.feed_forward.routers:
        assert torch.equal(router.weight, source.feed_forward.router.weight)
    for norm in layer.feed_forward.norms.values():
        assert torch.equal(norm.weight, source.feed_forward_norm.weight)
    layer.feed_forward.retrofit_scale["2"].data.fill_(0.5)
    assert not torch.allclose(logits(chain, ids), logits(decoder, ids))


@pytest.mark.parametrize("choices", [["residual=outer", "norm=once"], ["gates=shared"], ["gates=frozen"]])
def test_other_chains_start_as_the_model_too(choices, tmp_path):
    config = NATIVE["qwen3_moe"]
    decoder = random_weights(config)
    write_run(tmp_path / "run", config, decoder)
    run, out, back = (str(tmp_path / folder) for folder in ("run", "out", "back"))
    assert main(["export", "--checkpoint", run, "--out", out]) == 0
    words = ["import", "--from", out, "--out", back, "--chain-iterations", "2", "--chain-set", *choices]
    assert main(words) == 0
    reader = CheckpointReader(tmp_path / "back")
    chain = reader.config.model.moe.chain
    assert all(getattr(chain, name) == value for name, value in (choice.split("=") for choice in choices))
    decoder_of_chains = Decoder(reader.config.model.shape).eval()
    decoder_of_chains.load_state_dict({name: reader.read(name) for name in reader.tensors})
    ids = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
    assert torch.equal(logits(decoder_of_chains, ids), logits(decoder, ids))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("residual=both", "--chain-set residual: .*'inner'"),
        ("gate=shared", "--chain-set gate: "),
        ("residual=init", "--chain-set .*residual=init .*stream=prenorm"),
        ("iterations=3", r"--chain-set iterations=3: .*model\.moe\.chain"),
        ("shared_experts=once", "--chain-set shared_experts=once: "),
    ],
)
def test_choices_that_make_no_such_chain(choice, message):
    with pytest.raises(UserError, match=message):
        chained(NATIVE["qwen3_moe"], 2, [choice])


@pytest.mark.parametrize(
    ("name", "iterations", "message"),
    [
        ("qwen3", "2", r"--chain-iterations: .*\bno experts"),
        ("chain of experts", "2", r"--chain-iterations: .*\bchains\b"),
        ("qwen3_moe", "1", r"--chain-iterations 1: .*\b2\b"),
    ],
)
def test_what_cannot_be_chained(name, iterations, message, tmp_path, capsys):
    write_run(tmp_path / "run", (NATIVE | OWN)[name])
    run, out, back = (str(tmp_path / folder) for folder in ("run", "out", "back"))
    assert main(["export", "--checkpoint", run, "--out", out]) == 0
    assert main(["import", "--from", out, "--out", back, "--chain-iterations", iterations]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "back").exists()
