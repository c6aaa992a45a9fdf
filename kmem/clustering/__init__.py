"""Clustering of prepared data: embed units, fit a tree of centroids to the embeddings, assign units to leaves."""
