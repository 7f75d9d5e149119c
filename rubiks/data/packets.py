"""Reads from a packet's first bytes how many frames a player shows of it, and whether decoding can start there.

Containers are not reliable on either. They mark pictures as key frames although the frames around them cannot be
decoded from there (open GOPs and periodic intra refresh of H.264), mark every packet as a key frame, or hold packets
that are never shown (the alt-ref frames of VP8). The codecs themselves are. Sources: ITU-T H.264 and H.265, section
7.3; RFC 6386 (VP8), section 9.1; the VP9 and AV1 bitstream specifications, "uncompressed header" and "OBU syntax";
ISO/IEC 14496-2 (MPEG-4).
"""

from __future__ import annotations

from collections.abc import Callable

from rubiks.data.bitstream import UNKNOWN, Bits, Packet, ReadPacket, nal_units
from rubiks.data.h264 import h264


def packet_reader(codec: str, extradata: bytes | None, intra_only: bool) -> ReadPacket:
    """The function that reads a codec's packets.

    Args:
        codec: FFmpeg's name for it.
        extradata: the codec's header as stored in the container.
        intra_only: whether every frame of the codec can be decoded without others.
    """
    if codec in _READERS:
        return _READERS[codec](extradata or b"")
    return lambda data: Packet(1, True) if intra_only else UNKNOWN


# ---- HEVC


def _hevc(extradata: bytes) -> ReadPacket:
    in_boxes = len(extradata) > 21 and extradata[0] == 1  # HEVCDecoderConfigurationRecord
    length_size = (extradata[21] & 3) + 1 if in_boxes else 0
    # Leading pictures are not shown if they belong to a broken link, or to a CRA picture where decoding starts.
    began, leading_shown = False, False

    def read(data: bytes) -> Packet:
        nonlocal began, leading_shown
        pictures, shown, entry = 0, 0, True
        for unit in nal_units(data, length_size):
            if len(unit) < 3 or (unit[0] & 1) << 5 | unit[1] >> 3:  # another layer, such as transparency
                continue
            kind, first = unit[0] >> 1 & 63, unit[2] >> 7
            if kind == 36:  # the end of a sequence, after which everything starts over
                return UNKNOWN
            if kind > 31:
                continue
            pictures += first
            if 16 <= kind <= 23:
                if unit[2] >> 6 & 1:  # earlier frames that were not shown yet are dropped
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
        """A superframe's frames. Its index is at the end, between two equal marker bytes."""
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
        """Whether the frame is shown, whether it is a key frame, and what it says about its size."""
        bits = Bits(data[:16])
        bits.take(2)
        profile = bits.take(1) | bits.take(1) << 1
        if profile == 3:
            bits.take(1)
        if bits.take(1):  # shows an earlier frame again
            return True, False, None
        inter, shown, resilient = bits.take(1), bool(bits.take(1)), bits.take(1)
        if not inter:
            bits.take(24)
            if profile:  # the size is elsewhere
                return shown, True, None
            return shown, True, bits.take(36).to_bytes(5, "big")  # colours, width, height
        intra = 0 if shown else bits.take(1)
        if not resilient:
            bits.take(2)
        if not intra:
            bits.take(20)
            if bits.take(3):  # the same size as a reference frame
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

_EMPTY = 16  # bytes; shorter frames are empty, unless the video is as small as a thumbnail


def _mpeg4(extradata: bytes) -> ReadPacket:
    past = packed = 0

    def read(data: bytes) -> Packet:
        nonlocal past, packed
        frames = data.split(b"\0\0\1\xb6")[1:]
        if packed and len(frames) == 1 and len(frames[0]) < _EMPTY:
            packed -= 1
            return Packet(1, False, timed=False)
        # FFmpeg gives no frame for an empty one, which repeats the one before.
        if not 1 <= len(frames) <= 2 or any(len(frame) < _EMPTY for frame in frames):
            return UNKNOWN
        past += 1
        if past == 2 and frames[0][0] >> 6 == 2:  # a B-frame whose first reference is missing
            return UNKNOWN
        # B-frames in AVI files: two frames in one packet, and later an empty packet, when the second is shown.
        packed += len(frames) - 1
        return Packet(1, len(frames) == 1 and frames[0][0] >> 6 == 0, timed=len(frames) == 1)

    return read


_READERS: dict[str, Callable[[bytes], ReadPacket]] = {
    "h264": h264,
    "hevc": _hevc,
    "vp8": _vp8,
    "vp9": _vp9,
    "av1": _av1,
    "mpeg4": _mpeg4,
}
