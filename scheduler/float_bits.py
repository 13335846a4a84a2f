"""Floats as a log keeps them: the 32 bits of a float32, so that what is read again is what was decided on. Pure."""

import struct


def to_float32(value: float) -> float:
    """Rounded as a float32 operation on float32 operands would round it."""
    return from_bits(to_bits(value))


def to_bits(value: float) -> int:
    """The bits of the nearest float32."""
    bits: int = struct.unpack("<I", struct.pack("<f", value))[0]
    return bits


def from_bits(bits: int) -> float:
    """The float32 of these bits."""
    value: float = struct.unpack("<f", struct.pack("<I", bits))[0]
    return value
