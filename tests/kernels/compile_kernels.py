"""Compiles every kernel for a GPU that need not be there, as the launches on a GPU would; run by test_compile.py.

What the interpreter accepts the compiler may refuse. Prints a line of JSON per kernel: its name and what its PTX holds.
"""

import json
import re
import sys

import torch
import triton
from kmem_kernels.ngram_ids.triton import ngram_ids
from kmem_kernels.permute.triton import combine_backward, gather_sum, scatter, sort_by_expert
from kmem_kernels.route.triton import route, route_backward
from kmem_kernels.segment_reduce.op import segments_of
from kmem_kernels.segment_reduce.triton import segment_reduce
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
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
        elif value == 1:  # Triton compiles for it apart
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        else:
            signature[parameter.name] = "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    facts = {
        "kernel": kernel.fn.__name__,
        "atomics": re.findall(r"\b(?:atom|red)\.\S+", ptx),
        "wide_loads": ptx.count("ld.global.v4"),
        "wide_stores": ptx.count("st.global.v4"),
    }
    print(json.dumps(facts))


def main() -> None:
    JITFunction.run = compile_instead
    for tokens in (64, 1):
        for kind, groups, experts in (("softmax", 1, 256), ("sigmoid", 8, 256), ("sigmoid", 8, 24)):
            logits, bias = torch.zeros(tokens, experts), torch.zeros(experts)
            choice = route(logits, bias if groups > 1 else None, 4, kind, groups, groups // 2 or 1, 2, True, 2.5)
            route_backward(choice.scores_TE, choice.experts_TK, choice.weights_TK, logits, kind, True, 2.5)
        for dtype, hidden_size in ((torch.bfloat16, 2048), (torch.float32, 40)):
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
    ids = torch.zeros(2, 130, dtype=torch.int64)
    ngram_ids(ids, ids, (2, 3), (3, 5, 7), (11, 13, 17, 19), (0, 11, 24, 41), "document", 1)


if __name__ == "__main__":
    sys.exit(main())
