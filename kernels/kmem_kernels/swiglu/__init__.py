"""The activation between an expert's two matrix products."""
