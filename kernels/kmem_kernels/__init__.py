"""Triton kernels of kmem, one folder per operation: reference.py (the definition), triton.py, op.py (backends).

The package imports nothing of kmem. Without Triton, the references can be imported but the ops cannot; kmem then uses
its own torch code on every device.
"""
