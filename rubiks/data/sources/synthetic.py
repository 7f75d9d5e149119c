"""The built-in data set, as a source."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rubiks.data import builtin
from rubiks.data.sources.something import SomethingSomethingV2
from rubiks.data.sources.source import Source
from rubiks.settings import Count


class Builtin(Source):
    """A small Something-Something of synthetic videos, made on first use (`rubiks.data.builtin`)."""

    format: Literal["builtin"] = "builtin"
    level: Literal["plain", "textured"] = Field(
        "plain",
        description="plain: one object on a flat background; textured: moving background, distractors, camera shake",
    )
    train_videos: Count | None = Field(None, description="number of training videos; null: the level's default")
    val_videos: Count | None = Field(None, description="the same for validation")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="random seed of the videos")

    def ready(self) -> SomethingSomethingV2:
        folder = builtin.generate(self.root, self.level, self.train_videos, self.val_videos, self.seed)
        return SomethingSomethingV2(format=self.format, root=str(folder), name=self.name, num_classes=self.num_classes)
