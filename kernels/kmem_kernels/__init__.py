"""Triton kernels of kmem, one folder per operation: reference.py (the definition), triton.py, op.py (backends).

Imports nothing of kmem. Without Triton the references can be imported and no op can: kmem's own torch code then serves
every device.
"""
