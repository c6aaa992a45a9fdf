"""Reads pinned host memory from the device as fast as a kernel can: the ceiling for gathers from host memory."""

import torch
import triton
import triton.language as tl
from kmem_kernels.backend import interpreted
from torch import Tensor

BLOCK = 2048
"""Values per iteration of a program: 16 in each of 128 threads."""


@triton.jit
def _copy(source_ptr, target_ptr, count, BLOCK: tl.constexpr):
    for block in range(tl.program_id(0), tl.cdiv(count, BLOCK), tl.num_programs(0)):
        place = block * BLOCK + tl.arange(0, BLOCK)
        tl.store(target_ptr + place, tl.load(source_ptr + place, mask=place < count), mask=place < count)


def host_copy(source: Tensor, target: Tensor) -> None:
    """Copy the fp32 source, in pinned host memory, to the target, on the device, from front to back. Each access has 16
    bytes if the number of values is a multiple of 16."""
    block = 1 << 14 if interpreted() else BLOCK
    programs = triton.cdiv(source.numel(), block)
    assert (2 * programs + 1) * block < 2**31, "places are counted in 32 bits"
    if target.is_cuda:
        programs = min(programs, torch.cuda.get_device_properties(target.device).multi_processor_count)
    _copy[(programs,)](source, target, source.numel(), BLOCK=block)
