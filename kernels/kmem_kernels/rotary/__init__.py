"""The rotation of queries and keys by their positions."""
