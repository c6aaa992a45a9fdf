"""Megatron-core's own indexed dataset, the oracle of .bin and .idx files."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # hints about Apex and Transformer Engine, which other parts of it use
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

__all__ = ["DType", "IndexedDataset", "IndexedDatasetBuilder"]
