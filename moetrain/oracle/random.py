"""Counter-based uniform numbers, one at a time: SplitMix64's finaliser (Steele, Lea, Flood 2014), applied twice."""

import hashlib

MASK = 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15
FIRST, SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def key_of(*parts: int | str) -> int:
    """63 bits of BLAKE2b over each part's type, length and text."""
    text = b"".join(f"{type(part).__name__}{len(str(part).encode())}:{part}".encode() for part in parts)
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def uniform(key: int, index: int) -> float:
    """A number in [0, 1) with 53 random bits."""
    bits = _mix(_mix((index * GAMMA + key) & MASK) + (key * FIRST & MASK ^ GAMMA) & MASK)
    return (bits >> 11) / 2**53


def _mix(bits: int) -> int:
    bits = (bits ^ bits >> 30) * FIRST & MASK
    bits = (bits ^ bits >> 27) * SECOND & MASK
    return bits ^ bits >> 31
