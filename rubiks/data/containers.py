"""How long a file should be, according to its container."""

from __future__ import annotations

import os
import struct
from typing import BinaryIO

from rubiks.errors import VideoError

# Boxes at the top level of an MP4 file.
_BOXES = frozenset(
    (
        *(b"ftyp", b"moov", b"mdat", b"moof", b"mfra", b"free", b"skip", b"wide", b"uuid", b"meta", b"udta", b"pnot"),
        *(b"styp", b"sidx", b"ssix", b"prft", b"emsg", b"pdin", b"bloc", b"pict", b"PICT", b"junk"),
    )
)


def check_whole(path: str) -> None:
    """Raise VideoError if a file is shorter than its container says."""
    promised = promised_bytes(path)
    missing = 0 if promised is None else promised - os.path.getsize(path)
    if missing > 0:
        raise VideoError(
            path, f"is cut short: {missing:,} of the {promised:,} bytes that its container announces are missing"
        )


def promised_bytes(path: str) -> int | None:
    """Bytes that an MP4, Matroska, WebM or AVI file says it has; None for other files and if it does not say."""
    with open(path, "rb") as file:
        head = file.read(12)
        file.seek(0)
        if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide"):
            return _end_of_boxes(file)
        if head[:4] == b"\x1a\x45\xdf\xa3":
            return _end_of_segment(file)
        if head[:4] == b"RIFF" and head[8:] == b"AVI ":
            return 8 + int.from_bytes(head[4:8], "little") if head[4:8] != bytes(4) else None
    return None


def _end_of_boxes(file: BinaryIO) -> int | None:
    end = 0
    while head := file.read(8):
        if len(head) < 8:
            return end + 8
        size, kind = struct.unpack(">I4s", head)
        if size == 0:  # to the end of the file
            return None
        if size == 1:
            size = int.from_bytes(file.read(8), "big")
        if size < 8 or kind not in _BOXES:  # something else follows the video
            return end
        end += size
        file.seek(end)
    return end


def _end_of_segment(file: BinaryIO) -> int | None:
    file.seek(4)
    header = _ebml_size(file)
    if header is None:
        return None
    file.seek(header, os.SEEK_CUR)
    if file.read(4) != b"\x18\x53\x80\x67":
        return None
    size = _ebml_size(file)
    return None if size is None else file.tell() + size


def _ebml_size(file: BinaryIO) -> int | None:
    """A size in EBML: the leading zero bits of the first byte count the bytes that follow. None for "unknown"."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    following = 8 - first[0].bit_length()
    value = int.from_bytes(bytes([first[0] & (1 << (7 - following)) - 1]) + file.read(following), "big")
    return None if value == (1 << 7 * (following + 1)) - 1 else value
