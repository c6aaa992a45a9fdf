"""The constants of the published n-gram hashes: a prime for each head and a multiplier for each look-back position.

Sources: deepseek-ai/Engram (arXiv 2601.07372), V4.1 (arXiv 2609.19969), and Transformers' qwen4_exp.
"""

from collections.abc import Sequence

import numpy as np

INT64_MAX = 2**63 - 1
LAYER_STRIDE = 10007
"""Difference between the seeds of consecutive layers, in all published variants."""


def prime_sizes(tables: int, bases: Sequence[int], heads: int) -> tuple[tuple[int, ...], ...]:
    """Distinct primes, [tables][orders * heads]. Each head takes the smallest prime, from its order's base upwards,
    that no earlier head of any table has taken."""
    used: set[int] = set()
    sizes = []
    for _ in range(tables):
        row: list[int] = []
        for base in bases:
            prime = base - 1
            for _ in range(heads):
                prime += 1
                while prime in used or not is_prime(prime):
                    prime += 1
                used.add(prime)
                row.append(prime)
        sizes.append(tuple(row))
    return tuple(sizes)


def is_prime(number: int) -> bool:
    """Miller-Rabin with the bases that decide every number below 3.3e24 (Sorenson and Webster, 2015)."""
    witnesses = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)
    if number < 2 or any(number % prime == 0 for prime in witnesses):
        return number in witnesses
    twos = ((number - 1) & -(number - 1)).bit_length() - 1
    for witness in witnesses:
        power = pow(witness, (number - 1) >> twos, number)
        if power in (1, number - 1):
            continue
        for _ in range(twos - 1):
            power = power * power % number
            if power == number - 1:
                break
        else:
            return False
    return True


def multiplier_bound(vocab_size: int) -> int:
    """Upper bound of r in a multiplier 2r + 1, so that a token id times the multiplier stays below 2^63."""
    return max(1, INT64_MAX // vocab_size // 2)


def pcg64_multipliers(seed: int, layer: int, count: int, vocab_size: int) -> tuple[int, ...]:
    """DeepSeek's multipliers. NumPy does not guarantee the stream across versions, so a run stores the numbers."""
    generator = np.random.default_rng(seed + LAYER_STRIDE * layer)
    draws = generator.integers(0, multiplier_bound(vocab_size), size=count, dtype=np.int64)
    return tuple(2 * draw + 1 for draw in draws.tolist())


def splitmix64_multipliers(seed: int, ordinal: int, count: int, vocab_size: int) -> tuple[int, ...]:
    """Qwen's multipliers; `ordinal` is the index of the layer among the layers with a table. The first multiplier uses
    the second output of the usual splitmix64 stream: `_splitmix64` adds the increment before it mixes."""
    base, bound = seed + LAYER_STRIDE * ordinal, multiplier_bound(vocab_size)
    return tuple(2 * (_splitmix64(base + _GOLDEN * (index + 1)) % bound) + 1 for index in range(count))


_GOLDEN = 0x9E3779B97F4A7C15
_WORD = 2**64 - 1


def _splitmix64(state: int) -> int:
    word = (state + _GOLDEN) & _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)
