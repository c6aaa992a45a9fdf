"""Banks in checkpoints: inspecting, erasing, replacing and merging their blocks."""
