"""Which rows of its engram a model's tokens address with a given tokenizer."""

from pathlib import Path

from kmem.config import ConfigError, ModelConfig
from kmem.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from kmem.model.engram_reader import EngramAddresses


def model_addresses(model: ModelConfig, tokenizer: Path) -> EngramAddresses:
    """The addresses of a model's engram.

    Args:
        tokenizer: a tokenizer folder, such as the one in prepared data or in a run.

    Raises:
        ConfigError: the model's settings do not fit the tokenizer; names the field.
    """
    assert model.engram is not None
    loaded = load_tokenizer(tokenizer)
    if loaded.eos_token_id is None:
        raise ConfigError(f"model.engram: the tokenizer {tokenizer} names no end of text, but n-grams are padded by it")
    pad = model.engram.pad_token_id
    if model.engram.boundary == "eos" and pad not in (None, loaded.eos_token_id):
        raise ConfigError(
            f"model.engram.pad_token_id: {pad}, but boundary=eos pads with the tokenizer's end of text, which is "
            f"{loaded.eos_token_id}; leave the field out"
        )
    try:
        return EngramAddresses.build(model.shape, loaded.eos_token_id, loaded, tokenizer_fingerprint(tokenizer))
    except ValueError as error:
        raise ConfigError(f"model.engram: {error}") from error
