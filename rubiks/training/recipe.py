"""What a training recipe says, checked."""

from __future__ import annotations

from dataclasses import dataclass

from rubiks.errors import InputError


@dataclass(frozen=True)
class Recipe:
    """A training recipe; `conf/recipe` has one file for each, with its source.

    Attributes:
        epochs: passes over the training list.
        batch_size: videos in a batch of one process.
        accumulate: batches per optimiser step.
        optimizer: sgd (Nesterov off) or adamw.
        lr: learning rate at a total batch of `lr_batch` videos; it is scaled in proportion to the total batch (Goyal et
            al., 2017). The total batch is batch_size * accumulate * processes.
        momentum: of sgd.
        weight_decay: of convolution and linear weights; nothing else decays.
        shift_lr_scale, attention_lr_scale, classifier_lr_scale: learning rates of the shift parameters, the AQ logits
            and the classifier as multiples of lr.
        schedule: constant, step (divided by 10 after each of `milestones`, in epochs) or cosine (to 0).
        warmup_epochs: linear warm-up from 0, in epochs.
        label_smoothing, dropout: regularisation, each in [0, 1).
        clip_grad_norm: largest norm of the gradient of everything but the shifts; 0 for none.
        crop_scales: see `rubiks.data.views.TrainingViews`; not used where `augment.random_resized_crop` is.
    """

    epochs: int
    batch_size: int
    lr: float
    lr_batch: int
    optimizer: str = "sgd"
    accumulate: int = 1
    momentum: float = 0.9
    weight_decay: float = 0.0
    shift_lr_scale: float = 0.01
    attention_lr_scale: float = 1.0
    classifier_lr_scale: float = 1.0
    schedule: str = "step"
    milestones: tuple[float, ...] = ()
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    dropout: float = 0.0
    clip_grad_norm: float = 0.0
    crop_scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66)

    def __post_init__(self) -> None:
        for key, choices in (("optimizer", ("sgd", "adamw")), ("schedule", ("constant", "step", "cosine"))):
            if getattr(self, key) not in choices:
                raise _bad(key, f"one of {', '.join(choices)}", getattr(self, key))
        for key in ("epochs", "batch_size", "lr_batch", "accumulate"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise _bad(key, "a whole number of at least 1", value)
        for key in ("lr", "weight_decay", "shift_lr_scale", "attention_lr_scale", "classifier_lr_scale"):
            self._number(key, 0, float("inf"))
        for key in ("warmup_epochs", "clip_grad_norm"):
            self._number(key, 0, float("inf"))
        for key in ("momentum", "label_smoothing", "dropout"):
            self._number(key, 0, 1)
        if not self.crop_scales or not all(_is_number(scale) and 0 < scale <= 1 for scale in self.crop_scales):
            raise _bad("crop_scales", "a list of numbers above 0 and at most 1", list(self.crop_scales))
        if not all(_is_number(epoch) and epoch > 0 for epoch in self.milestones):
            raise _bad("milestones", "a list of epochs", list(self.milestones))

    def _number(self, key: str, least: float, below: float) -> None:
        value = getattr(self, key)
        if not _is_number(value) or not least <= value < below:
            raise _bad(key, f"a number from {least} to below {below}", value)

    def total_batch(self, processes: int) -> int:
        """Videos per optimiser step."""
        return self.batch_size * self.accumulate * processes

    def scaled_lr(self, processes: int) -> float:
        """The learning rate by the linear scaling rule."""
        return self.lr * self.total_batch(processes) / self.lr_batch


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _bad(key: str, expected: str, value: object) -> InputError:
    return InputError(f"recipe.{key} must be {expected}, got {value!r}")
