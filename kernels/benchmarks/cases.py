"""The benchmark cases: shapes, inputs, the bytes or FLOP of each case, and its goal on an H200-class GPU."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from kmem_kernels.ngram_ids.op import ngram_ids
from kmem_kernels.permute import reference
from kmem_kernels.permute.triton import combine_backward, gather_sum, scatter, sort_by_expert
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
