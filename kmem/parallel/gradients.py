"""The global gradient norm, correct on every mesh: each element of the model counts once.

Where gradients lie depends on the optimizer that DeepSpeed chose: on the parameters (fp32, ZeRO-0), in this rank's
partitions (fp32, ZeRO-1), or in flat fp32 buffers (bf16).
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from kmem.parallel.mesh import Mesh, local_device


def is_tied_copy(parameter: nn.Parameter) -> bool:
    """Whether another stage of the pipeline holds the copy of this parameter that counts."""
    return getattr(parameter, "ds_pipe_replicated", False)


class GradientNorm:
    """Norm and scaling of the reduced gradients of one engine."""

    def __init__(self, module: nn.Module, optimizer, mesh: Mesh):
        self.module = module
        self.optimizer = optimizer
        self.mesh = mesh

    def reduce(self, extra: Sequence[float]) -> list[float]:
        """Sum of squares over the whole model, then the sums of `extra`, over all ranks, in one fp64 all-reduce."""
        norms = [torch.linalg.vector_norm(piece, dtype=torch.float32) for piece in self._counted()]
        total = torch.tensor([0.0, *extra], dtype=torch.float64, device=local_device())
        if norms:  # a rank may hold only copies
            total[0] = torch.stack(norms).double().square().sum()
        dist.all_reduce(total)
        return total.tolist()

    def scale(self, factor: float) -> None:
        """Multiply every gradient that this rank's optimizer step will use."""
        pieces = list(self._local())
        if pieces:
            torch._foreach_mul_(pieces, factor)

    def _counted(self) -> Iterator[Tensor]:
        """Gradients that this rank counts, and no other."""
        optimizer = self.optimizer
        if isinstance(optimizer, DeepSpeedZeroOptimizer):
            for group, params in enumerate(optimizer.params_in_partition):
                gradients = [g for g in optimizer.averaged_gradients[group] if not getattr(g, "_zero_padding", False)]
                for parameter, gradient in zip(params, gradients, strict=True):
                    if not is_tied_copy(parameter):
                        yield gradient
        elif isinstance(optimizer, BF16_Optimizer):
            for params, partition in zip(
                optimizer.bf16_groups, optimizer.fp32_groups_gradient_flat_partition, strict=True
            ):
                for parameter in params:
                    fragment = parameter._hp_mapping
                    if fragment is not None and not is_tied_copy(parameter):
                        address = fragment.get_hp_fragment_address()
                        yield partition.narrow(0, address.start, address.numel)
        else:
            for parameter in self.module.parameters():
                first = self.mesh.is_first_expert_replica if is_moe_param(parameter) else self.mesh.is_first_replica
                if first and parameter.grad is not None and not is_tied_copy(parameter):
                    yield parameter.grad

    def _local(self) -> Iterator[Tensor]:
        optimizer = self.optimizer
        if isinstance(optimizer, DeepSpeedZeroOptimizer):
            for pieces in optimizer.averaged_gradients.values():
                yield from pieces
        elif isinstance(optimizer, BF16_Optimizer):
            yield from optimizer.fp32_groups_gradient_flat_partition
        else:
            yield from (parameter.grad for parameter in self.module.parameters() if parameter.grad is not None)
