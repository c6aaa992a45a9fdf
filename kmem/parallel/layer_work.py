"""What a layer asks of a GPU, counted on meta tensors, which have shapes but no values: operators, FLOP, bytes that
operators read and write, and memory.

Operators are those of PyTorch's dispatcher that launch work; views and allocations are none. Attention, RMSNorm and
every Triton kernel of kmem are one operator each, as on a GPU. Only the framework's own memory and the scratch memory
of kernels are not seen.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from kmem.config import Config
from kmem.model import kernels
from kmem.model.decoder import DecoderLayer, Head
from kmem.model.memory_kinds import layer_kinds, replaces_feed_forward
from kmem.model.moe import ExpertLayer
from kmem.model.rope import rotation
from kmem.model.shape import Shape
from kmem.model.stream import open_stream
from kmem.parallel.memory_kinds import kinds_of
from kmem.parallel.meta_operators import fused_as_on_gpus
from kmem.parallel.selective_recompute import checkpoint_selectively


@dataclass
class Work:
    """What was counted in one pass."""

    operators: Counter[str] = field(default_factory=Counter)
    """Name -> how often it was called."""
    flop: Counter[str] = field(default_factory=Counter)
    """Name -> FLOP of all its calls: of matrix products and attention, and of kernels that contain products."""
    bytes: Counter[str] = field(default_factory=Counter)
    """Name -> bytes of all tensors that its calls read or write, each once a call."""
    waits: Counter[str] = field(default_factory=Counter)
    """Name -> how often the host waits for the device because of it."""


@dataclass(frozen=True)
class LayerWork:
    """The work of a layer for one micro-batch."""

    forward: Work
    backward: Work
    kept: int
    """Bytes of activations from the forward to the backward pass; the layer's input is among them, its output not."""
    extra: int
    """The most bytes that are held in addition within one of the passes, gradients of weights while they are computed
    among them."""


def layer_work(
    config: Config, index: int, expert: int = 1, recompute: str | None = None, with_kernels: bool = True
) -> LayerWork:
    """The work of decoder layer `index` for a micro-batch of whole sequences, each of them one document.

    Args:
        expert: ranks over which experts are divided. Each gets as many rows as it sends; the exchange is not counted.
        recompute: default `train.recompute`.
        with_kernels: False counts the torch code that computes the same as kmem's kernels.
    """
    shape, train = config.model.shape, config.train
    first = next(other for other in range(index + 1) if _twins(shape, other, index))
    key = (config.model_dump_json(include={"model", "data", "train"}), first, expert, recompute, with_kernels)
    if key not in _COUNTED:
        _COUNTED[key] = _count_layer(config, first, expert, recompute or train.recompute, with_kernels)
    return _COUNTED[key]


_COUNTED: dict[tuple[Any, ...], LayerWork] = {}


def _twins(shape: Shape, one: int, other: int) -> bool:
    """Whether two layers compute alike."""
    return (
        layer_kinds(shape, one) == layer_kinds(shape, other)
        and shape.has_experts(one) == shape.has_experts(other)
        and replaces_feed_forward(shape, one) == replaces_feed_forward(shape, other)
    )


