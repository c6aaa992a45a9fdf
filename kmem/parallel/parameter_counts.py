"""Exact parameter counts from the modules themselves, built on the meta device: nothing is allocated."""

from dataclasses import dataclass

import torch
from torch import nn

from kmem.config import ModelConfig
from kmem.model.bank_layout import BankLayout, layer_bank_name
from kmem.model.chain_of_experts import ChainOfExperts
from kmem.model.decoder import Decoder, DecoderLayer
from kmem.model.engram_reader import table_name, table_rows
from kmem.model.moe import ExpertLayer


@dataclass(frozen=True)
class ParameterCounts:
    """Trainable elements of a model."""

    total: int
    active: int
    """Elements that take part in the computation of one token: of the routed experts only the chosen share. A chain of
    C iterations counts the C * top_k experts that a token can visit at most, or top_k where the choice is frozen; what
    several iterations use is counted once."""
    tables: int
    """Elements in lookup tables, padding rows and generic blocks included; of these a token touches a few rows."""
    embedding: int
    """Embedding, and the head when it is not tied."""
    components: dict[str, int]
    layers: list[int]
    """Elements each decoder layer multiplies a token with, once per use in a chain of experts: the weights of pipeline
    balancing."""
    head: int
    """Elements the projection to the vocabulary multiplies with, tied or not."""
    fetched: int = 0
    """Elements of the blocks that a context fetches from a memory bank, one of each level."""
    bank: int = 0
    """Elements of all blocks in the tree of a memory bank; generic blocks are as many as `fetched`."""

    @property
    def anchor(self) -> int:
        """Elements outside all tables."""
        return self.total - self.tables

    @property
    def non_embedding(self) -> int:
        return self.total - self.embedding

    @property
    def active_non_embedding(self) -> int:
        return self.active - self.embedding


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Count a model of this shape."""
    with torch.device("meta"):
        decoder = Decoder(config.shape)
    shape = decoder.shape
    engram_rows = {layer: rows * shape.engram.row_dim for layer, rows in table_rows(shape).items()}
    components = {
        "embedding": _size(decoder.embedding),
        "attention": 0,
        "feed_forward": 0,
        "shared_experts": 0,
        "routed_experts": 0,
        "routers": 0,
        "norms": _size(decoder.norm),
        "head": 0 if config.tie_embeddings else config.vocab_size * config.hidden_size,
    }
    if config.engram is not None:
        components |= {"engram": 0, "engram_table": sum(engram_rows.values())}
    layout = None if shape.bank is None else BankLayout.of(shape)
    if layout is not None:
        components |= {"bank": layout.bank_values} | ({"generic": layout.fetched_values} if layout.generic else {})
    if shape.branches > 1:
        components["hyper_connections"] = 0
    active = embedding = components["embedding"] + components["head"]
    active += components["norms"]
    layers = []
    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer)
        norms = _size(layer.attention_norm) + _size(layer.feed_forward_norm)
        components["norms"] += norms
        components["attention"] += _size(layer.attention)
        feed_forward = layer.feed_forward
        if isinstance(feed_forward, ExpertLayer):
            parts = _expert_layer(feed_forward)
            for name, (elements, _, _) in parts.items():
                components[name] = components.get(name, 0) + elements
            touched, multiplied = (sum(part[place] for part in parts.values()) for place in (1, 2))
        else:
            touched = multiplied = _size(feed_forward)
            components["feed_forward"] += touched
        always = norms + _size(layer.attention)
        connections = _size(layer.attention_connection) + _size(layer.feed_forward_connection)
        if connections:
            components["hyper_connections"] += connections
            always += connections
        if layer.engram is not None:
            components["engram"] += _size(layer.engram)
            always += _size(layer.engram)
            active += layer.engram.width  # the rows of a token
        if layout is not None and layer.has_bank:
            always += sum(layout.block_values(level) for level in layout.levels)
        active += always + touched
        layers.append(always + multiplied)
    return ParameterCounts(
        total=sum(components.values()),
        active=active,
        tables=sum(engram_rows.values()) + components.get("bank", 0) + components.get("generic", 0),
        embedding=embedding,
        components=components,
        layers=layers,
        head=config.vocab_size * config.hidden_size,
        fetched=0 if layout is None else layout.fetched_values,
        bank=0 if layout is None else layout.bank_values,
    )


def _expert_layer(layer: ExpertLayer) -> dict[str, tuple[int, int, int]]:
    """Component -> (elements, elements that one token touches, elements it is multiplied with)."""
    routers = layer.iteration_routers()
    iterations, router = len(routers), _size(routers[0])
    expert = _size(layer.experts) // layer.moe.num_experts
    shared = 0 if layer.shared_experts is None else _size(layer.shared_experts)
    own_routers, choices, shared_runs = len(set(routers)), iterations, iterations
    extra: dict[str, tuple[int, int, int]] = {}
    if isinstance(layer, ChainOfExperts):
        if layer.chain.gates == "frozen":
            choices = 1
        if layer.chain.shared_experts == "once":
            shared_runs = 1
        extra = {
            name: (_size(module),) * 3
            for name, module in (("norms", layer.norms), ("retrofit_scale", layer.retrofit_scale))
            if module is not None
        }
    top_k, num_experts = layer.moe.top_k, layer.moe.num_experts
    visited = min(num_experts, choices * top_k)
    return {
        "routed_experts": (num_experts * expert, visited * expert, iterations * top_k * expert),
        "routers": (own_routers * router, own_routers * router, choices * router),
        "shared_experts": (shared, shared, shared_runs * shared),
        **extra,
    }


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def tensor_shapes(config: ModelConfig) -> dict[str, list[int]]:
    """Canonical name -> unsharded shape of every parameter, persistent buffer and table."""
    with torch.device("meta"):
        decoder = Decoder(config.shape)
    shapes = {name: list(tensor.shape) for name, tensor in decoder.state_dict().items()}
    for layer, rows in table_rows(decoder.shape).items():
        shapes[table_name(layer)] = [rows, decoder.shape.engram.row_dim]
    if decoder.shape.bank is not None:
        layout = BankLayout.of(decoder.shape)
        for layer in layout.layers:
            for level in layout.levels:
                shapes[layer_bank_name(layer, level)] = [layout.rows(level), layout.block_values(level)]
    return shapes
