"""N-gram memory in checkpoints: reading, inspecting and erasing its rows."""
