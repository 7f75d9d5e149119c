"""What an exported file says about its network and the input that it expects."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from rubiks.nn.normalize import IMAGENET_MEAN, IMAGENET_STD

INPUT, OUTPUT = "pixel_values", "logits"

Positive = Annotated[int, Field(ge=1)]


class FrameInput(BaseModel):
    """How a frame is prepared.

    Attributes:
        size: height and width.
        short_side: pixels of the short side to which frames are resized before cropping.
        mean, std: of the colours in [0, 1], by which pixels are normalised.
        input: uint8 takes RGB from 0 to 255, normalized float32.
    """

    model_config = ConfigDict(frozen=True)

    size: tuple[Positive, Positive]
    short_side: Positive
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    input: Literal["uint8", "normalized"]


class ClipInput(FrameInput):
    """How a clip is made from a video.

    Attributes:
        num_frames: of a clip.
        min_frames, max_frames: how few and how many frames are accepted.
        sampling, window: which frames; see `rubiks.models.preprocessing`.
    """

    num_frames: Positive
    min_frames: Positive
    max_frames: Positive
    sampling: Literal["uniform", "dense"]
    window: Positive


class StreamInput(FrameInput):
    """How frames of a live source are prepared.

    Attributes:
        frames_per_second: how many to take; about as many as there were in training.
    """

    frames_per_second: Annotated[float, Field(gt=0)]


class State(BaseModel):
    """What a stream's file keeps from one frame to the next: an input, and an output with its next value.

    Attributes:
        name: of the input.
        next: of the output.
        shape: (C, H, W) or (C, frames, H, W) of one video; batch comes before.
        initial: every value before the first frame.
        holds: what it is.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    next: str
    shape: list[Positive]
    initial: float = 0.0
    holds: str


class Description(BaseModel):
    """The metadata of a file.

    Attributes:
        classes: names in label order; None if they are not known.
        preprocessing: of the input.
        precision: of the weights and activations.
        source_sha256: of the checkpoint.
    """

    model_config = ConfigDict(frozen=True)

    tier: str
    variant: str
    num_classes: Positive
    classes: list[str] | None
    preprocessing: FrameInput
    precision: Literal["float32", "int8"] = "float32"
    source_sha256: str
    rubiks_version: str

    def inputs(self) -> list[str]:
        """Their names, in order."""
        return [INPUT]

    def outputs(self) -> list[str]:
        """Their names, in order."""
        return [OUTPUT]

    def texts(self) -> dict[str, str]:
        """The metadata as texts: strings as they are, everything else as JSON."""
        values = self.model_dump(mode="json")
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


class ClipDescription(Description):
    """The metadata of a file that takes clips."""

    preprocessing: ClipInput


class StreamDescription(Description):
    """The metadata of a file that takes one frame at a time."""

    preprocessing: StreamInput
    states: list[State]

    def inputs(self) -> list[str]:
        return [INPUT, *(state.name for state in self.states)]

    def outputs(self) -> list[str]:
        return [OUTPUT, *(state.next for state in self.states)]


# A file as a function from its inputs to its outputs, and what it says about them.
Loaded = tuple[Callable[..., Sequence[Tensor]], ClipDescription | StreamDescription]


def from_texts(texts: Mapping[str, Any]) -> ClipDescription | StreamDescription:
    """Read what `Description.texts` has made; other keys are ignored. Raises ValueError if it is something else."""
    parsed = ("num_classes", "classes", "preprocessing", "states")
    return from_values({key: json.loads(value) if key in parsed else value for key, value in texts.items()})


def from_values(values: Mapping[str, Any]) -> ClipDescription | StreamDescription:
    """The description with these values, which are those of a stream if there are states."""
    return (StreamDescription if "states" in values else ClipDescription).model_validate(values)
