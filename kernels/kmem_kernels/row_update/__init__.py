"""Optimizer steps of a table's touched rows, in place."""
