"""One uniform number for each (seed, sample, position): the same whatever else runs, and whenever it is drawn."""

from __future__ import annotations

_LOW32 = 0xFFFFFFFF


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox-4x32-10 (Salmon et al. 2011) of one counter; `reference.philox4x32` is the same for tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & _LOW32, (a >> 32) ^ c3 ^ k1, a & _LOW32
        k0, k1 = (k0 + 0x9E3779B9) & _LOW32, (k1 + 0xBB67AE85) & _LOW32
    return c0, c1, c2, c3


def uniform(seed: int, sample: int, position: int) -> float:
    """In [0, 1), a multiple of 2**-53."""
    high, low, _, _ = philox4x32((position, sample, 0, 0), (seed & _LOW32, seed >> 32))
    return ((high >> 5) * 2**26 + (low >> 6)) * 2.0**-53
