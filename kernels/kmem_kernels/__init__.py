"""Triton kernels of kmem, one folder per operation: reference.py (the definition), triton.py, op.py (backends).

Importing this without Triton raises ImportError; kmem's own torch code then serves every device.
"""

from importlib.util import find_spec

if find_spec("triton") is None:
    raise ImportError("kmem_kernels needs Triton: pip install 'kmem[kernels]'")
