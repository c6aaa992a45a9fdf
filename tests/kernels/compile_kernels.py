"""Compiles every kernel for a GPU that need not be there, as the launches on a GPU would; run by test_compile.py.

What the interpreter accepts the compiler may refuse. With `--all` each is compiled for one token at every size, and not
at the smallest alone. Prints a line of JSON per kernel: its name, what it needs on a GPU, and what its PTX holds.
"""

import json
import re
import subprocess
import sys
import tempfile

import torch
import triton
from kmem_kernels.cross_entropy.triton import cross_entropy_
from kmem_kernels.engram_convolution.triton import engram_convolved, engram_convolved_backward
from kmem_kernels.engram_gate.triton import engram_gate, engram_gate_backward
from kmem_kernels.hyper_connection.triton import (
    hyper_connection_read,
    hyper_connection_read_backward,
    hyper_connection_write,
    hyper_connection_write_backward,
)
from kmem_kernels.ngram_ids.triton import ngram_ids
from kmem_kernels.permute.triton import combine_backward, gather_sum, scatter, sort_by_expert
from kmem_kernels.rotary.triton import rotary
from kmem_kernels.route.triton import route, route_backward
from kmem_kernels.row_gather.triton import row_gather
from kmem_kernels.row_update.op import CatchUp, Gradients, OwnSteps, RandomRounding
from kmem_kernels.row_update.reference import AdamStep
from kmem_kernels.row_update.triton import adam_, rowwise_adagrad_, square_norms
from kmem_kernels.segment_reduce.op import segments_of
from kmem_kernels.segment_reduce.triton import segment_reduce
from kmem_kernels.swiglu.triton import silu_times, silu_times_backward
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.float64: "*fp64",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


def compile_instead(kernel, *arguments, grid, warmup, **keywords):
    """In place of JITFunction.run: nothing is launched, outputs stay as they were allocated."""
    options = {name: keywords.pop(name) for name in OPTIONS if name in keywords}
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | keywords
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif torch.is_tensor(value):
            signature[parameter.name] = TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:  # Triton compiles for it apart
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = compiled.asm["ptx"]
    facts = {
        "kernel": kernel.fn.__name__,
        "shared": compiled.metadata.shared,
        **resources(compiled.asm["cubin"]),
        "atomics": re.findall(r"\b(?:atom|red)\.\S+", ptx),
        "wide_loads": ptx.count("ld.global.v4"),
        "wide_stores": ptx.count("st.global.v4"),
        "narrow": re.findall(r"\b(?:ld|st)\.global(?!\.v4)\S*\.[bfsu](?:8|16|32)\b", ptx),
        "inexact": re.findall(r"\b(?:fma|mad)\.\S*f\d\d|\S+\.(?:approx|full|ftz)\b\S*", ptx),
    }
    print(json.dumps(facts))


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and the bytes of its stack, where registers that do not suffice are spilled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        words = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        printed = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    found = dict(re.findall(r"\b(REG|STACK):(\d+)", printed))
    return {"registers": int(found["REG"]), "stack": int(found["STACK"])}


