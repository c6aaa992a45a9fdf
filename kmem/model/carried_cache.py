"""What memories keep in Transformers' key-value cache: the state of an n-gram memory, and the contexts of a memory
bank. Ships beside exported weights."""

from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import cache_utils

from .engram_reader import EngramReader, EngramState

# Offloading passes over layers of this class; Transformers before 5.19 has none.
_Keyless: Any = getattr(cache_utils, "DummyLayer", object)
AnyLayer = TypeVar("AnyLayer", bound="CarriedLayer")


class CarriedLayer(_Keyless):
    """A cache layer without keys behind those of the decoder: what beam search, repetition or assisted decoding do to
    the sequences of a cache is done to what it carries."""

    supports_early_init = False
    is_compileable = True  # it decides about the masks of caches of fixed length, which a memory does not touch
    is_croppable = True
    is_sliding = False

    def __init__(self) -> None:
        self.keys = self.values = None
        self.is_initialized = True

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        assert key_states is None, "the memory's layer holds no keys"
        return None, None

    def get_max_length(self) -> int:
        return -1

    def offload(self) -> None: ...
    def prefetch(self) -> None: ...


class EngramCacheLayer(CarriedLayer):
    """The state of an n-gram memory."""

    def __init__(self) -> None:
        super().__init__()
        self.record_past = False
        self.state: EngramState | None = None

    def begun(self, reader: EngramReader, batch: int, device: torch.device) -> EngramState:
        """The state before the next tokens of `batch` sequences."""
        if self.state is None:
            self.state = reader.start(batch, device)
        if self.state.batch != batch:
            raise ValueError(f"the cache holds {self.state.batch} sequences, and {batch} are given")
        self.state.record(self.record_past)
        return self.state

    def activate_past_recording(self) -> None:
        """Keep what `crop` needs from now on."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back -tokens_to_remove tokens, which is 0 or negative as in all cache layers."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): give the tokens to take back as a negative number; assisted decoding with "
                "n-gram memory needs a Transformers whose caches have activate_past_recording()"
            )
        if self.state is not None:
            self.state.crop(-tokens_to_remove)

    def reset(self) -> None:
        self.state = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.state is not None:
            self.state.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.state.reorder(torch.arange(self.state.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None:
            self.state.reorder(torch.arange(self.state.batch)[indices.cpu()])


class BankCacheLayer(CarriedLayer):
    """The contexts of a memory bank: a cache keeps those that it began with, since its keys were made with their
    blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.leaves: Tensor | None = None
        """int64 [B] on the host, or None before the first token."""

    def crop(self, tokens_to_remove: int) -> None:
        """Tokens that are taken back leave the context what it is."""

    def reset(self) -> None:
        self.leaves = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._take(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.leaves is not None:
            self.leaves = self.leaves.repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._take(indices)

    def _take(self, indices: Tensor) -> None:
        if self.leaves is not None:
            self.leaves = self.leaves[indices.cpu()]


def bank_cache_layer(cache: Any, decoder_layers: int) -> BankCacheLayer | None:
    """The bank's layer of a cache, appended where it has none yet; None for a cache that holds tokens and has none."""
    for layer in cache.layers:
        if isinstance(layer, BankCacheLayer):
            return layer
    if cache.get_seq_length():
        return None
    return _appended(cache, BankCacheLayer(), decoder_layers)


def engram_cache_layer(cache: Any, decoder_layers: int) -> EngramCacheLayer:
    """The memory's layer of a cache, appended where it has none yet.

    Raises:
        ValueError: the cache holds tokens that no memory has read.
    """
    for layer in cache.layers:
        if isinstance(layer, EngramCacheLayer):
            return layer
    if cache.get_seq_length():
        raise ValueError(
            "past_key_values holds tokens whose n-grams this model's memory has not read: continue a cache that this "
            "model filled"
        )
    return _appended(cache, EngramCacheLayer(), decoder_layers)


def _appended(cache: Any, layer: AnyLayer, decoder_layers: int) -> AnyLayer:
    while len(cache.layers) < decoder_layers:  # a cache that was made without a configuration grows as it is used
        cache.layers.append(cache.layer_class_to_replicate())
    cache.layers.append(layer)
    return layer
