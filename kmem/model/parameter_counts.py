"""Exact parameter counts. The modules are built on the meta device and counted, so nothing is allocated."""

from dataclasses import dataclass

import torch
from torch import nn

from .chain_of_experts import ChainOfExperts
from .decoder import Decoder, DecoderLayer
from .memory_kinds import kinds_of
from .moe import ExpertLayer
from .shape import Shape


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of trainable elements of a model."""

    total: int
    active: int
    """Elements used for one token. Only the chosen share of the routed experts counts. A chain of C iterations counts
    C * top_k experts, the most that a token can visit, or top_k if the choice is frozen; an element that several
    iterations use counts once."""
    tables: int
    """Elements in lookup tables, padding rows and generic blocks included. A token reads only a few of the rows."""
    embedding: int
    """Elements of the embedding, and of the head if it is not tied."""
    components: dict[str, int]
    layers: list[int]
    """For each decoder layer, the elements by which a token is multiplied, counted once per use in a chain of experts:
    the weights for pipeline balancing."""
    head: int
    """Elements of the projection to the vocabulary, tied or not."""
    fetched: int = 0
    """Table elements that a context fetches once for all its tokens, such as a bank's block on every level."""

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


def count_parameters(shape: Shape) -> ParameterCounts:
    """The parameter counts of a model of this shape."""
    with torch.device("meta"):
        decoder = Decoder(shape)
    kinds = kinds_of(shape)
    components = {
        "embedding": _size(decoder.embedding),
        "attention": 0,
        "feed_forward": 0,
        "shared_experts": 0,
        "routed_experts": 0,
        "routers": 0,
        "norms": _size(decoder.norm),
        "head": 0 if shape.tie_embeddings else shape.vocab_size * shape.hidden_size,
    }
    tables = 0
    for kind in kinds:
        in_layers = sum(_size(decoder.layers[layer].get_submodule(kind.name)) for layer in kind.layers(shape))
        in_tables = kind.components(shape)
        components |= ({kind.name: in_layers} if in_layers else {}) | in_tables
        tables += sum(in_tables.values())
    if shape.branches > 1:
        components["hyper_connections"] = 0
    active = embedding = components["embedding"] + components["head"]
    active += components["norms"]
    layers = []
    for index, layer in enumerate(decoder.layers):
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
            touched = multiplied = 0 if feed_forward is None else _size(feed_forward)
            components["feed_forward"] += touched
        always = norms + _size(layer.attention)
        connections = _size(layer.attention_connection) + _size(layer.feed_forward_connection)
        if connections:
            components["hyper_connections"] += connections
            always += connections
        always += sum(_size(module) for module in layer.memories.values())
        kinds_here = [kind for kind in kinds if kind.name in layer.memories]
        active += always + touched + sum(kind.row_values(shape, index) for kind in kinds_here)
        layers.append(always + multiplied + sum(kind.multiplied_values(shape, index) for kind in kinds_here))
    return ParameterCounts(
        total=sum(components.values()),
        active=active,
        tables=tables,
        embedding=embedding,
        components=components,
        layers=layers,
        head=shape.vocab_size * shape.hidden_size,
        fetched=sum(kind.fetched_values(shape) for kind in kinds),
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


def tensor_shapes(shape: Shape) -> dict[str, list[int]]:
    """Canonical name -> unsharded shape of every parameter, persistent buffer and table."""
    with torch.device("meta"):
        decoder = Decoder(shape)
    shapes = {name: list(tensor.shape) for name, tensor in decoder.state_dict().items()}
    for kind in kinds_of(shape):
        shapes |= {name: [table.rows, table.width] for name, table in kind.tables(shape).items()}
    return shapes
