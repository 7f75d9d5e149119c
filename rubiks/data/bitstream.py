"""What is known of a packet, and how its bits and units are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple


class Packet(NamedTuple):
    """What a packet says about itself.

    Attributes:
        frames: how many of its frames are shown; None if its bytes do not tell.
        entry: decoding can start here: no frame that is shown after its own needs an earlier packet.
        layout: for H.264, VP8 and VP9, a value that changes when the size or the turn of the frames may change; None if
            the packet does not tell.
        timed: the packet's time stamp is that of its frame.
        order: for H.264, its frame's place in display order; None if unknown.
    """

    frames: int | None
    entry: bool
    layout: bytes | None = None
    timed: bool = True
    order: int | None = None


UNKNOWN = Packet(None, False)

ReadPacket = Callable[[bytes], Packet]


class Bits:
    """Reads bits, the most significant first; reading beyond the end raises IndexError."""

    def __init__(self, data: bytes) -> None:
        self._value = int.from_bytes(data, "big")
        self._left = 8 * len(data)

    def take(self, count: int) -> int:
        self._left -= count
        if self._left < 0:
            raise IndexError
        return self._value >> self._left & (1 << count) - 1

    def golomb(self) -> int:
        """An unsigned number as coded in H.264, ue(v). A signed one, se(v), has the same length."""
        zeros = 0
        while not self.take(1):
            zeros += 1
        return (1 << zeros) - 1 + self.take(zeros)


def nal_units(data: bytes, length_size: int) -> Iterator[bytes]:
    """The NAL units of a packet, each preceded by its length, or by a start code if `length_size` is 0."""
    if not length_size:
        yield from (unit for unit in data.split(b"\0\0\1")[1:] if unit)
        return
    place = 0
    while place + length_size < len(data):
        size = int.from_bytes(data[place : place + length_size], "big")
        place += length_size
        if size:
            yield data[place : place + size]
        place += size
