"""Random numbers without state: each is a hash of a seed, a purpose and coordinates.

A draw depends only on its arguments, so it is the same for any batch size, worker count, place or resume.
Draws for one purpose never change the draws for another. The mixer is splitmix64's finaliser (Steele et al.
2014, "Fast splittable pseudorandom number generators", section 5).
"""

import zlib

import numpy as np

GAMMA = np.uint64(0x9E3779B97F4A7C15)


def uniform(seed: int, purpose: str, *coordinates) -> np.ndarray:
    """Uniform draws in [0, 1).

    Args:
        seed: the experiment's seed.
        purpose: names the stream, such as "crop"; different purposes are independent.
        coordinates: integers or integer arrays that broadcast together, such as (epoch, image id, view).

    Returns:
        float64 array of the broadcast shape, with 53 random bits each.
    """
    return (bits(seed, purpose, *coordinates) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def bits(seed: int, purpose: str, *coordinates) -> np.ndarray:
    """64 random bits for each element of the broadcast coordinates, as uint64."""
    with np.errstate(over="ignore"):
        state = _mix(np.uint64(seed & 0xFFFFFFFFFFFFFFFF) + GAMMA)
        for word in (zlib.crc32(purpose.encode()), *coordinates):
            state = _mix((state ^ np.asarray(word).astype(np.uint64)) + GAMMA)
    return state


def permutation(seed: int, purpose: str, size: int, *coordinates: int) -> np.ndarray:
    """A permutation of range(size) as an int64 array, drawn by sorting hashes."""
    return np.argsort(bits(seed, purpose, *coordinates, np.arange(size)), kind="stable")


def generator(seed: int, purpose: str, *coordinates: int) -> np.random.Generator:
    """A NumPy generator for one event that draws from a distribution, such as the mixing of one step."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), *coordinates])


def integer(seed: int, purpose: str, *coordinates: int) -> int:
    """One integer in [0, 2**63), to seed the generator of a library."""
    return int(bits(seed, purpose, *coordinates) >> np.uint64(1))


def _mix(z):
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
