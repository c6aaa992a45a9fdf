"""Trainable lookup tables outside the engine: stores, sharding, working sets, exchange and row optimizers."""
