"""Seeking in a video file with PyAV: from the nearest packet from which decoding can begin, matched by time."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
from av.container import InputContainer
from av.packet import Packet

from rubiks.data.index import Entry, Index, packets_with_data, video_stream
from rubiks.data.screen import Screen


class Seeker:
    """Reads frames of an open file. Whatever comes is compared with the index, so that a container that leads elsewhere
    costs time, not a wrong frame.

    Args:
        container: the open file, all of whose packets have been read once.
        index: of its frames, found by it.
    """

    def __init__(self, container: InputContainer, index: Index) -> None:
        stream = video_stream(container)
        assert stream is not None
        self._container, self._stream, self._index = container, stream, index

    def images(self, times: Collection[int]) -> dict[int, np.ndarray]:
        """The frames of these times, uint8 (H, W, 3) each, as a player shows them.

        Raises:
            LookupError: the packets do not come as the index has them.
            av.FFmpegError, ValueError: one cannot be decoded.
        """
        screen, codec = Screen(), self._stream.codec_context
        # Of H.264 a picture that no other refers to says so, and need not be decoded if it is not wanted.
        skipping = codec.codec.canonical_name == "h264"
        images: dict[int, np.ndarray] = {}
        packets: Iterator[Packet | None] = iter(())
        position = -1  # of the packet that comes next
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
                    if frame.is_corrupt:  # a decoder patches it with others, from the start and from here
                        raise LookupError(frame.pts)
                    if frame.pts in wanted:
                        images[frame.pts] = screen.image(frame)
        return images

    def _packets_from(self, entry: Entry) -> Iterator[Packet | None]:
        """The packets from this one on, and None, by which a decoder gives what it still holds."""
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
                if position > entry.position:  # too far; from the start it must come
                    break
        raise LookupError(entry.time)

    def _expect(self, packet: Packet, position: int) -> None:
        if self._index.packets.get((packet.pts, packet.size)) != position:
            raise LookupError(position)
