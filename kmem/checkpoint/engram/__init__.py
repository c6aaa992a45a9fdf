"""Engram in checkpoints: reading, inspecting and erasing its rows."""
