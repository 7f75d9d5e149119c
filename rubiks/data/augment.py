"""What a training clip goes through beside TSM's crop and the flip: settings, checked, and torchvision's transforms."""

from __future__ import annotations

from dataclasses import dataclass

from torchvision.transforms import v2

from rubiks.errors import InputError

# What is erased becomes 0 when it is normalised.
_MEAN_COLOUR = (124.0, 116.0, 104.0)


@dataclass(frozen=True)
class Augment:
    """Augmentation of training clips, all of it off unless set. All frames of a clip go through the same operations.

    Attributes:
        random_resized_crop: least and largest share of a frame's area that a crop takes, in place of the multi-scale
            crop; its aspect ratio is 3/4 to 4/3 (Szegedy et al., 2015). None for the multi-scale crop.
        color_jitter: brightness, contrast and saturation are each multiplied by a factor up to this far from 1.
        rand_augment: operations of RandAugment (Cubuk et al., 2020) that a clip goes through, one after the other.
        rand_augment_magnitude: how far they go, of 30.
        random_erasing: share of the clips of which a box, 2 to 33% of the area, is painted over (Zhong et al., 2020).
        temporal_jitter: with dense sampling, move each frame ahead by a random part of the step (as in mmaction2).
        mixup, cutmix: alpha of the Beta distribution that the share of the other clip is drawn from; 0 for none. They
            mix the clips of a batch, so they are applied to it (`rubiks.training.mixing`).
    """

    random_resized_crop: tuple[float, float] | None = None
    color_jitter: float = 0.0
    rand_augment: int = 0
    rand_augment_magnitude: int = 9
    random_erasing: float = 0.0
    temporal_jitter: bool = False
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        area = self.random_resized_crop
        if area is not None and not (
            isinstance(area, tuple) and len(area) == 2 and all(map(_is_number, area)) and 0 < area[0] <= area[1] <= 1
        ):
            raise _bad("random_resized_crop", "null or two numbers above 0 and at most 1, the smaller first", area)
        for key in ("color_jitter", "random_erasing"):
            value = getattr(self, key)
            if not _is_number(value) or not 0 <= value <= 1:
                raise _bad(key, "a number from 0 to 1", value)
        for key in ("mixup", "cutmix"):
            value = getattr(self, key)
            if not _is_number(value) or not (value == 0 or 1e-3 <= value < float("inf")):
                raise _bad(key, "0 or a number of at least 0.001", value)
        for key, most in (("rand_augment", 100), ("rand_augment_magnitude", 30)):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
                raise _bad(key, f"a whole number from 0 to {most}", value)
        if not isinstance(self.temporal_jitter, bool):
            raise _bad("temporal_jitter", "true or false", self.temporal_jitter)

    def transforms(self) -> list[v2.Transform]:
        """What a cropped clip uint8 (T, 3, S, S) goes through, in order. They draw from PyTorch's generator."""
        chosen: list[v2.Transform] = []
        if self.color_jitter:
            chosen.append(v2.ColorJitter(self.color_jitter, self.color_jitter, self.color_jitter))
        if self.rand_augment:
            bilinear = v2.InterpolationMode.BILINEAR
            chosen.append(v2.RandAugment(self.rand_augment, self.rand_augment_magnitude, interpolation=bilinear))
        if self.random_erasing:
            chosen.append(v2.RandomErasing(self.random_erasing, value=_MEAN_COLOUR))
        return chosen


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _bad(key: str, expected: str, value: object) -> InputError:
    shown = list(value) if isinstance(value, tuple) else value
    return InputError(f"augment.{key} must be {expected}, got {shown!r}")


NOTHING = Augment()
