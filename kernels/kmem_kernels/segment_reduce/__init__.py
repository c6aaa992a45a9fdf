"""Sums of rows that belong together, in an order that is always the same."""
