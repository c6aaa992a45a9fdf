"""Memory banks in checkpoints: inspecting, erasing, replacing and merging their blocks."""
