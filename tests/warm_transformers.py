"""What a server of `tests/warm_processes.py` imports for programs that must do without kmem: torch and Transformers."""

import importlib
import os
import sys

import torch

for name in (
    "pytest",
    "transformers.generation",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.modeling_utils",
    "transformers.pipelines",
):
    importlib.import_module(name)
torch.set_num_threads(1)
assert not {"kmem", "kmem_kernels", "deepspeed", "pydantic_settings"} & sys.modules.keys()
assert len(os.listdir("/proc/self/task")) == 1, "a fork has no other threads, and what they had locked stays locked"
