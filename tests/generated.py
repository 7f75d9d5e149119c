"""Small generated video files of every kind that people have: codec, container, groups of pictures, times, turns."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.bitstream import BitStreamFilterContext
from av.stream import Disposition
from videos import cut_without_encoding, moving_square, rotated

FRAMES = 60
RATE = 12

Write = Callable[[Path], None]

_ENCODERS = {
    "h264": ("libx264", {"preset": "veryfast"}),
    "hevc": ("libx265", {"preset": "ultrafast"}),
    "vp8": ("libvpx", {"deadline": "realtime", "cpu-used": "8"}),
    "vp9": ("libvpx-vp9", {"deadline": "good", "cpu-used": "5"}),
    "av1": ("libsvtav1", {"preset": "12"}),
    "mpeg4": ("mpeg4", {}),
    "mpeg2": ("mpeg2video", {}),
    "mjpeg": ("mjpeg", {}),
    "ffv1": ("ffv1", {}),
    "flv1": ("flv", {}),
    "wmv2": ("wmv2", {}),
    "gif": ("gif", {}),
}


def encoded(
    codec: str,
    gop: int = 12,
    b_frames: int | None = None,
    options: dict[str, str] | None = None,
    times: Iterable[int] | None = None,
    pix_fmt: str | None = None,
    images: np.ndarray | None = None,
) -> Write:
    """A writer of FRAMES frames in the container that the file's name gives.

    Args:
        codec: a key of _ENCODERS.
        gop: frames from a key frame to the next.
        b_frames: how many B-frames at most; None for the encoder's own choice.
        options: of the encoder.
        times: of the frames, in units of 1 / RATE seconds.
        pix_fmt: FFmpeg's name; None for the usual one.
        images: uint8 (T, H, W, 3).
    """

    def write(path: Path) -> None:
        encoder, usual = _ENCODERS[codec]
        frames = moving_square(FRAMES) if images is None else images
        with av.open(str(path), "w") as container:
            stream = container.add_stream(encoder, rate=RATE, options=usual | (options or {}))
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = pix_fmt or ("yuvj420p" if codec == "mjpeg" else "yuv420p")
            stream.codec_context.gop_size = gop
            stream.codec_context.time_base = Fraction(1, RATE)
            if b_frames is not None:
                stream.codec_context.max_b_frames = b_frames
            for image, time in zip(frames, times or range(len(frames)), strict=True):
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts, frame.time_base = time, Fraction(1, RATE)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())

    return write


def x264(parameters: str, **options) -> Write:
    return encoded("h264", options={"x264-params": parameters}, **options)


def x265(parameters: str) -> Write:
    return encoded("hevc", options={"x265-params": f"{parameters}:log-level=0"})


def remuxed(write: Write, change: Callable[[list[av.Packet]], list[av.Packet]], **options: str) -> Write:
    """Changed packets of another file, in the container that the new file's name gives."""

    def rewrite(path: Path) -> None:
        source = path.with_name(f"source of {path.stem}.mkv")
        write(source)
        with av.open(str(source)) as original, av.open(str(path), "w", options=options) as container:
            stream = container.add_stream_from_template(original.streams.video[0])
            for packet in change([packet for packet in original.demux(video=0) if packet.size]):
                packet.stream = stream
                container.mux(packet)
        source.unlink()

    return rewrite


def patched(write: Write, change: Callable[[bytes], bytes]) -> Write:
    """Another file with other bytes."""

    def rewrite(path: Path) -> None:
        write(path)
        path.write_bytes(change(path.read_bytes()))

    return rewrite


def shown_with(a: float, b: float, c: float, d: float) -> Callable[[bytes], bytes]:
    """Gives an mp4 file a display matrix."""

    def change(content: bytes) -> bytes:
        start = content.index(b"tkhd") + 44  # after version, times, number, duration, layer and volume
        first, second = ((round(x * (1 << 16)), round(y * (1 << 16)), 0) for x, y in ((a, b), (c, d)))
        matrix = struct.pack(">9i", *first, *second, 0, 0, 1 << 30)
        return content[:start] + matrix + content[start + len(matrix) :]

    return change


def _shift(packets: list[av.Packet], by: int) -> list[av.Packet]:
    for packet in packets:
        packet.pts += by
        packet.dts = None if packet.dts is None else packet.dts + by
    return packets


def _equal_times(packets: list[av.Packet]) -> list[av.Packet]:
    for first, second in zip(packets[6::10], packets[7::10], strict=False):
        second.pts, second.dts = first.pts, max(first.dts, min(second.dts, first.pts))
    return packets


def _jitter(packets: list[av.Packet]) -> list[av.Packet]:
    for number, packet in enumerate(packets):
        packet.pts += number % 3 * 120
    return packets


