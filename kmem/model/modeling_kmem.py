"""kmem's model in Transformers: the decoder, the causal language model, and a classifier of sequences. Ships beside
exported weights."""

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)

from .bank_modeling import BankContexts
from .carried_cache import carried_by
from .configuration_kmem import KmemConfig
from .decoder import Decoder, Embedding
from .export_tables import RowTable
from .exported_memory import ExportedMemory, ForwardTokens, exported_memory, modules_of
from .init import initialise_
from .mask import Documents, padded_positions, padding_mask
from .memory_kinds import kinds_of
from .pretrained_folder import PretrainedFolder
from .rope import rotation
from .shape import Shape
from .stream import close_stream, open_stream

# Shape letters: B sequences, T new tokens, S cached and new tokens, V vocabulary.

TABLES_KEPT = ("device", "mmap")
NOT_COMPUTED = {
    "output_attentions": "attention runs in kernels that do not keep its weights",
    "output_router_logits": "the router's losses are training's, and exports compute none",
}
"""Arguments of Transformers' models -> why they are refused."""


class KmemModel(BankContexts, PreTrainedModel):
    """The parts of a `Decoder` without its head, under their canonical names, with cache, padding and memories.

    A model with a bank fetches the blocks of its contexts. `fetch` fetches for contexts that the caller names,
    `generate` for its prompts, and a forward pass without either for its own tokens (see `forward` for the rule).

    Args:
        tables: where the tables of memories are kept. device: they are parameters. mmap: they stay in the weight files,
            mapped and read-only; `from_pretrained(.., tables="mmap")` finds the files. Default: mmap for a bank, device
            for the other memories.
        bank_control: what a bank gives all contexts: "fetched", or as a control "generic" or "none". Default:
            "fetched", or "generic" if the model was trained with generic blocks only.
        bank_levels: levels of the bank that are on; default: all.

    Raises:
        ValueError: an argument has an unknown value, or does not apply to this model.
    """

    config_class = KmemConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _input_embed_layer = "embedding"
    _no_split_modules = ("DecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _keep_in_fp32_modules_strict = ("selection_bias",)
    _supports_sdpa = True
    _keys_to_ignore_on_load_unexpected: Collection[str] = (r"^head\.",)
    """Tensors of exports that this class does not have."""

    def __init__(
        self,
        config: KmemConfig,
        tables: str | None = None,
        bank_control: str | None = None,
        bank_levels: Sequence[int] | None = None,
    ) -> None:
        if tables not in (*TABLES_KEPT, None):
            raise ValueError(f"tables={tables!r}: choose one of {', '.join(TABLES_KEPT)}")
        super().__init__(config)
        self.shape = Shape(config.model)
        decoder = Decoder(self.shape)
        self.embedding: nn.Module = decoder.embedding
        self.layers = decoder.layers
        self.norm = decoder.norm
        self.gradient_checkpointing = False
        self._add_outputs(decoder)
        self.memories: dict[str, ExportedMemory] = {}
        """Kind -> memory; its `control` can be set, for example `model.memories["engram"].control = "off"`."""
        self._mapped: set[str] = set()
        self._row_tables: dict[nn.Module, tuple[ExportedMemory, int]] = {}
        for kind in kinds_of(self.shape):
            self.memories[kind.name] = memory = exported_memory(kind, self.shape, config)
            memory.attach(modules_of(self.layers, kind, self.shape))
            for name, length in kind.exported_tensors(self.shape).items():
                self.register_buffer(name, torch.zeros(length, dtype=torch.int64))
            if (tables or memory.tables_kept) == "mmap":
                self._mapped.add(kind.name)
            else:
                for key, (name, table) in zip(memory.tables, memory.hold(), strict=True):
                    self._add(name, table)
                    self._row_tables[table.parts] = memory, key
        if self._mapped:
            names = [table.name for kind in sorted(self._mapped) for table in self.memories[kind].tables.values()]
            mapped = [rf"^{re.escape(name)}\.parts\." for name in names]
            self._keys_to_ignore_on_load_unexpected = {*self._keys_to_ignore_on_load_unexpected, *mapped}
        self.choose_bank(bank_control, bank_levels)
        self._names = {module: name for name, module in self.named_modules()}
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers, with the further arguments `tables`, `bank_control` and `bank_levels`.

        Raises:
            ValueError: the token compression is not the one that the tables were trained with, or a weight file of
                mapped tables is missing or damaged.
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        folder = PretrainedFolder.of(pretrained_model_name_or_path, kwargs)
        for kind, memory in model.memories.items():
            memory.loaded(folder, model.config, mapped=kind in model._mapped)
            memory.check(model._memory_tensors(memory))
        return loaded

    def _add_outputs(self, decoder: Decoder) -> None:
        """Add the modules after the final norm."""

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding = value

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any):
        """As in Transformers, without reentrant checkpointing: it would not see that layers share their rows.

        Raises:
            ValueError: `use_reentrant` is true.
        """
        chosen = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if chosen["use_reentrant"]:
            raise ValueError("gradient_checkpointing_kwargs: use_reentrant=True is not supported; set it to False")
        super().gradient_checkpointing_enable(chosen, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        token_mask: Tensor | None = None,
        addresses: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Normed hidden states [B, T, H] of token ids int64 [B, T].

        Args:
            attention_mask: [B, S] over cached and new tokens, 0 where a token is padding; or bool [B, 1, T, S], True
                where a query may attend.
            position_ids: [B, T]. Default: positions count from the first token that is not padding. Without a mask or
                cache, positions that do not ascend by one begin a document, as in Transformers: tokens neither attend
                nor look back to an earlier document. The look-back of n-grams does not depend on positions otherwise.
            token_mask: [B, T], 0 where a token is padding; memories skip padding. Needed if `attention_mask` does not
                tell it. Default: the last T columns of `attention_mask` [B, S].
            addresses: for a bank, the leaf of each sequence [B] or token [B, T]. Default: the leaves of `fetch`, else
                the leaves with which the cache began, else the leaves of the running `generate`'s prompts, else the
                leaves of these tokens. In the last case the context is the whole sequence, scored tokens included, as
                is usual for the perplexity of documents. To score continuations of contexts, `fetch` the contexts
                first.

        Raises:
            ValueError: arguments contradict each other, a needed one is missing, or one asks for what is not computed;
                names the arguments.
        """
        for name in NOT_COMPUTED:
            if kwargs.get(name) or getattr(self.config, name, False):
                raise ValueError(f"{name}: {NOT_COMPUTED[name]}; leave it out")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        for kind in self._reads_token_ids() if input_ids is None else ():
            raise ValueError(f"a model with model.{kind} reads token ids: give input_ids, not inputs_embeds")
        hidden = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        document_ids = None
        if attention_mask is None and past_key_values is None and position_ids is not None:
            document_ids = _documents(position_ids)
        if document_ids is not None:
            self._check_packed(use_cache, addresses)
            use_cache = False
        recomputed = self.gradient_checkpointing and self.training
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache and not recomputed
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        cached = 0 if past_key_values is None else past_key_values.get_seq_length()
        queries = hidden.shape[1]
        if position_ids is None:
            position_ids = _positions(hidden, cached, attention_mask)

        rotary = rotation(self.shape, position_ids)
        mask = _mask(attention_mask, queries, cached) if document_ids is None else Documents.of(document_ids)
        if token_mask is None and attention_mask is not None and attention_mask.dim() == 2:
            token_mask = attention_mask[:, -queries:]
        read = self._read(hidden, input_ids, token_mask, document_ids, addresses, past_key_values)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states = [hidden]
        hidden = open_stream(hidden, self.shape)
        for index, layer in enumerate(self.layers):
            memories = {kind: by_layer[index] for kind, by_layer in read.items() if index in by_layer}
            arguments = (hidden, position_ids, mask, past_key_values, rotary, memories)
            hidden = self._gradient_checkpointing_func(layer, *arguments) if recomputed else layer(*arguments)
            if wanted:
                states.append(close_stream(hidden, self.shape))
        hidden = self.norm(close_stream(hidden, self.shape))
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*states[:-1], hidden) if wanted else None,
        )
        return output.to_tuple() if return_dict is False else output

    def _check_packed(self, use_cache: bool | None, addresses: Tensor | None) -> None:
        if use_cache:
            raise ValueError("position_ids: several documents in a sequence leave no cache; set use_cache to False")
        if self.contexts is not None and (addresses is None or addresses.dim() == 1):
            raise ValueError(
                "position_ids: several documents in a sequence have contexts of their own; give `addresses` per token"
            )

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers. If a memory reads token ids, the size cannot change: the addresses of its rows depend on
        it.

        Raises:
            ValueError: the model has such a memory and the size would change.
        """
        for kind in self._reads_token_ids() if new_num_tokens not in (None, self.config.vocab_size) else ():
            raise ValueError(f"the vocabulary is fixed: the addresses of the rows of model.{kind} depend on it")
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers, together with what memories keep beside the weights, such as a bank's tree.

        Raises:
            ValueError: tables are mapped, so they would not be saved.
        """
        if not all(memory.is_saved for memory in self.memories.values()):
            raise ValueError(
                'tables="mmap": the tables are not part of the model; load it with tables="device" to save it'
            )
        saved = super().save_pretrained(save_directory, *args, **kwargs)
        for memory in self.memories.values():
            memory.saved(Path(save_directory))
        return saved

    def _reads_token_ids(self) -> list[str]:
        return [kind for kind, memory in self.memories.items() if memory.needs_token_ids]

    def _memory_tensors(self, memory: ExportedMemory) -> dict[str, Tensor]:
        return {name: self.get_buffer(name) for name in memory.kind.exported_tensors(self.shape)}

    def _add(self, name: str, table: RowTable) -> None:
        """Add a table under its name, such as `layers.2.engram.table`."""
        path, _, last = name.rpartition(".")
        if "." not in path and not hasattr(self, path):
            self.add_module(path, nn.Module())
        self.get_submodule(path).add_module(last, table)

    @torch.compiler.disable  # rows of mapped tables come from numpy, and states are not tensors
    def _read(
        self,
        hidden: Tensor,
        input_ids: Tensor | None,
        token_mask: Tensor | None,
        document_ids: Tensor | None,
        addresses: Tensor | None,
        cache: Any,
    ) -> dict[str, dict[int, Any]]:
        """Kind -> layer -> what the memory reads for the tokens [B, T]."""
        read = {}
        for kind, memory in self.memories.items():
            layer = None
            if cache is not None and memory.keeps_state:
                layer = carried_by(cache, kind, self.shape.num_layers)
            tokens = ForwardTokens(
                like=hidden,
                input_ids=input_ids,
                present=token_mask,
                document_ids=document_ids,
                addresses=addresses,
                continued=cache is not None and cache.get_seq_length() > 0,
                tensors=self._memory_tensors(memory),
            )
            read[kind] = memory.inputs(tokens, None if layer is None else layer.carried)
        return read

    def _first_rows(self, parts: nn.Module) -> None:
        memory, key = self._row_tables[parts]
        start = 0
        for part in parts.parameters():
            if not getattr(part, "_is_hf_initialized", False):
                memory.initialise_rows_(part, key, start, torch.initial_seed())
            start += len(part)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """kmem's initialisation, from the process's seed. Tensors that were loaded from a checkpoint keep their
        values."""
        if isinstance(module, nn.ParameterList):
            self._first_rows(module)
        if next(module.children(), None) is not None or isinstance(module, nn.ParameterList):
            return  # only modules without children own tensors
        tensors = (*module.parameters(), *module.buffers())
        loaded = [(tensor, tensor.clone()) for tensor in tensors if getattr(tensor, "_is_hf_initialized", False)]
        name = self._names.get(module, "embedding")  # resizing the vocabulary creates modules without a known name
        initialise_(module, self.shape, torch.initial_seed(), name)
        for tensor, value in loaded:
            tensor.copy_(value)


class KmemForCausalLM(KmemModel, GenerationMixin):
    """The decoder with its head, loss and `generate`. Arguments as `KmemModel`.

    A tied head has no parameter of its own, so there is nothing for Transformers to tie.
    """

    _keys_to_ignore_on_load_unexpected = ()
    head: nn.Module | None

    def _add_outputs(self, decoder: Decoder) -> None:
        self.head = decoder.head

    def get_output_embeddings(self) -> nn.Module | None:
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.head = new_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        if self.head is None and isinstance(value, nn.Embedding) and not isinstance(value, Embedding):
            value.__class__ = Embedding  # the tied head calls it, too
        super().set_input_embeddings(value)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        token_mask: Tensor | None = None,
        addresses: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits [B, T, V] of token ids int64 [B, T]. The other arguments and errors are those of `KmemModel.forward`.

        Args:
            labels: [B, T], token ids like `input_ids`, -100 where the loss leaves a token out; they are shifted here.
            logits_to_keep: keep the logits of this many last positions, or of the positions in this tensor; 0 keeps
                all.
        """
        passed = {name: kwargs.pop(name) for name in NOT_COMPUTED if name in kwargs}
        decoded = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            token_mask=token_mask,
            addresses=addresses,
            **passed,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = (self.head or self.embedding)(decoded.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=decoded.past_key_values,
            hidden_states=decoded.hidden_states,
        )
        return output.to_tuple() if return_dict is False else output

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As in Transformers, plus `token_mask` for caches of fixed length: their 4-D mask does not tell which tokens
        are padding."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, attention_mask=attention_mask, **kwargs)
        mask = inputs.get("attention_mask")
        if self.memories and attention_mask is not None and mask is not None and mask.dim() == 4:
            inputs["token_mask"] = attention_mask[:, -mask.shape[2] :]
        return inputs

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """As in Transformers; also appends the memories' cache layers. Assisted decoding tells the cache to record
        before the first token is read, so they must exist by then."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if cache is None:
            return
        for kind, memory in self.memories.items():
            layer = carried_by(cache, kind, self.shape.num_layers) if memory.keeps_state else None
            if layer is not None and getattr(generation_config, "is_assistant", False):
                layer.activate_past_recording()


class KmemForSequenceClassification(KmemModel):
    """The decoder with a linear classifier of each sequence's last token, as Transformers' decoders have it.
    `config.num_labels` is the number of classes. Arguments as `KmemModel`."""

    def _add_outputs(self, decoder: Decoder) -> None:
        self.score = nn.Linear(self.shape.hidden_size, self.config.num_labels, bias=False)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast | tuple[Any, ...]:
        """Scores [B, classes] of token ids int64 [B, T]. The other arguments and errors are those of
        `KmemModel.forward`.

        Args:
            attention_mask: [B, T], 0 where a token is padding. Default: no token is padding, so the last one counts.
            labels: [B], the class; or, with one class, a number, whose squared error is the loss.
        """
        decoded = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        hidden = decoded.last_hidden_state
        places = torch.arange(hidden.shape[1], device=hidden.device)
        last = places[-1:] if attention_mask is None else (attention_mask.bool() * places).amax(-1)
        scores = self.score(hidden[torch.arange(len(hidden), device=hidden.device), last])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=scores, labels=labels, pooled_logits=scores, config=self.config)
        output = SequenceClassifierOutputWithPast(
            loss=loss,
            logits=scores,
            past_key_values=decoded.past_key_values,
            hidden_states=decoded.hidden_states,
        )
        return output.to_tuple() if return_dict is False else output


def _positions(hidden: Tensor, cached: int, attention_mask: Tensor | None) -> Tensor:
    batch, queries = hidden.shape[:2]
    if attention_mask is not None and attention_mask.dim() == 2:
        return padded_positions(attention_mask)[:, -queries:]
    return torch.arange(cached, cached + queries, device=hidden.device).expand(batch, -1)


def _mask(attention_mask: Tensor | None, queries: int, cached: int) -> Tensor | None:
    """The layers' mask: bool [B, 1, T, S], or None for plain causal attention."""
    if attention_mask is None:
        return None
    if attention_mask.dim() == 4:
        return attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
    if attention_mask.shape[1] != cached + queries:
        raise ValueError(
            f"attention_mask covers {attention_mask.shape[1]} tokens, but {cached} are cached and {queries} are new"
        )
    return padding_mask(attention_mask, queries)


def _documents(position_ids: Tensor) -> Tensor | None:
    """Number of the document of each token, int64 [B, T], given positions [B, T]; None if each sequence is one."""
    begins = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not bool(begins.any()):
        return None
    return torch.nn.functional.pad(begins.long().cumsum(1), (1, 0))
