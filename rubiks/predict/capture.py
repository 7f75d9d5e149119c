"""Frames of a live source, read in a thread so that the newest are there when the network has time for them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

import av
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from rubiks.data.index import packets_with_data
from rubiks.errors import InputError
from rubiks.predict.live_source import LiveSource

GAP = 10.0  # seconds; a file whose time stamps jump further continues at once
POLL = 0.2  # seconds after which a wait looks whether something else has happened
RATE = 25.0  # frames per second where time stamps are missing and the file has no rate

Item = TypeVar("Item")


class Clock(Protocol):
    """The module time, or a clock of a test."""

    def monotonic(self) -> float: ...

    def sleep(self, seconds: float, /) -> None: ...


class Frame(NamedTuple):
    """A decoded frame.

    Attributes:
        picture: as decoded.
        time: seconds since the source's first frame.
        arrived: when it arrived, or was to be shown, by the clock.
    """

    picture: VideoFrame
    time: float
    arrived: float


class Every:
    """Picks the first of each `period` seconds; of everything, if the period is 0."""

    def __init__(self, period: float) -> None:
        self._period = period
        self._last = -1

    def __call__(self, seconds: float) -> bool:
        if not self._period:
            return True
        slot = int(seconds / self._period + 1e-6)
        due, self._last = slot > self._last, max(slot, self._last)
        return due


class Rate:
    """How often something happens per second, of late."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=30)

    def note(self, now: float) -> None:
        self._times.append(now)

    @property
    def value(self) -> float:
        """0 until it has happened twice."""
        times = list(self._times)  # another thread may append
        spent = times[-1] - times[0] if len(times) > 1 else 0.0
        return (len(times) - 1) / spent if spent > 0 else 0.0


class Mailbox(Generic[Item]):
    """From one thread to another: keeps the newest items, and drops older ones that have not been taken.

    Attributes:
        dropped: how many items nobody took.
    """

    def __init__(self, size: int) -> None:
        self._items: deque[Item] = deque()
        self._size = size
        self._closed = False
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self.dropped = 0

    def put(self, item: Item) -> None:
        with self._changed:
            self._items.append(item)
            if len(self._items) > self._size:
                self._items.popleft()
                self.dropped += 1
            self._changed.notify_all()

    def close(self, error: Exception | None = None) -> None:
        """No more items come, because of this error or since all have come."""
        with self._changed:
            self._closed, self._error = True, error
            self._changed.notify_all()

    def take(self, timeout: float = POLL) -> list[Item] | None:
        """All items, oldest first; none if none came in time; None after the last. Raises the error instead of that."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._closed, timeout)
            if self._closed and not self._items:
                if self._error is not None:
                    raise self._error
                return None
            items = list(self._items)
            self._items.clear()
            return items


class Capture:
    """Reads a source until `close`.

    Args:
        source: what is read.
        period: seconds of video of which one frame is taken for the network; 0: all frames.
        keep: how many of these frames wait for the network; older ones are dropped.
        watch: called with each frame, in the reading thread.
        timeout: seconds without a frame after which a source that is not a file counts as silent.
        clock: for the frames' times.

    Attributes:
        frames: how many frames have been read.
        damaged: how many packets could not be decoded, and were skipped.
        rate: frames a second.
    """

    def __init__(
        self,
        source: LiveSource,
        period: float,
        keep: int,
        watch: Sequence[Callable[[Frame], object]] = (),
        timeout: float = 10.0,
        clock: Clock = time,
    ) -> None:
        self.source = source
        self.frames = self.damaged = 0
        self.rate = Rate()
        self._due = Every(period)
        self._mailbox: Mailbox[Frame] = Mailbox(keep)
        self._watch = watch
        self._timeout = timeout
        self._clock = clock
        self._heard = clock.monotonic()
        self._stopped = False
        # A camera's driver may block for ever, so the program must not wait for this thread.
        self._thread = threading.Thread(target=self._run, name="capture", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Frames that were due, but for which the network had no time."""
        return self._mailbox.dropped

    def __iter__(self) -> Iterator[list[Frame]]:
        """The due frames since the last time, oldest first, at least one.

        Raises:
            InputError: the source cannot be opened, is silent, or breaks off.
        """
        while (frames := self._mailbox.take()) is not None:
            if frames:
                yield frames
            elif not self.source.is_file and self._clock.monotonic() - self._heard > self._timeout:
                raise InputError(f"{self.source.name} is silent: nothing came in {self._timeout:g} seconds")

    def close(self) -> None:
        """Stop reading."""
        self._stopped = True
        self._thread.join(1)

    def _run(self) -> None:
        try:
            # Longer than `__iter__` waits, whose error is clearer.
            container, stream, live = self.source.open(self._timeout + 1)
            with container:
                pictures = self._decoded(container, stream)
                for frame in self._arriving(pictures) if live else self._played(pictures, stream):
                    if self._stopped:
                        break
                    self.frames += 1
                    self.rate.note(frame.arrived)
                    for look in self._watch:
                        look(frame)
                    if self._due(frame.time):
                        self._mailbox.put(frame)
            if not self.frames and not self._stopped:
                raise InputError(f"{self.source.name} contains no frame that can be decoded")
        except av.FFmpegError as error:
            self._mailbox.close(InputError(f"{self.source.name} broke off: {self.source.reason(error)}"))
        except Exception as error:  # the main thread raises it
            self._mailbox.close(error)
        else:
            self._mailbox.close()

    def _decoded(self, container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
        """Every frame in order. As in a player, packets that cannot be decoded are left out."""
        while not self._stopped:
            try:
                for packet in packets_with_data(container, stream):
                    try:
                        frames = packet.decode()
                    except av.InvalidDataError:
                        self.damaged += 1
                        continue
                    yield from frames
                yield from stream.decode(None)
                return
            except av.BlockingIOError:  # on macOS, a camera that has no frame yet
                self._clock.sleep(0.005)

    def _arriving(self, pictures: Iterator[VideoFrame]) -> Iterator[Frame]:
        """Frames as they come."""
        start = None
        for picture in pictures:
            now = self._heard = self._clock.monotonic()
            start = now if start is None else start
            yield Frame(picture, now - start, now)

    def _played(self, pictures: Iterator[VideoFrame], stream: VideoStream) -> Iterator[Frame]:
        """Frames when they are to be shown. Late ones are not waited for, and time stamps that jump are skipped."""
        usual = 1 / float(stream.average_rate or stream.guessed_rate or RATE)
        start, seconds, stamp = None, 0.0, None
        for picture in pictures:
            self._heard = self._clock.monotonic()
            if start is None:
                start = self._heard
            else:
                step = usual if picture.time is None or stamp is None else picture.time - stamp
                seconds += step if 0 <= step <= GAP else usual
            stamp = picture.time
            while not self._stopped and (early := start + seconds - self._clock.monotonic()) > 0:
                self._heard = self._clock.monotonic()
                self._clock.sleep(min(early, POLL))
            yield Frame(picture, seconds, max(self._heard, start + seconds))
