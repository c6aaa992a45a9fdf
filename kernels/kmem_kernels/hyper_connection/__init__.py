"""How a sublayer reads the branches of the residual stream, and how its output enters them."""
