"""The mesh of process groups, DeepSpeed's pipeline and its engine, expert dispatch, local process start."""

import os
import warnings

import torch

# DeepSpeed chooses its accelerator when it is first imported, which only modules of this package do.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

# DeepSpeed makes this call; users can do nothing about it.
warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
