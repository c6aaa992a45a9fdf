"""kmem's model as a Transformers causal language model. Ships beside exported weights."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .bank_export import BANK_TABLES, TREE_FOLDER, BankDescription
from .bank_fetched import BankParameters
from .bank_inference import InferenceBank
from .bank_modeling import BankContexts
from .carried_cache import bank_cache_layer, engram_cache_layer
from .configuration_kmem import KmemConfig
from .decoder import Decoder
from .engram import Engram
from .engram_compression import TokenCompression
from .engram_export import COMPRESSION, TABLES, EngramDescription
from .engram_reader import EngramAddresses, EngramReader, RowSource, RowTable
from .export_tables import map_tables
from .hyper_connections import collapse_branches, expand_branches
from .init import initialise_
from .mask import padded_positions, padding_mask
from .memory_kinds import KINDS
from .pretrained_folder import PretrainedFolder
from .rope import rotation
from .shape import Shape

# Shape letters: B sequences, T new tokens, S cached and new tokens, V vocabulary.

TABLES_KEPT = ("device", "mmap")


class KmemForCausalLM(BankContexts, PreTrainedModel, GenerationMixin):
    """The parts of a `Decoder` under their canonical names, with cache, padding, loss and `generate`.

    A tied head has no parameter of its own, so there is nothing for Transformers to tie.

    A model with a bank fetches the blocks of its contexts. `fetch` fetches for contexts that the caller names,
    `generate` for its prompts, and a forward pass without either for its own tokens (see `forward` for the rule).

    Args:
        tables: where the tables of an engram or a bank are kept. device: they are parameters. mmap: they stay in the
            weight files, mapped and read-only; `from_pretrained(.., tables="mmap")` finds the files. Default: device
            for an engram, mmap for a bank.
        bank_control: what a bank gives all contexts: "fetched", or as a control "generic" or "none". Default:
            "fetched", or "generic" if the model was trained with generic blocks only.
        bank_levels: levels of the bank that are on; default: all.

    Raises:
        ValueError: an argument has an unknown value, or does not apply to this model.
    """

    config_class = KmemConfig
    base_model_prefix = ""
    _no_split_modules = ("DecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _keep_in_fp32_modules_strict = ("selection_bias",)
    _supports_sdpa = True

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
        self.head: nn.Module | None = decoder.head
        self.engram_description: EngramDescription | None = None
        self._engram_control = "on"
        self._rows: dict[int, RowSource] = {}
        self._reading: EngramReader | None = None
        if self.shape.engram is not None:
            manifest, parts = getattr(config, "engram_addressing", None), getattr(config, "engram_parts", {})
            self.engram_description = EngramDescription.read(self.shape, manifest, parts)
            if self.engram_description.compressed:
                self.register_buffer(COMPRESSION, torch.zeros(self.shape.vocab_size, dtype=torch.int64))
            if tables == "mmap":
                self._keys_to_ignore_on_load_unexpected = {TABLES}
            else:
                for layer, rows in self.engram_description.parts.items():
                    self._rows[layer] = table = RowTable(rows, self.engram_description.row_dim)
                    self._engram(layer).add_module("table", table)
        self.bank_description: BankDescription | None = None
        self.contexts: InferenceBank | None = None
        self._tree_folder: Callable[[], Path] | None = None
        if self.shape.bank is not None:
            parts, tree = getattr(config, "bank_parts", {}), getattr(config, "bank_tree", None)
            self.bank_description = BankDescription.read(self.shape, parts, tree)
            self.contexts = InferenceBank(self.bank_description.layout)
            self.contexts.choose(bank_control or self.shape.bank_control, bank_levels)
            if tables == "device":
                self.bank = BankParameters(self.bank_description.layout, self.bank_description.parts)
                self.contexts.sources = self.bank.sources
            else:
                self._keys_to_ignore_on_load_unexpected = {
                    *(self._keys_to_ignore_on_load_unexpected or ()),
                    BANK_TABLES,
                }
        elif bank_control not in (None, "fetched") or bank_levels is not None:
            raise ValueError("bank_control and bank_levels are for models with a bank (model.bank)")
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
        if model.engram_description is not None:
            if kwargs.get("tables") == "mmap":
                model.use_rows(map_tables(model.engram_description.tables(), folder.find))
            model.engram_reader()  # refuses another compression
        bank = model.bank_description
        if bank is not None:
            if kwargs.get("tables") != "device":
                model.contexts.sources = dict(map_tables(bank.tables(), folder.find))
            model.contexts.router = partial(folder.router, bank, model.config)
            model._tree_folder = partial(folder.tree, bank)
        return loaded

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding = value

    def get_output_embeddings(self) -> nn.Module | None:
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.head = new_embeddings

    @property
    def engram_control(self) -> str:
        """What engram layers read: "on", or as a control "off", "shuffled" or "single-row". Can be set."""
        return self._engram_control

    @engram_control.setter
    def engram_control(self, value: str) -> None:
        KINDS["engram"].check_control(self.shape, value)
        self._engram_control = value

    def use_rows(self, sources: Mapping[int, RowSource]) -> None:
        """Set the functions that read each layer's rows, for tables="mmap"."""
        self._rows, self._reading = dict(sources), None

    def engram_reader(self) -> EngramReader:
        """The reader of a model with an engram.

        Raises:
            ValueError: `token_compression` is not the map that the tables were trained with, or the tables are mapped
                and `use_rows` was not called.
        """
        assert self.engram_description is not None
        lookup = getattr(self, COMPRESSION, None)
        if self._reading is not None:
            known = self._reading.addresses.compression
            if known is None or known.lookup is lookup:  # the tensor differs after a move to another device
                return self._reading
        if self.engram_description.parts.keys() != self._rows.keys():
            raise ValueError('tables="mmap": the tables stay in the weight files; load the model with from_pretrained')
        compression = None
        if lookup is not None:
            size = self.engram_description.addressing.compressed_vocab_size
            assert size is not None
            compression = TokenCompression(lookup, size)
        addresses = EngramAddresses(self.engram_description.addressing, compression)
        self._reading = EngramReader(addresses, self._rows, {layer: self._engram(layer) for layer in self._rows})
        return self._reading

    def forward(
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
        """Logits [B, T, V] of token ids int64 [B, T].

        Args:
            attention_mask: [B, S] over cached and new tokens, 0 where a token is padding; or bool [B, 1, T, S], True
                where a query may attend.
            position_ids: [B, T]. Default: positions count from the first token that is not padding. The look-back of an
                engram does not depend on them.
            labels: [B, T], token ids like `input_ids`, -100 where the loss leaves a token out; they are shifted here.
            logits_to_keep: keep the logits of this many last positions, or of the positions in this tensor; 0 keeps
                all.
            token_mask: [B, T], 0 where a token is padding; an engram skips padding. Needed if `attention_mask` does not
                tell it. Default: the last T columns of `attention_mask` [B, S].
            addresses: for a bank, the leaf of each sequence [B] or token [B, T]. Default: the leaves of `fetch`, else
                the leaves with which the cache began, else the leaves of the running `generate`'s prompts, else the
                leaves of these tokens. In the last case the context is the whole sequence, scored tokens included, as
                is usual for the perplexity of documents. To score continuations of contexts, `fetch` the contexts
                first.

        Raises:
            ValueError: arguments contradict each other, or a needed one is missing; names the arguments.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if self.engram_description is not None and input_ids is None:
            raise ValueError("a model with an engram reads token ids: give input_ids, not inputs_embeds")
        hidden = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        cached = 0 if past_key_values is None else past_key_values.get_seq_length()
        queries = hidden.shape[1]
        if position_ids is None:
            position_ids = _positions(hidden, cached, attention_mask)

        rotary = rotation(self.shape, position_ids)
        mask = _mask(attention_mask, queries, cached)
        if token_mask is None and attention_mask is not None and attention_mask.dim() == 2:
            token_mask = attention_mask[:, -queries:]
        read = {
            "engram": self._read(input_ids, token_mask, past_key_values),
            "bank": self._fetched(hidden, input_ids, token_mask, addresses, past_key_values),
        }
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states = [hidden]
        branches = self.shape.branches
        hidden = expand_branches(hidden, branches)
        for index, layer in enumerate(self.layers):
            memories = {kind: by_layer[index] for kind, by_layer in read.items() if index in by_layer}
            hidden = layer(hidden, position_ids, mask, past_key_values, rotary, memories)
            if wanted:
                states.append(collapse_branches(hidden, branches))
        hidden = self.norm(collapse_branches(hidden, branches))
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if self.head is None:
            logits = nn.functional.linear(hidden[:, kept], self.embedding.get_parameter("weight"))
        else:
            logits = self.head(hidden[:, kept])

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*states[:-1], hidden) if wanted else None,
        )
        return output.to_tuple() if return_dict is False else output

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As in Transformers, plus `token_mask` for caches of fixed length: their 4-D mask does not tell which tokens
        are padding."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, attention_mask=attention_mask, **kwargs)
        mask = inputs.get("attention_mask")
        has_memory = self.engram_description is not None or self.contexts is not None
        if has_memory and attention_mask is not None and mask is not None and mask.dim() == 4:
            inputs["token_mask"] = attention_mask[:, -mask.shape[2] :]
        return inputs

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers, for models without an engram: another vocabulary would change every address.

        Raises:
            ValueError: the model has an engram and the size would change.
        """
        if self.engram_description is not None and new_num_tokens not in (None, self.config.vocab_size):
            raise ValueError("the vocabulary of a model with an engram is fixed: the addresses of rows depend on it")
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers, together with a bank's tree.

        Raises:
            ValueError: tables are mapped, so they would not be saved.
        """
        sources = (*self._rows.values(), *(() if self.contexts is None else self.contexts.sources.values()))
        mapped = self.contexts is not None and not self.contexts.sources
        if mapped or not all(isinstance(rows, RowTable) for rows in sources):
            raise ValueError(
                'tables="mmap": the tables are not part of the model; load it with tables="device" to save it'
            )
        saved = super().save_pretrained(save_directory, *args, **kwargs)
        if self._tree_folder is not None:
            tree, target = self._tree_folder(), Path(save_directory) / TREE_FOLDER
            if tree.resolve() != target.resolve():
                shutil.rmtree(target, ignore_errors=True)  # an earlier tree's embedder may have other files
                shutil.copytree(tree, target)
        return saved

    def _engram(self, layer: int) -> Engram:
        engram = self.layers[layer].get_submodule("engram")
        assert isinstance(engram, Engram)
        return engram

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """As in Transformers; also appends the memories' cache layers. Assisted decoding tells the cache to record
        before the first token is read, so they must exist by then."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if self.engram_description is not None and cache is not None:
            layer = engram_cache_layer(cache, self.shape.num_layers)
            if getattr(generation_config, "is_assistant", False):
                layer.activate_past_recording()
        if self.contexts is not None and cache is not None:
            bank_cache_layer(cache, self.shape.num_layers)

    @torch.compiler.disable  # rows of mapped tables come from numpy, and the state is not a tensor
    def _read(self, input_ids: Tensor | None, token_mask: Tensor | None, cache: Any) -> dict[int, Any]:
        """Layer -> input of its engram for the tokens [B, T]; empty for a model without an engram."""
        if self.engram_description is None or input_ids is None:
            return {}
        reader, state = self.engram_reader(), None
        reader.control = self._engram_control
        if cache is not None:
            layer = engram_cache_layer(cache, self.shape.num_layers)
            state = layer.begun(reader, len(input_ids), input_ids.device)
        present = None if token_mask is None or bool(token_mask.all()) else token_mask.bool()
        return reader.read(input_ids, present=present, state=state)

    def _first_rows(self, parts: nn.ParameterList, table: str) -> None:
        start = 0
        for part in parts:
            stop = start + len(part)
            if not getattr(part, "_is_hf_initialized", False):
                if table.startswith("bank.level"):
                    level = int(table.removeprefix("bank.level"))
                    part.copy_(self.bank.layout.initial_rows(torch.initial_seed(), level, start, stop))
                else:
                    nn.init.normal_(part, std=self.shape.engram.init_std)
            start = stop

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """kmem's initialisation, from the process's seed. Tensors that were loaded from a checkpoint keep their
        values."""
        if isinstance(module, nn.ParameterList):
            self._first_rows(module, self._names[module].removesuffix(".parts"))
        if next(module.children(), None) is not None or isinstance(module, nn.ParameterList):
            return  # only modules without children own tensors
        tensors = (*module.parameters(), *module.buffers())
        loaded = [(tensor, tensor.clone()) for tensor in tensors if getattr(tensor, "_is_hf_initialized", False)]
        name = self._names.get(module, "embedding")  # resizing the vocabulary creates modules without a known name
        initialise_(module, self.shape, torch.initial_seed(), name)
        for tensor, value in loaded:
            tensor.copy_(value)


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
