"""The state of memories in Transformers' key-value cache, such as the look-back of an engram. Ships beside exported
weights."""

from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils

from .exported_memory import Carried

# Offloading skips layers of this class; Transformers before 5.19 does not have it.
_Keyless: Any = getattr(cache_utils, "DummyLayer", object)


class MemoryCacheLayer(_Keyless):
    """A cache layer without keys, placed after the decoder's layers. Beam search, repetition and assisted decoding
    reorder or cut the sequences of a cache; this layer applies the same to the state that a memory carries in it."""

    supports_early_init = False
    is_compileable = True  # it affects only the masks of caches of fixed length, which a memory does not use
    is_croppable = True
    is_sliding = False

    def __init__(self, kind: str) -> None:
        self.keys = self.values = None
        self.is_initialized = True
        self.kind = kind
        self.carried = Carried()

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        assert key_states is None, "this cache layer holds no keys"
        return None, None

    def get_max_length(self) -> int:
        return -1

    def offload(self) -> None: ...
    def prefetch(self) -> None: ...

    def activate_past_recording(self) -> None:
        """From now on, record what `crop` needs."""
        self.carried.recording = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -tokens_to_remove tokens; the argument is 0 or negative, as in all cache layers."""
        if self.carried.state is not None:
            self.carried.state.crop(-tokens_to_remove)

    def reset(self) -> None:
        self.carried.state = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.carried.state is not None:
            self.carried.state.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.carried.state is not None:
            self.carried.state.reorder(torch.arange(self.carried.state.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.carried.state is not None:
            self.carried.state.reorder(torch.arange(self.carried.state.batch)[indices.cpu()])


def carried_by(cache: Any, kind: str, decoder_layers: int) -> MemoryCacheLayer | None:
    """The layer of a cache that carries a kind's state, appended if the cache is empty; None if the cache holds tokens
    but has no such layer."""
    for layer in cache.layers:
        if isinstance(layer, MemoryCacheLayer) and layer.kind == kind:
            return layer
    if cache.get_seq_length():
        return None
    while len(cache.layers) < decoder_layers:  # a cache made without a configuration grows as it is used
        cache.layers.append(cache.layer_class_to_replicate())
    layer = MemoryCacheLayer(kind)
    cache.layers.append(layer)
    return layer
