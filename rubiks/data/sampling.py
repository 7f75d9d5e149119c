"""Which frames of a video are read, and at what size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from rubiks.settings import Count, Settings, Side

Window = Annotated[int, Field(ge=1, le=1_000_000)]
Flip = Literal[True, False, "auto"]


class Sampling(Settings, section="data"):
    """Clips of videos."""

    num_frames: Count = Field(description="T, frames per clip")
    size: Side = Field(description="side of the views, in pixels")
    sampling: Literal["uniform", "dense"] = Field(
        "uniform",
        description="how a clip's frames are chosen. uniform: one from each of num_frames segments (TSN); dense: at "
        "equal steps within a window (I3D)",
    )
    window: Window = Field(64, description="frames that a clip spans in dense sampling")

    @model_validator(mode="after")
    def _wide_enough(self) -> Self:
        if self.span is not None and self.window < self.num_frames:
            raise self.wrong(
                "window",
                f"a whole number of at least data.num_frames={self.num_frames}, the number of frames per clip",
            )
        return self

    @property
    def span(self) -> int | None:
        """How many frames a densely sampled clip spans; None for uniform sampling."""
        return self.window if self.sampling == "dense" else None


class TrainingSampling(Sampling):
    """Clips of training videos."""

    flip: Flip = Field(False, description="mirror half of the training clips; auto: if the class names allow it")
    clips_per_video: Count = Field(
        1, description="clips drawn independently from each video of a batch: repeated augmentation"
    )


class AsTrained(Settings, section="data"):
    """Clips of an evaluation: null means the value that the network was trained with."""

    num_frames: Count | None = Field(None, description="T, frames per clip; null: as in training")
    size: Side | None = Field(None, description="side of the views, in pixels; null: as in training")
    sampling: Literal["uniform", "dense"] | None = Field(None, description="uniform or dense; null: as in training")
    window: Window | None = Field(None, description="frames that a clip spans in dense sampling; null: as in training")
    flip: Flip = Field(False, description="used only in training; evaluation never mirrors clips")

    def resolve(self, trained: Mapping[str, Any]) -> Sampling:
        """The sampling, with null replaced by the value that the network was trained with."""
        given = {key: value for key, value in self.model_dump(exclude={"flip"}).items() if value is not None}
        return Sampling(**{**{key: trained[key] for key in Sampling.model_fields}, **given})
