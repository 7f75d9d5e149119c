"""Live video with the predicted class drawn on: recorded in a file, and shown on a page."""

from __future__ import annotations

import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from rubiks.data.screen import Screen
from rubiks.errors import InputError
from rubiks.files import check_writable
from rubiks.predict.capture import Frame, Mailbox
from rubiks.predict.drawing import captioned
from rubiks.predict.live_page import LivePage

WAITING = 16  # frames that wait to be drawn; when the computer is too slow, older ones are dropped
CLOCK = Fraction(1, 1000)  # seconds


class Recording:
    """A video file, H.264 in fragmented MP4 without sound: whatever happens later, it can be played up to the last
    fragment.

    Args:
        path: the file, which is replaced when the first frame comes.

    Attributes:
        frames: how many it has.

    Raises:
        InputError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix.lower() != ".mp4":
            raise InputError(f"{path} cannot be recorded: the name must end in .mp4")
        check_writable(path)
        self.path = path
        self.frames = 0
        self._last = -1
        self._container: av.container.OutputContainer | None = None
        self._stream: av.VideoStream | None = None

    def add(self, image: np.ndarray, seconds: float) -> None:
        """Add an image, uint8 (H, W, 3), that is shown from this time on. All have one size."""
        image = image[: len(image) // 2 * 2, : image.shape[1] // 2 * 2]  # H.264 needs even sides
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        frame.pts = self._last = max(self._last + 1, round(seconds / CLOCK))
        frame.time_base = CLOCK
        try:
            if self._container is None:
                self._open(*image.shape[:2])
            self._encode(frame)
        except OSError as error:
            raise self._failure(error) from None
        self.frames += 1

    def close(self) -> None:
        """Finish the file; raises InputError if it cannot be written."""
        if self._container is None:
            return
        try:
            self._encode(None)
            self._container.close()
        except OSError as error:
            raise self._failure(error) from None

    def _open(self, height: int, width: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fragments = {"movflags": "frag_keyframe+empty_moov+default_base_moof", "flush_packets": "1"}
        self._container = av.open(str(self.path), "w", format="mp4", options=fragments)
        options = {"crf": "20", "preset": "veryfast", "g": "50", "bf": "0"}
        self._stream = self._container.add_stream("libx264", rate=25, options=options)
        self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, "yuv420p"
        self._stream.codec_context.time_base = CLOCK

    def _encode(self, frame: av.VideoFrame | None) -> None:
        """A frame; None: those that the encoder still has."""
        assert self._container is not None
        assert self._stream is not None
        self._container.mux(self._stream.encode(frame))

    def _failure(self, error: OSError) -> InputError:
        return InputError(f"{self.path} cannot be written: {error.strerror or error}")


class LiveView:
    """Draws frames in a thread of its own, so that neither reading nor scoring waits for it.

    Args:
        recording: the file; None for none. It is closed with the view.
        page: the page; None for none.

    Attributes:
        caption: what is drawn on frames from now on; empty for nothing.
    """

    def __init__(self, recording: Recording | None, page: LivePage | None) -> None:
        self.caption = ""
        self._recording, self._page = recording, page
        self._frames: Mailbox[Frame] = Mailbox(WAITING)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="view", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Frames that could not be drawn in time."""
        return self._frames.dropped

    def add(self, frame: Frame) -> None:
        """Draw a frame soon."""
        self._frames.put(frame)

    def check(self) -> None:
        """Raise InputError if the file cannot be written."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Draw the frames that wait, and finish the file.

        Raises:
            InputError: it cannot be written.
        """
        self._frames.close()
        self._thread.join()
        if self._recording is not None:
            self._recording.close()
        self.check()

    def _run(self) -> None:
        screen = Screen()
        try:
            while (frames := self._frames.take()) is not None:
                for frame in frames:
                    image = screen.image(frame.picture)
                    if self.caption:
                        image = captioned(image, self.caption)
                    if self._recording is not None:
                        self._recording.add(image, frame.time)
                    if self._page is not None:
                        self._page.show(image)
        except Exception as error:  # the main thread raises it
            self._error = error
