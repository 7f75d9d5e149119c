"""What the first bytes of a packet say: how many frames a player shows of it, and whether decoding can begin there.

Containers do not say either reliably. They call pictures key frames from which the frames around cannot be decoded
(open GOPs and periodic intra refresh of H.264), call every packet a key frame, or hold packets that are never shown
(the alt-ref frames of VP8). The codecs themselves do. Sources: ITU-T H.264 and H.265, section 7.3; RFC 6386 (VP8),
section 9.1; the VP9 and AV1 bitstream specifications, "uncompressed header" and "OBU syntax"; ISO/IEC 14496-2 (MPEG-4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple


class Packet(NamedTuple):
    """What a packet says of itself.

    Attributes:
        frames: frames of it that are shown; None where its bytes do not tell.
        entry: decoding can begin here: no frame that is shown after its own needs an earlier packet.
        layout: of H.264, VP8 and VP9, something that changes where the size of the frames or their turn may change;
            None where it says nothing.
        timed: the packet's time stamp is that of its frame.
        order: of H.264, its frame's place in the order of showing; None where that is not known.
    """

    frames: int | None
    entry: bool
    layout: bytes | None = None
    timed: bool = True
    order: int | None = None


UNKNOWN = Packet(None, False)

ReadPacket = Callable[[bytes], Packet]


def packet_reader(codec: str, extradata: bytes | None, intra_only: bool) -> ReadPacket:
    """What reads a codec's packets.

    Args:
        codec: FFmpeg's name.
        extradata: the codec's header as the container has it.
        intra_only: whether every frame of the codec stands alone.
    """
    if codec in _READERS:
        return _READERS[codec](extradata or b"")
    return lambda data: Packet(1, True) if intra_only else UNKNOWN


class _Bits:
    """Reads bits, the most significant first; what lies beyond the end raises IndexError."""

    def __init__(self, data: bytes) -> None:
        self._value = int.from_bytes(data, "big")
        self._left = 8 * len(data)

    def take(self, count: int) -> int:
        self._left -= count
        if self._left < 0:
            raise IndexError
        return self._value >> self._left & (1 << count) - 1

    def golomb(self) -> int:
        """An unsigned number as H.264 writes it, ue(v). One with a sign, se(v), is as long."""
        zeros = 0
        while not self.take(1):
            zeros += 1
        return (1 << zeros) - 1 + self.take(zeros)


# ---- H.264 and HEVC: packets of NAL units


def _split(data: bytes, length_size: int) -> Iterator[bytes]:
    """The NAL units of a packet, each after its length, or, where that has 0 bytes, after a start code."""
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


def _h264(extradata: bytes) -> ReadPacket:
    in_boxes = extradata[:1] == b"\1"  # AVCDecoderConfigurationRecord
    length_size = (extradata[4] & 3) + 1 if in_boxes and len(extradata) > 4 else 0
    sets: dict[bytes, _Sequence | None] = {}  # sequence parameter sets
    places = _Places()
    turned = 0

    def read(data: bytes) -> Packet:
        nonlocal turned
        pictures, keys, recovers, order = 0, True, False, None
        for unit in _split(data, length_size):
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
            elif kind == 2:  # slices in parts
                return UNKNOWN
        # Two fields may come as two packets, of which a decoder makes one frame.
        known = pictures == 1 and bool(sets) and all(one is not None and one.progressive for one in sets.values())
        layout = bytes([len(sets) & 255, turned & 255])
        return Packet(1 if known else None, (keys or recovers) and pictures == 1, layout, order=order)

    for unit in _parameter_sets(extradata, in_boxes):
        if unit[0] & 31 == 7:
            sets[unit] = _sequence(unit)
    return read


def _parameter_sets(extradata: bytes, in_boxes: bool) -> Iterator[bytes]:
    if not in_boxes:
        yield from _split(extradata, 0)
        return
    place = 6
    for _ in range(extradata[5] & 31 if len(extradata) > 5 else 0):
        size = int.from_bytes(extradata[place : place + 2], "big")
        if size:
            yield extradata[place + 2 : place + 2 + size]
        place += 2 + size


def _messages(unit: bytes) -> dict[int, bytes]:
    """Supplemental information, by its kind."""
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
    """Whether a recovery point says that this frame and all that are shown after it are exact from here on."""
    bits = _Bits(message)
    try:
        return bits.golomb() == 0 and bits.take(1) == 1 and bits.take(1) == 0
    except IndexError:
        return False


def _unescaped(data: bytes) -> bytes:
    """Without the bytes that keep start codes out."""
    return data.replace(b"\0\0\3", b"\0\0")


class _Sequence(NamedTuple):
    """What a sequence parameter set says.

    Attributes:
        progressive: no frame is coded as two fields.
        planes: colours are coded as pictures of their own.
        number_bits: of a picture's frame_num.
        order_type, order_bits: how its place in the order of showing is written.
    """

    progressive: bool
    planes: bool
    number_bits: int
    order_type: int
    order_bits: int


def _sequence(unit: bytes) -> _Sequence | None:
    """Of a sequence parameter set; None where it cannot be read."""
    bits = _Bits(_unescaped(unit[1:]))
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
    """Pictures' places in the order of showing: their picture order counts, which begin anew at an IDR picture.

    Source: H.264, 8.2.1. Where a picture begins them anew otherwise, places and times disagree, as they should.
    """

    def __init__(self) -> None:
        self._group = self._high = self._low = self._count = 0

    def of(self, unit: bytes, sequence: _Sequence | None) -> int | None:
        """From a picture's first slice; None where its place is not to be had so."""
        if sequence is None or sequence.order_type == 1:
            return None
        bits = _Bits(_unescaped(unit[1:24]))
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
        if sequence.order_type == 2:  # in the order of decoding
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


