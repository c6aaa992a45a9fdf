"""The sizes that papers print, from the configurations that ship."""

import json
from pathlib import Path

import pytest

from kmem.cli import main
from kmem.config import load_config
from kmem.hf.foreign_config import ignored_fields, read_architecture, read_config, read_model
from kmem.model.parameter_counts import count_parameters
from kmem.parallel.mesh import Mesh
from kmem.train.dry_run import rank_bytes

CHAINS_OF_EXPERTS = {
    "coe/n64-l4-c1": (570_956_800, "544.51"),
    "coe/n64-l4-c2": (571_214_848, "544.75"),
    "coe/n48-l4-c2": (432_671_744, "412.63"),
    "coe/n64-l8-c1": (1_141_912_576, "1089.01"),
}

ENGRAM = {  # total, active without the embedding, memory; as printed by the paper in billions
    "moe-27b": ((26_717_336_660, 3_807_917_140, 0), ("26.7", "3.8", "0.0")),
    "engram-27b": ((26_725_685_460, 3_839_594_580, 5_792_338_560), ("26.7", "3.8", "5.7")),
    "engram-40b": ((39_467_658_260, 3_839_594_580, 18_534_311_360), ("39.5", "3.8", "18.5")),
}

BANKS = {  # anchor; fetched and bank as arXiv 2510.02375 prints them, or as 3 r L d says
    "160m": (163_510_016, "18.063M", "4.624B", 3 * 35 * 512, (256, 64, 16, 0)),
    "160m-frozen": (163_510_016, "18.063M", "4.624B", 3 * 35 * 512, (256, 64, 16, 0)),
    "160m-scratch": (163_510_016, "18.063M", "4.624B", 3 * 35 * 512, (256, 64, 16, 0)),
    "160m-level-4": (163_510_016, "18.278M", "18.717B", 3 * 35 * 512, (256, 64, 16, 4)),
    "410m": (411_665_408, "49.545M", "12.684B", 3 * 24 * 1024, (512, 128, 32, 0)),
    "1.4b": (1_439_893_504, "153.354M", "21.139B", 3 * 24 * 2048, (768, 256, 16, 0)),
    # The published models': Gemma's without the norms behind its sublayers, 2 * 18 * 640.
    "gemma-3-270m": (268_098_176 - 23_040, "23.224M", "5.945B", 3 * 18 * 640, (512, 128, 32, 0)),
    "qwen2.5-0.5b": (494_032_768, "43.352M", "11.098B", 3 * 24 * 896, (512, 128, 32, 0)),
    "llama-3.2-1b": (1_235_814_400, "102.236M", "14.093B", 3 * 16 * 2048, (768, 256, 16, 0)),
}


