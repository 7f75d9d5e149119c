"""Cameras, files and network addresses as sources of live video."""

from __future__ import annotations

import errno
import os
import re
import sys
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import av
from av.container import InputContainer
from av.video.stream import VideoStream

from rubiks.data.decode import ANY_TAGS
from rubiks.data.index import video_stream
from rubiks.errors import InputError

# Motion JPEG over HTTP has no time stamps; FFmpeg invents some for 25 frames a second.
_NO_TIMES = "mpjpeg"


@dataclass(frozen=True)
class LiveSource:
    """Where live video comes from.

    Attributes:
        name: as shown to the user, without a password.
        address: what FFmpeg opens.
        format: FFmpeg's name of the camera interface; None for files and addresses.
        options: for FFmpeg.
        live: the source decides when a frame comes, and its time is when it arrives. Other sources are played by their
            time stamps.
        is_file: waiting for it is not an error.
    """

    name: str
    address: str
    format: str | None = None
    options: dict[str, str] = field(default_factory=dict)
    live: bool = True
    is_file: bool = False

    def open(self, timeout: float) -> tuple[InputContainer, VideoStream, bool]:
        """Open the source.

        Args:
            timeout: seconds to wait for an answer, and later for data.

        Returns:
            the container, which the caller must close, the video in it, and whether it is live.

        Raises:
            InputError: it cannot be opened, or has no video.
        """
        waits = None if self.is_file else (timeout, timeout)
        try:
            container = av.open(self.address, "r", self.format, dict(self.options), timeout=waits, **ANY_TAGS)
        except (av.FFmpegError, ValueError) as error:
            raise InputError(f"{self.name} cannot be opened: {self.reason(error)}") from None
        stream = video_stream(container)
        if stream is None or stream.codec_context is None:
            container.close()
            raise InputError(f"{self.name} contains no video that FFmpeg can decode")
        stream.codec_context.thread_count = 1  # threads would hold frames back
        return container, stream, self.live or container.format.name == _NO_TIMES

    def reason(self, error: Exception) -> str:
        """Why it cannot be opened or read, in one line."""
        reason: str = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        if self.format is None:
            return reason
        hints = {
            errno.ENOENT: f"there is no such camera; {_cameras()}",
            errno.EACCES: "permission denied; on Linux, the user must be in the group video",
            errno.EBUSY: "another program uses it",
        }
        return hints.get(getattr(error, "errno", 0), reason)


def find(source: str) -> LiveSource:
    """What a user names: a camera's number, a file, or an address such as rtsp://HOST/PATH.

    Raises:
        InputError: there is no such file, or cameras are not supported here.
    """
    if source.isdecimal() or source.startswith("/dev/video"):
        return _camera(source)
    if "://" in source:
        scheme = urlsplit(source).scheme
        options = {"rtsp_transport": "tcp"} if scheme.startswith("rtsp") else {}
        shown = re.sub(r"(?<=://)[^/?#]*@", "", source)
        return LiveSource(shown, source, options=options, live=scheme not in ("http", "https", "file"))
    if not os.path.exists(source):
        raise InputError(f"{source}: no such file; a live source is a camera's number, a file, or an address with ://")
    return LiveSource(source, os.path.abspath(source), live=False, is_file=True)


def _camera(source: str) -> LiveSource:
    name = f"camera {source}"
    if sys.platform == "darwin":
        # FFmpeg's default of 29.97 frames a second is refused by built-in cameras.
        return LiveSource(name, source, "avfoundation", {"framerate": "30"})
    if sys.platform == "win32":
        devices = [one for one in av.enumerate_input_devices("dshow") if "video" in one.media_types]
        if int(source) >= len(devices):
            raise InputError(f"{name}: there is no such camera; Windows lists {len(devices)}, counted from 0")
        return LiveSource(name, f"video={devices[int(source)].name.removeprefix('video=')}", "dshow")
    return LiveSource(name, f"/dev/video{source}" if source.isdecimal() else source, "v4l2")


def _cameras() -> str:
    try:
        found = sorted(name for name in os.listdir("/dev") if name.startswith("video"))
    except OSError:
        found = []
    return f"found {', '.join(f'/dev/{name}' for name in found) or 'none'}"
