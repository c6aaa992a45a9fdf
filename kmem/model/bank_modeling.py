"""The contexts of a model with a bank in Transformers: which blocks its sequences use, and when they are fetched. Ships
beside exported weights."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .bank_blocks import BankInput
from .bank_contexts import Contexts, as_contexts
from .bank_inference import Fetch, InferenceBank, InferenceSession
from .bank_tree import ClusterPath
from .carried_cache import bank_cache_layer

# Shape letters: B sequences, T tokens, n contexts.


class BankContexts:
    """The part of `KmemForCausalLM` that fetches. It comes before Transformers' base classes, to extend `generate`.

    Without a bank, `contexts` is None and everything works as in Transformers.
    """

    contexts: InferenceBank | None
    shape: Any
    embedding: Any
    generation_config: Any

    @property
    def bank_control(self) -> str:
        """What the bank gives all contexts: "fetched", "generic" or "none". Can be set."""
        return self._contexts().control

    @bank_control.setter
    def bank_control(self, value: str) -> None:
        self._contexts().choose_control(value)

    @property
    def bank_levels(self) -> tuple[int, ...] | None:
        """Levels of the bank that are on; None: all. Can be set; `fetch` can choose others for its contexts."""
        return self._contexts().levels

    @bank_levels.setter
    def bank_levels(self, value: Iterable[int] | None) -> None:
        self._contexts().choose_levels(value)

    @property
    def bank_blocked(self) -> tuple[ClusterPath, ...]:
        """Clusters that the look-up of a leaf may not enter. Can be set, for example to ["3.7"]; `fetch` can choose
        others for its contexts. Contexts that are already fetched do not change."""
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

        A forward pass over B sequences uses B contexts in order. With n < B contexts, each serves B / n consecutive
        sequences, which is how beams and samples are laid out.

        Fetched contexts belong to the model, like `bank_control`. They apply to every forward pass and `generate` that
        begins afterwards in any thread, such as a `generate` with a streamer. One that already runs in another thread
        continues with its own contexts. A thread with contexts of its own passes them along instead:
        `generate(.., addresses=model.route(..))`.

        Args:
            context: a text, several texts, lists of token ids, or token ids int64 [B, T].
            attention_mask: [B, T], 0 where a token id is padding.
            addresses: leaves of the tree, int64 [B], instead of contexts.
            levels: levels that are on; default: `bank_levels`.
            blocked: clusters that may not be used, such as "3" or "3.7"; the next nearest is used instead. Default:
                `bank_blocked`. For an address, the descent restarts at its first blocked cluster, with the centroid of
                its leaf.

        Returns:
            The leaves, and for each level the bytes read and the seconds spent.

        Raises:
            ValueError: no contexts, no bank, no tree, a damaged file, an unknown cluster or level, or every cluster is
                blocked.
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
        """The leaf of each context, int64 [n], to pass as `addresses`. Takes the arguments of `fetch`, but fetches
        nothing and does not change the model.

        Raises:
            ValueError: as `fetch`.
        """
        return self._contexts().route(as_contexts(context, attention_mask), blocked)

    def forget(self) -> None:
        """Drop the fetched contexts: `generate` and forward passes look up their own contexts again."""
        self._contexts().forget()

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers. The prompts are the contexts of the bank and are looked up once, unless `addresses` are
        given, `fetch` was called, or the given cache already has contexts. Several threads may generate at once, each
        with its own contexts and cache."""
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
        """Layer -> the blocks that it reads for the tokens [B, T]; empty for a model without a bank."""
        if self.contexts is None:
            return {}
        session, (batch, tokens) = self.contexts.session(), hidden.shape[:2]
        leaves = None
        if session.controls.control == "fetched":
            leaves = self._addresses(session, input_ids, token_mask, addresses, cache)
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
        return session.inputs(leaves, batch, tokens, hidden)

    def _addresses(
        self,
        session: InferenceSession,
        input_ids: Tensor | None,
        token_mask: Tensor | None,
        addresses: Tensor | None,
        cache: Any,
    ) -> Tensor:
        """Leaves [n] or [B, T], on the host."""
        if addresses is not None:
            return addresses.cpu()
        if session.controls.leaves is not None:
            return session.controls.leaves
        carried = None if cache is None else bank_cache_layer(cache, self.shape.num_layers)
        if carried is not None and carried.leaves is not None:
            return carried.leaves
        prompt = session.prompt_leaves()
        if prompt is not None:
            return prompt
        if cache is not None and cache.get_seq_length():
            raise ValueError(
                "past_key_values holds tokens whose contexts this model has not looked up: continue a cache that this "
                "model filled, or call fetch(context) first"
            )
        if input_ids is None:
            raise ValueError("a bank looks up token ids: give input_ids or addresses, or call fetch(context) first")
        return session.route(as_contexts(input_ids, token_mask))

    def _contexts(self) -> InferenceBank:
        if self.contexts is None:
            raise ValueError("this model has no bank (model.bank)")
        return self.contexts

    def _like(self) -> Tensor:
        """A tensor with the dtype and device that the layers compute with."""
        return self.embedding.get_parameter("weight")

    def _padding(self, ids: Tensor, generation_config: Any, options: Mapping[str, Any]) -> Tensor | None:
        """Mask [B, T] of prompts given without one, False for padding, by Transformers' own rule; None: no padding."""
        config = self.generation_config if generation_config is None else generation_config
        pad, end = (options.get(f"{name}_token_id", getattr(config, f"{name}_token_id")) for name in ("pad", "eos"))
        ends = end if isinstance(end, list | tuple) else [end]
        return None if pad is None or pad in ends else ids.ne(pad)


def _spread(leaves: Tensor, batch: int) -> Tensor:
    """Leaves [n] repeated for a batch, each for B / n consecutive sequences; int64 [B]."""
    if batch % len(leaves):
        raise ValueError(
            f"{len(leaves)} contexts were fetched, but {batch} sequences are given: fetch the contexts of these "
            "sequences, or call forget()"
        )
    return leaves.repeat_interleave(batch // len(leaves))