def _count_layer(config: Config, index: int, expert: int, recompute: str, with_kernels: bool) -> LayerWork:
    shape, train = config.model.shape, config.train
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    held = None if shape.moe is None else range(shape.moe.num_experts // expert)
    with torch.device("meta"):
        layer = DecoderLayer(shape, index).to(dtype)
        if held is not None and isinstance(layer.feed_forward, ExpertLayer):
            _shorten(layer.feed_forward.experts, len(held))
        batch, tokens = train.micro_batch_size, config.data.sequence_length
        position_ids = torch.empty(batch, tokens, dtype=torch.int64)
        hidden = open_stream(torch.empty(batch, tokens, shape.hidden_size, dtype=dtype), shape)
        rotary = rotation(shape, position_ids)
        reads = {
            kind.name: kind.imagined_read(config, index)
            for kind in kinds_of(shape)
            if index in kind.model.layers(shape)
        }

    def run(hidden: Tensor) -> Tensor:
        return layer(hidden, position_ids, rotary=rotary, memories=reads)

    return _counted(run, layer, hidden, recompute, with_kernels)


def _shorten(experts: nn.Module, number: int) -> None:
    for name, parameter in list(experts.named_parameters()):
        setattr(experts, name, nn.Parameter(parameter[:number].clone()))


def loss_work(config: Config, with_kernels: bool = True) -> LayerWork:
    """The work of the final norm, the head and the loss for a micro-batch."""
    shape, train = config.model.shape, config.train
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    with torch.device("meta"):
        head = Head(Shape({**shape.as_dict(), "tie_embeddings": False})).to(dtype)
        size = (train.micro_batch_size, config.data.sequence_length)
        hidden = open_stream(torch.empty(*size, shape.hidden_size, dtype=dtype), shape)
        labels = torch.empty(size, dtype=torch.int64)
    return _counted(lambda hidden: head.loss(hidden, labels), head, hidden, "none", with_kernels)


def _counted(
    run: Callable[[Tensor], Tensor], module: nn.Module, hidden: Tensor, recompute: str, with_kernels: bool
) -> LayerWork:
    for parameter in module.parameters():  # a gradient is added to its sum, and gone
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    hidden.requires_grad_()
    if recompute == "selective":
        function: Callable[[Tensor], Tensor] = lambda hidden: checkpoint_selectively(run, hidden)  # noqa: E731
    elif recompute == "full":
        function = lambda hidden: checkpoint(run, hidden, use_reentrant=False, preserve_rng_state=False)  # noqa: E731
    else:
        function = run
    watch = _Watch()
    with _with_kernels(with_kernels), torch.device("meta"), fused_as_on_gpus(), watch:
        out = function(hidden)
        forward, watch.work = watch.work, Work()
        kept = watch.live - _nbytes(out) + _nbytes(hidden)
        torch.autograd.backward(out, torch.empty_like(out))
    return LayerWork(forward, watch.work, kept, watch.most + _nbytes(hidden) - kept)


@contextmanager
def _with_kernels(served: bool) -> Iterator[None]:
    known: Any = kernels.kmem_kernels
    try:
        kernels.kmem_kernels = known if served else None  # type: ignore[assignment]
        yield
    finally:
        kernels.kmem_kernels = known


class _Watch(TorchDispatchMode):
    """Counts operators and the memory of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()
        self.live = self.most = 0
        """Bytes of all results that are still held, and the most of them at any time."""
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: Mapping[str, Any] | None = None
    ) -> Any:
        given = [leaf for leaf in tree_leaves((arguments, keywords)) if isinstance(leaf, Tensor)]
        storages = {leaf.untyped_storage()._cdata for leaf in given}  # meta storages are all equal, by their pointers
        result = operator(*arguments, **(keywords or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        new = [leaf for leaf in made if leaf.untyped_storage()._cdata not in storages]
        for leaf in new:
            self._hold(leaf.untyped_storage())
        name = operator.name().partition(".")[0]
        schema = operator._schema
        if not (new or schema.is_mutable) or name in _ALLOCATIONS or not made:
            return result
        self.work.operators[name] += 1
        self.work.bytes[name] += sum(_nbytes(leaf) for leaf in (*given, *new))
        self.work.flop[name] += _flop(operator, name, arguments, keywords or {}, result)
        if name in _WAITS:
            self.work.waits[name] += 1
        return result

    def _hold(self, storage: Any) -> None:
        number, size = storage._cdata, storage.nbytes()
        if number not in self._known:
            self._known.add(number)
            self.live += size
            self.most = max(self.live, self.most)
            weakref.finalize(storage, self._release, number, size).atexit = False

    def _release(self, number: int, size: int) -> None:
        self._known.remove(number)
        self.live -= size


_ALLOCATIONS = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided")
_WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::_unique2", "aten::unique_dim", "aten::bincount")
"""Operators for which the host waits for the device."""


def _nbytes(tensor: Tensor) -> int:
    """Bytes of the values: a tensor that was expanded has fewer than its shape says."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return prod(sizes) * tensor.element_size() if tensor.numel() else 0


def _flop(operator: Any, name: str, arguments: tuple[Any, ...], keywords: Mapping[str, Any], result: Any) -> int:
    known = flop_registry.get(operator.overloadpacket)
    if name == "kmem_meta::grouped_mm":
        return 2 * arguments[0].numel() * arguments[1].shape[2]
    if name == "kmem_meta::grouped_mm_backward":
        return 4 * arguments[1].numel() * arguments[0].shape[1]
    if name == "kmem_kernels::hyper_connection_read":
        return 2 * len(arguments[0]) * arguments[1].numel()
    if name == "kmem_kernels::hyper_connection_read_backward":
        return 4 * len(arguments[3]) * arguments[4].numel()
    if name.startswith("kmem_meta::attention"):
        query, key, value = arguments[-5:-2] if name.endswith("backward") else arguments
        pairs = query.shape[0] * query.shape[1] * query.shape[2] * (key.shape[2] + 1) // 2
        return 2 * pairs * (query.shape[-1] + value.shape[-1]) * (5 if name.endswith("backward") else 2) // 2
    return 0 if known is None else known(*arguments, **keywords, out_val=result)
