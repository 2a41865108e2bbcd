"""Codes of a few bits in bytes, with nothing left over.

A code is cut into planes of 4, 2 and 1 bits, those that add up to its width, the low bits in the first plane (8 bits
are a byte as it is). A byte of a plane of w bits holds 8 / w codes that stand far apart: of n bytes, byte j holds the
codes j, j + n, j + 2n and so on, the first in its lowest bits. So what is unpacked is a few long pieces in a row, and
neighbours that must share a byte are brought apart by the caller, whose `turn` can put them back.
"""

from jaxtyping import UInt8

from framework.arrays import Array, Namespace


def planes(bits: int) -> tuple[int, ...]:
    """The widths of the planes of a code of 1 to 8 bits, from its low bits on: 7 is 4, 2, 1."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def pack(xp: Namespace, codes: UInt8[Array, "*axes count"], bits: int) -> UInt8[Array, "*axes bytes"]:
    """Codes below 2^bits, count * bits / 8 bytes; the count is a multiple of 8 unless `bits` is 2, 4 or 8."""
    made, low = [], 0
    for width in planes(bits):
        plane = codes if width == bits else (codes >> low) & (2**width - 1)
        share = 8 // width
        size = codes.shape[-1] // share
        byte = plane[..., :size]
        for place in range(1, share):
            byte = byte | (plane[..., place * size : (place + 1) * size] << (place * width))
        made.append(byte)
        low += width
    return made[0] if len(made) == 1 else xp.concat(made, axis=-1)


def pieces(xp: Namespace, packed: UInt8[Array, "*axes bytes"], bits: int) -> list[UInt8[Array, "*axes n"]]:
    """What `pack` was given, as arrays that lie side by side in it: as many as a byte of the first plane holds."""
    widths, count = planes(bits), packed.shape[-1] * 8 // bits
    each = count * widths[0] // 8
    made = []
    for piece in range(8 // widths[0]):
        codes, low, first = None, 0, 0
        for width in widths:
            size, share = count * width // 8, 8 // width
            byte = packed if width == bits else packed[..., first : first + size]
            parts = []
            for place in range(piece * each // size, (piece + 1) * each // size):
                part = byte >> (place * width) if place else byte
                parts.append(part if place == share - 1 else part & (2**width - 1))
            plane = parts[0] if len(parts) == 1 else xp.concat(parts, axis=-1)
            codes = plane if codes is None else codes | (plane << low)
            first += size
            low += width
        made.append(codes)
    return made


def unpack(xp: Namespace, packed: UInt8[Array, "*axes bytes"], bits: int) -> UInt8[Array, "*axes count"]:
    """What `pack` was given."""
    made = pieces(xp, packed, bits)
    return made[0] if len(made) == 1 else xp.concat(made, axis=-1)
