"""The benchmark cases: shapes, inputs, the bytes or FLOP of each case, and its goal on an H200-class GPU."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from kmem_kernels.cross_entropy import reference as loss_reference
from kmem_kernels.cross_entropy.triton import cross_entropy_
from kmem_kernels.engram_convolution.triton import engram_convolved, engram_convolved_backward
from kmem_kernels.engram_gate.triton import engram_gate, engram_gate_backward
from kmem_kernels.hyper_connection import reference as connection_reference
from kmem_kernels.hyper_connection.triton import (
    hyper_connection_read,
    hyper_connection_read_backward,
    hyper_connection_write,
    hyper_connection_write_backward,
)
from kmem_kernels.ngram_ids.op import ngram_ids
from kmem_kernels.permute import reference
from kmem_kernels.permute.triton import combine_backward, gather_sum, scatter, sort_by_expert
from kmem_kernels.rotary import reference as rotary_reference
from kmem_kernels.rotary.triton import rotary
from kmem_kernels.route import reference as route_reference
from kmem_kernels.route.reference import Choice
from kmem_kernels.route.triton import route, route_backward
from kmem_kernels.segment_reduce.op import segment_reduce, segments_of
from kmem_kernels.swiglu import reference as swiglu_reference
from kmem_kernels.swiglu.triton import silu_times, silu_times_backward
from torch import Tensor

from kmem.model.engram_ngrams import NgramAddressing
from kmem.model.moe import MoE
from kmem.model.shape import Shape

# Shape letters: B sequences, T tokens, E experts, K experts per token, H hidden size, I width of an expert, N rows or
# ids, U distinct ids, D columns of a table.


@dataclass(frozen=True)
class Goal:
    limit: float
    unit: Literal["us", "TFLOP/s", "%"]
    at_most: bool = False

    def __str__(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.limit:g} {self.unit}"


@dataclass(frozen=True)
class Case:
    name: str
    shape: str
    dtype: str
    prepare: Callable[[], list[Callable[[], Any]]]
    """Makes the inputs; returns calls that do the same work, each on its own inputs."""
    bytes: int = 0
    flop: int = 0
    goal: Goal | None = None
    timing: Literal["graph", "events"] = "events"
    profiled: bool = False
    over_the_bus: bool = False
    """Whether `bytes` are read from host memory; writes on the device then do not count."""

    @property
    def ceiling(self) -> Literal["GEMM", "copy", "host copy"]:
        """The operation that bounds the case."""
        return "GEMM" if self.flop else "host copy" if self.over_the_bus else "copy"


@dataclass(frozen=True)
class Layer:
    experts: int
    hidden: int
    width: int
    top_k: int
    tokens: int

    def __str__(self) -> str:
        return f"T{self.tokens} E{self.experts} K{self.top_k} H{self.hidden} I{self.width}"


@dataclass(frozen=True)
class Sizes:
    copy_bytes: int
    gemm: int
    route: tuple[int, int, int]
    """Tokens, experts, experts per token."""
    copies: int
    """Number of input sets for kernels of microseconds; together, they are larger than the L2 cache."""
    fine: Layer
    coarse: Layer
    connection: tuple[int, int, int]
    """Tokens, branches and hidden size of hyper-connections."""
    rotary: tuple[int, int, int]
    """Tokens, heads and rotated values of a head."""
    loss: tuple[int, int]
    """Tokens and vocabulary."""
    lookups: tuple[int, int, int]
    """Number of lookups, number of ids from which they are drawn, columns."""
    ngrams: tuple[int, int]
    """Sequences, tokens per sequence."""
    table_bytes: int
    """Size of the tables whose rows are gathered and updated; far larger than the L2 cache."""
    touched_bytes: int
    """Size of the rows that a gather or an update touches."""
    row_types: tuple[tuple[torch.dtype, int], ...]
    """Dtype and columns of the rows."""


SIZES = {
    "full": Sizes(
        copy_bytes=2**30,
        gemm=8192,
        route=(8192, 256, 8),
        copies=16,
        fine=Layer(experts=128, hidden=2048, width=768, top_k=8, tokens=32_768),
        coarse=Layer(experts=8, hidden=4096, width=14_336, top_k=2, tokens=16_384),
        connection=(4096, 4, 2560),
        rotary=(4096, 32, 64),
        loss=(4096, 129_280),
        lookups=(1_048_576, 4_194_304, 256),
        ngrams=(32, 4096),
        table_bytes=2**33,
        touched_bytes=2**28,
        row_types=((torch.bfloat16, 128), (torch.bfloat16, 256), (torch.float32, 128), (torch.float32, 256)),
    ),
    "tiny": Sizes(
        copy_bytes=2**16,
        gemm=64,
        route=(40, 16, 2),
        copies=2,
        fine=Layer(experts=8, hidden=64, width=24, top_k=4, tokens=40),
        coarse=Layer(experts=4, hidden=64, width=48, top_k=2, tokens=24),
        connection=(4, 2, 24),
        rotary=(20, 4, 8),
        loss=(4, 300),
        lookups=(600, 200, 40),
        ngrams=(2, 70),
        table_bytes=2**16,
        touched_bytes=2**13,
        row_types=((torch.bfloat16, 24), (torch.float32, 20)),
    ),
}


def all_cases(device: torch.device, sizes: Sizes) -> list[Case]:
    return [
        *route_cases(device, sizes),
        *permute_cases(device, sizes.fine),
        *swiglu_cases(device, sizes.fine),
        *connection_cases(device, *sizes.connection),
        *engram_cases(device, *sizes.connection),
        *rotary_cases(device, *sizes.rotary),
        *loss_cases(device, *sizes.loss),
        *segment_cases(device, sizes.lookups),
        ngram_case(device, sizes),
        *layer_cases(device, "MoE layer", sizes.fine, Goal(260, "TFLOP/s"), Goal(230, "TFLOP/s")),
        *layer_cases(device, "coarse MoE layer", sizes.coarse, Goal(75, "%"), Goal(75, "%")),
    ]


def route_cases(device: torch.device, sizes: Sizes) -> list[Case]:
    tokens, experts, top_k = sizes.route
    shape = f"T{tokens} E{experts} K{top_k}"
    kinds: dict[str, tuple[str, int, int]] = {
        "softmax": ("softmax", 1, 1),
        "sigmoid, bias, 8 groups": ("sigmoid", 8, 4),
    }

    def forward(kind: str) -> list[Callable[[], Any]]:
        function, groups, top_groups = kinds[kind]
        bias = 0.01 * torch.randn(experts, device=device) if groups > 1 else None
        score_top_k = min(2, experts // groups)

        def call(logits: Tensor) -> Callable[[], Any]:
            return lambda: route(logits, bias, top_k, function, groups, top_groups, score_top_k, True, 1.0)

        return [call(torch.randn(tokens, experts, device=device)) for _ in range(sizes.copies)]

    def backward(kind: str) -> list[Callable[[], Any]]:
        choices = [Choice(*call()) for call in forward(kind)]
        grads = [torch.randn(tokens, top_k, device=device) for _ in choices]
        return [
            lambda choice=choice, grad=grad: route_backward(
                choice.scores_TE, choice.experts_TK, grad, None, kinds[kind][0], True, 1.0
            )
            for choice, grad in zip(choices, grads, strict=True)
        ]

    def in_torch() -> list[Callable[[], Any]]:
        logits = torch.randn(tokens, experts, device=device)
        return [lambda: route_reference.route(logits, None, top_k, "softmax", 1, 1, 1, True, 1.0)]

    of_scores, of_choices = 2 * tokens * experts * 4, tokens * top_k * (8 + 4)
    return [
        *(
            Case(
                f"route {direction} ({kind})",
                shape,
                "fp32",
                lambda make=make, kind=kind: make(kind),  # type: ignore[misc]
                bytes=of_scores + of_choices,
                goal=Goal(15, "us", at_most=True) if kind == "softmax" else None,
                timing="graph",
            )
            for kind in kinds
            for direction, make in (("forward", forward), ("backward", backward))
        ),
        Case("route forward (softmax, torch)", shape, "fp32", in_torch, bytes=of_scores + of_choices),
    ]


def permute_cases(device: torch.device, layer: Layer) -> list[Case]:
    tokens, top_k, rows = layer.tokens, layer.top_k, layer.tokens * layer.top_k
    dtype = torch.bfloat16
    row_bytes, place_bytes = layer.hidden * dtype.itemsize, 8 * rows
    once = (tokens + rows) * row_bytes + place_bytes
    goal = Goal(85, "%")

    def normal(*size: int) -> Tensor:
        return torch.randn(size, dtype=dtype, device=device)

    def chosen() -> Tensor:
        return torch.rand(tokens, layer.experts, device=device).topk(top_k).indices

    def places() -> Tensor:
        return sort_by_expert(chosen(), layer.experts)[1]

    def weights() -> Tensor:
        return torch.rand(tokens, top_k, device=device)

    def permute() -> list[Callable[[], Any]]:
        hidden, place = normal(tokens, layer.hidden), places()
        return [lambda: scatter(hidden, place, rows)]

    def permute_backward() -> list[Callable[[], Any]]:
        grad, place = normal(rows, layer.hidden), places()
        return [lambda: gather_sum(grad, None, place)]

    def combine() -> list[Callable[[], Any]]:
        values, weight, place = normal(rows, layer.hidden), weights(), places()
        return [lambda: gather_sum(values, weight, place)]

    def backward_of_combine() -> list[Callable[[], Any]]:
        grad, values, weight, place = normal(tokens, layer.hidden), normal(rows, layer.hidden), weights(), places()
        return [lambda: combine_backward(grad, values, weight, place)]

    def torch_permute() -> list[Callable[[], Any]]:
        hidden, place = normal(tokens, layer.hidden), places()
        return [lambda: reference.permute(hidden, place, rows)]

    def torch_combine() -> list[Callable[[], Any]]:
        values, weight, place = normal(rows, layer.hidden), weights(), places()
        return [lambda: reference.combine(values, weight, place)]

    def torch_sort() -> list[Callable[[], Any]]:
        experts = chosen()
        return [lambda: reference.sort_by_expert(experts)]

    def sort() -> list[Callable[[], Any]]:
        experts = chosen()
        return [lambda: sort_by_expert(experts, layer.experts)]

    shape, of_choices = f"T{tokens} K{top_k} H{layer.hidden}", f"T{tokens} E{layer.experts} K{top_k}"
    return [
        Case("sort by expert (torch)", of_choices, "int64", torch_sort, bytes=3 * place_bytes),
        Case("sort by expert", of_choices, "int64", sort, bytes=3 * place_bytes, timing="graph"),
        Case("permute forward (torch)", shape, "bf16", torch_permute, bytes=once),
        Case("combine forward (torch)", shape, "bf16", torch_combine, bytes=once + 4 * rows),
        Case("permute forward", shape, "bf16", permute, bytes=once, goal=goal),
        Case("permute backward", shape, "bf16", permute_backward, bytes=once, goal=goal),
        Case("combine forward", shape, "bf16", combine, bytes=once + 4 * rows, goal=goal),
        Case(
            "combine backward",
            shape,
            "bf16",
            backward_of_combine,
            bytes=(tokens + 2 * rows) * row_bytes + place_bytes + 8 * rows,
            goal=goal,
        ),
    ]


def swiglu_cases(device: torch.device, layer: Layer) -> list[Case]:
    """The activation between the two products of the experts; gate and up are the halves of one matrix."""
    rows, width, dtype = layer.tokens * layer.top_k, layer.width, torch.bfloat16

    def normal(columns: int) -> Tensor:
        return torch.randn(rows, columns, dtype=dtype, device=device)

    def forward() -> list[Callable[[], Any]]:
        gate, up = normal(2 * width).chunk(2, dim=1)
        return [lambda: silu_times(gate, up)]

    def backward() -> list[Callable[[], Any]]:
        (gate, up), grad = normal(2 * width).chunk(2, dim=1), normal(width)
        return [lambda: silu_times_backward(grad, gate, up)]

    def in_torch() -> list[Callable[[], Any]]:
        gate, up = normal(2 * width).chunk(2, dim=1)
        return [lambda: swiglu_reference.silu_times(gate, up)]

    shape, of_values = f"N{rows} I{width}", rows * width * dtype.itemsize
    goal = Goal(85, "%")
    return [
        Case("swiglu forward (torch)", shape, "bf16", in_torch, bytes=3 * of_values),
        Case("swiglu forward", shape, "bf16", forward, bytes=3 * of_values, goal=goal),
        Case("swiglu backward", shape, "bf16", backward, bytes=5 * of_values, goal=goal),
    ]


def connection_cases(device: torch.device, tokens: int, branches: int, hidden: int) -> list[Case]:
    """Hyper-connections: `bytes` counts streams as often as a kernel walks them."""
    dtype, numbers = torch.bfloat16, branches * (branches + 2)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, dtype=dtype, device=device)

    def parameters() -> tuple[Tensor, Tensor, Tensor]:
        return normal(numbers, branches * hidden) * 0.01, normal(numbers), normal(3)

    def forward(function: Callable[..., Any]) -> list[Callable[[], Any]]:
        streams, given = normal(tokens, branches, hidden), parameters()
        return [lambda: function(streams, *given, 1e-6, 20)]

    def backward() -> list[Callable[[], Any]]:
        streams, given = normal(tokens, branches, hidden), parameters()
        taken, mappings, dynamic, rms = hyper_connection_read(streams, *given, 1e-6, 20)
        grads = (taken, normal(tokens, branches, hidden), torch.randn_like(mappings))
        return [lambda: hyper_connection_read_backward(*grads, streams, *given, mappings, dynamic, rms, 20)]

    def write(name: str) -> list[Callable[[], Any]]:
        streams, output = normal(tokens, branches, hidden), normal(tokens, hidden)
        mappings, grad = torch.randn(tokens, branches + 2, branches, device=device), torch.randn_like(streams)
        calls: dict[str, Callable[[], Any]] = {
            "forward": lambda: hyper_connection_write(streams, output, mappings),
            "backward": lambda: hyper_connection_write_backward(grad, streams, output, mappings),
            "torch": lambda: connection_reference.write(streams, output, mappings),
        }
        return [calls[name]]

    shape, of_row = f"N{tokens} M{branches} D{hidden}", tokens * hidden * dtype.itemsize
    of_streams, goal = branches * of_row, Goal(60, "%")
    reading, writing = 2 * of_streams + of_row, 2 * of_streams + of_row
    return [
        Case("connection read (torch)", shape, "bf16", lambda: forward(connection_reference.read), bytes=reading),
        Case("connection read", shape, "bf16", lambda: forward(hyper_connection_read), bytes=reading, goal=goal),
        Case("connection read backward", shape, "bf16", backward, bytes=5 * of_streams + 2 * of_row, goal=goal),
        Case("connection write (torch)", shape, "bf16", lambda: write("torch"), bytes=writing),
        Case("connection write", shape, "bf16", lambda: write("forward"), bytes=writing, goal=Goal(80, "%")),
        Case(
            "connection write backward",
            shape,
            "bf16",
            lambda: write("backward"),
            bytes=3 * of_streams + 2 * of_row,
            goal=goal,
        ),
    ]


def engram_cases(device: torch.device, tokens: int, branches: int, hidden: int) -> list[Case]:
    """The gate and the convolution of an engram layer: `bytes` counts streams as often as they must be moved."""
    dtype = torch.bfloat16
    streams, keys = (torch.randn(tokens, branches, hidden, dtype=dtype, device=device) for _ in range(2))
    value, norm = torch.randn(tokens, hidden, dtype=dtype, device=device), torch.ones(branches, hidden, device=device)
    taps = torch.randn(4, branches, hidden, device=device)

    def both(gate: bool, backward: bool) -> list[Callable[[], Any]]:
        if gate:
            gated, numbers = engram_gate(streams, keys, value, norm, 1e-6)
            forward, back = (streams, keys, value, norm, 1e-6), (gated, streams, keys, value, norm, numbers)
            return [(lambda: engram_gate_backward(*back)) if backward else (lambda: engram_gate(*forward))]
        _, scales = engram_convolved(streams, norm, taps, None, 1e-6, 3, tokens)
        given, back = (streams, norm, taps, None, 1e-6, 3, tokens), (keys, streams, scales, norm, taps, None, 3, tokens)
        return [(lambda: engram_convolved_backward(*back)) if backward else (lambda: engram_convolved(*given))]

    shape, moved = f"N{tokens} M{branches} D{hidden}", tokens * branches * hidden * dtype.itemsize
    goal = Goal(60, "%")
    return [
        Case("engram gate", shape, "bf16", lambda: both(True, False), bytes=3 * moved, goal=goal),
        Case("engram gate backward", shape, "bf16", lambda: both(True, True), bytes=5 * moved, goal=goal),
        Case("engram convolution", shape, "bf16", lambda: both(False, False), bytes=3 * moved, goal=goal),
        Case("engram convolution backward", shape, "bf16", lambda: both(False, True), bytes=7 * moved, goal=goal),
    ]


def rotary_cases(device: torch.device, tokens: int, heads: int, width: int) -> list[Case]:
    """The rotation of queries, of whose heads a part is rotated."""
    x = torch.randn(tokens, heads, 3 * width, dtype=torch.bfloat16, device=device)[..., 2 * width :]
    cos, sin = torch.randn(tokens, width, device=device), torch.randn(tokens, width // 2, device=device)
    shape, moved = f"N{tokens} h{heads} D{width}", 2 * 2 * tokens * heads * width
    return [
        Case("rotary (torch)", shape, "bf16", lambda: [lambda: rotary_reference.rotated(x, cos, sin, 1)], bytes=moved),
        Case("rotary", shape, "bf16", lambda: [lambda: rotary(x, cos, sin, 1)], bytes=moved, goal=Goal(60, "%")),
    ]


def loss_cases(device: torch.device, tokens: int, vocabulary: int) -> list[Case]:
    """The loss of logits, which become its gradient: read twice, written once."""

    def prepare(function: Callable[[Tensor, Tensor], Tensor]) -> list[Callable[[], Any]]:
        logits = torch.randn(tokens, vocabulary, dtype=torch.bfloat16, device=device)
        labels = torch.randint(vocabulary, (tokens,), device=device)
        return [lambda: function(logits, labels)]

    shape, moved = f"N{tokens} V{vocabulary}", 3 * 2 * tokens * vocabulary
    in_torch, by_kernel = loss_reference.cross_entropy_, cross_entropy_
    return [
        Case("cross_entropy (torch)", shape, "bf16", lambda: prepare(in_torch), bytes=moved),
        Case("cross_entropy", shape, "bf16", lambda: prepare(by_kernel), bytes=moved, goal=Goal(80, "%")),
    ]


def segment_cases(device: torch.device, lookups: tuple[int, int, int]) -> list[Case]:
    count, vocabulary, columns = lookups
    generator = torch.Generator().manual_seed(0)
    # Log-uniform ranks: the frequencies of the ids follow Zipf's law with exponent 1.
    ids = (vocabulary ** torch.rand(count, generator=generator, dtype=torch.float64)).long() - 1
    unique, inverse = ids.unique(return_inverse=True)
    segments = len(unique)

    def reduce(dtype: torch.dtype) -> list[Callable[[], Any]]:
        values = torch.randn(count, columns, device=device).to(dtype)
        order, starts = segments_of(inverse.to(device), segments)
        return [lambda: segment_reduce(values, order, starts, backend="triton")]

    def group() -> list[Callable[[], Any]]:
        of_device = inverse.to(device)
        return [lambda: segments_of(of_device, segments)]

    shape = f"N{count} U{segments} D{columns}"
    return [
        Case("group ids (torch)", f"N{count} U{segments}", "int64", group, bytes=8 * (2 * count + segments)),
        *(
            Case(
                "segment_reduce",
                shape,
                name,
                lambda dtype=dtype: reduce(dtype),  # type: ignore[misc]
                bytes=count * (columns * dtype.itemsize + 8) + segments * (4 * columns + 8),
                goal=Goal(60, "%"),
            )
            for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
        ),
    ]


def ngram_case(device: torch.device, sizes: Sizes) -> Case:
    batch, tokens = sizes.ngrams
    orders, heads = [2, 3], 8

    def prepare() -> list[Callable[[], Any]]:
        tables = NgramAddressing.build(
            variant="benchmark",
            layers=[0],
            raw_vocab_size=131_072,
            compressed_vocab_size=None,
            orders=orders,
            heads=heads,
            rows_per_head=[1_000_000, 1_000_000],
            boundary="document",
            pad_id=2,
            hash="pcg64",
            seed=0,
        )
        constants = (tables.orders, tables.multipliers[0], tables.sizes[0], tables.offsets(0))

        def call() -> Callable[[], Any]:
            ids = torch.randint(131_072, (batch, tokens + tables.context), device=device)
            documents = (torch.rand(ids.shape, device=device) < 0.001).long().cumsum(1)
            return lambda: ngram_ids(ids, documents, *constants, "document", 2, backend="triton")

        return [call() for _ in range(sizes.copies)]

    return Case(
        "ngram_ids",
        f"B{batch} T{tokens} heads {heads * len(orders)}",
        "int64",
        prepare,
        bytes=8 * batch * tokens * (2 + heads * len(orders)),
        timing="graph",
    )


def layer_cases(device: torch.device, name: str, layer: Layer, forward: Goal, both: Goal) -> list[Case]:
    """kmem's MoE layer with softmax routing and `F.grouped_mm`, including router and dispatch."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def build() -> tuple[MoE, Tensor]:
        moe = {
            "num_experts": layer.experts,
            "top_k": layer.top_k,
            "intermediate_size": layer.width,
            "num_shared_experts": 0,
            "score_function": "softmax",
            "selection_bias": False,
            "num_groups": 1,
            "top_groups": 1,
            "group_score_top_k": 2,
            "renormalize": True,
            "scaling_factor": 1.0,
            "aux_loss": 0.0,
            "sequence_aux_loss": 0.0,
            "z_loss": 0.0,
        }
        with torch.device(device):
            module = MoE(Shape({"hidden_size": layer.hidden, "moe": moe})).to(dtype)
            hidden = torch.randn(1, layer.tokens, layer.hidden, dtype=dtype)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        return module, hidden.requires_grad_()

    def forward_alone() -> list[Callable[[], Any]]:
        module, hidden = build()
        return [lambda: module(hidden)]

    def forward_and_backward() -> list[Callable[[], Any]]:
        module, hidden = build()
        grad = torch.randn_like(hidden)
        inputs = [hidden, *module.parameters()]
        return [lambda: torch.autograd.grad(module(hidden), inputs, grad)]

    flop = 2 * layer.tokens * layer.top_k * 3 * layer.hidden * layer.width
    dtype_name = "bf16" if dtype == torch.bfloat16 else "fp32"
    return [
        Case(f"{name} forward", str(layer), dtype_name, forward_alone, flop=flop, goal=forward),
        Case(
            f"{name} forward + backward",
            str(layer),
            dtype_name,
            forward_and_backward,
            flop=3 * flop,
            goal=both,
            profiled=True,
        ),
    ]