def _turned_by_sei(packets: list[av.Packet]) -> list[av.Packet]:
    """A display orientation within H.264, only in the first frame."""
    change = BitStreamFilterContext("h264_metadata=display_orientation=insert:rotate=90", packets[0].stream)
    return [new for packet in packets for new in change.filter(packet)]


def _swapped(packets: list[av.Packet]) -> list[av.Packet]:
    """Two frames of each group have each other's times."""
    by_time = sorted(packets, key=lambda packet: packet.pts)
    for first, second in zip(by_time[5::12], by_time[6::12], strict=False):
        first.pts, second.pts = second.pts, first.pts
    return packets


def _without_order(packets: list[av.Packet]) -> list[av.Packet]:
    """With time stamps in the order of the packets, whatever the order of the frames."""
    times = sorted(packet.pts for packet in packets)
    for packet, time in zip(packets, times, strict=True):
        packet.pts = packet.dts = time
    return packets


def _like(packet: av.Packet, content: bytes, later: int = 0) -> av.Packet:
    """A packet with other content, this much later."""
    new = av.Packet(content)
    new.pts = new.dts = packet.pts + later
    new.time_base, new.is_keyframe = packet.time_base, packet.is_keyframe
    return new


def _superframes(packets: list[av.Packet]) -> list[av.Packet]:
    """VP9 with a hidden copy in the packet of each key frame, and frames that are shown again."""
    changed = []
    for packet in packets:
        content = bytes(packet)
        if packet.is_keyframe:
            hidden = bytes([content[0] & ~2]) + content[1:]
            index = struct.pack("<BIIB", 0xD9, len(hidden), len(content), 0xD9)
            changed += [_like(packet, hidden + content + index), _like(packet, b"\x88", later=40)]
            changed[-1].is_keyframe = False
        else:
            changed.append(_like(packet, content))
    return changed


def _hidden_packets(packets: list[av.Packet]) -> list[av.Packet]:
    """VP9 with a hidden copy before each key frame, in a packet of its own."""
    changed = []
    for packet in packets:
        content = bytes(packet)
        if packet.is_keyframe:
            changed.append(_like(packet, bytes([content[0] & ~2]) + content[1:]))
        changed.append(_like(packet, content))
    return changed


def _hide(packets: list[av.Packet]) -> list[av.Packet]:
    """VP8 in which every fifth frame is decoded but not shown, like an alt-ref frame."""
    hidden = []
    for number, packet in enumerate(packets):
        content = bytes(packet)
        if number % 5 == 3 and content[0] & 1:
            content = bytes([content[0] & ~16]) + content[1:]
        hidden.append(_like(packet, content))
    return hidden


def _from_second_key(packets: list[av.Packet]) -> list[av.Packet]:
    keys = [number for number, packet in enumerate(packets) if packet.is_keyframe]
    return packets[keys[1] :]


def packed_b_frames(path: Path) -> None:
    """MPEG-4 as DivX wrote it: a B-frame in the packet of the frame before it, and an empty frame in its place."""

    def pack(packets: list[av.Packet]) -> list[av.Packet]:
        contents = [bytes(packet) for packet in packets]
        is_b = [content[content.index(b"\0\0\1\xb6") + 4] >> 6 == 2 for content in contents]
        for number in range(len(contents) - 1):
            if is_b[number + 1] and not is_b[number]:
                contents[number] += contents[number + 1]
                contents[number + 1] = b"\0\0\1\xb6" + b"\x50\x9f\xff"  # a P-frame that is not coded
        contents[0] = contents[0].replace(b"\0\0\1\xb6", b"\0\0\1\xb2DivX503b1393p\0\0\1\xb6", 1)
        packed = []
        for number, (packet, content) in enumerate(zip(packets, contents, strict=True)):
            new = av.Packet(content)
            new.pts = new.dts = number
            new.time_base, new.is_keyframe = Fraction(1, RATE), packet.is_keyframe
            packed.append(new)
        return packed

    noise = np.random.default_rng(0).integers(0, 256, (FRAMES, 64, 80, 3), dtype=np.uint8)
    images = moving_square(FRAMES) // 2 + noise // 4  # no frame is short
    remuxed(encoded("mpeg4", b_frames=1, images=images, options={"b_strategy": "0"}), pack)(path)


def two_sizes(codec: str, pixels: str = "yuv420p") -> Write:
    """The second half has frames of another size, which the container does not mention."""

    def write(path: Path) -> None:
        options = {"preset": "veryfast", "x264-params": "repeat-headers=1"} if codec == "libx264" else {}
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=RATE, options=options)
            stream.width, stream.height, stream.pix_fmt = 80, 64, pixels
            for start, height, width in ((0, 64, 80), (30, 96, 128)):
                encoder = av.CodecContext.create(codec, "w")
                encoder.width, encoder.height, encoder.pix_fmt = width, height, pixels
                encoder.time_base, encoder.framerate, encoder.gop_size = Fraction(1, RATE), Fraction(RATE), 10
                encoder.options = options
                for number, image in enumerate(moving_square(30, height, width)):
                    frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                    frame.pts, frame.time_base = start + number, Fraction(1, RATE)
                    _mux(container, stream, encoder.encode(frame))
                _mux(container, stream, encoder.encode(None))

    return write


