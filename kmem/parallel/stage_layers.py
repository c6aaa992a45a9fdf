"""The model's modules as layers of a DeepSpeed pipeline: hidden states in, hidden states out, the last one the loss.

Each layer knows the canonical prefix of its parameters, so that names do not depend on the mesh.
"""

import torch
from torch import Tensor, nn

from kmem.model.decoder import DecoderLayer, Embedding, Head
from kmem.model.loss import linear_cross_entropy
from kmem.model.norm import RMSNorm
from kmem.model.shape import Shape
from kmem.model.stream import close_stream, open_stream
from kmem.parallel.step_context import StepContext


class StageLayer(nn.Module):
    """A module of the model in the pipeline; `prefix` + its own parameter names are canonical names."""

    def __init__(self, module: nn.Module, prefix: str):
        super().__init__()
        self.module = module
        self.prefix = prefix
        self.context = StepContext()
        """Shared by the layers of a stage."""


class EmbeddingLayer(StageLayer):
    """Token ids [B, T] to the stream of `open_stream`."""

    def __init__(self, shape: Shape):
        super().__init__(Embedding(shape), "embedding.")
        self.shape = shape

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.module(input_ids)
        if self.context.frozen and torch.is_grad_enabled():
            hidden.requires_grad_()  # the engine runs a backward pass through every stage, with or without blocks
        return open_stream(hidden, self.shape)


class TransformerLayer(StageLayer):
    """One decoder layer on the running micro-batch."""

    def __init__(self, shape: Shape, index: int, local_experts: range | None):
        super().__init__(DecoderLayer(shape, index, local_experts=local_experts), f"layers.{index}.")
        self.index = index

    def forward(self, hidden: Tensor) -> Tensor:
        micro = self.context.micro_batch()
        memories = self.context.read(self.index)
        return self.module(
            hidden, micro.sequences.position_ids, micro.documents, rotary=micro.rotary, memories=memories
        )


class LossLayer(StageLayer):
    """Final norm, projection and cross entropy: hidden states to the micro-batch's scaled loss."""

    def __init__(self, shape: Shape):
        super().__init__(Head(shape), "")

    def forward(self, hidden: Tensor) -> Tensor:
        assert isinstance(self.module, Head)
        labels = self.context.micro_batch().sequences.labels
        return self.module.loss(hidden, labels) * self.context.loss_factor


class NormLayer(StageLayer):
    """The final norm on its own, [B, T, H], for models whose head is the embedding matrix."""

    def __init__(self, shape: Shape):
        super().__init__(RMSNorm(shape.hidden_size, shape.norm_eps), "norm.")
        self.shape = shape

    def forward(self, hidden: Tensor) -> Tensor:
        return self.module(close_stream(hidden, self.shape))


def tied_loss(layer: EmbeddingLayer, hidden: Tensor) -> Tensor:
    """The loss of a tied head, computed by the stage's copy of the embedding layer."""
    assert isinstance(layer.module, Embedding)
    labels = layer.context.micro_batch().sequences.labels
    return linear_cross_entropy(hidden, layer.module.weight, labels) * layer.context.loss_factor
