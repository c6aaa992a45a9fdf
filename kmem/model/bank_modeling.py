"""The contexts of a model with a bank in Transformers: which blocks its sequences use, and when they are fetched. Ships
beside exported weights."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .bank_contexts import Contexts, as_contexts
from .bank_export import ExportedBank
from .bank_inference import Fetch, InferenceBank
from .bank_tree import ClusterPath
from .exported_memory import ExportedMemory

# Shape letters: B sequences, T tokens, n contexts.


class BankContexts:
    """The part of `KmemForCausalLM` that fetches. It comes before Transformers' base classes, to extend `generate`.

    Without a bank, `contexts` is None and everything works as in Transformers.
    """

    memories: Mapping[str, ExportedMemory]
    embedding: Any
    generation_config: Any

    @property
    def contexts(self) -> InferenceBank | None:
        """The bank and its fetched contexts; None for a model without a bank."""
        bank = self.memories.get("bank")
        return bank.contexts if isinstance(bank, ExportedBank) else None

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
        return self._contexts().controls.levels

    @bank_levels.setter
    def bank_levels(self, value: Iterable[int] | None) -> None:
        self._contexts().choose_levels(value)

    @property
    def bank_blocked(self) -> tuple[ClusterPath, ...]:
        """Clusters that the look-up of a leaf may not enter. Can be set, for example to ["3.7"]; `fetch` can choose
        others for its contexts. Contexts that are already fetched do not change."""
        return self._contexts().controls.blocked

    @bank_blocked.setter
    def bank_blocked(self, value: Iterable[ClusterPath | str] | None) -> None:
        self._contexts().block(value)

    def choose_bank(self, control: str | None, levels: Sequence[int] | None) -> None:
        """Set the control and the levels of the bank; None leaves the default.

        Raises:
            ValueError: the model has no bank, or the bank no such control or level.
        """
        bank = self.contexts
        if bank is not None:
            bank.choose(control or bank.control, levels)
        elif control not in (None, "fetched") or levels is not None:
            raise ValueError("bank_control and bank_levels are for models with a bank (model.bank)")

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
