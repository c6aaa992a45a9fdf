"""The gate between an engram's value and the branches of the residual stream."""
