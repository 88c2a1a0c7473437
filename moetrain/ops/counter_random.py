"""Counter-based random numbers: a value is a function of a key and an index alone.

So any subset of the indices gives the same values, in any order, on any number of ranks and on any device; nothing
is drawn and no generator has a state. Shapes: N values.

The bits are those of SplitMix64's finaliser (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number
generators"), applied twice: to index and key, then to that and a second key.
"""

import hashlib
import math

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, odd
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)
_SECOND_VALUE = 0xD1B54A32D192ED03  # sets the second uniform of a normal apart from the first
_BITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


def key_of(*parts: int | str) -> int:
    """Hash what a random number is for (seed, parameter name, step, layer, purpose) to a key.

    Args:
        parts: ints and strings; their order, types and boundaries count: ("ab",), ("a", "b"), (1,), ("1",) all differ.

    Returns:
        An int in ``[0, 2**63)``, the same in every process and on every machine.

    Raises:
        TypeError: a part is neither an int nor a string.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, int | str):
            kind = type(part).__name__
            raise TypeError(f"key_of: parts must be int or str, got {part!r} ({kind}); convert it with int() or str()")
        text = str(part).encode()
        digest.update(f"{type(part).__name__}{len(text)}:".encode() + text)
    return int.from_bytes(digest.digest(), "little") >> 1


def counter_uniform(key: int, index_N: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform values in ``[0, 1)``, one per index.

    Args:
        key: from ``key_of``.
        index_N: int64, any shape; what the value belongs to, such as a flat global index or a token id.
        dtype: float64, float32, float16 or bfloat16. A narrower one truncates the same bits, so never reaches 1.

    Returns:
        A tensor of ``index_N``'s shape and device.

    Raises:
        TypeError: ``index_N`` is not int64, or ``dtype`` not one of those.
    """
    _check("counter_uniform", index_N, dtype)
    return _fraction(_hash(key, index_N), _BITS[dtype]).to(dtype)


def counter_normal(key: int, index_N: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal values, one per index, by the Box-Muller transform in float64.

    Args:
        key: from ``key_of``.
        index_N: int64, any shape.
        dtype: float64, float32, float16 or bfloat16; the float64 value is rounded to it.

    Returns:
        A tensor of ``index_N``'s shape and device. Devices may differ in the last bits of log and cos.

    Raises:
        TypeError: ``index_N`` is not int64, or ``dtype`` not one of those.
    """
    _check("counter_normal", index_N, dtype)
    radius_N = _fraction(_hash(key, index_N), 53).neg_().add_(1.0).log_().mul_(-2.0).sqrt_()  # 1 - u is never 0
    angle_N = _fraction(_hash(key ^ _SECOND_VALUE, index_N), 53).mul_(2.0 * math.pi)
    return radius_N.mul_(angle_N.cos_()).to(dtype)


def _check(name: str, index_N: Tensor, dtype: torch.dtype) -> None:
    if index_N.dtype != torch.int64:
        raise TypeError(f"{name}: index must be int64, got {index_N.dtype}; convert it with .long()")
    if dtype not in _BITS:
        raise TypeError(f"{name}: dtype must be float64, float32, float16 or bfloat16, got {dtype}")


def _hash(key: int, index_N: Tensor) -> Tensor:
    """64 mixed bits per index, as int64; arithmetic wraps around."""
    bits_N = index_N.mul(_signed(_GAMMA)).add_(_signed(key))
    bits_N = _mix(bits_N).add_(_signed(key * _FACTORS[0] ^ _GAMMA))
    return _mix(bits_N)


def _mix(bits_N: Tensor) -> Tensor:
    """SplitMix64's finaliser, in place."""
    for factor, shift in zip(_FACTORS, _SHIFTS, strict=False):
        bits_N.bitwise_xor_(_shift_right(bits_N, shift)).mul_(_signed(factor))
    return bits_N.bitwise_xor_(_shift_right(bits_N, _SHIFTS[-1]))


def _shift_right(bits_N: Tensor, shift: int) -> Tensor:
    """A logical shift: torch's is arithmetic, so the sign's copies are masked away."""
    return (bits_N >> shift).bitwise_and_((1 << (64 - shift)) - 1)


def _fraction(bits_N: Tensor, num_bits: int) -> Tensor:
    """The highest ``num_bits`` bits as a float64 in ``[0, 1)``."""
    return _shift_right(bits_N, 64 - num_bits).to(torch.float64).mul_(2.0**-num_bits)


def _signed(value: int) -> int:
    """The int64 with the low 64 bits of ``value``."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value
