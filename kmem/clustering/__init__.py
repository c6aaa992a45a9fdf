"""Clustering of prepared data: units to embeddings, embeddings to a tree of centroids, units to leaves."""
