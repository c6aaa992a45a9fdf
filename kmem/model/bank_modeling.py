"""Contexts of a model with a memory bank in Transformers: which blocks its sequences use, and when they are fetched.
Ships beside exported weights."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .bank_blocks import BankInput
from .bank_contexts import Contexts, as_contexts
from .bank_inference import Call, Fetch, InferenceBank
from .bank_tree import ClusterPath
from .carried_cache import bank_cache_layer


class BankContexts:
    """The part of `KmemForCausalLM` that fetches; it stands before Transformers' classes, whose `generate` it extends.

    Without a memory bank `contexts` is None, and everything is as in Transformers.
    """

    contexts: InferenceBank | None
    shape: Any
    embedding: Any
    generation_config: Any

    @property
    def bank_control(self) -> str:
        """What the bank gives all contexts: "fetched", "generic" or "none"; can be set."""
        return self._contexts().control

    @bank_control.setter
    def bank_control(self, value: str) -> None:
        self._contexts().choose_control(value)

    @property
    def bank_levels(self) -> tuple[int, ...] | None:
        """Levels of the bank that are on, None for all; can be set. `fetch` can choose others."""
        return self._contexts().levels

    @bank_levels.setter
    def bank_levels(self, value: Iterable[int] | None) -> None:
        self._contexts().choose_levels(value)

    @property
    def bank_blocked(self) -> tuple[ClusterPath, ...]:
        """Clusters of the bank that no context may use where its leaf is looked up; can be set, as in ["3.7"]. `fetch`
        can choose others; what was fetched before stays."""
        return self._contexts().blocked

    @bank_blocked.setter
    def bank_blocked(self, value: Iterable[ClusterPath | str] | None) -> None:
        self._contexts().block(value)

    def fetch(
        self,
        context: Contexts | None = None,
        attention_mask: Tensor | None = None,
        *,
        addresses: Tensor | Sequence[int] | None = None,
        levels: Iterable[int] | None = None,
        blocked: Iterable[ClusterPath | str] | None = None,
    ) -> Fetch:
        """Fetch the blocks of contexts, and use them in all forward passes until the next `fetch` or `forget`.

        A forward pass over B sequences takes those of B contexts in their order; of fewer, each for B / n sequences
        that follow one another, as beams and samples do.

        What is fetched is the model's, as `bank_control` is, and so for calls of all its threads that begin from then
        on, such as a `generate` with a streamer; one that runs in another thread goes on with what it began with.
        Threads that have contexts of their own give them to their calls: `generate(.., addresses=model.route(..))`.

        Args:
            context: a text, texts, lists of token ids, or token ids int64 [B, T].
            attention_mask: [B, T], 0 where a token id is padding.
            addresses: leaves of the tree instead, int64 [B].
            levels: those that are on; default: `bank_levels`.
            blocked: clusters that may not be used, such as "3" or "3.7": the next nearest is; default: `bank_blocked`.
                Of an address, that is the next nearest to its leaf's centroid, from the first blocked cluster on its
                way down.

        Returns:
            The leaves; and by level what was read, in bytes and seconds.

        Raises:
            ValueError: no contexts, no bank, no tree, a damaged file, a cluster or level that is not there, or nothing
                left that is not blocked.
        """
        leaves = None if addresses is None else torch.as_tensor(addresses, dtype=torch.int64).cpu().view(-1)
        contexts = None if context is None else as_contexts(context, attention_mask)
        return self._contexts().fetch(contexts, leaves, levels, blocked, self._like())

    def route(
        self,
        context: Contexts,
        attention_mask: Tensor | None = None,
        *,
        blocked: Iterable[ClusterPath | str] | None = None,
    ) -> Tensor:
        """The leaf of each context, int64 [n], for `addresses` of calls; the arguments are those of `fetch`. Nothing is
        fetched yet, and the model is what it was.

        Raises:
            ValueError: as `fetch`.
        """
        return self._contexts().route(as_contexts(context, attention_mask), blocked)

    def forget(self) -> None:
        """Let go of what was fetched: contexts are found anew, by `generate` or a forward pass."""
        self._contexts().forget()

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers; the contexts of a memory bank are the prompts, and are looked up once, unless `addresses`
        are given, `fetch` was called, or a cache is given that began with some. Several threads may generate at once,
        each with contexts and a cache of its own."""
        bank, ids = self.contexts, kwargs.get("input_ids") if inputs is None else inputs
        if bank is None:
            return super().generate(inputs, generation_config, *args, **kwargs)  # type: ignore[misc]
        prompt = None
        if ids is not None and ids.dim() == 2 and not ids.is_floating_point():
            mask = kwargs.get("attention_mask")
            prompt = as_contexts(ids, self._padding(ids, generation_config, kwargs) if mask is None else mask)
        with bank.generation(prompt):
            return super().generate(inputs, generation_config, *args, **kwargs)  # type: ignore[misc]

    @torch.compiler.disable  # contexts are looked up on the host
    def _fetched(
        self,
        hidden: Tensor,
        input_ids: Tensor | None,
        token_mask: Tensor | None,
        addresses: Tensor | None,
        cache: Any,
    ) -> dict[int, BankInput]:
        """What the bank of each layer holds for the tokens [B, T]; nothing for a model without."""
        if self.contexts is None:
            return {}
        call, (batch, tokens) = self.contexts.call(), hidden.shape[:2]
        leaves = None
        if call.controls.control == "fetched":
            leaves = self._addresses(call, input_ids, token_mask, addresses, cache)
            if leaves.dim() == 1 and len(leaves) != batch:
                leaves = _spread(leaves, batch)
            if leaves.shape not in ((batch,), (batch, tokens)):
                raise ValueError(
                    f"addresses of shape {list(leaves.shape)}: give one for each of the {batch} sequences, [{batch}], "
                    f"or one for each of their tokens, [{batch}, {tokens}]"
                )
            carried = None if cache is None else bank_cache_layer(cache, self.shape.num_layers)
            if carried is not None and carried.leaves is None and leaves.dim() == 1:
                carried.leaves = leaves
        return call.inputs(leaves, batch, tokens, hidden)

    def _addresses(
        self,
        call: Call,
        input_ids: Tensor | None,
        token_mask: Tensor | None,
        addresses: Tensor | None,
        cache: Any,
    ) -> Tensor:
        """Leaves [n] or [B, T], on the host."""
        if addresses is not None:
            return addresses.cpu()
        if call.controls.leaves is not None:
            return call.controls.leaves
        carried = None if cache is None else bank_cache_layer(cache, self.shape.num_layers)
        if carried is not None and carried.leaves is not None:
            return carried.leaves
        prompt = call.prompt_leaves()
        if prompt is not None:
            return prompt
        if cache is not None and cache.get_seq_length():
            raise ValueError(
                "past_key_values holds tokens of contexts that this model has not looked up: continue a cache that "
                "this model filled, or fetch(context)"
            )
        if input_ids is None:
            raise ValueError("a memory bank looks up token ids: give input_ids or addresses, or fetch(context) first")
        return call.route(as_contexts(input_ids, token_mask))

    def _contexts(self) -> InferenceBank:
        if self.contexts is None:
            raise ValueError("this model has no memory bank (model.bank)")
        return self.contexts

    def _like(self) -> Tensor:
        """A tensor of the type and on the device of what layers read."""
        return self.embedding.get_parameter("weight")

    def _padding(self, ids: Tensor, generation_config: Any, options: Mapping[str, Any]) -> Tensor | None:
        """Which tokens of prompts [B, T] are none of theirs where no mask says so, by Transformers' own rule."""
        config = self.generation_config if generation_config is None else generation_config
        pad, end = (options.get(f"{name}_token_id", getattr(config, f"{name}_token_id")) for name in ("pad", "eos"))
        ends = end if isinstance(end, list | tuple) else [end]
        return None if pad is None or pad in ends else ids.ne(pad)


def _spread(leaves: Tensor, batch: int) -> Tensor:
    """Leaves [n] for a batch, each for as many sequences that follow one another; int64 [B]."""
    if batch % len(leaves):
        raise ValueError(
            f"{len(leaves)} contexts were fetched, and {batch} sequences are given: fetch the contexts of these, or "
            "forget()"
        )
    return leaves.repeat_interleave(batch // len(leaves))
