"""Attacks on what kmem reads and writes. `python -m tests.faults --minutes N` runs them as long as one likes."""