def dry_run(name, capsys):
    assert main(["train", "--config", name, "--dry-run", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", CHAINS_OF_EXPERTS)
def test_chain_of_experts(name, capsys):
    """arXiv 2506.18945 counts in units of 2^20, without embeddings."""
    figures = dry_run(name, capsys)
    expected, printed = CHAINS_OF_EXPERTS[name]
    assert figures["non_embedding"] == expected
    assert f"{figures['non_embedding'] / 2**20:.2f}" == printed
    assert figures["total"] == sum(figures["components"].values()) == expected + 2 * 102400 * 1024


@pytest.mark.parametrize("name", ENGRAM)
def test_engram(name, capsys):
    """arXiv 2601.07372 counts in 10^9 and rounds, but for its memory of 2 * 2,262,400 * 1280 = 5.79B, which it cuts."""
    figures = dry_run(name, capsys)
    found = tuple(figures[count] for count in ("total", "active_non_embedding", "tables"))
    exact, (total, active, memory) = ENGRAM[name]
    assert found == exact
    assert figures["total"] == sum(figures["components"].values())
    assert (f"{found[0] / 1e9:.1f}", f"{found[1] / 1e9:.1f}") == (total, active)
    assert f"{found[2] // 10**8 / 10:.1f}" == memory
    # What the configurations say they count: without mHC's own parameters the experts' model has 26.70B and 3.79B.
    connections = figures["components"]["hyper_connections"]
    assert connections == 30 * 2 * (24 * 4 * 2560 + 24 + 3)
    if name == "moe-27b":
        assert [f"{(count - connections) / 1e9:.2f}" for count in found[:2]] == ["26.70", "3.79"]


def test_engram_rows_are_the_published_ones_up_to_primes(capsys):
    for name, vocabulary in (("engram-27b", 2_262_400), ("engram-40b", 7_239_680)):
        figures = dry_run(name, capsys)
        tables = [table for stage in figures["rank_bytes"] for table in stage["tables"]]
        assert [table["number"] for table in tables] == [1, 14]
        assert 0 <= figures["tables"] - 2 * vocabulary * 1280 < 2e-4 * figures["tables"]


def test_allocation_of_engram_27b(capsys):
    """Section 5 of arXiv 2601.07372: what a token does not use is 74.3 % experts; both models have as much of it."""
    moe, engram = dry_run("moe-27b", capsys), dry_run("engram-27b", capsys)
    unused = [figures["total"] - figures["active"] for figures in (moe, engram)]
    assert f"{1 - engram['tables'] / unused[1]:.3f}" == "0.743"
    assert abs(unused[0] / unused[1] - 1) < 2e-3


def test_deepseek_v41_flash(capsys):
    """arXiv 2609.19969: the rows of both tables and their 196.6B parameters; the backbone, a stand-in, has 552B too."""
    figures = dry_run("deepseek-v4.1-flash", capsys)
    assert figures["tables"] == (384_006_168 + 384_016_682) * 256 == 768_022_850 * 256
    assert f"{figures['tables'] / 1e9:.1f}" == "196.6"
    backbone = figures["total"] - figures["tables"] - figures["components"]["engram"]
    assert f"{backbone / 1e9:.0f}" == "552"
    data = figures["mesh"]["data"]
    owned = {table["number"]: table["rows"] for stage in figures["rank_bytes"] for table in stage["tables"]}
    assert owned == {1: -(-384_006_168 // data), 14: -(-384_016_682 // data)}


@pytest.mark.parametrize("name", BANKS)
def test_memory_bank(name, capsys):
    """Section 4.1 and table 2 of arXiv 2510.02375; what a rank keeps of it, too."""
    figures = dry_run(f"bank/{name}", capsys)
    components, (anchor, fetched, bank, unit, ranks) = figures["components"], BANKS[name]
    assert components["anchor"] == anchor
    assert components["fetched"] == unit * sum(ranks)
    assert components["bank"] == sum(unit * rank * 16**level for level, rank in enumerate(ranks, 1))
    assert (f"{components['fetched'] / 1e6:.3f}M", f"{components['bank'] / 1e9:.3f}B") == (fetched, bank)
    assert components["generic"] == components["fetched"]  # the control is of the fetched size
    assert figures["total"] == anchor + figures["tables"] == anchor + components["bank"] + components["generic"]
    assert figures["active"] == anchor + components["fetched"]
    tables = figures["rank_bytes"][0]["tables"]
    assert [table["number"] for table in tables] == [level for level, rank in enumerate(ranks, 1) if rank]
    for table in tables:
        assert table["rows"] == 16 ** table["number"] + 1
        assert table["row_bytes"] == 2 * unit * ranks[table["number"] - 1]  # bf16


RECIPES = {  # rows of table 1 of arXiv 2510.02375 and section 4: tokens, learning rates, decay, warm-up, anchor
    "160m-anchor": (2**40, (5e-3, 5e-5), 0.05, 10000, None),
    "160m": (2**40, (1e-4, 1e-5), 1e-3, 10000, "train"),
    "160m-frozen": (2**40, (1e-4, 1e-5), 1e-3, 10000, "frozen"),
    "160m-scratch": (2**41, (1e-3, 1e-5), 0.1, 10000, "train"),
    "410m": (2**40, (1e-4, 1e-5), 1e-3, 10000, "train"),
    "1.4b": (2**40, (1e-4, 1e-5), 1e-3, 10000, "train"),
    "gemma-3-270m": (2**40, (1e-4, 1e-5), 1e-3, 5000, "frozen"),
    "qwen2.5-0.5b": (2**40, (1e-4, 1e-5), 1e-3, 5000, "frozen"),
    "llama-3.2-1b": (2**40, (1e-4, 1e-5), 1e-3, 5000, "frozen"),
}
NEW = ("160m-anchor", "160m-scratch", "gemma-3-270m")


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_of_memory_banks(name):
    config, (tokens, rates, decay, warmup, anchor) = load_config(f"bank/{name}"), RECIPES[name]
    train, bank = config.train, config.model.bank
    assert train.steps * train.global_batch_size * config.data.sequence_length == tokens
    lr = train.optimizer.lr
    assert (lr, lr * train.schedule.min_ratio) == pytest.approx(rates)
    assert (train.optimizer.weight_decay, train.schedule.warmup_steps) == (decay, warmup)
    assert (bank.anchor if bank else None) == anchor
    assert bank is None or (config.bank.optimizer.weight_decay, config.bank.optimizer.lr_multiplier) == (decay, 1.0)
    assert (config.checkpoint.start is None) == (name in NEW)
    assert config.data.document_attention == (anchor != "frozen" or name.startswith("160m"))


def test_the_anchor_of_a_recipe_is_its_model(capsys):
    """Begun with by name, with every field of the model but the bank."""
    anchor, banked = (load_config(f"bank/{name}") for name in ("160m-anchor", "160m"))
    assert banked.checkpoint.start == f"{anchor.folder}/{anchor.name}"
    assert banked.model.model_copy(update={"bank": None}) == anchor.model
    assert dry_run("bank/160m-anchor", capsys)["total"] == 163_510_016


PUBLISHED = {  # config.json of the published models
    "qwen2.5-0.5b": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "num_hidden_layers": 24,
        "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
    "llama-3.2-1b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 16,
        "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "tie_word_embeddings": True,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_bank_fits_the_imported_model(name):
    """What `kmem import` makes of the published model is the model of the configuration, but for the bank."""
    path, fields = Path(name), PUBLISHED[name]
    architecture = read_architecture(fields, path)
    imported = read_model(read_config(fields, architecture, path), architecture, path)
    assert load_config(f"bank/{name}").model.model_copy(update={"bank": None}) == imported


COUNTS = {  # config.json of published models, and their sizes as the hub counts them, without selection biases
    "Mixtral-8x7B": (46_702_792_704, {
        "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "num_experts_per_tok": 2, "sliding_window": None, "rope_theta": 1e6,
    }),
    "OLMoE-1B-7B": (6_919_161_856, {
        "model_type": "olmoe", "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024,
        "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64,
        "num_experts_per_tok": 8, "norm_topk_prob": False, "clip_qkv": None, "rope_scaling": None,
    }),
    "Qwen1.5-MoE-A2.7B": (14_315_784_192, {
        "model_type": "qwen2_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632,
        "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "num_hidden_layers": 24,
        "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 60, "num_experts_per_tok": 4,
        "norm_topk_prob": False, "decoder_sparse_step": 1, "use_sliding_window": False, "sliding_window": 32768,
    }),
    "DeepSeek-V2-Lite": (15_706_484_224, {
        "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
        "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16, "n_routed_experts": 64,
        "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1, "topk_method": "greedy",
        "scoring_func": "softmax", "norm_topk_prob": False, "kv_lora_rank": 512, "q_lora_rank": None,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "rope_theta": 10000,
        "rope_scaling": {
            "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
        },
    }),
    "DeepSeek-V3": (671_026_419_200 - 58 * 256, {
        "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128, "n_routed_experts": 256,
        "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "topk_method": "noaux_tc",
        "scoring_func": "sigmoid", "norm_topk_prob": True, "kv_lora_rank": 512, "q_lora_rank": 1536, "n_group": 8,
        "topk_group": 4, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "rope_theta": 10000,
        "rope_scaling": {
            "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_an_imported_model_has_the_published_size(name):
    size, fields = COUNTS[name]
    path, architecture = Path(name), read_architecture(fields, Path(name))
    model = read_model(read_config(fields, architecture, path), architecture, path)
    assert count_parameters(model.shape).total == size
    assert not ignored_fields(fields, model, architecture)


RANKS = {
    "engram-27b": (16, 32, 64),
    "engram-40b": (16, 32, 64),
    "moe-27b": (8, 16, 32, 64),
    "engram-150m": (8, 16, 32, 64),
}


@pytest.mark.parametrize("name", RANKS)
def test_a_config_starts_on_the_ranks_that_it_names(name):
    for ranks in RANKS[name]:
        config = load_config(name)
        mesh = Mesh(0, config.parallel.pipeline, config.data_parallel_size(ranks), config.parallel.expert)
        assert max(stage.total for stage in rank_bytes(config, mesh)) < 75e9
