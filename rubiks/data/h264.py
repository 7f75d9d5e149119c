"""Reads packets of H.264 (`packets`). Source: ITU-T H.264, section 7.3, and annex D for supplemental information."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from rubiks.data.bitstream import UNKNOWN, Bits, Packet, ReadPacket, nal_units


def h264(extradata: bytes) -> ReadPacket:
    in_boxes = extradata[:1] == b"\1"  # AVCDecoderConfigurationRecord
    length_size = (extradata[4] & 3) + 1 if in_boxes and len(extradata) > 4 else 0
    sets: dict[bytes, _Sequence | None] = {}  # sequence parameter sets
    places = _Places()
    turned = 0

    def read(data: bytes) -> Packet:
        nonlocal turned
        pictures, keys, recovers, order = 0, True, False, None
        for unit in nal_units(data, length_size):
            kind = unit[0] & 31
            if kind in (1, 5):
                keys &= kind == 5
                if len(unit) > 1 and unit[1] >> 7:  # its first slice begins with macroblock 0
                    pictures += 1
                    order = places.of(unit, next(iter(sets.values()))) if len(sets) == 1 else None
            elif kind == 6:
                messages = _messages(unit)
                recovers |= 6 in messages and _recovers(messages[6])
                turned += 47 in messages  # a display orientation, which libraries do not know
            elif kind == 7:
                sets[unit] = _sequence(unit)
            elif kind == 2:  # slices split into partitions
                return UNKNOWN
        # Two fields may come as two packets, which a decoder combines into one frame.
        known = pictures == 1 and bool(sets) and all(one is not None and one.progressive for one in sets.values())
        layout = bytes([len(sets) & 255, turned & 255])
        return Packet(1 if known else None, (keys or recovers) and pictures == 1, layout, order=order)

    for unit in _parameter_sets(extradata, in_boxes):
        if unit[0] & 31 == 7:
            sets[unit] = _sequence(unit)
    return read


def _parameter_sets(extradata: bytes, in_boxes: bool) -> Iterator[bytes]:
    if not in_boxes:
        yield from nal_units(extradata, 0)
        return
    place = 6
    for _ in range(extradata[5] & 31 if len(extradata) > 5 else 0):
        size = int.from_bytes(extradata[place : place + 2], "big")
        if size:
            yield extradata[place + 2 : place + 2 + size]
        place += 2 + size


def _messages(unit: bytes) -> dict[int, bytes]:
    """Supplemental information, by kind."""
    data, place, found = _unescaped(unit[1:]), 0, {}
    try:
        while place + 2 < len(data):
            fields = []  # the kind and the size of the message
            for _ in range(2):
                value = 0
                while data[place] == 255:
                    value, place = value + 255, place + 1
                fields.append(value + data[place])
                place += 1
            found[fields[0]] = data[place : place + fields[1]]
            place += fields[1]
    except IndexError:  # cut off
        pass
    return found


def _recovers(message: bytes) -> bool:
    """Whether a recovery point says that this frame and all frames shown after it are exact."""
    bits = Bits(message)
    try:
        return bits.golomb() == 0 and bits.take(1) == 1 and bits.take(1) == 0
    except IndexError:
        return False


def _unescaped(data: bytes) -> bytes:
    """The data without the bytes that prevent start codes in it."""
    return data.replace(b"\0\0\3", b"\0\0")


class _Sequence(NamedTuple):
    """What a sequence parameter set says.

    Attributes:
        progressive: no frame is coded as two fields.
        planes: colours are coded as separate pictures.
        number_bits: bits of a picture's frame_num.
        order_type, order_bits: how its place in display order is coded.
    """

    progressive: bool
    planes: bool
    number_bits: int
    order_type: int
    order_bits: int


def _sequence(unit: bytes) -> _Sequence | None:
    """Read a sequence parameter set; None if it cannot be read."""
    bits = Bits(_unescaped(unit[1:]))
    planes, order_bits = False, 0
    try:
        profile = bits.take(8)
        bits.take(16)
        bits.golomb()
        if profile in (100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135):
            if bits.golomb() == 3:
                planes = bool(bits.take(1))
            bits.golomb(), bits.golomb()
            bits.take(1)
            if bits.take(1):  # scaling lists, which encoders hardly ever write
                return None
        number_bits = bits.golomb() + 4
        order_type = bits.golomb()
        if order_type == 0:
            order_bits = bits.golomb() + 4
        elif order_type == 1:
            bits.take(1)
            bits.golomb(), bits.golomb()
            for _ in range(bits.golomb()):
                bits.golomb()
        bits.golomb()
        bits.take(1)
        bits.golomb(), bits.golomb()
        return _Sequence(bool(bits.take(1)), planes, number_bits, order_type, order_bits)
    except IndexError:
        return None


class _Places:
    """Pictures' places in display order: their picture order counts, which restart at an IDR picture.

    Source: H.264, 8.2.1. If another picture restarts them, places and times disagree, as they should.
    """

    def __init__(self) -> None:
        self._group = self._high = self._low = self._count = 0

    def of(self, unit: bytes, sequence: _Sequence | None) -> int | None:
        """The place, from a picture's first slice; None if it cannot be read from that."""
        if sequence is None or sequence.order_type == 1:
            return None
        bits = Bits(_unescaped(unit[1:24]))
        is_idr = unit[0] & 31 == 5
        try:
            bits.golomb(), bits.golomb(), bits.golomb()
            bits.take(2 * sequence.planes + sequence.number_bits)
            if is_idr:
                bits.golomb()
            low = bits.take(sequence.order_bits)
        except IndexError:
            return None
        if is_idr:
            self._group += 1 << 40
            self._high = self._low = 0
        if sequence.order_type == 2:  # display order is decoding order
            self._count += 1
            return self._group + self._count
        full, high = 1 << sequence.order_bits, self._high
        if self._low - low >= full // 2:
            high += full
        elif low - self._low > full // 2:
            high -= full
        if unit[0] >> 5 & 3:  # others refer to it
            self._high, self._low = high, low
        return self._group + high + low
