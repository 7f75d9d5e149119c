"""Videos made of images: a folder with one for each frame, or a single image."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from rubiks.data.records import CheckedFile, OpenVideo, as_tensor, checked_indices, count_frames, first_frame_hint
from rubiks.errors import VideoError


class FrameFolder(OpenVideo):
    """A folder with one JPEG or PNG image per frame, all of one size.

    Args:
        path: the folder.
        num_frames: the number of frames in the list; None to count them.
        pattern: format of the file names, e.g. "{:06d}.jpg" (TSM's convention).
        checked: what `rubiks check` found; its count is used unless the folder has grown since.
        first_frame: number of the first frame's file, 1 or 0.

    Raises:
        VideoError: there is no such folder, it has no frames, or counting finds gaps.
    """

    def __init__(
        self,
        path: str,
        num_frames: int | None,
        pattern: str,
        checked: CheckedFile | None = None,
        first_frame: int = 1,
    ) -> None:
        if not os.path.isdir(path):
            raise VideoError(path, "is not a folder of frames" if os.path.exists(path) else "no such folder")
        listed = num_frames is not None
        if num_frames is None and checked is not None:
            grown = os.path.exists(os.path.join(path, pattern.format(first_frame + checked.frames)))
            num_frames = None if grown else checked.frames
        if num_frames is None:
            num_frames = count_frames(path, pattern, first_frame)
        if num_frames < 1:
            raise VideoError(path, f"the list says it has {num_frames} frames, expected at least 1")
        self.path = path
        self._length = num_frames
        self._pattern = pattern
        self._first_frame = first_frame
        if listed:
            self._check_numbers()

    def __len__(self) -> int:
        """The number of frames."""
        return self._length

    def frames(self, indices: Sequence[int]) -> Tensor:
        """Read frames by number: index 0 is the file of the first frame.

        Args:
            indices: T numbers in range(len(self)), in any order, repeats allowed.

        Returns:
            uint8 (T, 3, H, W), RGB; channels last in memory.

        Raises:
            VideoError: a frame is missing, cannot be decoded, or differs in size from the first one read.
        """
        indices = checked_indices(indices, self._length)
        images = {index: self._image(index) for index in dict.fromkeys(indices)}
        first = images[indices[0]]
        for index, image in images.items():
            if image.shape != first.shape:
                raise VideoError(
                    self.path,
                    f"frame {self._file(index)} is {_size(image)}, but {self._file(indices[0])} is {_size(first)}",
                )
        return as_tensor(np.stack([images[index] for index in indices]))

    def _file(self, index: int) -> str:
        return self._pattern.format(self._first_frame + index)

    def _check_numbers(self) -> None:
        """Raise VideoError if a list's frames are numbered from 0 but 1 was configured, or the other way round."""
        # N frames have the numbers 0 to N - 1 or 1 to N: whether 0 and N are there tells the two apart.
        zero, last = (self._pattern.format(number) for number in (0, self._length))
        there, absent = (zero, last) if self._first_frame == 1 else (last, zero)
        paths = (os.path.join(self.path, name) for name in (there, absent))
        if os.path.exists(next(paths)) and not os.path.exists(next(paths)):
            hint = first_frame_hint(1 - self._first_frame)
            raise VideoError(
                self.path,
                f"the list says it has {self._length} frames, but {there} exists and {absent} does not; {hint}",
            )

    def _image(self, index: int) -> np.ndarray:
        """uint8 (H, W, 3)."""
        name = self._file(index)
        try:
            return _read_image(os.path.join(self.path, name))
        except FileNotFoundError as error:
            raise VideoError(self.path, f"frame {name} is missing, expected {self._length} frames") from error
        except VideoError as error:
            raise VideoError(self.path, f"frame {name} {error.reason}") from error


class ImageFile(OpenVideo):
    """A still image as a video of one frame, which is read when needed.

    Args:
        path: any image of 8 bits per channel that Pillow reads.
        content: the file's bytes, if they are not at `path`.
    """

    def __init__(self, path: str, content: bytes | None = None) -> None:
        self.path = path
        self._content = content

    def __len__(self) -> int:
        return 1

    def frames(self, indices: Sequence[int]) -> Tensor:
        """The image once for each index; like `FrameFolder.frames`."""
        indices = checked_indices(indices, 1)
        try:
            image = _read_image(self.path, self._content)
        except FileNotFoundError as error:
            raise VideoError(self.path, "no such file") from error
        return as_tensor(np.stack([image] * len(indices)))


def _read_image(path: str, content: bytes | None = None) -> np.ndarray:
    """uint8 (H, W, 3); raises VideoError, or FileNotFoundError."""
    try:
        with Image.open(path if content is None else io.BytesIO(content)) as image:
            if image.mode.startswith(("I", "F")):
                raise VideoError(path, "has more than 8 bits per channel, expected 8")
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's for broken files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise VideoError(path, f"cannot be decoded: {reason}") from error


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"
