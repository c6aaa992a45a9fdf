"""What the server of `tests/warm_processes.py` imports before it forks: whatever training imports anywhere."""

import importlib
import os

import torch

for name in (
    "deepspeed.module_inject",
    "deepspeed.moe.layer",
    "deepspeed.ops.adam",
    "numpy.ma",
    "pytest",
    "rich.progress",
    "torch.profiler",
    "transformers",
    "kmem.parallel.bank_kind",
    "kmem.parallel.engram_kind",
    "kmem.train.command",
    "kmem.train.dry_run",
    "kmem.train.reporting",
    "kmem.train.run_folder",
    "kmem.train.tracking",
    "kmem.train.trainer",
):
    importlib.import_module(name)
torch.set_num_threads(1)
assert len(os.listdir("/proc/self/task")) == 1, "a fork has no other threads, and what they had locked stays locked"