def _hevc(extradata: bytes) -> ReadPacket:
    in_boxes = len(extradata) > 21 and extradata[0] == 1  # HEVCDecoderConfigurationRecord
    length_size = (extradata[21] & 3) + 1 if in_boxes else 0
    # Leading pictures of a CRA picture that a decoder begins with, or of a broken link, are not shown.
    began, leading_shown = False, False

    def read(data: bytes) -> Packet:
        nonlocal began, leading_shown
        pictures, shown, entry = 0, 0, True
        for unit in _split(data, length_size):
            if len(unit) < 3 or (unit[0] & 1) << 5 | unit[1] >> 3:  # of another layer, such as transparency
                continue
            kind, first = unit[0] >> 1 & 63, unit[2] >> 7
            if kind == 36:  # the end of a sequence, after which everything begins anew
                return UNKNOWN
            if kind > 31:
                continue
            pictures += first
            if 16 <= kind <= 23:
                if unit[2] >> 6 & 1:  # frames that were to be shown before it are dropped
                    return UNKNOWN
                leading_shown = began and kind > 18
                began = True
            else:
                entry = False
            shown += first and (leading_shown or kind not in (8, 9))
        return Packet(shown if pictures == 1 else None, entry and pictures == 1)

    return read


# ---- VP8, VP9, AV1: hidden frames


def _vp8(extradata: bytes) -> ReadPacket:
    def read(data: bytes) -> Packet:
        if len(data) < 4:
            return UNKNOWN
        key = not data[0] & 1
        return Packet(data[0] >> 4 & 1, key, data[6:10] if key else None)

    return read


