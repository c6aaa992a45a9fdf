"""The state that memories keep in Transformers' key-value cache: an engram's look-back, and a bank's contexts. Ships
beside exported weights."""

from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import cache_utils

from .engram_reader import EngramReader, EngramState

# Shape letters: B sequences.

# Offloading skips layers of this class; Transformers before 5.19 does not have it.
_Keyless: Any = getattr(cache_utils, "DummyLayer", object)
AnyLayer = TypeVar("AnyLayer", bound="CarriedLayer")


class CarriedLayer(_Keyless):
    """A cache layer without keys, placed after the decoder's layers. Beam search, repetition and assisted decoding
    reorder or cut the sequences of a cache; this layer applies the same to the state it carries."""

    supports_early_init = False
    is_compileable = True  # it affects only the masks of caches of fixed length, which a memory does not use
    is_croppable = True
    is_sliding = False

    def __init__(self) -> None:
        self.keys = self.values = None
        self.is_initialized = True

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        assert key_states is None, "this cache layer holds no keys"
        return None, None

    def get_max_length(self) -> int:
        return -1

    def offload(self) -> None: ...
    def prefetch(self) -> None: ...


class EngramCacheLayer(CarriedLayer):
    """The state of an engram."""

    def __init__(self) -> None:
        super().__init__()
        self.record_past = False
        self.state: EngramState | None = None

    def begun(self, reader: EngramReader, batch: int, device: torch.device) -> EngramState:
        """The state before the next tokens of `batch` sequences.

        Raises:
            ValueError: the cache holds another number of sequences.
        """
        if self.state is None:
            self.state = reader.start(batch, device)
        if self.state.batch != batch:
            raise ValueError(f"the cache holds {self.state.batch} sequences, but {batch} are given")
        self.state.record(self.record_past)
        return self.state

    def activate_past_recording(self) -> None:
        """From now on, record what `crop` needs."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -tokens_to_remove tokens; the argument is 0 or negative, as in all cache layers."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): give the number of tokens to remove as a negative number; assisted "
                "decoding with an engram needs a Transformers whose caches have activate_past_recording()"
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
    """The contexts of a bank. A cache keeps the contexts with which it began, since its keys were computed with their
    blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.leaves: Tensor | None = None
        """int64 [B] on the host, or None before the first token."""

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing to do: removing tokens does not change the context."""

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
    """The bank's layer of a cache, appended if the cache is empty; None if the cache holds tokens but has no such
    layer."""
    for layer in cache.layers:
        if isinstance(layer, BankCacheLayer):
            return layer
    if cache.get_seq_length():
        return None
    return _appended(cache, BankCacheLayer(), decoder_layers)


def engram_cache_layer(cache: Any, decoder_layers: int) -> EngramCacheLayer:
    """The engram's layer of a cache, appended if the cache is empty.

    Raises:
        ValueError: the cache holds tokens but has no such layer.
    """
    for layer in cache.layers:
        if isinstance(layer, EngramCacheLayer):
            return layer
    if cache.get_seq_length():
        raise ValueError(
            "past_key_values holds tokens whose n-grams this model's engram has not read: continue a cache that this "
            "model filled"
        )
    return _appended(cache, EngramCacheLayer(), decoder_layers)


def _appended(cache: Any, layer: AnyLayer, decoder_layers: int) -> AnyLayer:
    while len(cache.layers) < decoder_layers:  # a cache made without a configuration grows as it is used
        cache.layers.append(cache.layer_class_to_replicate())
    cache.layers.append(layer)
    return layer
