"""Bringing tokens into the order of their experts, and the experts' outputs back."""
