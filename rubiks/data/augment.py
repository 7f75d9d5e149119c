"""Augmentation of training clips besides TSM's crop and the flip: checked settings, and torchvision's transforms."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, model_validator
from torchvision.transforms import v2
from typing_extensions import Self

from rubiks.settings import AsTuple, Expected, Settings, Share, expectation

# Erased pixels become 0 when normalised.
_MEAN_COLOUR = (124.0, 116.0, 104.0)


def _usable(alpha: float) -> float:
    """Reject values so small that the Beta distribution gives no number."""
    if 0 < alpha < 1e-3:
        raise ValueError
    return alpha


Alpha = Annotated[float, Field(ge=0), AfterValidator(_usable), Expected("0 or a number of at least 0.001")]


class Augment(Settings, section="augment"):
    """Augmentation of training clips, all of it off unless set. All frames of a clip go through the same operations."""

    random_resized_crop: Annotated[
        tuple[float, float] | None,
        AsTuple,
        Expected("null or two numbers above 0 and at most 1, the smaller first"),
    ] = Field(
        None,
        description="smallest and largest share of a frame's area in a crop, e.g. [0.08, 1.0], instead of "
        "recipe.crop_scales; its aspect ratio is 3/4 to 4/3 (Szegedy et al., 2015)",
    )
    color_jitter: Share = Field(
        0.0,
        description="brightness, contrast and saturation are each scaled by a random factor of 1 +- this, e.g. 0.4",
    )
    rand_augment: Annotated[int, Field(ge=0, le=100)] = Field(
        0, description="number of RandAugment operations (Cubuk et al., 2020) applied in turn to each clip, e.g. 2"
    )
    rand_augment_magnitude: Annotated[int, Field(ge=0, le=30)] = Field(
        9, description="strength of RandAugment's operations, from 0 to 30"
    )
    random_erasing: Share = Field(
        0.0, description="share of the clips in which a box of 2 to 33% of the area is erased, e.g. 0.25"
    )
    temporal_jitter: bool = Field(
        False, description="with data.sampling=dense, move each frame forward by a random part of the step"
    )
    mixup: Alpha = Field(
        0.0, description="alpha of mixup, e.g. 0.8; if cutmix is on too, each batch gets one of the two"
    )
    cutmix: Alpha = Field(0.0, description="alpha of cutmix, e.g. 1.0")

    @model_validator(mode="after")
    def _crop(self) -> Self:
        area = self.random_resized_crop
        if area is not None and not 0 < area[0] <= area[1] <= 1:
            raise self.wrong("random_resized_crop", expectation(type(self).model_fields["random_resized_crop"]))
        return self

    def transforms(self) -> list[v2.Transform]:
        """The transforms of a cropped clip uint8 (T, 3, S, S), in order. They use PyTorch's generator."""
        chosen: list[v2.Transform] = []
        if self.color_jitter:
            chosen.append(v2.ColorJitter(self.color_jitter, self.color_jitter, self.color_jitter))
        if self.rand_augment:
            bilinear = v2.InterpolationMode.BILINEAR
            chosen.append(v2.RandAugment(self.rand_augment, self.rand_augment_magnitude, interpolation=bilinear))
        if self.random_erasing:
            chosen.append(v2.RandomErasing(self.random_erasing, value=_MEAN_COLOUR))
        return chosen


NOTHING = Augment()
