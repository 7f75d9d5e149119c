"""Seeking in a video file with PyAV: from the nearest packet where decoding can start, matched by time."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
from av.container import InputContainer
from av.packet import Packet

from rubiks.data.index import Entry, Index, packets_with_data, video_stream
from rubiks.data.screen import Screen


class Seeker:
    """Reads frames of an open file. Every packet is compared with the index, so a container that seeks to a wrong place
    costs time but never gives a wrong frame.

    Args:
        container: the open file; all its packets have been read once.
        index: of its frames, made from this container.
    """

    def __init__(self, container: InputContainer, index: Index) -> None:
        stream = video_stream(container)
        assert stream is not None
        self._container, self._stream, self._index = container, stream, index

    def images(self, times: Collection[int]) -> dict[int, np.ndarray]:
        """The frames of these times, uint8 (H, W, 3) each, as a player shows them.

        Raises:
            LookupError: the packets differ from the index.
            av.FFmpegError, ValueError: a frame cannot be decoded.
        """
        screen, codec = Screen(), self._stream.codec_context
        # In H.264 a picture that no other refers to is marked, and need not be decoded if it is not wanted.
        skipping = codec.codec.canonical_name == "h264"
        images: dict[int, np.ndarray] = {}
        packets: Iterator[Packet | None] = iter(())
        position = -1  # of the next packet
        wanted = set(times) if self._index.steady else {self._index.times[0], *times}  # the first gives size and turn
        for time in sorted(wanted):
            entry = self._index.entry_before(time)
            if position < 0 or entry.position > position:
                packets, position = self._packets_from(entry), entry.position
            while time not in images:
                packet = next(packets)
                if packet is not None:
                    self._expect(packet, position)
                    position += 1
                    if skipping:
                        codec.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
                for frame in self._stream.decode(packet):
                    if frame.is_corrupt:  # patched from other frames, which depend on where decoding started
                        raise LookupError(frame.pts)
                    if frame.pts in wanted:
                        images[frame.pts] = screen.image(frame)
        return images

    def _packets_from(self, entry: Entry) -> Iterator[Packet | None]:
        """The packets from this one on, then None, which makes a decoder return what it still holds."""
        for target in (entry.target, self._index.entries[0].target):
            self._container.seek(target, stream=self._stream)
            packets = packets_with_data(self._container, self._stream)
            for packet in packets:
                position = self._index.packets.get((packet.pts, packet.size), -1)
                if position == entry.position:
                    yield packet
                    yield from packets
                    yield None
                    raise LookupError(entry.time)  # there should have been more
                if position > entry.position:  # too far; from the start it will come
                    break
        raise LookupError(entry.time)

    def _expect(self, packet: Packet, position: int) -> None:
        if self._index.packets.get((packet.pts, packet.size)) != position:
            raise LookupError(position)
