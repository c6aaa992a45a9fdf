"""Counter-based random bits: any rank can draw any row, in any order, and gets the same bits.

The generator is splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators") used as a hash:
one value per (key, counter). All arithmetic is on integers, so values do not depend on a machine's maths library.
"""

import numpy as np

GOLDEN, MIX_1, MIX_2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_THIRTY, _TWENTY_SEVEN, _THIRTY_ONE = np.uint64(30), np.uint64(27), np.uint64(31)


def random_bits(key, counter):
    """64 random bits of a stream at each counter (uint64 array). For single counters, compile it with numba: numpy
    would warn about the overflow."""
    z = key + (counter + np.uint64(1)) * GOLDEN
    z = (z ^ (z >> _THIRTY)) * MIX_1
    z = (z ^ (z >> _TWENTY_SEVEN)) * MIX_2
    return z ^ (z >> _THIRTY_ONE)