def _vp9(extradata: bytes) -> ReadPacket:
    def frames(data: bytes) -> list[bytes]:
        """A superframe's frames. Its index is at the end, between two equal marks."""
        mark = data[-1]
        count, length = (mark & 7) + 1, (mark >> 3 & 3) + 1
        start = len(data) - 2 - count * length
        if mark & 0xE0 != 0xC0 or start < 0 or data[start] != mark:
            return [data]
        found, place = [], 0
        for number in range(count):
            entry = start + 1 + number * length
            size = int.from_bytes(data[entry : entry + length], "little")
            found.append(data[place : place + size])
            place += size
        return [frame for frame in found if frame]

    def header(data: bytes) -> tuple[bool, bool, bytes | None]:
        """Whether it is shown, whether it is a key frame, and what it says of the size."""
        bits = _Bits(data[:16])
        bits.take(2)
        profile = bits.take(1) | bits.take(1) << 1
        if profile == 3:
            bits.take(1)
        if bits.take(1):  # shows a frame that came before
            return True, False, None
        inter, shown, resilient = bits.take(1), bool(bits.take(1)), bits.take(1)
        if not inter:
            bits.take(24)
            if profile:  # whose size is elsewhere
                return shown, True, None
            return shown, True, bits.take(36).to_bytes(5, "big")  # colours, width, height
        intra = 0 if shown else bits.take(1)
        if not resilient:
            bits.take(2)
        if not intra:
            bits.take(20)
            if bits.take(3):  # as large as a frame that it refers to
                return shown, False, None
        return shown, False, b"a size of its own"

    def read(data: bytes) -> Packet:
        try:
            found = [header(frame) for frame in frames(data)]
        except IndexError:
            return UNKNOWN
        shown = sum(frame[0] for frame in found)
        layouts = {layout for _, _, layout in found if layout is not None}
        layout = b"".join(sorted(layouts)) if layouts else None
        return Packet(shown if shown < 2 else None, bool(found) and found[0][1], layout)

    return read


def _av1(extradata: bytes) -> ReadPacket:
    def read(data: bytes) -> Packet:
        place, shown, entry = 0, 0, None
        while place < len(data):
            head = data[place]
            kind, extended, sized = head >> 3 & 15, head >> 2 & 1, head >> 1 & 1
            if extended and data[place + 1] >> 3 & 3:  # a spatial layer
                return UNKNOWN
            place += 1 + extended
            size, shift = (0, 0) if sized else (len(data) - place, 0)
            while sized:
                byte = data[place]
                size |= (byte & 127) << shift
                place, shift, sized = place + 1, shift + 7, byte >> 7
            body = data[place : place + size]
            place += size
            if kind in (3, 6):
                again, frame_type, visible = body[0] >> 7, body[0] >> 5 & 3, body[0] >> 4 & 1
                shown += again or visible
                if entry is None:
                    entry = not again and frame_type == 0 and bool(visible)
            elif kind == 8:  # a list of tiles
                return UNKNOWN
        return Packet(shown if shown < 2 else None, bool(entry))

    def checked(data: bytes) -> Packet:
        try:
            return read(data)
        except IndexError:
            return UNKNOWN

    return checked


# ---- MPEG-4 part 2

_EMPTY = 16  # bytes that the shortest frame with something in it has more than, if it is no thumbnail


def _mpeg4(extradata: bytes) -> ReadPacket:
    past = packed = 0

    def read(data: bytes) -> Packet:
        nonlocal past, packed
        frames = data.split(b"\0\0\1\xb6")[1:]
        if packed and len(frames) == 1 and len(frames[0]) < _EMPTY:
            packed -= 1
            return Packet(1, False, timed=False)
        # A frame with nothing in it, which repeats the one before, is no frame for FFmpeg.
        if not 1 <= len(frames) <= 2 or any(len(frame) < _EMPTY for frame in frames):
            return UNKNOWN
        past += 1
        if past == 2 and frames[0][0] >> 6 == 2:  # a B-frame whose first reference is missing
            return UNKNOWN
        # How B-frames came into AVI files: two frames in a packet, later an empty one, at which the second is shown.
        packed += len(frames) - 1
        return Packet(1, len(frames) == 1 and frames[0][0] >> 6 == 0, timed=len(frames) == 1)

    return read


_READERS: dict[str, Callable[[bytes], ReadPacket]] = {
    "h264": _h264,
    "hevc": _hevc,
    "vp8": _vp8,
    "vp9": _vp9,
    "av1": _av1,
    "mpeg4": _mpeg4,
}
