"""Tiny video clips for tests, and where the real ones are."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest

from rubiks.data.readers import check_reader
from rubiks.errors import InputError

CLIPS = Path(__file__).resolve().parents[1].parent / "shared" / "videos"

_OPTIONS = {"libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"}, "libx264": {"preset": "ultrafast"}}


def real_clip(name: str) -> str:
    """Path of a real clip; skips the test if the clips are not available."""
    if not (CLIPS / name).is_file():
        pytest.skip(f"no clip {name}")
    return str(CLIPS / name)


def usable(reader: str) -> str:
    """The reader's name; skips the test, with the reason, if its library is not available."""
    try:
        check_reader(reader)
    except InputError as error:
        pytest.skip(f"{error}" + (f" ({error.__cause__})" if error.__cause__ else ""))
    return reader


def moving_square(num_frames: int, height: int = 64, width: int = 80) -> np.ndarray:
    """uint8 (T, H, W, 3): a bright square that moves over a background whose colour identifies the frame."""
    frames = np.zeros((num_frames, height, width, 3), np.uint8)
    for index, frame in enumerate(frames):
        frame[..., 0] = index * 5 % 256
        frame[..., 1] = np.linspace(0, 255, width, dtype=np.uint8)
        left = index * 3 % (width - 16)
        frame[10:26, left : left + 16] = (255, 255, index * 7 % 256)
    return frames


def write_video(
    path: str | os.PathLike[str],
    frames: np.ndarray,
    codec: str = "libx264",
    fps: int = 12,
    gop: int = 12,
    b_frames: int | None = None,
    pix_fmt: str = "yuv420p",
) -> None:
    """Encode frames, uint8 (T, H, W, 3) RGB, with a key frame every `gop`; the file's name gives the container."""
    with av.open(os.fspath(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=_OPTIONS.get(codec, {}))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        stream.codec_context.gop_size = gop
        if b_frames is not None:
            stream.codec_context.max_b_frames = b_frames
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def cut_without_encoding(source: str, path: str | os.PathLike[str], first: int) -> None:
    """Copy the stream from the key frame before `first`, and mark the frames before `first` as not to be shown."""
    with av.open(source) as original, av.open(os.fspath(path), "w") as container:
        stream = container.add_stream_from_template(original.streams.video[0])
        packets = [packet for packet in original.demux(video=0) if packet.pts is not None]
        start = sorted(packet.pts for packet in packets)[first]
        keys = [index for index, packet in enumerate(packets) if packet.is_keyframe and packet.pts <= start]
        for packet in packets[keys[-1] :]:
            packet.pts -= start
            packet.dts -= start
            packet.stream = stream
            container.mux(packet)


def rotated(content: bytes) -> bytes:
    """An mp4 file's content, marked to be shown turned clockwise by 90 degrees."""
    matrix = content.index(b"tkhd") + 44  # after version, times, number, duration, layer and volume
    turn = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    return content[:matrix] + turn + content[matrix + len(turn) :]


def decode_in_order(path: str | os.PathLike[str]) -> np.ndarray:
    """Every frame, uint8 (T, H, W, 3) RGB, decoded from the start without seeking: what any reader must return."""
    return np.stack(list(_frames(os.fspath(path))))


def _frames(path: str) -> Iterator[np.ndarray]:
    with av.open(path) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")