def _mux(container: av.container.OutputContainer, stream: av.VideoStream, packets: list[av.Packet]) -> None:
    for packet in packets:
        packet.stream = stream
        container.mux(packet)


def joined(path: Path) -> None:
    """Two recordings, one after the other, whose times differ by only a fraction of a second."""
    parts = []
    for times, images in ((range(30), moving_square(30)), (range(1, 31), 255 - moving_square(30))):
        encoded("h264", b_frames=0, times=times, images=images)(path)
        parts.append(path.read_bytes())
    path.write_bytes(b"".join(parts))


def with_cover(path: Path) -> None:
    """A cover picture before the video."""
    video = path.with_name("video.mp4")
    encoded("h264")(video)
    with av.open(str(video)) as source, av.open(str(path), "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        stream = container.add_stream_from_template(source.streams.video[0])
        picture = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
        container.mux([*cover.encode(picture), *cover.encode()])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                container.mux(packet)
    video.unlink()


def cut(path: Path) -> None:
    """Cut without re-encoding, so that frames before the cut are kept and hidden."""
    source = path.with_name("whole.mp4")
    encoded("h264", b_frames=2)(source)
    cut_without_encoding(str(source), path, 17)
    source.unlink()


_CLOSED = encoded("h264", b_frames=2)
_UNEVEN = [0]
for _step in np.random.default_rng(0).integers(1, 5, FRAMES - 1).tolist():
    _UNEVEN.append(_UNEVEN[-1] + _step)
_PYRAMID = "bframes=3:b-pyramid=normal:b-adapt=0:keyint=12:min-keyint=12:scenecut=0"
_OPEN = "open-gop=1:bframes=2:b-adapt=0:keyint=12:min-keyint=12:scenecut=0"
_REFRESH = "intra-refresh=1:keyint=12:bframes=0:scenecut=0"

FILES: dict[str, Write] = {
    **{f"h264 closed.{kind}": _CLOSED for kind in ("mp4", "mov", "mkv", "flv", "ts", "avi")},
    **{f"h264 open.{kind}": x264(_OPEN) for kind in ("mp4", "mkv", "flv", "ts")},
    **{f"h264 intra refresh.{kind}": x264(_REFRESH) for kind in ("mp4", "mkv", "flv")},
    **{f"h264 pyramid.{kind}": x264(_PYRAMID) for kind in ("mp4", "flv", "ts")},
    "h264 open, many references.mkv": x264(f"{_OPEN}:ref=5:b-pyramid=normal:bframes=4:weightp=2:direct=temporal"),
    "h264 no b-frames.mp4": encoded("h264", b_frames=0),
    "h264 one key frame.mp4": x264("keyint=1000:scenecut=0"),
    "h264 all key frames.mkv": encoded("h264", gop=1),
    "h264 interlaced.mp4": x264("tff=1:bframes=2"),
    "h264 slices.mp4": x264("slices=3:bframes=2:keyint=12"),
    "h264 10 bits.mp4": encoded("h264", pix_fmt="yuv420p10le"),
    "h264 4:4:4.mp4": encoded("h264", pix_fmt="yuv444p"),
    "h264 narrow.mp4": encoded("h264", images=moving_square(FRAMES, 48, 20)),
    "h264 fragments.mp4": remuxed(_CLOSED, list, movflags="frag_keyframe+empty_moov"),
    "h264 uneven.mp4": encoded("h264", b_frames=2, times=_UNEVEN),
    "h264 uneven.mkv": encoded("h264", b_frames=2, times=_UNEVEN),
    "h264 chunks without data.avi": encoded("h264", b_frames=0, times=_UNEVEN),
    "h264 equal times.mkv": remuxed(encoded("h264", b_frames=0), _equal_times),
    "h264 equal times.mp4": remuxed(_CLOSED, _equal_times),
    "h264 times out of order.mp4": remuxed(_CLOSED, _without_order),
    "h264 negative times.mkv": remuxed(_CLOSED, lambda packets: _shift(packets, -2000), avoid_negative_ts="disabled"),
    "h264 late.mp4": remuxed(_CLOSED, lambda packets: _shift(packets, 100_000)),
    "h264 begins within.mkv": remuxed(x264(_OPEN), _from_second_key),
    "h264 begins within.mp4": remuxed(x264(_OPEN), _from_second_key),
    "h264 all samples sync.mp4": patched(_CLOSED, lambda content: content.replace(b"stss", b"free")),
    "h264 swapped times.mkv": remuxed(_CLOSED, _swapped),
    "h264 jitter.mkv": remuxed(encoded("h264", b_frames=0), _jitter),
    "h264 jitter.mp4": remuxed(encoded("h264", b_frames=0), _jitter),
    "h264 joined.ts": joined,
    "h264 half its rate.mkv": encoded("h264", b_frames=2, times=range(0, 2 * FRAMES, 2)),
    "h264 text after it.mp4": patched(_CLOSED, lambda content: content + b"TAG title of the clip"),
    "h264 cut.mp4": cut,
    "h264 two sizes.mkv": two_sizes("libx264"),
    "h264 two sizes.ts": two_sizes("libx264"),
    "h264 cover.mp4": with_cover,
    "h264 turned.mp4": patched(_CLOSED, rotated),
    "h264 turned by 180.mp4": patched(_CLOSED, shown_with(-1, 0, 0, -1)),
    "h264 turned by 270.mp4": patched(_CLOSED, shown_with(0, -1, 1, 0)),
    "h264 mirrored.mp4": patched(_CLOSED, shown_with(-1, 0, 0, 1)),
    "h264 flipped.mp4": patched(_CLOSED, shown_with(1, 0, 0, -1)),
    "h264 turned by 60.mp4": patched(_CLOSED, shown_with(0.5, 0.866, -0.866, 0.5)),
    "h264 turned by 200.mp4": patched(_CLOSED, shown_with(-0.94, -0.342, 0.342, -0.94)),
    "h264 turned by SEI.mp4": remuxed(_CLOSED, _turned_by_sei),
    "h264 turned by SEI.mkv": remuxed(_CLOSED, _turned_by_sei),
    "h264 transposed.mp4": patched(_CLOSED, shown_with(0, 1, 1, 0)),
    "h264 transposed back.mp4": patched(_CLOSED, shown_with(0, -1, -1, 0)),
    "hevc closed.mp4": x265("open-gop=0"),
    **{f"hevc open.{kind}": x265("open-gop=1:bframes=2") for kind in ("mp4", "mkv", "ts")},
    "hevc begins within.mkv": remuxed(x265("open-gop=1:bframes=2"), _from_second_key),
    "vp8.webm": encoded("vp8"),
    "vp8 hidden frames.webm": remuxed(encoded("vp8"), _hide),
    "vp8 odd height.webm": encoded("vp8", images=moving_square(FRAMES, 63, 97)),
    "vp8 another size announced.webm": patched(
        encoded("vp8"), lambda content: content.replace(b"\xb0\x81\x50", b"\xb0\x81\x7f")
    ),
    "vp8 one key frame.webm": encoded("vp8", gop=1000),
    "vp9.webm": encoded("vp9"),
    "vp9.mp4": encoded("vp9"),
    "vp9 superframes.webm": remuxed(encoded("vp9"), _superframes),
    "vp9 superframes.mp4": remuxed(encoded("vp9"), _superframes),
    "vp9 hidden frames.webm": remuxed(encoded("vp9"), _hidden_packets),
    "vp9 two sizes.webm": two_sizes("libvpx-vp9"),
    "vp8 two sizes.webm": two_sizes("libvpx"),
    "vp9 odd height.webm": encoded("vp9", images=moving_square(FRAMES, 63, 97)),
    "vp9 odd width.webm": encoded("vp9", images=moving_square(FRAMES, 64, 97)),
    "vp9 4:4:4 two sizes.webm": two_sizes("libvpx-vp9", "yuv444p"),
    "vp9 one key frame.webm": encoded("vp9", gop=1000),
    "vp9 uneven.webm": encoded("vp9", times=_UNEVEN),
    "av1.mp4": encoded("av1"),
    "av1.mkv": encoded("av1"),
    **{f"mpeg4.{kind}": encoded("mpeg4", b_frames=0) for kind in ("avi", "mp4")},
    **{f"mpeg4 b-frames.{kind}": encoded("mpeg4", b_frames=2) for kind in ("avi", "mp4", "mkv")},
    "mpeg4 packed b-frames.avi": packed_b_frames,
    "mjpeg.avi": encoded("mjpeg"),
    "mjpeg.mov": encoded("mjpeg"),
    "mpeg2.mpg": encoded("mpeg2", b_frames=2),
    "mpeg2.ts": encoded("mpeg2", b_frames=2),
    "flv1.flv": encoded("flv1"),
    "wmv2.avi": encoded("wmv2"),
    "gif.gif": encoded("gif", pix_fmt="rgb8"),
    "ffv1.mkv": encoded("ffv1"),
}