def main() -> None:
    JITFunction.run = compile_instead
    routers = (("sigmoid", 8, 24), ("softmax", 1, 256), ("sigmoid", 8, 256))
    hidden_sizes = ((torch.float32, 40), (torch.bfloat16, 2048))
    for tokens in (64, 1):  # Triton compiles for one apart
        few = tokens == 1 and "--all" not in sys.argv
        for kind, groups, experts in routers[:1] if few else routers:
            logits, bias = torch.zeros(tokens, experts), torch.zeros(experts)
            experts_TK, weights, scores, _ = route(
                logits, bias if groups > 1 else None, 4, kind, groups, groups // 2 or 1, 2, True, 2.5
            )
            route_backward(scores, experts_TK, weights, logits, kind, True, 2.5)
        for dtype, hidden_size in hidden_sizes[:1] if few else hidden_sizes:
            hidden, weights = torch.zeros(tokens, hidden_size, dtype=dtype), torch.zeros(tokens, 8)
            place = torch.arange(8 * tokens).view(tokens, 8)
            sort_by_expert(place, 8 * tokens)
            rows = scatter(hidden, place, 8 * tokens)
            gather_sum(rows, None, place)
            gather_sum(rows, weights, place)
            combine_backward(hidden, rows, weights, place)
    for columns, segments in ((40, 1), (256, 9)):
        values, ids = torch.zeros(600, columns), torch.arange(600) % segments
        segment_reduce(values, *segments_of(ids, segments), None)
        segment_reduce(values.bfloat16(), *segments_of(ids, segments), torch.zeros(segments, columns))
    for dtype, columns in ((torch.float32, 132), (torch.bfloat16, 264)):
        table, rows = torch.zeros(9, columns, dtype=dtype), torch.zeros(300, dtype=torch.int64)
        row_gather(table, rows, torch.zeros(300, columns), None)
        row_gather(table, rows, torch.zeros(900, columns), rows)
    for dtype, columns in ((torch.float32, 256), (torch.bfloat16, 264), (torch.bfloat16, 30_000)):
        table, rows = torch.zeros(9, columns, dtype=dtype), torch.arange(7)
        first, second = torch.zeros(9, columns), torch.zeros(9, columns)
        catch_up = CatchUp(torch.zeros(9, 1, dtype=torch.int32), 5, torch.ones(3, 8))
        random = None if dtype == torch.float32 else RandomRounding(2**63 + 5, 0)
        for order, starts, missed, rounding in (
            (None, None, None, None),
            (torch.arange(7), torch.arange(8), catch_up, random),
        ):
            gradients = Gradients(rows, torch.zeros(7, columns), 0.5, order, starts)
            adam_(table, first, second, gradients, AdamStep.lazy(0.9, 0.999, 1e-8, 0.1, 2), missed, rounding)
            own = None if missed else OwnSteps(torch.zeros(9, 1, dtype=torch.int32), torch.ones(99))
            adam_(table, first, second, gradients, AdamStep.own(0.9, 0.999, 1e-8, 0.1), None, rounding, 0.9, own)
            rowwise_adagrad_(table, torch.zeros(9, 1), gradients, 0.1, 1e-8, rounding)
        square_norms(gradients.values)
    for dtype, width in ((torch.bfloat16, 768), (torch.float32, 40), (torch.float32, 3)):
        gate, up = torch.zeros(9, 2 * width, dtype=dtype).chunk(2, dim=1)
        silu_times_backward(silu_times(gate, up), gate, up)
    connections = ((torch.bfloat16, 4, 2560), (torch.float32, 3, 40), (torch.float32, 8, 1024))
    for dtype, branches, hidden in connections if "--all" in sys.argv else connections[:1]:
        numbers = branches * (branches + 2)
        streams, weight = torch.zeros(9, branches, hidden, dtype=dtype), torch.zeros(numbers, branches * hidden)
        given = (streams, weight.to(dtype), torch.zeros(numbers, dtype=dtype), torch.zeros(3, dtype=dtype))
        taken, mappings, dynamic, rms = hyper_connection_read(*given, 1e-6, 20)
        hyper_connection_read_backward(taken, streams, mappings, *given, mappings, dynamic, rms, 20)
        hyper_connection_write(streams, taken, mappings)
        hyper_connection_write_backward(streams, streams, taken, mappings)
        norm, taps = torch.zeros(branches, hidden), torch.zeros(4, branches, hidden)
        gated, gates = engram_gate(streams, streams, taken, norm, 1e-6)
        engram_gate_backward(streams, streams, streams, taken, norm, gates)
        for documents in (None, torch.zeros(9, dtype=torch.int64)):
            _, scales = engram_convolved(gated, norm, taps, documents, 1e-6, 3, 9)
            engram_convolved_backward(streams, gated, scales, norm, taps, documents, 3, 9)
    query, cos, sin = torch.zeros(9, 4, 192, dtype=torch.bfloat16), torch.zeros(9, 64), torch.zeros(9, 32)
    rotary(query[..., 128:], cos, sin, 1)
    cross_entropy_(torch.zeros(2, 129_280, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int64))
    ids = torch.zeros(2, 130, dtype=torch.int64)
    ngram_ids(ids, ids, (2, 3), (3, 5, 7), (11, 13, 17, 19), (0, 11, 24, 41), "document", 1)


if __name__ == "__main__":
    sys.exit(main())
