"""The short convolution of an engram layer, with the norm before it and the activation after it."""
