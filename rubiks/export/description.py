"""What an exported file says about its network and the input that it expects."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from rubiks.nn.normalize import IMAGENET_MEAN, IMAGENET_STD

INPUT, OUTPUT = "pixel_values", "logits"

Positive = Annotated[int, Field(ge=1)]


class Input(BaseModel):
    """How a clip is made from a video.

    Attributes:
        num_frames: of a clip.
        min_frames, max_frames: how few and how many frames are accepted.
        size: height and width.
        short_side: pixels of the short side to which frames are resized before cropping.
        sampling, window: which frames; see `rubiks.models.preprocessing`.
        mean, std: of the colours in [0, 1], by which pixels are normalised.
        input: uint8 takes RGB from 0 to 255, normalized float32.
    """

    model_config = ConfigDict(frozen=True)

    num_frames: Positive
    min_frames: Positive
    max_frames: Positive
    size: tuple[Positive, Positive]
    short_side: Positive
    sampling: Literal["uniform", "dense"]
    window: Positive
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    input: Literal["uint8", "normalized"]


class Description(BaseModel):
    """The metadata of a file.

    Attributes:
        classes: names in label order; None if they are not known.
        precision: of the weights and activations.
        source_sha256: of the checkpoint.
    """

    model_config = ConfigDict(frozen=True)

    tier: str
    variant: str
    num_classes: Positive
    classes: list[str] | None
    preprocessing: Input
    precision: Literal["float32", "int8"] = "float32"
    source_sha256: str
    rubiks_version: str

    def texts(self) -> dict[str, str]:
        """The metadata as texts: strings as they are, everything else as JSON."""
        values = self.model_dump(mode="json")
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}

    @classmethod
    def from_texts(cls, texts: Mapping[str, Any]) -> Description:
        """Read what `texts` has made; other keys are ignored. Raises ValueError if it is something else."""
        parsed = ("num_classes", "classes", "preprocessing")
        values = {key: json.loads(value) if key in parsed else value for key, value in texts.items()}
        return cls.model_validate(values)
